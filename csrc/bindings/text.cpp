// Tokenizer, StreamEncoder and StreamDecoder as Python sees them.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <algorithm>
#include <filesystem>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "bindings/module.h"
#include "engine/model_files.h"
#include "puna/error.h"
#include "text/stream_decoder.h"
#include "text/stream_encoder.h"
#include "text/tokenizer.h"
#include "text/unicode_classes.h"
#include "text/wide_text.h"

namespace py = pybind11;

namespace puna::bindings {

namespace {

using namespace py::literals;  // NOLINT

// "none", "all", or a collection of names, which must exist.
AllowedSpecial allowed_of(const Tokenizer& tokenizer, const py::object& allowed) {
  if (py::isinstance<py::str>(allowed)) {
    const auto word = allowed.cast<std::string>();
    if (word == "none") return AllowedSpecial::none();
    if (word == "all") return AllowedSpecial::every();
    fail(ErrorCode::kInvalidRequest, "[tokenizer] allowed_special is \"", word,
         "\"; it must be \"none\", \"all\" or a set of special tokens");
  }
  AllowedSpecial names;
  if (!py::isinstance<py::iterable>(allowed))
    throw py::type_error("allowed_special must be \"none\", \"all\" or a set of special tokens");
  for (const py::handle& name : allowed) {
    if (!py::isinstance<py::str>(name))
      throw py::type_error("allowed_special holds names (str), not " +
                           py::str(py::type::of(name).attr("__name__")).cast<std::string>());
    const auto text = name.attr("encode")("utf-8", "replace").cast<std::string>();
    if (!tokenizer.special_tokens().contains(text)) {
      fail(ErrorCode::kInvalidRequest, "[tokenizer] ", text,
           " is no special token of this tokenizer");
    }
    names.names.insert(text);
  }
  return names;
}

EncodeOptions options_of(const Tokenizer& tokenizer, const py::object& allowed_special,
                         const std::string& cut, std::optional<int> threads) {
  if (cut != "none" && cut != "meta") {
    fail(ErrorCode::kInvalidRequest, "[tokenizer] cut is \"", cut,
         "\"; it must be \"none\" or \"meta\"");
  }
  if (threads && *threads < 1) {
    fail(ErrorCode::kInvalidRequest, "[tokenizer] threads is ", *threads,
         "; it must be at least 1");
  }
  EncodeOptions options;
  options.special = allowed_of(tokenizer, allowed_special);
  options.cut = cut == "meta" ? Cut::kMeta : Cut::kNone;
  options.threads = threads.value_or(0);
  return options;
}

// A str or bytes, which lives as long as this.
class Text {
 public:
  explicit Text(const py::handle& text) : owner_(py::reinterpret_borrow<py::object>(text)) {
    if (!PyUnicode_Check(text.ptr()) && !PyBytes_Check(text.ptr())) {
      throw py::type_error("a text is str or bytes, not " +
                           py::str(py::type::of(text).attr("__name__")).cast<std::string>());
    }
    is_wide_ = PyUnicode_Check(text.ptr()) && !PyUnicode_IS_COMPACT_ASCII(text.ptr());
    is_valid_utf8_ = PyUnicode_Check(text.ptr());
  }
  // Those of an ASCII str are its own, of another one they are made. UnicodeEncodeError: half of a
  // surrogate pair.
  std::string_view bytes() {
    if (is_wide_) {
      owner_ = py::reinterpret_steal<py::object>(PyUnicode_AsUTF8String(owner_.ptr()));
      if (!owner_) throw py::error_already_set();
      is_wide_ = false;
    }
    PyObject* object = owner_.ptr();
    if (PyBytes_Check(object)) {
      return {PyBytes_AS_STRING(object), static_cast<size_t>(PyBytes_GET_SIZE(object))};
    }
    return {static_cast<const char*>(PyUnicode_DATA(object)),
            static_cast<size_t>(PyUnicode_GET_LENGTH(object))};
  }
  bool is_valid_utf8() const { return is_valid_utf8_; }
  // In bytes, or in characters if it is a str.
  size_t length() const {
    return static_cast<size_t>(is_valid_utf8_ && !PyBytes_Check(owner_.ptr())
                                   ? PyUnicode_GET_LENGTH(owner_.ptr())
                                   : PyBytes_GET_SIZE(owner_.ptr()));
  }

