// What the operating system gives: mapped files, memory, facts about the machine, the environment.
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/env.h"
#include "check.h"
#include "environment_variable.h"
#include "kernels/cpu/dispatch.h"
#include "platform/cache_directory.h"
#include "platform/memory.h"
#include "platform/mmap.h"
#include "platform/system.h"
#include "platform/thread_pool.h"
#include "temporary_directory.h"

using puna::ErrorCode;
using puna::MappedFile;
using puna::Memory;

using fixture::TemporaryDirectory;
using fixture::Variable;

namespace {

template <class Body>
std::string message_of(const Body& body) {
  try {
    body();
  } catch (const puna::Error& error) {
    return error.what();
  }
  return "no error";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST(mapped_file_shows_the_bytes) {
  const TemporaryDirectory directory;
  std::string content;
  for (int i = 0; i < 100000; ++i) content += static_cast<char>(i * 7);
  const std::string path = directory.file("weights", content);
  MappedFile file(path);
  CHECK_EQ(file.path(), path);
  CHECK_EQ(file.size(), content.size());
  CHECK(std::memcmp(file.data(), content.data(), content.size()) == 0);
  // Hints change nothing, and ranges beyond the file are cut off.
  constexpr size_t kAll = std::numeric_limits<size_t>::max();
  CHECK(file.holds(file.data()) && file.holds(file.data() + file.size() - 1));
  CHECK(!file.holds(file.data() + file.size()) && !file.holds(&file));
  file.will_need(0, kAll);
  file.will_need(5000, 10);
  file.dont_need(4097, kAll);
  file.dont_need(kAll, kAll);
  CHECK(std::memcmp(file.data(), content.data(), content.size()) == 0);
}

TEST(mapped_file_moves) {
  const TemporaryDirectory directory;
  MappedFile first(directory.file("a", "aaaa")), second(directory.file("b", "bbbbbbbb"));
  const std::byte* bytes = second.data();
  first = std::move(second);
  CHECK(first.data() == bytes);
  CHECK_EQ(first.size(), size_t{8});
  MappedFile third(std::move(first));
  CHECK(third.data() == bytes);
  CHECK_EQ(third.path(), directory.path("b"));
}

TEST(mapped_file_outlives_its_name) {
  const TemporaryDirectory directory;
  const MappedFile file(directory.file("gone", "still here"));
  std::filesystem::remove(directory.path("gone"));
  CHECK(std::memcmp(file.data(), "still here", 10) == 0);
}

TEST(files_that_cannot_be_mapped) {
  const TemporaryDirectory directory;
  const std::string missing = directory.path("missing"), empty = directory.file("empty", "");
  const std::string folder = directory.path("folder"), pipe = directory.path("pipe");
  std::filesystem::create_directory(folder);
  CHECK_EQ(mkfifo(pipe.c_str(), 0600), 0);
  CHECK_THROWS(ErrorCode::kModelNotFound, MappedFile(missing));
  CHECK_THROWS(ErrorCode::kModelNotFound, MappedFile(directory.file("a", "a") + "/below"));
  CHECK_THROWS(ErrorCode::kModelFormat, MappedFile(empty));
  CHECK_THROWS(ErrorCode::kModelFormat, MappedFile(folder));
  CHECK_THROWS(ErrorCode::kModelFormat, MappedFile(pipe));  // and does not wait for a writer
  for (const std::string& path : {missing, empty, folder, pipe}) {
    const std::string message = message_of([&] { MappedFile file(path); });
    CHECK(contains(message, path));
  }
}

TEST(memory_is_zeroed_aligned_and_writable) {
  const size_t sizes[] = {1,
                          4095,
                          4096,
                          4097,
                          (size_t{2} << 20) - 1,
                          size_t{2} << 20,
                          (size_t{2} << 20) + 1,
                          size_t{5} << 20};
  for (const size_t bytes : sizes) {
    const Memory memory(bytes);
    CHECK(memory.size() >= bytes);
    auto* data = static_cast<unsigned char*>(memory.data());
    const size_t alignment = bytes >= (size_t{2} << 20) ? size_t{2} << 20 : 4096;
    CHECK_EQ(reinterpret_cast<uintptr_t>(data) % alignment, uintptr_t{0});
    bool zero = true;
    for (size_t i = 0; i < memory.size(); ++i) zero &= data[i] == 0;
    CHECK(zero);
    std::memset(data, 0xa5, memory.size());  // the whole of it is ours
  }
}

TEST(memory_moves_and_may_be_empty) {
  Memory empty, none(0);
  CHECK(empty.data() == nullptr && none.data() == nullptr);
  CHECK_EQ(none.size(), size_t{0});
  Memory first(100);
  void* data = first.data();
  empty = std::move(first);
  CHECK(empty.data() == data);
  const Memory second(std::move(empty));
  CHECK(second.data() == data);
  CHECK(empty.data() == nullptr);  // NOLINT(bugprone-use-after-move): what a move promises
}

TEST(memory_that_is_not_there) {
  constexpr size_t kMost = std::numeric_limits<size_t>::max();
  for (const size_t bytes : {kMost, kMost - (size_t{2} << 20), kMost / 2, size_t{1} << 60}) {
    CHECK_THROWS(ErrorCode::kOutOfMemory, Memory(bytes));
    CHECK(contains(message_of([&] { Memory memory(bytes); }), std::to_string(bytes)));
  }
}

TEST(machine_facts_are_plausible) {
  CHECK(!puna::processor_name().empty());
  CHECK(puna::usable_cores() >= 1);
  CHECK(puna::usable_cores() <= static_cast<int>(std::thread::hardware_concurrency()));
  CHECK(puna::total_memory_bytes() > (int64_t{16} << 20));
  CHECK(puna::available_memory_bytes() >= 0);
  CHECK(puna::available_memory_bytes() <= puna::total_memory_bytes());
}

TEST(usable_cores_follow_the_affinity_mask) {
  // In a thread of its own, since a mask belongs to a thread.
  std::thread([] {
    cpu_set_t mask;
    CPU_ZERO(&mask);
    CHECK_EQ(sched_getaffinity(0, sizeof mask, &mask), 0);
    for (int cpu = 0, kept = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &mask) && kept++ > 0) CPU_CLR(cpu, &mask);
    }
    CHECK_EQ(sched_setaffinity(0, sizeof mask, &mask), 0);
    CHECK_EQ(puna::usable_cores(), 1);
  }).join();
}

