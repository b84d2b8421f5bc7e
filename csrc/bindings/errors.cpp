#include "bindings/errors.h"

#include <pybind11/stl.h>

#include "puna/error.h"

namespace py = pybind11;

namespace puna::bindings {

namespace {

const char* class_of(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInternal:
      return "Error";
    case ErrorCode::kModelNotFound:
      return "ModelNotFound";
    case ErrorCode::kModelFormat:
      return "ModelFormatError";
    case ErrorCode::kUnsupported:
      return "UnsupportedError";
    case ErrorCode::kOutOfMemory:
      return "OutOfMemory";
    case ErrorCode::kContextOverflow:
      return "ContextOverflow";
    case ErrorCode::kInvalidRequest:
      return "InvalidRequest";
    case ErrorCode::kImage:
      return "ImageError";
    case ErrorCode::kDevice:
      return "DeviceError";
    case ErrorCode::kSessionMismatch:
      return "SessionMismatch";
    case ErrorCode::kStorage:
      return "StorageError";
    case ErrorCode::kEngineClosed:
      return "EngineClosed";
  }
  return "Error";
}

}  // namespace

void register_errors(py::module_&) {
  py::register_exception_translator([](std::exception_ptr pending) {
    try {
      if (pending) std::rethrow_exception(pending);
    } catch (const Error& error) {
      const py::object type = py::module_::import("puna.errors").attr(class_of(error.code()));
      const py::object raised = type(error.what());
      const ErrorFacts& facts = error.facts();
      if (error.code() == ErrorCode::kInvalidRequest) {
        if (facts.param) raised.attr("param") = facts.param;
      } else if (error.code() == ErrorCode::kOutOfMemory) {
        raised.attr("needed") = facts.asked;
        raised.attr("available") = facts.limit;
      } else if (error.code() == ErrorCode::kContextOverflow) {
        raised.attr("prompt_tokens") = facts.asked;
        raised.attr("limit") = facts.limit;
      }
      py::set_error(type, raised);
    }
  });
}

}  // namespace puna::bindings
