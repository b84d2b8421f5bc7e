// The one error type of the core. It is thrown before work starts, says what was wrong with the
// numbers and what to do, and is translated to a Python exception in one place
// (bindings/errors.cpp).
#pragma once

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace puna {

enum class ErrorCode {
  kInternal,         // a broken invariant of ours: puna.Error
  kModelNotFound,    // puna.ModelNotFound(FileNotFoundError)
  kModelFormat,      // puna.ModelFormatError(ValueError)
  kUnsupported,      // puna.UnsupportedError(NotImplementedError)
  kOutOfMemory,      // puna.OutOfMemory(MemoryError)
  kContextOverflow,  // puna.ContextOverflow(ValueError)
  kInvalidRequest,   // puna.InvalidRequest(ValueError)
  kImage,            // puna.ImageError(ValueError)
  kDevice,           // puna.DeviceError(RuntimeError)
  kSessionMismatch,  // puna.SessionMismatch(ValueError)
  kStorage,          // puna.StorageError(OSError)
  kEngineClosed,     // puna.EngineClosed(RuntimeError)
};

// What a program may want to read out of an error, besides its message.
struct ErrorFacts {
  const char* param = nullptr;  // the argument at fault (kInvalidRequest)
  // What was asked for and what there is: bytes (kOutOfMemory), tokens (kContextOverflow).
  std::optional<int64_t> asked = {}, limit = {};
};

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message, ErrorFacts facts = {})
      : std::runtime_error(message), code_(code), facts_(facts) {}
  ErrorCode code() const { return code_; }
  const ErrorFacts& facts() const { return facts_; }

 private:
  ErrorCode code_;
  ErrorFacts facts_;
};

// fail(ErrorCode::kModelFormat, "[safetensors] ", path, ": header is ", n, " bytes")
template <class... Parts>
[[noreturn]] void fail(ErrorCode code, const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(code, message.str());
}

template <class... Parts>
[[noreturn]] void fail(ErrorCode code, const ErrorFacts& facts, const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(code, message.str(), facts);
}

}  // namespace puna
