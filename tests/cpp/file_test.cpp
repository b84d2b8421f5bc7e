// Files and reads in flight: the system's files, both read queues, private directories.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <random>
#include <thread>

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
  CHECK_THROWS(ErrorCode::kStorage, files.remove_directory(folder));  // not empty
  files.remove(folder + "/three");
  files.remove_directory(folder);
  files.remove_directory(folder);  // no error
  CHECK(!files.exists(folder));
}

TEST(files_are_replaced_whole_or_not_at_all) {
  const TemporaryDirectory directory;
  FileSystem& files = system_files();
  const std::string path = directory.path("data");
  const std::vector<char> bytes = random_bytes(100);
  const auto write = [&](File& file) {
    const File::Part part = part_of(bytes, 0, bytes.size());
    file.write({&part, 1}, 0);
  };
  const auto refuse = [] { fail(ErrorCode::kStorage, "no"); };
  CHECK_THROWS(ErrorCode::kStorage, replace_file(files, path, OpenMode::kWrite, write, refuse));
  CHECK(files.list(directory.path("")).empty());
  bool ready = false;
  replace_file(files, path, OpenMode::kWrite, write, [&] { ready = !files.exists(path); });
  CHECK(ready);
  CHECK_EQ(files.open(path, OpenMode::kRead)->facts().bytes, uint64_t{100});
  CHECK_THROWS(ErrorCode::kStorage,
               replace_file(files, path, OpenMode::kWriteDirect, [&](File&) { refuse(); }));
  CHECK_EQ(files.open(path, OpenMode::kRead)->facts().bytes, uint64_t{100});
  CHECK_EQ(files.list(directory.path("")).size(), size_t{1});
  CHECK(!remove_if_possible(files, directory.path("")));
  CHECK(remove_if_possible(files, path));
}

TEST(locks_are_exclusive) {
  const TemporaryDirectory directory;
  auto first = system_files().lock(directory.path("lock"));
  CHECK(first != nullptr);
  CHECK(system_files().lock(directory.path("lock")) == nullptr);
  first.reset();
  CHECK(system_files().lock(directory.path("lock")) != nullptr);
}

TEST(a_forked_process_does_not_keep_a_lock) {
  const TemporaryDirectory directory;
  auto lock = system_files().lock(directory.path("lock"));
  int until[2];
  CHECK_EQ(pipe(until), 0);
  const pid_t child = fork();
  if (child == 0) {
    close(until[1]);
    char byte;
    const bool ended = read(until[0], &byte, 1) == 0;
    lock.reset();  // not its own to give back
    _exit(ended ? 0 : 1);
  }
  close(until[0]);
  lock.reset();
  lock = system_files().lock(directory.path("lock"));
  CHECK(lock != nullptr);
  close(until[1]);
  int status = 1;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK_EQ(status, 0);
  CHECK(system_files().lock(directory.path("lock")) == nullptr);
}

TEST(a_lock_of_a_file_that_was_removed_is_none) {
  // Between opening the file and locking it, its owner removes it and lets go of it.
  const TemporaryDirectory directory;
  const std::string path = directory.path("lock");
  std::atomic<bool> stop{false};
  std::atomic<int> owners{0}, most{0};
  const auto contend = [&] {
    while (!stop) {
      const auto lock = system_files().lock(path);
      if (lock == nullptr) continue;
      const int now = ++owners;
      if (now > most) most = now;
      --owners;
      system_files().remove(path);
    }
  };
  std::thread first(contend), second(contend);
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  stop = true;
  first.join();
  second.join();
  CHECK_EQ(most.load(), 1);
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

// Tells in which order things are removed.
class RemovalOrder final : public FileSystem {
 public:
  std::unique_ptr<File> open(const std::string& path, OpenMode mode) override {
    return under_.open(path, mode);
  }
  bool exists(const std::string& path) override { return under_.exists(path); }
  std::vector<std::string> list(const std::string& path) override { return under_.list(path); }
  void make_directory(const std::string& path) override { under_.make_directory(path); }
  void rename(const std::string& from, const std::string& to) override { under_.rename(from, to); }
  bool link(const std::string& from, const std::string& to) override {
    return under_.link(from, to);
  }
  void remove(const std::string& path) override {
    removed.push_back(std::filesystem::path(path).filename());
    under_.remove(path);
  }
  void remove_directory(const std::string& path) override {
    removed.push_back(std::filesystem::path(path).filename());
    under_.remove_directory(path);
  }
  void sync_directory(const std::string& path) override { under_.sync_directory(path); }
  uint64_t free_bytes(const std::string& path) override { return under_.free_bytes(path); }
  std::unique_ptr<File> lock(const std::string& path) override { return under_.lock(path); }

  std::vector<std::string> removed;

 private:
  FileSystem& under_ = system_files();
};

TEST(a_private_directory_is_locked_until_it_is_empty) {
  const TemporaryDirectory directory;
  RemovalOrder files;
  {
    const PrivateDirectory mine(files, directory.path("cache"));
    std::ofstream(mine.path() + "/a") << "content";
    std::ofstream(mine.path() + "/z") << "content";
  }
  const std::vector<std::string> expected = {"a", "z", "lock", "puna-0"};
  CHECK(files.removed == expected);
  CHECK(files.list(directory.path("cache")).empty());
}
