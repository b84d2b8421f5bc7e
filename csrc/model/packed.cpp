#include "model/packed.h"

#include <algorithm>
#include <set>

#include "base/error.h"
#include "io/json_file.h"
#include "io/message.h"
#include "io/safetensors_writer.h"

namespace puna {
namespace {

// The key of the file's metadata whose value is {"version": 2, "matrices": {name: {"format",
// "rows", "cols"}}, "vectors": {name: size}}, and "embedding": TYPE where the token embedding is of
// one of GGUF's blocked types, which safetensors has not: its bytes are there as they were.
constexpr const char* kMetadataKey = "puna";
constexpr int64_t kVersion = 2;
// Version 1 differs in the small numbers of blocks alone, which had a byte each.
constexpr int64_t kOldestVersion = 1;

bool is_of_version_1(WeightFormat format) {
  return !is_quantized(format) ||
         with_traits(format, [](auto traits) { return decltype(traits)::kSubBits % 8 == 0; });
}
constexpr const char* kEmbedding = "embed_tokens";
// Every matrix and vector begins at a page, so that an expert can be read or dropped on its own.
constexpr int64_t kPage = 4096;

int64_t whole_pages(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// A matrix in several pieces: the second is NAME.1, and so on.
std::string piece_name(const std::string& name, size_t piece) {
  return piece == 0 ? name : name + "." + std::to_string(piece);
}

template <class... Parts>
[[noreturn]] void bad(const Checkpoint& checkpoint, const Parts&... parts) {
  fail(ErrorCode::kModelFormat, "[packed] ", checkpoint.path(), ": ", parts...);
}

int64_t whole_number(const Checkpoint& checkpoint, const std::string& name,
                     const nlohmann::json& value) {
  // Far above any matrix, and small enough that bytes cannot overflow.
  constexpr int64_t kMost = int64_t{1} << 30;
  if (!value.is_number_unsigned() || value.get<uint64_t>() < 1 ||
      value.get<uint64_t>() > static_cast<uint64_t>(kMost))
    bad(checkpoint, "the size of ", printable(name), " is ", printable(value.dump()),
        ", expected a whole number from 1 to ", kMost);
  return value.get<int64_t>();
}

// What a model is made of, in order, without its data.
class PlanningLoader : public MeasuringLoader {
 public:
  explicit PlanningLoader(const QuantRecipe& recipe) : MeasuringLoader(recipe) {}

  std::vector<WeightRef> matrices(const std::string& name, std::span<const MatrixSource> parts,
                                  bool split) override {
    std::vector<WeightRef> weights = MeasuringLoader::matrices(name, parts, split);
    for (size_t i = 0; i < weights.size(); ++i) {
      const WeightRef& weight = weights[i];
      const std::string piece = piece_name(name, i);
      matrices_[piece] = {
          {"format", name_of(weight.format)}, {"rows", weight.rows}, {"cols", weight.cols}};
      entries_.push_back({piece, DType::kU8, {whole_pages(static_cast<int64_t>(weight.bytes))}});
    }
    return weights;
  }

  VectorRef vector(const std::string& name, std::span<const TensorRef> parts) override {
    int64_t size = 0;
    for (const TensorRef& part : parts) size += part.elements();
    vectors_[name] = size;
    entries_.push_back(
        {name, DType::kF32, {whole_pages(size * 4) / static_cast<int64_t>(sizeof(float))}});
    return {};
  }

  std::vector<SafetensorsWriter::Entry> entries_;
  nlohmann::json matrices_ = nlohmann::json::object(), vectors_ = nlohmann::json::object();
};

// Packs as PackingLoader does, and writes instead of keeping.
class WritingLoader : public PackingLoader {
 public:
  WritingLoader(Backend& backend, const QuantRecipe& recipe, const Checkpoint& source,
                PackProgress progress, const Importance& importance, SafetensorsWriter& writer)
      : PackingLoader(backend, recipe, &source, std::move(progress), &importance),
        writer_(writer) {}

  std::vector<WeightRef> matrices(const std::string& name, std::span<const MatrixSource> parts,
                                  bool split) override {
    std::vector<WeightRef> weights = PackingLoader::matrices(name, parts, split);
    for (size_t i = 0; i < weights.size(); ++i) {
      writer_.write(piece_name(name, i), weights[i].data.get(), weights[i].bytes);
      weights[i].data = nullptr;
    }
    return weights;
  }

  VectorRef vector(const std::string& name, std::span<const TensorRef> parts) override {
    const VectorRef vector = PackingLoader::vector(name, parts);
    writer_.write(name, vector.get(), static_cast<size_t>(vector.size) * sizeof(float));
    return {};
  }

 private:
  SafetensorsWriter& writer_;
};

void load_all(const ModelSpec& spec, const ModelWeights& weights, WeightLoader& loader) {
  load_text(spec, weights.text, loader);
  if (weights.vision) load_vision(*weights.vision, loader);
}

}  // namespace

bool is_packed(const Checkpoint& checkpoint) {
  return checkpoint.metadata().contains(kMetadataKey);
}

AdoptingLoader::AdoptingLoader(const Checkpoint& checkpoint) : checkpoint_(checkpoint) {
  const nlohmann::json form = parse_json(checkpoint.metadata().at(kMetadataKey),
                                         checkpoint.path() + " (metadata of the packed form)");
  const auto part = [&](const char* key) -> const nlohmann::json& {
    if (!form.is_object() || !form.contains(key)) bad(checkpoint, "the metadata have no ", key);
    return form[key];
  };
  const auto bad_version = [&](const auto&... where) {
    fail(ErrorCode::kUnsupported, "[packed] ", checkpoint.path(), ": the packed form is of ",
         "version ", printable(part("version").dump()), where..., ", this puna reads version ",
         kVersion, "; quantise the checkpoint again");
  };
  if (!part("version").is_number_integer() || part("version") < kOldestVersion ||
      part("version") > kVersion)
    bad_version();
  const auto place = [&](const std::string& name, DType dtype, int64_t bytes) -> const void* {
    const auto found = checkpoint.tensors().find(name);
    if (found == checkpoint.tensors().end())
      bad(checkpoint, "there is no tensor ", printable(name));
    const TensorRef& tensor = found->second;
    if (tensor.dtype != dtype || static_cast<int64_t>(tensor.bytes()) < bytes ||
        reinterpret_cast<uintptr_t>(tensor.data) % kPage != 0)
      bad(checkpoint, printable(name), " is ", name_of(tensor.dtype), " ", tensor.shape_string(),
          ", expected ", bytes, " bytes of ", name_of(dtype), " at a multiple of ", kPage);
    return tensor.data;
  };
  if (!part("matrices").is_object() || !part("vectors").is_object())
    bad(checkpoint, "the metadata list no matrices or vectors");
  for (const auto& [name, entry] : part("matrices").items()) {
    if (!entry.is_object() || !entry.contains("format") || !entry["format"].is_string() ||
        !entry.contains("rows") || !entry.contains("cols"))
      bad(checkpoint, "the entry of ", printable(name), " needs a format, rows and cols");
    const auto text = entry["format"].get<std::string>();
    const std::optional<WeightFormat> format = format_of(text);
    if (!format)
      fail(ErrorCode::kUnsupported, "[packed] ", checkpoint.path(), ": ", printable(name),
           " has the weight format ", printable(text), ", which this version does not know");
    if (part("version") < kVersion && !is_of_version_1(*format))
      bad_version(" and ", printable(name), " of ", text);
    Matrix found{*format, whole_number(checkpoint, name, entry["rows"]),
                 whole_number(checkpoint, name, entry["cols"]), nullptr};
    const auto bytes = static_cast<int64_t>(packed_bytes(found.format, found.rows, found.cols));
    found.data = place(name, DType::kU8, bytes);
    (name.starts_with("vision.") ? vision_bytes_ : text_bytes_) += bytes;
    add_expert(experts_, name, found.format, bytes);
    matrices_.emplace(name, found);
  }
  if (form.contains("embedding")) {
    const nlohmann::json& type = form["embedding"];
    if (type.is_string()) embedding_type_ = blocked_type(type.get<std::string>());
    if (!embedding_type_)
      fail(ErrorCode::kUnsupported, "[packed] ", checkpoint.path(), ": the token embedding has ",
           "the type ", printable(type.dump()), ", which this version does not know");
  }
  for (const auto& [name, size] : part("vectors").items()) {
    Vector found{whole_number(checkpoint, name, size), nullptr};
    found.data = place(name, DType::kF32, found.size * static_cast<int64_t>(sizeof(float)));
    vectors_.emplace(name, found);
  }
}

TensorRef AdoptingLoader::embedding(const ModelSpec& spec) const {
  const auto found = checkpoint_.tensors().find(kEmbedding);
  if (found == checkpoint_.tensors().end()) bad(checkpoint_, "there is no ", kEmbedding);
  if (!embedding_type_) return found->second;
  const TensorRef table{*embedding_type_, 2, {spec.vocab_size, spec.hidden}, found->second.data};
  if (spec.hidden % info_of(table.dtype).block_elements != 0 || found->second.dtype != DType::kU8 ||
      found->second.bytes() != table.bytes())
    bad(checkpoint_, kEmbedding, " is ", name_of(found->second.dtype), " ",
        found->second.shape_string(), ", expected the bytes of ", name_of(table.dtype), " (",
        spec.vocab_size, ", ", spec.hidden, ")");
  return table;
}

template <class Entry>
const Entry& AdoptingLoader::find(const std::map<std::string, Entry>& entries,
                                  const std::string& name) const {
  const auto found = entries.find(name);
  if (found == entries.end())
    bad(checkpoint_, "there is no ", printable(name), "; config.json is of another model");
  return found->second;
}

std::vector<const AdoptingLoader::Matrix*> AdoptingLoader::pieces_of(
    const std::string& name, std::span<const MatrixSource> parts, bool split) const {
  int64_t rows = 0, found_rows = 0;
  for (const MatrixSource& part : parts) rows += part.rows;
  std::vector<const Matrix*> pieces;
  while (pieces.empty() || (split && found_rows < rows)) {
    const Matrix& entry = find(matrices_, piece_name(name, pieces.size()));
    if (entry.cols != parts[0].cols) {
      found_rows = -1;
      break;
    }
    pieces.push_back(&entry);
    found_rows += entry.rows;
  }
  if (found_rows != rows)
    bad(checkpoint_, printable(name), " is not the matrix of ", rows, " rows and ", parts[0].cols,
        " columns that config.json asks for");
  return pieces;
}

const AdoptingLoader::Vector& AdoptingLoader::vector_of(const std::string& name,
                                                        std::span<const TensorRef> parts) const {
  int64_t size = 0;
  for (const TensorRef& part : parts) size += part.elements();
  const Vector& entry = find(vectors_, name);
  if (entry.size != size)
    bad(checkpoint_, printable(name), " has ", entry.size, " elements, config.json asks for ",
        size);
  return entry;
}

std::vector<WeightRef> AdoptingLoader::matrices(const std::string& name,
                                                std::span<const MatrixSource> parts, bool split) {
  std::vector<WeightRef> weights;
  for (const Matrix* piece : pieces_of(name, parts, split)) {
    weights.push_back(place_of(*backend_).adopt_matrix(
        piece->format, piece->rows, piece->cols, {std::shared_ptr<const void>(), piece->data}));
    bytes_ += static_cast<int64_t>(weights.back().bytes);
  }
  return weights;
}

VectorRef AdoptingLoader::vector(const std::string& name, std::span<const TensorRef> parts) {
  const Vector& entry = vector_of(name, parts);
  const TensorRef part{DType::kF32, 1, {entry.size}, entry.data};
  return backend_->load_vector({&part, 1});
}

// Adopts nothing: looks whether what is asked for is there, and nothing else.
class AdoptingLoader::Comparison : public WeightLoader {
 public:
  explicit Comparison(const AdoptingLoader& held) : held_(held) {}