  void encode(const Tokenizer& tokenizer, EncodeOptions options, IdBuffer& ids) {
    if (is_wide_) {
      PyObject* object = owner_.ptr();
      const WideText wide(PyUnicode_DATA(object), length(), PyUnicode_KIND(object));
      const py::gil_scoped_release release;
      if (tokenizer.encode(wide, options, ids)) return;
    }
    const std::string_view utf8 = bytes();  // throws if the text was refused
    options.is_valid_utf8 = is_valid_utf8_;
    const py::gil_scoped_release release;
    tokenizer.encode(utf8, options, ids);
  }

 private:
  py::object owner_;
  bool is_wide_, is_valid_utf8_;
};

using TokenIds = py::array_t<uint32_t>;

// The memory of a longer list becomes its array's; so few ids are cheaper to copy.
constexpr size_t kCopiedIds = 4096;

TokenIds array_of(IdBuffer ids) {
  const auto count = static_cast<py::ssize_t>(ids.size());
  if (ids.size() <= kCopiedIds) {
    TokenIds array(count);
    std::copy_n(ids.ids().data(), ids.size(), array.mutable_data());
    return array;
  }
  auto owner = std::make_unique<IdBuffer::Owner>(ids.release());
  auto* const memory = reinterpret_cast<uint32_t*>(owner->get());
  const py::capsule capsule(owner.get(),
                            [](void* pointer) { delete static_cast<IdBuffer::Owner*>(pointer); });
  static_cast<void>(owner.release());  // the capsule's
  return TokenIds(count, memory, capsule);
}

py::object encode(const Tokenizer& tokenizer, const py::object& text,
                  const py::object& allowed_special, const std::string& cut,
                  std::optional<int> threads) {
  EncodeOptions options = options_of(tokenizer, allowed_special, cut, threads);
  if (!py::isinstance<py::list>(text) && !py::isinstance<py::tuple>(text)) {
    Text one(text);
    IdBuffer ids(IdBuffer::kKeep, one.length());
    one.encode(tokenizer, options, ids);
    return array_of(std::move(ids));
  }
  std::vector<Text> texts;
  std::vector<std::string_view> views;
  options.is_valid_utf8 = true;
  for (const py::handle& one : text) {
    texts.emplace_back(one);
    views.push_back(texts.back().bytes());
    options.is_valid_utf8 &= texts.back().is_valid_utf8();
  }
  std::vector<IdBuffer> all;
  {
    const py::gil_scoped_release release;
    all = tokenizer.encode_all(views, options);
  }
  py::list arrays;
  for (IdBuffer& ids : all) arrays.append(array_of(std::move(ids)));
  return arrays;
}

size_t count(const Tokenizer& tokenizer, const py::object& text, const py::object& allowed_special,
             const std::string& cut, std::optional<int> threads) {
  IdBuffer ids(IdBuffer::kCount);
  Text(text).encode(tokenizer, options_of(tokenizer, allowed_special, cut, threads), ids);
  return ids.size();
}

py::object made(PyObject* object) {
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

// Ids out of an array or a sequence of numbers; one that is none becomes -1, which is no token.
class IdList {
 public:
  explicit IdList(const py::object& ids) {
    if (py::isinstance<TokenIds>(ids)) {
      // A copy, in order: an array may have strides, and others may write to it without the GIL.
      const auto array = py::array_t<uint32_t, py::array::c_style>::ensure(ids);
      if (!array) throw py::error_already_set();
      const auto* const first = reinterpret_cast<const int32_t*>(array.data());
      ids_.assign(first, first + array.size());
      return;
    }
    const auto narrow = [&](int64_t id) {
      ids_.push_back(id < 0 || id > std::numeric_limits<int32_t>::max() ? -1
                                                                        : static_cast<int32_t>(id));
    };
    if (PyList_CheckExact(ids.ptr()) || PyTuple_CheckExact(ids.ptr())) {
      const Py_ssize_t size = PySequence_Fast_GET_SIZE(ids.ptr());
      PyObject** items = PySequence_Fast_ITEMS(ids.ptr());
      ids_.reserve(static_cast<size_t>(size));
      for (Py_ssize_t i = 0; i < size; ++i) {
        int overflow = 0;
        const long long id = PyLong_AsLongLongAndOverflow(items[i], &overflow);
        if (id == -1 && PyErr_Occurred()) throw py::error_already_set();
        narrow(overflow ? -1 : id);
      }
    } else {
      for (const py::handle& id : ids) {
        const py::object number = made(PyNumber_Index(id.ptr()));  // TypeError: it is none
        int overflow = 0;
        const long long value = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
        narrow(overflow ? -1 : value);
      }
    }
  }
  std::span<const int32_t> view() const { return ids_; }

 private:
  std::vector<int32_t> ids_;
};

py::str text_of(std::string_view bytes) {
  PyObject* text =
      PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "replace");
  if (!text) throw py::error_already_set();
  return py::reinterpret_steal<py::str>(text);
}

Tokenizer::DecodedSize decoded_size(const Tokenizer& tokenizer, const IdList& ids,
                                    bool skip_special) {
  const py::gil_scoped_release release;
  return tokenizer.decoded_size(ids.view(), skip_special);
}

py::object decode_bytes(const Tokenizer& tokenizer, const py::object& ids, bool skip_special) {
  const IdList list(ids);
  const size_t size = decoded_size(tokenizer, list, skip_special).bytes;
  py::object bytes = made(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size)));
  char* const memory = PyBytes_AS_STRING(bytes.ptr());
  const py::gil_scoped_release release;
  tokenizer.decode_into(list.view(), skip_special, {memory, size});
  return bytes;
}

