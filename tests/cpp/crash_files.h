// A file system in memory that knows what is durable: crash() gives the one that a machine finds
// after it lost power, with any part of what had not been synced.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "base/error.h"
#include "platform/file_system.h"

namespace fixture {

using namespace puna;

class CrashFiles final : public FileSystem {
 public:
  // Operations that still succeed; after them everything fails, as after the power. -1: no bound.
  std::atomic<int64_t> operations_left{-1};
  std::atomic<int64_t> operations{0};
  std::set<std::string> synced;  // directories

  // What is there after the power failed.
  std::unique_ptr<CrashFiles> crash(std::mt19937& random) const {
    const std::lock_guard guard(mutex_);
    auto after = std::make_unique<CrashFiles>();
    std::map<const Node*, std::shared_ptr<Node>> copies;
    for (const auto& [path, directory] : directories_) {
      Directory& found = after->directories_[path];
      std::map<std::string, std::shared_ptr<Node>> names = directory.durable;
      for (const auto& [name, node] : directory.pending)
        if (random() % 2) node ? void(names[name] = node) : void(names.erase(name));
      for (const auto& [name, node] : names) {
        std::shared_ptr<Node>& copy = copies[node.get()];
        if (!copy) copy = node->after_crash(random);
        found.names[name] = found.durable[name] = copy;
      }
    }
    return after;
  }
  // An independent copy, with nothing lost.
  std::unique_ptr<CrashFiles> copy() const {
    const std::lock_guard guard(mutex_);
    auto same = std::make_unique<CrashFiles>();
    std::map<const Node*, std::shared_ptr<Node>> copies;
    for (const auto& [path, directory] : directories_) {
      Directory& found = same->directories_[path];
      for (const auto& [name, node] : directory.names) {
        std::shared_ptr<Node>& copy = copies[node.get()];
        if (!copy) copy = std::make_shared<Node>(*node);
        found.names[name] = found.durable[name] = copy;
      }
    }
    return same;
  }
  // All files below a directory, and one byte of one of them.
  std::vector<std::pair<std::string, size_t>> sizes(const std::string& below) const {
    std::vector<std::pair<std::string, size_t>> found;
    for (const auto& [path, directory] : directories_)
      for (const auto& [name, node] : directory.names)
        if ((path + "/").starts_with(below + "/"))
          found.push_back({path + "/" + name, node->bytes.size()});
    return found;
  }
  std::byte& byte(const std::string& path, size_t offset) {
    return node_at(path, false)->bytes[offset];
  }

  std::unique_ptr<File> open(const std::string& path, OpenMode mode) override;
  bool exists(const std::string& path) override {
    const std::lock_guard guard(mutex_);
    return directories_.contains(path) || find(path) != nullptr;
  }
  std::vector<std::string> list(const std::string& path) override {
    const std::lock_guard guard(mutex_);
    std::vector<std::string> names;
    const auto directory = directories_.find(path);
    if (directory == directories_.end()) refuse(path, "listed");
    for (const auto& [name, node] : directory->second.names) names.push_back(name);
    return names;
  }
  // Directories are durable at once: what is lost is what lies in them.
  void make_directory(const std::string& path) override {
    const std::lock_guard guard(mutex_);
    for (size_t at = path.find('/', 1); at != std::string::npos; at = path.find('/', at + 1))
      directories_[path.substr(0, at)];
    directories_[path];
  }
  void rename(const std::string& from, const std::string& to) override {
    const std::lock_guard guard(mutex_);
    count(from);
    const std::shared_ptr<Node> node = node_at(from, false);
    set(to, node);
    set(from, nullptr);
  }
  bool link(const std::string& from, const std::string& to) override {
    const std::lock_guard guard(mutex_);
    count(from);
    set(to, node_at(from, false));
    return true;
  }
  void remove(const std::string& path) override {
    const std::lock_guard guard(mutex_);
    count(path);
    if (find(path)) set(path, nullptr);
  }
  void remove_directory(const std::string& path) override {
    const std::lock_guard guard(mutex_);
    const auto found = directories_.find(path);
    if (found == directories_.end()) return;
    if (!found->second.names.empty())
      fail(ErrorCode::kStorage, "[file] ", path, " cannot be removed: it is not empty");
    directories_.erase(found);
  }
  void sync_directory(const std::string& path) override {
    const std::lock_guard guard(mutex_);
    count(path);
    synced.insert(path);
    const auto directory = directories_.find(path);
    if (directory == directories_.end()) return;  // of directories alone, such as "."
    directory->second.durable = directory->second.names;
    directory->second.pending.clear();
  }
  uint64_t free_bytes(const std::string&) override { return uint64_t{1} << 40; }
  std::unique_ptr<File> lock(const std::string& path) override;

 private:
  struct Node {
    std::vector<std::byte> bytes, durable;
    struct Write {
      uint64_t offset;
      std::vector<std::byte> bytes;
      bool resize;
    };
    std::vector<Write> pending;
    int64_t changes = 0;

