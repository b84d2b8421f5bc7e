// Hostile checkpoints: puna::Error with a message fit to show, or a correct load. Never another
// exception, a crash or a hang; the sanitized build of these tests shows what only looks right.
#include <chrono>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "check.h"
#include "checkpoint_fixture.h"
#include "engine/quantize.h"
#include "io/safetensors.h"
#include "json_mutation.h"
#include "model/parameters.h"
#include "puna/engine.h"
#include "text/pretokenizer.h"
#include "text/tokenizer.h"
#include "text/unicode_classes.h"
#include "tokenizer_fixture.h"

namespace fixture = checkpoint_fixture;
using json_mutation::Mutator;
using puna::ErrorCode;

namespace {

// No input is larger than a few hundred kilobytes; only a hang takes this long, sanitized or not.
constexpr std::chrono::seconds kTooLong{10};
constexpr size_t kLongestMessage = 4096;

struct Tally {
  int accepted = 0, refused = 0;
};

// Runs `load` on `count` inputs; what it throws must be an Error that blames the file.
template <class Load>
Tally fuzz(int count, uint32_t seed, const Load& load) {
  count = check::trials(count);
  Mutator mutator(seed);
  Tally tally;
  for (int i = 0; i < count; ++i) {
    const auto start = std::chrono::steady_clock::now();
    try {
      load(mutator);
      ++tally.accepted;
    } catch (const puna::Error& error) {
      ++tally.refused;
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
  CHECK(tally.accepted > count / 100);
  CHECK(tally.refused > count / 100);
  std::printf("accepted %d, refused %d\n", tally.accepted, tally.refused);
  return tally;
}

// Every byte of every tensor must be there to be read.
unsigned touch(const std::map<std::string, puna::TensorRef>& tensors) {
  unsigned sum = 0;
  for (const auto& [name, tensor] : tensors) {
    const auto* bytes = static_cast<const unsigned char*>(tensor.data);
    for (size_t i = 0; i < tensor.bytes(); ++i) sum += bytes[i];
  }
  return sum;
}

// What was accepted must run: load it, compute, and find numbers of the right count.
void use(const std::string& directory) {
  puna::LoadOptions options;
  options.path = directory;
  options.threads = 1;
  options.memory = int64_t{64} << 20;
  const std::shared_ptr<puna::Engine> engine = puna::Engine::load(options);
  const std::vector<int32_t> tokens = {1, 2, 3, 4, 5, 6};
  const auto length = static_cast<size_t>(std::min<int64_t>(6, engine->info().context));
  const std::vector<float> logits = engine->outputs(
      puna::ModelOutput::kLogits,
      {{tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(length)}, {}}, {});
  CHECK_EQ(logits.size(), length * static_cast<size_t>(engine->info().vocab_size));
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

TEST(mutated_safetensors_files) {
  const fixture::Directory directory("puna-fuzz-safetensors");
  const fixture::Parts as_floats = fixture::parts(fixture::tensors());
  const fixture::Parts as_float8 = fixture::parts(fixture::tensors(), fixture::Stored::kFloat8);
  directory.write("config.json", fixture::kConfig);
  directory.write("model.safetensors", fixture::joined(as_float8));
  use(directory.path());
  const puna::ModelSpec spec = puna::read_model_spec(directory.path());
  fuzz(5000, 1, [&](Mutator& mutator) {
    fixture::Parts parts = mutator.below(2) ? as_floats : as_float8;
    std::string file;
    switch (mutator.below(10)) {
      case 0: {  // bytes anywhere
        file = fixture::joined(parts);
        for (size_t left = 1 + mutator.below(3); left > 0; --left) {
          file[mutator.below(file.size())] = static_cast<char>(mutator.below(256));
        }
        break;
      }
      case 1:  // truncated, in the header more often than not
        file = fixture::joined(parts);
        file.resize(mutator.below(mutator.below(2) ? file.size() : parts.header.size()));
        break;
      case 2: {  // another length
        file = fixture::joined(parts);
        const uint64_t lengths[] = {0,
                                    1,
                                    parts.header.size() - 1,
                                    parts.header.size() + 8,
                                    file.size() - 8,
                                    file.size() - 7,
                                    file.size(),
                                    99'999'999,
                                    100'000'001,
                                    uint64_t{1} << 32,
                                    ~uint64_t{0},
                                    ~uint64_t{0} - 7};
        file.replace(0, 8, fixture::length_bytes(lengths[mutator.below(std::size(lengths))]));
        break;
      }
      case 3:  // more or less data than the header tells of
        if (mutator.below(2)) {
          parts.data.resize(mutator.below(parts.data.size()));
        } else {
          parts.data.append(1 + mutator.below(100), 'x');
        }
        file = fixture::joined(parts);
        break;
      default:
        parts.header = mutator.mutated(parts.header);
        file = fixture::joined(parts);
    }
    directory.write("model.safetensors", file);
    const puna::Checkpoint checkpoint(directory.path());
    touch(checkpoint.tensors());
    const puna::ModelWeights weights = puna::resolve_weights(spec, checkpoint);
    CHECK(puna::packed_bytes_of(spec, weights, puna::QuantRecipe()).text_source > 0);
  });
}

TEST(mutated_index) {
  const fixture::Directory directory("puna-fuzz-index");
  directory.write("config.json", fixture::kConfig);
  const puna::ModelSpec spec = puna::read_model_spec(directory.path());
  const std::string good = fixture::write_shards(directory);
  fuzz(2500, 2, [&](Mutator& mutator) {
    directory.write("model.safetensors.index.json", mutator.mutated(good));
    const puna::Checkpoint checkpoint(directory.path());
    touch(checkpoint.tensors());
    puna::resolve_weights(spec, checkpoint);
  });
}

TEST(mutated_config) {
  const fixture::Directory directory("puna-fuzz-config");
  directory.write("model.safetensors", fixture::joined(fixture::parts(fixture::tensors())));
  directory.write("config.json", fixture::kConfig);
  use(directory.path());
  fuzz(4000, 3, [&](Mutator& mutator) {
    directory.write("config.json", mutator.mutated(fixture::kConfig));
    const puna::ModelSpec spec = puna::read_model_spec(directory.path());
    CHECK(puna::count_parameters(spec).total > 0);
    for (const double f : puna::inverse_frequencies(spec.rope, spec.head_dim)) {
      CHECK(std::isfinite(f) && f >= 0);
    }
    CHECK(std::isfinite(puna::attention_temperature(spec.max_position, spec.temperature_floor,
                                                    spec.temperature_scale)));
    use(directory.path());
  });
}

// puna's packed form: its metadata are JSON within the JSON of the header.
TEST(mutated_packed_form) {
  const fixture::Directory source("puna-fuzz-source"), directory("puna-fuzz-packed");
  source.write("model.safetensors", fixture::joined(fixture::parts(fixture::tensors())));
  source.write("config.json", fixture::kConfig);
  puna::QuantizeOptions options;
  options.path = source.path();
  options.out = directory.path();
  options.quant = "int4";
  options.threads = 1;
  puna::quantize(options);
  use(directory.path());

  const std::string whole = read_file(directory.file("model.safetensors"));
  uint64_t length = 0;
  std::memcpy(&length, whole.data(), sizeof(length));
  const std::string data = whole.substr(8 + length);
  const auto header = nlohmann::json::parse(whole.substr(8, length));
  const auto form = header["__metadata__"]["puna"].get<std::string>();
  constexpr size_t kAlignment = 4096;
  fuzz(2000, 7, [&](Mutator& mutator) {
    std::string text;
    std::string config = fixture::kConfig;
    switch (mutator.below(4)) {
      case 0:
        text = mutator.mutated(header.dump());
        break;
      case 1:
        text = header.dump();
        config = mutator.mutated(config);
        break;
      default: {
        nlohmann::json changed = header;
        changed["__metadata__"]["puna"] = mutator.mutated(form);
        text = changed.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
      }
    }
    text.resize((8 + text.size() + kAlignment - 1) / kAlignment * kAlignment - 8, ' ');
    directory.write("model.safetensors", fixture::length_bytes(text.size()) + text + data);
    directory.write("config.json", config);
    use(directory.path());
  });
}

TEST(mutated_generation_config) {
  fuzz(2000, 4, [&](Mutator& mutator) {
    const puna::ModelSpec spec =
        puna::parse_model_spec(fixture::kConfig, mutator.mutated(fixture::kGeneration));
    for (const int32_t id : spec.eos_tokens) CHECK(id >= 0 && id < spec.vocab_size);
    CHECK(spec.bos_token >= -1 && spec.bos_token < spec.vocab_size);
    const double temperature = spec.generation.temperature.value_or(1);
    CHECK(temperature >= 0 && temperature <= 100);
    const double top_p = spec.generation.top_p.value_or(1);
    CHECK(top_p > 0 && top_p <= 1);
  });
}

TEST(mutated_tokenizer_files) {
  const std::string json = tokenizer_fixture::json(puna::kPretokenizerPattern);
  const std::string ranks = tokenizer_fixture::ranks(), config = tokenizer_fixture::config();
  const auto use_tokenizer = [](const puna::Tokenizer& tokenizer) {
    const std::string text = "the world's 123\n\n € 😀 <|eot|>";
    CHECK(tokenizer.decode(tokenizer.encode(text, {.special = puna::AllowedSpecial::every()})) ==
          text);
  };
  fuzz(1500, 5,
       [&](Mutator& mutator) { use_tokenizer(puna::Tokenizer::from_json(mutator.mutated(json))); });
  fuzz(1000, 6, [&](Mutator& mutator) {
    use_tokenizer(puna::Tokenizer::from_ranks(ranks, mutator.mutated(config)));
  });
}

// Whole documents of depth alone, of all kinds of brackets, closed or not.
TEST(depth_bombs) {
  for (const size_t depth : {65u, 1000u, 1'000'000u}) {
    for (const std::string& open :
         {std::string("["), std::string("{\"a\":"), std::string("[{\"a\":")}) {
      std::string text;
      for (size_t i = 0; i < depth; ++i) text += open;
      CHECK_THROWS(ErrorCode::kModelFormat, puna::parse_model_spec(text));
      CHECK_THROWS(ErrorCode::kModelFormat, puna::parse_model_spec(fixture::kConfig, text));
      CHECK_THROWS(ErrorCode::kModelFormat, puna::Tokenizer::from_json(text));
    }
  }
}