// The str is made in the width of its widest character, which Python's own decoder finds out on the
// way only, copying what it has for each wider one.
py::object decode(const Tokenizer& tokenizer, const py::object& ids, bool skip_special) {
  const IdList list(ids);
  const auto [size, is_ascii] = decoded_size(tokenizer, list, skip_special);
  if (is_ascii) {
    py::object text = made(PyUnicode_New(static_cast<Py_ssize_t>(size), 0x7f));
    auto* const memory = static_cast<char*>(PyUnicode_DATA(text.ptr()));
    const py::gil_scoped_release release;
    tokenizer.decode_into(list.view(), skip_special, {memory, size});
    return text;
  }
  const auto memory = std::make_unique_for_overwrite<char[]>(size);
  const std::string_view bytes(memory.get(), size);
  std::optional<Utf8Shape> shape;
  {
    const py::gil_scoped_release release;
    tokenizer.decode_into(list.view(), skip_special, {memory.get(), size});
    shape = utf8_shape(bytes);
  }
  if (!shape) return text_of(bytes);
  const Py_UCS4 widest = shape->unit == 1 ? 0xff : shape->unit == 2 ? 0xffff : 0x10ffff;
  py::object text = made(PyUnicode_New(static_cast<Py_ssize_t>(shape->characters), widest));
  void* const characters = PyUnicode_DATA(text.ptr());
  const py::gil_scoped_release release;
  write_wide(bytes, shape->unit, characters);
  return text;
}

// A Python object that keeps its owner's alive. (py::keep_alive<0, 1> of pybind11 3.1 takes what
// stands for the result of a call whose arguments did not fit for an object, and crashes.)
template <class Value, class Owner>
py::object kept_with(const Owner& owner, Value value) {
  const py::object made = py::cast(std::move(value));
  py::detail::keep_alive_impl(made, py::cast(owner, py::return_value_policy::reference));
  return made;
}

