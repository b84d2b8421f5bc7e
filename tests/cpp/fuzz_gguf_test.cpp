// Hostile GGUF files: puna::Error with a message fit to show, or a load that computes. Never
// another exception, a crash or a hang.
#include <chrono>
#include <random>

#include "check.h"
#include "engine/model_files.h"
#include "gguf_fixture.h"
#include "model/open_model.h"
#include "model/weight_map.h"
#include "puna/engine.h"
#include "text/unicode_classes.h"

namespace fixture = gguf_fixture;
using puna::ErrorCode;

namespace {

constexpr std::chrono::seconds kTooLong{10};  // only a hang takes as long, sanitized or not
constexpr size_t kLongestMessage = 4096;

class Mutator {
 public:
  explicit Mutator(uint32_t seed) : random_(seed) {}
  size_t below(size_t n) { return random_() % n; }

  std::string mutated(const fixture::File& file) {
    std::string bytes = file.bytes;
    const auto change_fields = [&](size_t count) {
      for (; count > 0; --count) {
        const fixture::Field field = file.fields[below(file.fields.size())];
        uint64_t value = 0;
        std::memcpy(&value, bytes.data() + field.at, field.bytes);
        value = edge(value, bytes.size());
        std::memcpy(bytes.data() + field.at, &value, field.bytes);
      }
    };
    switch (below(8)) {
      case 0:
        for (size_t count = 1 + below(3); count > 0; --count) {
          bytes[below(bytes.size())] = static_cast<char>(random_());
        }
        break;
      case 1:
        for (size_t count = 1 + below(3); count > 0; --count) {
          bytes[below(file.header_bytes)] = static_cast<char>(random_());
        }
        break;
      case 2:
        bytes.resize(below(below(2) ? bytes.size() : file.header_bytes));
        break;
      case 3:
        bytes.erase(below(file.header_bytes), 1 + below(40));
        break;
      case 4: {
        const size_t from = below(file.header_bytes), length = 1 + below(40);
        bytes.insert(below(file.header_bytes), bytes.substr(from, length));
        break;
      }
      case 5: {  // one field's value in the place of another
        const fixture::Field a = file.fields[below(file.fields.size())],
                             b = file.fields[below(file.fields.size())];
        std::memmove(bytes.data() + a.at, bytes.data() + b.at, std::min(a.bytes, b.bytes));
        break;
      }
      default:
        change_fields(1 + below(2));
    }
    return bytes;
  }

 private:
  uint64_t edge(uint64_t value, size_t file_bytes) {
    const uint64_t edges[] = {0,
                              1,
                              2,
                              5,
                              31,
                              value + 1,
                              value - 1,
                              value * 2,
                              value / 2,
                              value + 32,
                              file_bytes,
                              file_bytes - 8,
                              uint64_t{1} << 24,
                              uint64_t{1} << 31,
                              (uint64_t{1} << 32) - 1,
                              uint64_t{1} << 61,
                              (uint64_t{1} << 63) - 1,
                              uint64_t{1} << 63,
                              ~uint64_t{0},
                              ~uint64_t{0} - 31};
    return edges[below(std::size(edges))];
  }

  std::mt19937 random_;
};

template <class Load>
void fuzz(int count, uint32_t seed, const Load& load) {
  count = check::trials(count);
  Mutator mutator(seed);
  int accepted = 0, refused = 0;
  for (int i = 0; i < count; ++i) {
    const auto start = std::chrono::steady_clock::now();
    try {
      load(mutator);
      ++accepted;
    } catch (const puna::Error& error) {
      ++refused;
      const ErrorCode code = error.code();
      CHECK(code == ErrorCode::kModelFormat || code == ErrorCode::kUnsupported ||
            code == ErrorCode::kModelNotFound || code == ErrorCode::kOutOfMemory);
      const std::string message = error.what();
      CHECK(message.size() < kLongestMessage);
      CHECK(puna::is_valid_utf8(message));
      CHECK(std::none_of(message.begin(), message.end(),
                         [](char c) { return static_cast<unsigned char>(c) < 0x20; }));
    }
    CHECK(std::chrono::steady_clock::now() - start < kTooLong);
  }
  // Both must happen, or the mutations are too mild or too wild to test anything.
  CHECK(accepted > count / 100);
  CHECK(refused > count / 100);
  std::printf("accepted %d, refused %d\n", accepted, refused);
}

// Every byte of every tensor must be there to be read.
unsigned touch(const puna::Checkpoint& checkpoint) {
  unsigned sum = 0;
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    const auto* bytes = static_cast<const unsigned char*>(tensor.data);
    for (size_t i = 0; i < static_cast<size_t>(tensor.bytes()); ++i) sum += bytes[i];
  }
  return sum;
}

void use(const std::string& path, const std::string& mmproj) {
  puna::LoadOptions options;
  options.path = path;
  options.mmproj = mmproj;
  options.threads = 1;
  options.memory = int64_t{64} << 20;
  const std::shared_ptr<puna::Engine> engine = puna::Engine::load(options);
  const auto length = static_cast<size_t>(std::min<int64_t>(6, engine->info().context));
  puna::Prompt prompt;
  for (size_t i = 0; i < length; ++i) {
    prompt.tokens.push_back(
        static_cast<int32_t>(i % static_cast<size_t>(engine->info().vocab_size)));
  }
  CHECK_EQ(engine->outputs(puna::ModelOutput::kLogits, prompt, {}).size(),
           length * static_cast<size_t>(engine->info().vocab_size));
  if (const puna::Tokenizer* tokenizer = engine->tokenizer()) {
    const std::string text = "the world's 123\n\n <|eot|>";
    CHECK(tokenizer->decode(tokenizer->encode(text, {.special = puna::AllowedSpecial::every()})) ==
          text);
  }
}

void open_and_use(const std::string& path, const std::string& mmproj) {
  const puna::OpenedModel model = puna::open_model(path, mmproj);
  touch(*model.checkpoint);
  puna::read_gguf_chat(path);
  use(path, mmproj);
}

}  // namespace

TEST(unchanged_file_is_accepted) {
  const fixture::Folder folder("puna-fuzz-gguf-good-");
  const std::string path = folder.write("model.gguf", fixture::model().file().bytes);
  open_and_use(path, folder.write("tower.gguf", fixture::projector().file().bytes));
}

TEST(mutated_model) {
  const fixture::Folder folder("puna-fuzz-gguf-model-");
  const fixture::File good = fixture::model().file();
  fuzz(8000, 11, [&](Mutator& mutator) {
    open_and_use(folder.write("model.gguf", mutator.mutated(good)), "");
  });
}

TEST(mutated_vision_tower) {
  const fixture::Folder folder("puna-fuzz-gguf-tower-");
  const std::string path = folder.write("model.gguf", fixture::model().file().bytes);
  const fixture::File good = fixture::projector().file();
  fuzz(3000, 12, [&](Mutator& mutator) {
    open_and_use(path, folder.write("tower.gguf", mutator.mutated(good)));
  });
}
