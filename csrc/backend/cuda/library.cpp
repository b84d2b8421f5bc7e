// Opening libpuna_cuda.so, which lies beside the file that this is linked into, if it was built, or
// where PUNA_CUDA_LIBRARY says.
#include <dlfcn.h>

#include <string>

#include "backend/cuda/cuda_backend.h"
#include "base/env.h"
#include "base/error.h"

namespace puna {
namespace {

constexpr const char* kLibrary = "libpuna_cuda.so";

struct Library {
  const cuda::DeviceTable* table = nullptr;
  std::string why;  // there is none
};

// The folder of the file that holds this code, with a slash.
std::string own_folder() {
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&cuda_library), &info) == 0 || info.dli_fname == nullptr)
    return "";
  const std::string path = info.dli_fname;
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "" : path.substr(0, slash + 1);
}

Library open_library() {
  Library library;
  const std::string given = environment_cuda_library();
  const std::string path = given.empty() ? own_folder() + kLibrary : given;
  // It stays open: device memory may be released until the process ends.
  void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    library.why = std::string("this installation has no CUDA backend (") + dlerror() + ")";
    return library;
  }
  using Entry = decltype(&PUNA_CUDA_ENTRY);
  const auto entry = reinterpret_cast<Entry>(dlsym(handle, PUNA_CUDA_ENTRY_NAME));
  if (entry != nullptr) library.table = entry(cuda::kTableVersion);
  if (library.table == nullptr)
    library.why = path + " is of another version of puna (its interface is not version " +
                  std::to_string(cuda::kTableVersion) + ")";
  return library;
}

const Library& library() {
  static const Library opened = open_library();
  return opened;
}

}  // namespace

const cuda::DeviceTable& cuda_library() {
  if (library().table == nullptr) fail(ErrorCode::kDevice, "[cuda] ", library().why);
  return *library().table;
}

BackendStatus cuda_status() {
  const cuda::DeviceTable* const table = library().table;
  if (table == nullptr) return {"cuda", false, library().why};
  int count = 0;
  const int code = table->device_count(&count);
  if (count == 0) return {"cuda", false, code != 0 ? table->describe(code) : "no GPU found"};
  std::string names;
  for (int i = 0; i < count; ++i) {
    cuda::DeviceInfo info = {};
    if (const int error = table->device_info(i, &info))
      return {"cuda", false, table->describe(error)};
    names += (names.empty() ? "" : ", ") + std::string(info.name);
  }
  return {"cuda", true, names};
}

}  // namespace puna