// An encoder that threads may share: a part waits until another one's ids are there.
class SharedEncoder {
 public:
  explicit SharedEncoder(StreamEncoder encoder) : encoder_(std::move(encoder)) {}

  // work(encoder), without the GIL: whoever waits for its turn must not hold it.
  template <class Work>
  auto use(const Work& work) {
    const py::gil_scoped_release release;
    const std::lock_guard turn(*mutex_);
    return work(encoder_);
  }

 private:
  StreamEncoder encoder_;
  std::unique_ptr<std::mutex> mutex_ = std::make_unique<std::mutex>();
};

void bind_encoder(py::module_& module) {
  py::class_<SharedEncoder>(module, "StreamEncoder",
                            "Text to token ids as it comes; made by Tokenizer.stream_encoder.")
      .def(
          "feed",
          [](SharedEncoder& shared, const py::object& text) {
            Text part(text);
            const std::string_view bytes = part.bytes();
            IdBuffer ids(IdBuffer::kKeep, std::min(bytes.size(), kCopiedIds));
            shared.use([&](StreamEncoder& encoder) { encoder.feed(bytes, ids); });
            return array_of(std::move(ids));
          },
          "text"_a,
          "Ids that no further text can change (str, or bytes, which may end within a character).")
      .def(
          "finish",
          [](SharedEncoder& shared) {
            IdBuffer ids;
            shared.use([&](StreamEncoder& encoder) { encoder.finish(ids); });
            return array_of(std::move(ids));
          },
          "The remaining ids. A new text may follow.")
      .def(
          "provisional",
          [](SharedEncoder& shared) {
            IdBuffer ids;
            shared.use([&](const StreamEncoder& encoder) { encoder.provisional(ids); });
            return array_of(std::move(ids));
          },
          "What finish() would give now; the text may go on.")
      .def_property_readonly(
          "pending_bytes",
          [](SharedEncoder& shared) {
            return shared.use([](const StreamEncoder& encoder) { return encoder.pending_bytes(); });
          },
          "Bytes of the text whose ids have not been given out.");
}

void bind_decoder(py::module_& module) {
  py::class_<StreamDecoder>(module, "StreamDecoder",
                            "Token ids to text as they come; made by Tokenizer.stream_decoder.")
      .def("push", &StreamDecoder::push, "id"_a,
           "Text that can be shown now: whole characters, and nothing that may become a stop "
           "string.")
      .def("finish", &StreamDecoder::finish, "What was held back.")
      .def(
          "copy",
          [](const StreamDecoder& decoder) { return kept_with(decoder, StreamDecoder(decoder)); },
          "A decoder in the same state.")
      .def_property_readonly("stopped", &StreamDecoder::stopped, "Whether a stop string was met.")
      .def_property_readonly(
          "stop_token",
          [](const StreamDecoder& decoder) {
            return decoder.stopped() ? std::optional(decoder.stop_token()) : std::nullopt;
          },
          "How many ids came before the one in which the stop string began, or None.")
      .def_property_readonly(
          "event",
          [](const StreamDecoder& decoder) {
            return decoder.event() < 0 ? std::nullopt : std::optional(decoder.event());
          },
          "With `events`, the special token that the last push() was given, or None.")
      .def_property_readonly("stop", &StreamDecoder::stop,
                             "The stop string that was met, or empty.");
}

}  // namespace