    void apply(std::vector<std::byte>& to, const Write& write, size_t taken) const {
      if (write.resize) return to.resize(write.offset);
      if (to.size() < write.offset + taken) to.resize(write.offset + taken);
      std::copy_n(write.bytes.begin(), taken, to.begin() + static_cast<ptrdiff_t>(write.offset));
    }
    std::shared_ptr<Node> after_crash(std::mt19937& random) const {
      auto after = std::make_shared<Node>();
      after->bytes = durable;
      for (const Write& write : pending) {
        if (random() % 2) continue;
        // Whole, or cut short somewhere.
        const size_t taken = random() % 2 || write.bytes.empty() ? write.bytes.size()
                                                                 : random() % write.bytes.size();
        apply(after->bytes, write, taken);
      }
      after->durable = after->bytes;
      return after;
    }
  };
  struct Directory {
    std::map<std::string, std::shared_ptr<Node>> names, durable;
    std::vector<std::pair<std::string, std::shared_ptr<Node>>> pending;  // null: removed
  };
  class Handle;

  [[noreturn]] static void refuse(const std::string& path, const char* what) {
    fail(ErrorCode::kStorage, "[file] ", path, " cannot be ", what, ": it is not there");
  }
  void count(const std::string& path) {
    ++operations;
    if (operations_left == 0) fail(ErrorCode::kStorage, "[file] ", path, ": the power failed");
    if (operations_left > 0) --operations_left;
  }
  std::shared_ptr<Node> find(const std::string& path) const {
    const size_t slash = path.find_last_of('/');
    const auto directory = directories_.find(path.substr(0, slash));
    if (directory == directories_.end()) return nullptr;
    const auto node = directory->second.names.find(path.substr(slash + 1));
    return node == directory->second.names.end() ? nullptr : node->second;
  }
  void set(const std::string& path, const std::shared_ptr<Node>& node) {
    const size_t slash = path.find_last_of('/');
    const std::string name = path.substr(slash + 1);
    Directory& directory = directories_[path.substr(0, slash)];
    directory.pending.push_back({name, node});
    if (node)
      directory.names[name] = node;
    else
      directory.names.erase(name);
  }
  std::shared_ptr<Node> node_at(const std::string& path, bool make) {
    std::shared_ptr<Node> node = find(path);
    if (!node && !make) refuse(path, "opened");
    if (!node) set(path, node = std::make_shared<Node>());
    return node;
  }

  mutable std::mutex mutex_;
  std::map<std::string, Directory> directories_;
  std::set<std::string> locked_;
};

class CrashFiles::Handle final : public File {
 public:
  Handle(CrashFiles& files, const std::string& path, std::shared_ptr<Node> node, bool locked)
      : File(path), files_(files), node_(std::move(node)), locked_(locked) {}
  ~Handle() override {
    const std::lock_guard guard(files_.mutex_);
    if (locked_) files_.locked_.erase(path());
  }

  size_t read(void* to, size_t bytes, uint64_t offset) override {
    const std::lock_guard guard(files_.mutex_);
    if (offset >= node_->bytes.size()) return 0;
    const size_t got = std::min<size_t>(bytes, node_->bytes.size() - offset);
    std::memcpy(to, node_->bytes.data() + offset, got);
    return got;
  }
  void write(std::span<const Part> parts, uint64_t offset) override {
    const std::lock_guard guard(files_.mutex_);
    for (const Part& part : parts) {
      files_.count(path());
      put({offset, {part.begin(), part.end()}, false});
      offset += part.size();
    }
  }
  void sync() override {
    const std::lock_guard guard(files_.mutex_);
    files_.count(path());
    node_->durable = node_->bytes;
    node_->pending.clear();
  }
  void resize(uint64_t bytes) override {
    const std::lock_guard guard(files_.mutex_);
    files_.count(path());
    put({bytes, {}, true});
  }
  void reserve(uint64_t) override {}
  FileFacts facts() override {
    const std::lock_guard guard(files_.mutex_);
    return {node_->bytes.size(), 1, reinterpret_cast<uint64_t>(node_.get()), node_->changes};
  }
  int descriptor() const override { return -1; }

 private:
  void put(Node::Write write) {
    node_->apply(node_->bytes, write, write.bytes.size());
    node_->pending.push_back(std::move(write));
    ++node_->changes;
  }
  CrashFiles& files_;
  std::shared_ptr<Node> node_;
  const bool locked_;
};

inline std::unique_ptr<File> CrashFiles::open(const std::string& path, OpenMode mode) {
  const std::lock_guard guard(mutex_);
  const bool writes = mode == OpenMode::kWrite || mode == OpenMode::kWriteDirect;
  if (writes) count(path);
  // A file that is emptied is another one: the old one's pages may still be read.
  if (mode == OpenMode::kWriteDirect && find(path)) set(path, std::make_shared<Node>());
  return std::make_unique<Handle>(*this, path, node_at(path, writes), false);
}

inline std::unique_ptr<File> CrashFiles::lock(const std::string& path) {
  const std::lock_guard guard(mutex_);
  if (!locked_.insert(path).second) return nullptr;
  return std::make_unique<Handle>(*this, path, node_at(path, true), true);
}

}  // namespace fixture
