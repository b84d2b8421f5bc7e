// Files and reads in flight: the system's files, both read queues, private directories.
#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <random>

#include "check.h"
#include "platform/file_system.h"
#include "platform/memory.h"
#include "platform/private_directory.h"
#include "platform/read_queue.h"
#include "temporary_directory.h"

using namespace puna;

using fixture::TemporaryDirectory;

namespace {

std::vector<char> random_bytes(size_t count) {
  std::mt19937_64 random(count);
  std::vector<char> bytes(count);
  for (char& byte : bytes) byte = static_cast<char>(random());
  return bytes;
}

File::Part part_of(const std::vector<char>& bytes, size_t first, size_t count) {
  return std::as_bytes(std::span(bytes)).subspan(first, count);
}

// Many reads at once through a queue, and what comes of them.
void read_all(std::unique_ptr<ReadQueue> queue, OpenMode mode) {
  const TemporaryDirectory directory;
  FileSystem& files = system_files();
  constexpr size_t kBlock = 64 << 10, kBlocks = 200;
  const std::vector<char> bytes = random_bytes(kBlock * kBlocks);
  {
    const auto file = files.open(directory.path("data"), OpenMode::kWrite);
    const File::Part part = part_of(bytes, 0, bytes.size());
    file->write({&part, 1}, 0);
    file->sync();
  }
  const std::shared_ptr<File> file = files.open(directory.path("data"), mode);
  const Memory memory(kBlock * kBlocks + 4096);
  std::mutex mutex;
  std::condition_variable changed;
  size_t done = 0, failed = 0;
  const auto submit = [&](size_t index, size_t count) {
    queue->submit({file, static_cast<char*>(memory.data()) + index * kBlock, count, index * kBlock,
                   [&](std::exception_ptr failure) {
                     const std::lock_guard guard(mutex);
                     ++done;
                     failed += failure != nullptr;
                     changed.notify_all();
                   }});
  };
  for (size_t i = 0; i < kBlocks; ++i) submit((i * 37) % kBlocks, kBlock);
  {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return done == kBlocks; });
  }
  CHECK_EQ(failed, size_t{0});
  CHECK(std::memcmp(memory.data(), bytes.data(), bytes.size()) == 0);
  submit(kBlocks - 1, kBlock + 4096);  // beyond the end
  queue.reset();                       // finishes what was submitted
  CHECK_EQ(done, kBlocks + 1);
  CHECK_EQ(failed, size_t{1});
}

}  // namespace

TEST(parts_are_written_one_after_another) {
  const TemporaryDirectory directory;
  FileSystem& files = system_files();
  const std::vector<char> bytes = random_bytes(10000);
  const auto file = files.open(directory.path("data"), OpenMode::kWrite);
  const std::vector<File::Part> parts = {part_of(bytes, 0, 1), part_of(bytes, 1, 0),
                                         part_of(bytes, 1, 6999), part_of(bytes, 7000, 3000)};
  file->write(parts, 5);
  std::vector<char> back(10010);
  CHECK_EQ(file->read(back.data(), back.size(), 0), size_t{10005});
  CHECK(std::memcmp(back.data() + 5, bytes.data(), bytes.size()) == 0);
  CHECK_EQ(int{back[2]}, 0);
  file->resize(8);
  CHECK_EQ(file->facts().bytes, uint64_t{8});
  CHECK_THROWS(ErrorCode::kStorage, read_exactly(*file, back.data(), 9, 0));
  // More parts than one system call takes.
  const std::vector<File::Part> many(3000, part_of(bytes, 0, 3));
  file->write(many, 0);
  CHECK_EQ(file->facts().bytes, uint64_t{9000});
}

TEST(names_and_directories) {
  const TemporaryDirectory directory;
  FileSystem& files = system_files();
  const std::string folder = directory.path("a/b");
  files.make_directory(folder);
  files.open(folder + "/one", OpenMode::kWrite);
  CHECK(files.link(folder + "/one", folder + "/two"));
  files.rename(folder + "/one", folder + "/three");
  files.sync_directory(folder);
  const std::vector<std::string> expected = {"three", "two"};
  CHECK(files.list(folder) == expected);
  CHECK(files.exists(folder + "/two"));
  const FileFacts linked = files.open(folder + "/two", OpenMode::kRead)->facts();
  CHECK(linked == files.open(folder + "/three", OpenMode::kRead)->facts());
  files.remove(folder + "/two");
  files.remove(folder + "/two");  // no error
  CHECK(!files.exists(folder + "/two"));
  CHECK(files.free_bytes(folder) > 0);
  CHECK_THROWS(ErrorCode::kStorage, files.open(folder + "/two", OpenMode::kRead));
  CHECK_THROWS(ErrorCode::kStorage, files.open(folder, OpenMode::kRead));
  CHECK_THROWS(ErrorCode::kStorage, files.list(folder + "/no"));
  CHECK_THROWS(ErrorCode::kStorage, files.link(folder + "/two", folder + "/four"));
  files.remove_directory(directory.path("a"));
  CHECK(!files.exists(folder));
}

TEST(locks_are_exclusive) {
  const TemporaryDirectory directory;
  auto first = system_files().lock(directory.path("lock"));
  CHECK(first != nullptr);
  CHECK(system_files().lock(directory.path("lock")) == nullptr);
  first.reset();
  CHECK(system_files().lock(directory.path("lock")) != nullptr);
}

TEST(threaded_reads) {
  read_all(make_threaded_read_queue(3), OpenMode::kRead);
  read_all(make_threaded_read_queue(), OpenMode::kReadDirect);
}

TEST(uring_reads) {
  // Where the kernel has none there is nothing to test; make_read_queue() falls back then.
  if (auto queue = make_uring_read_queue()) read_all(std::move(queue), OpenMode::kReadDirect);
  if (auto queue = make_uring_read_queue()) read_all(std::move(queue), OpenMode::kRead);
  CHECK(make_read_queue() != nullptr);
}

TEST(private_directories_end_with_their_owner) {
  const TemporaryDirectory directory;
  FileSystem& files = system_files();
  const std::string parent = directory.path("cache");
  std::string path;
  {
    const PrivateDirectory first(files, parent), second(files, parent);
    CHECK(first.path() != second.path());
    path = first.path();
    std::ofstream(path + "/file") << "content";
  }
  CHECK(files.list(parent).empty());
  // Of a process that was killed: no lock, some files.
  files.make_directory(parent + "/puna-0");
  files.make_directory(parent + "/puna-1");
  std::ofstream(parent + "/puna-1/file") << "content";
  const PrivateDirectory again(files, parent);
  CHECK(!files.exists(parent + "/puna-1/file"));
}