void bind_text(py::module_& module) {
  module.def(
      "gguf_chat",
      [](const std::string& path) {
        GgufChat chat;
        {
          const py::gil_scoped_release release;
          chat = read_gguf_chat(path);
        }
        py::dict templates, tokens;
        for (const auto& [name, text] : chat.templates) templates[text_of(name)] = text_of(text);
        for (const auto& [name, text] : chat.tokens) tokens[text_of(name)] = text_of(text);
        return py::make_tuple(templates, tokens);
      },
      "path"_a, "Chat templates of a GGUF file by name, and the special tokens they may ask for.");
  module.def("is_gguf", &is_gguf, "path"_a, "Whether a path is that of a GGUF file.");
  py::class_<Tokenizer>(module, "Tokenizer",
                        "Llama 4's tokenizer: byte-level BPE with special tokens. Thread-safe.")
      .def_static(
          "from_file",
          [](const std::filesystem::path& path) {
            const py::gil_scoped_release release;
            return read_tokenizer(path.string());
          },
          "path"_a,
          "Reads tokenizer.json, tokenizer.model, a directory that holds one, or a GGUF file.\n\n"
          "What is built from a large one is kept in $PUNA_CACHE, or else in ~/.cache/puna, and is "
          "read from there the next time; PUNA_CACHE=off keeps nothing.\n\n"
          "Raises ModelNotFound, ModelFormatError, or UnsupportedError for a tokenizer of another "
          "kind.")
      .def("encode", &encode, "text"_a, py::kw_only(), "allowed_special"_a = "none",
           "cut"_a = "none", "threads"_a = 1,
           "Ids of a text (str, or bytes read as UTF-8 with replacement) as an array of uint32, or "
           "of a list of texts as a list.\n\n"
           "allowed_special: \"none\" (special tokens in the text are plain text), \"all\", or a "
           "set of names.\n"
           "cut: \"meta\" cuts long texts as Meta's own tokenizer does, which changes ids there.\n"
           "threads: how many to use, None for all cores; ids do not depend on it.")
      .def("count", &count, "text"_a, py::kw_only(), "allowed_special"_a = "none", "cut"_a = "none",
           "threads"_a = 1, "How many ids encode() would give.")
      .def("decode", &decode, "ids"_a, py::kw_only(), "skip_special"_a = false,
           "Text of ids; bytes that are not UTF-8 become U+FFFD. Raises InvalidRequest for an "
           "unknown id.")
      .def("decode_bytes", &decode_bytes, "ids"_a, py::kw_only(), "skip_special"_a = false,
           "Bytes of ids.")
      .def(
          "stream_encoder",
          [](const Tokenizer& tokenizer, const py::object& allowed_special, const std::string& cut,
             size_t max_pending) {
            const EncodeOptions options = options_of(tokenizer, allowed_special, cut, 1);
            return kept_with(tokenizer,
                             SharedEncoder(StreamEncoder(tokenizer, options, max_pending)));
          },
          py::kw_only(), "allowed_special"_a = "none", "cut"_a = "none",
          "max_pending"_a = StreamEncoder::kMaxPending,
          "An encoder that takes a text in parts and gives the ids of the whole.\n\n"
          "max_pending: how many bytes may wait for their ids; with Llama 4's vocabulary it is "
          "never more than 256.")
      .def(
          "stream_decoder",
          [](const Tokenizer& tokenizer, const std::vector<std::string>& stop, bool skip_special,
             bool events, bool include_stop) {
            const SpecialText special = events         ? SpecialText::kEvent
                                        : skip_special ? SpecialText::kSkip
                                                       : SpecialText::kShow;
            return kept_with(tokenizer, StreamDecoder(tokenizer, stop, special, include_stop));
          },
          py::kw_only(), "stop"_a = std::vector<std::string>(), "skip_special"_a = true,
          "events"_a = false, "include_stop"_a = false,
          "A decoder that gives out text as ids come.\n\n"
          "events: text ends at each special token, which `event` then tells; none is shown.\n"
          "include_stop: the text ends behind the stop string instead of before it.")
      .def("is_special", &Tokenizer::is_special, "id"_a, "Whether an id is a special token.")
      .def_property_readonly("vocab_size", &Tokenizer::vocab_size,
                             "Number of ids, special tokens included.")
      .def_property_readonly("special_tokens", &Tokenizer::special_tokens,
                             "Special tokens: name to id.");
  bind_encoder(module);
  bind_decoder(module);
}

}  // namespace puna::bindings