TEST(peak_memory_grows_with_use) {
  const int64_t before = puna::peak_resident_bytes();
  CHECK(before > 0);
  {
    const Memory memory(size_t{64} << 20);
    std::memset(memory.data(), 1, memory.size());
  }
  const int64_t after = puna::peak_resident_bytes();
  CHECK(after >= int64_t{64} << 20);  // and stays after the memory is gone
  CHECK(after >= before);
}

TEST(environment_chooses_the_instruction_set) {
  const Variable scalar("PUNA_ISA", "scalar");
  CHECK_EQ(std::string(puna::resolve_isa("").isa), std::string("scalar"));
  for (const puna::KernelTable* isa : puna::compiled_isas()) {  // what is asked for goes first
    if (isa->supported()) CHECK_EQ(std::string(puna::resolve_isa(isa->isa).isa), isa->isa);
  }
  {
    const Variable unknown("PUNA_ISA", "sse9");
    CHECK_THROWS(ErrorCode::kInvalidRequest, puna::resolve_isa(""));
    CHECK(contains(message_of([] { puna::resolve_isa(""); }), "scalar"));  // names what there is
  }
  const Variable unset("PUNA_ISA", nullptr);
  for (const puna::KernelTable* isa : puna::compiled_isas()) {
    if (!isa->supported()) {
      CHECK_THROWS(ErrorCode::kDevice, puna::resolve_isa(isa->isa));
      continue;
    }
    CHECK_EQ(std::string(puna::resolve_isa("").isa), isa->isa);  // the first is the best
    break;
  }
}

TEST(environment_chooses_the_threads) {
  {
    const Variable three("PUNA_THREADS", "3");
    CHECK_EQ(puna::ThreadPool().lanes(), 3);
    CHECK_EQ(puna::ThreadPool(2).lanes(), 2);
  }
  for (const char* wrong : {"0", "-1", "two", "2x", "1e3", "99999999999999999999", "2000"}) {
    const Variable set("PUNA_THREADS", wrong);
    CHECK_THROWS(ErrorCode::kInvalidRequest, puna::ThreadPool());
    CHECK(contains(message_of([] { puna::ThreadPool pool; }), wrong));
  }
  const Variable unset("PUNA_THREADS", nullptr);
  CHECK_EQ(puna::ThreadPool().lanes(), puna::usable_cores());
}

TEST(environment_chooses_the_cache) {
  const Variable home("HOME", "/there"), none("XDG_CACHE_HOME", nullptr);
  const Variable unset("PUNA_CACHE", nullptr);
  CHECK_EQ(puna::environment_cache(), std::string("/there/.cache/puna"));
  const Variable caches("XDG_CACHE_HOME", "/caches");
  CHECK_EQ(puna::environment_cache(), std::string("/caches/puna"));
  {
    const Variable relative("XDG_CACHE_HOME", "caches"), empty("HOME", "");
    CHECK_EQ(puna::environment_cache(), std::string());
  }
  const Variable own("PUNA_CACHE", "/own");
  CHECK_EQ(puna::environment_cache(), std::string("/own"));
  const Variable off("PUNA_CACHE", "off");
  CHECK_EQ(puna::environment_cache(), std::string());
}

