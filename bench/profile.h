// Where a GPU's time goes: each kernel timed by itself.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "kernels/cuda/device_table.h"

namespace puna::bench {

// One at a time. Its backend's kernels run one after the other, as they would if there were no
// graphs, with an event before and after each: so that they do not overlap, and together take
// longer than a pass does.
class Profile {
 public:
  Profile();
  ~Profile();
  Profile(const Profile&) = delete;
  Profile& operator=(const Profile&) = delete;

  std::unique_ptr<Backend> make_backend(int ordinal);

  struct Time {
    int64_t calls = 0;
    double seconds = 0;
  };
  // What was timed since the last call, by kernel and shape, the longest first.
  std::vector<std::pair<std::string, Time>> take();

 private:
  template <class Call>
  static int run(const char* name, int (*kernel)(void*, const Call*), void* device,
                 const Call* call);
  void add_up();

  struct Sample {
    std::string name;
    void* events[2];
  };

  static Profile* current_;
  const cuda::DeviceTable& kernels_;
  cuda::DeviceTable timed_;
  void* device_ = nullptr;  // that was used last
  std::vector<Sample> samples_;
  std::map<std::string, Time> times_;
};

}  // namespace puna::bench