  std::vector<WeightRef> matrices(const std::string& name, std::span<const MatrixSource> parts,
                                  bool split) override {
    std::vector<WeightRef> weights;
    for (const Matrix* piece : held_.pieces_of(name, parts, split)) {
      names_.insert(piece_name(name, weights.size()));
      weights.push_back({piece->format, piece->rows, piece->cols, 0, nullptr});
    }
    return weights;
  }
  VectorRef vector(const std::string& name, std::span<const TensorRef> parts) override {
    held_.vector_of(name, parts);
    names_.insert(name);
    return {};
  }
  void refuse_others() const {
    const auto refuse_other = [&](const auto& entries) {
      for (const auto& [name, entry] : entries)
        if (!names_.contains(name))
          bad(held_.checkpoint_, "it holds ", printable(name),
              ", which config.json does not ask for; it is of another model");
    };
    refuse_other(held_.matrices_);
    refuse_other(held_.vectors_);
  }

 private:
  const AdoptingLoader& held_;
  std::set<std::string> names_;
};

ModelWeights AdoptingLoader::weights(const ModelSpec& spec) const {
  ModelWeights weights;
  for (const ExpectedTensor& tensor : expected_tensors(spec, usual_prefixes(spec), weights)) {
    tensor.place->dtype = DType::kBF16;
    tensor.place->rank = static_cast<int>(tensor.shape.size());
    std::copy(tensor.shape.begin(), tensor.shape.end(), tensor.place->shape.begin());
  }
  const TensorRef table = embedding(spec);
  if (table.rank != 2 || table.shape[0] != spec.vocab_size || table.shape[1] != spec.hidden ||
      (table.dtype != DType::kF32 && table.dtype != DType::kF16 && table.dtype != DType::kBF16 &&
       !is_blocked(table.dtype)))
    bad(checkpoint_, kEmbedding, " is ", name_of(table.dtype), " ", table.shape_string(),
        ", expected floats (", spec.vocab_size, ", ", spec.hidden, ")");
  if (spec.tied_embeddings) weights.text.lm_head = weights.text.embed;
  weights.text.embed = table;
  Comparison comparison(*this);
  load_all(spec, weights, comparison);
  comparison.refuse_others();
  return weights;
}

void write_packed(const ModelSpec& spec, const Checkpoint& source, const ModelWeights& weights,
                  const QuantRecipe& recipe, Backend& backend, const std::string& path,
                  const std::function<Importance()>& calibrate,
                  const std::function<void(int64_t, int64_t)>& progress) {
  PlanningLoader plan(recipe);
  load_all(spec, weights, plan);
  recipe.require_matches(plan.names());
  const TensorRef& table = weights.text.embed;
  nlohmann::json form = {
      {"version", kVersion}, {"matrices", plan.matrices_}, {"vectors", plan.vectors_}};
  if (is_blocked(table.dtype)) {
    form["embedding"] = name_of(table.dtype);
    plan.entries_.push_back({kEmbedding, DType::kU8, {static_cast<int64_t>(table.bytes())}});
  } else {
    plan.entries_.push_back({kEmbedding, table.dtype, {table.shape[0], table.shape[1]}});
  }
  SafetensorsWriter writer(path, plan.entries_, {{kMetadataKey, form.dump()}}, kPage);
  const Importance importance = calibrate();
  const int64_t total = plan.source_bytes();
  WritingLoader loader(
      backend, recipe, source,
      [&](int64_t done) {
        if (progress) progress(done, total);
      },
      importance, writer);
  load_all(spec, weights, loader);
  writer.write(kEmbedding, table.data, table.bytes());
  writer.finish();
}

}  // namespace puna
