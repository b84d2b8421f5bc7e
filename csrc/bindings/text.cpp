// Tokenizer and StreamDecoder as Python sees them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/module.h"
#include "engine/model_files.h"
#include "puna/error.h"
#include "text/stream_decoder.h"
#include "text/tokenizer.h"

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
  for (const py::handle& name : allowed) {
    names.names.insert(name.cast<std::string>());
    if (!tokenizer.special_tokens().contains(name.cast<std::string>())) {
      fail(ErrorCode::kInvalidRequest, "[tokenizer] ", name.cast<std::string>(),
           " is no special token of this tokenizer");
    }
  }
  return names;
}

std::vector<int32_t> encode(const Tokenizer& tokenizer, const py::object& text,
                            const py::object& allowed_special) {
  const AllowedSpecial allowed = allowed_of(tokenizer, allowed_special);
  if (!py::isinstance<py::str>(text) && !py::isinstance<py::bytes>(text)) {
    throw py::type_error("encode() takes str or bytes, not " +
                         py::str(py::type::of(text).attr("__name__")).cast<std::string>());
  }
  std::string bytes;
  if (py::isinstance<py::bytes>(text)) {
    bytes = text.cast<std::string>();
  } else {
    Py_ssize_t size = 0;
    const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    if (!data) throw py::error_already_set();  // UnicodeEncodeError: half of a surrogate pair
    bytes.assign(data, static_cast<size_t>(size));
  }
  const py::gil_scoped_release release;
  return tokenizer.encode(bytes, {.special = allowed});
}

py::str text_of(const std::string& bytes) {
  PyObject* text =
      PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "replace");
  if (!text) throw py::error_already_set();
  return py::reinterpret_steal<py::str>(text);
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
          "from_file", &read_tokenizer, "path"_a, py::call_guard<py::gil_scoped_release>(),
          "Reads tokenizer.json, tokenizer.model, a directory that holds one, or a GGUF file.\n\n"
          "Raises ModelNotFound, ModelFormatError, or UnsupportedError for a tokenizer of another "
          "kind.")
      .def("encode", &encode, "text"_a, py::kw_only(), "allowed_special"_a = "none",
           "Ids of a text (str, or bytes read as UTF-8 with replacement).\n\n"
           "allowed_special: \"none\" (special tokens in the text are plain text), \"all\", or a "
           "set of names.")
      .def(
          "decode",
          [](const Tokenizer& tokenizer, const std::vector<int32_t>& ids, bool skip_special) {
            return text_of(tokenizer.decode(ids, skip_special));
          },
          "ids"_a, py::kw_only(), "skip_special"_a = false,
          "Text of ids; bytes that are not UTF-8 become U+FFFD. Raises InvalidRequest for an "
          "unknown id.")
      .def(
          "decode_bytes",
          [](const Tokenizer& tokenizer, const std::vector<int32_t>& ids, bool skip_special) {
            return py::bytes(tokenizer.decode(ids, skip_special));
          },
          "ids"_a, py::kw_only(), "skip_special"_a = false, "Bytes of ids.")
      .def(
          "stream_decoder",
          [](const Tokenizer& tokenizer, const std::vector<std::string>& stop, bool skip_special) {
            return StreamDecoder(tokenizer, stop, skip_special);
          },
          py::kw_only(), "stop"_a = std::vector<std::string>(), "skip_special"_a = true,
          py::keep_alive<0, 1>(), "A decoder that gives out text as ids come.")
      .def("is_special", &Tokenizer::is_special, "id"_a, "Whether an id is a special token.")
      .def_property_readonly("vocab_size", &Tokenizer::vocab_size,
                             "Number of ids, special tokens included.")
      .def_property_readonly("special_tokens", &Tokenizer::special_tokens,
                             "Special tokens: name to id.");

  py::class_<StreamDecoder>(module, "StreamDecoder",
                            "Token ids to text as they come; made by Tokenizer.stream_decoder.")
      .def("push", &StreamDecoder::push, "id"_a,
           "Text that can be shown now: whole characters, and nothing that may become a stop "
           "string.")
      .def("finish", &StreamDecoder::finish, "What was held back.")
      .def(
          "copy", [](const StreamDecoder& decoder) { return StreamDecoder(decoder); },
          py::keep_alive<0, 1>(), "A decoder in the same state.")
      .def_property_readonly("stopped", &StreamDecoder::stopped, "Whether a stop string was met.")
      .def_property_readonly("stop", &StreamDecoder::stop,
                             "The stop string that was met, or empty.");
}

}  // namespace puna::bindings