namespace {

bool put(const puna::CacheDirectory& directory, const std::string& name, const std::string& content,
         size_t kept = 8) {
  // Two parts, one of which may be empty.
  const auto bytes = std::as_bytes(std::span(content));
  const size_t half = content.size() / 2;
  return directory.put(name, std::vector{bytes.first(half), bytes.subspan(half)}, kept);
}

// The whole file, or "none".
std::string content_of(const puna::CacheDirectory& directory, const std::string& name) {
  auto file = directory.open(name);
  if (!file) return "none";
  std::string content(file->left(), ' ');
  char more;
  return file->read(content.data(), content.size()) && !file->read(&more, 1) ? content : "cut";
}

}  // namespace

TEST(cached_files_are_put_whole) {
  const TemporaryDirectory parent;
  const puna::CacheDirectory directory(parent.path("a/b"));
  CHECK_EQ(content_of(directory, "x"), std::string("none"));
  CHECK(put(directory, "x", "one two"));
  CHECK_EQ(content_of(directory, "x"), std::string("one two"));
  auto before = directory.open("x");
  CHECK(put(directory, "x", "3"));
  CHECK_EQ(content_of(directory, "x"), std::string("3"));
  std::string old(7, ' ');  // who reads it goes on with the file that was there
  CHECK(before && before->read(old.data(), old.size()) && old == "one two");
  for (const std::string made : {"a", "a/b"}) {
    struct stat status{};
    CHECK(stat(parent.path(made).c_str(), &status) == 0 && (status.st_mode & 0777) == 0700);
  }
}

TEST(cached_files_that_were_used_last_stay) {
  const TemporaryDirectory parent;
  const puna::CacheDirectory directory(parent.path());
  const auto wait = [] { std::this_thread::sleep_for(std::chrono::milliseconds(10)); };
  for (const char* name : {"a", "b", "c"}) {
    CHECK(put(directory, name, name, 3));
    wait();
  }
  CHECK_EQ(content_of(directory, "a"), std::string("a"));
  const std::string others = parent.path("model.json");
  std::ofstream(others) << "{}";
  wait();
  CHECK(put(directory, "d", "d", 3));
  CHECK(std::filesystem::exists(others));
  CHECK_EQ(content_of(directory, "b"), std::string("none"));
  for (const char* name : {"a", "c", "d"}) CHECK_EQ(content_of(directory, name), std::string(name));
}

TEST(what_others_may_have_written_is_not_cached) {
  const TemporaryDirectory parent;
  const puna::CacheDirectory directory(parent.path("own"));
  const std::string content = "content";
  CHECK(put(directory, "x", content));
  const std::string file = parent.path("own/x"), folder = parent.path("own");
  CHECK_EQ(chmod(file.c_str(), 0666), 0);
  CHECK_EQ(content_of(directory, "x"), std::string("none"));
  CHECK_EQ(chmod(file.c_str(), 0600), 0);
  CHECK_EQ(content_of(directory, "x"), content);
  CHECK_EQ(chmod(folder.c_str(), 0770), 0);
  CHECK_EQ(content_of(directory, "x"), std::string("none"));
  CHECK(!put(directory, "y", content));
  CHECK_EQ(chmod(folder.c_str(), 0700), 0);
  if (geteuid() == 0) {  // only root can give files away
    for (const std::string& path : {file, folder}) {
      CHECK_EQ(chown(path.c_str(), 12345, static_cast<gid_t>(-1)), 0);
      CHECK_EQ(content_of(directory, "x"), std::string("none"));
      CHECK_EQ(chown(path.c_str(), 0, static_cast<gid_t>(-1)), 0);
    }
  } else {  // and write where nobody may
    CHECK_EQ(chmod(folder.c_str(), 0500), 0);
    CHECK_EQ(content_of(directory, "x"), content);
    CHECK(!put(directory, "y", content));
    CHECK_EQ(chmod(folder.c_str(), 0700), 0);
  }
  // Other things than files, or than a directory.
  std::filesystem::create_symlink(file, parent.path("own/link"));
  CHECK_EQ(mkfifo(parent.path("own/pipe").c_str(), 0600), 0);
  std::filesystem::create_directory(parent.path("own/folder"));
  for (const char* name : {"link", "pipe", "folder"}) {
    CHECK_EQ(content_of(directory, name), std::string("none"));
  }
  const puna::CacheDirectory below_a_file(file);
  CHECK_EQ(content_of(below_a_file, "x"), std::string("none"));
  CHECK(!put(below_a_file, "x", content));
}
