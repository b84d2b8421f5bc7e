// For the tests of the KV store: texts, pages whose content follows from the text, passes that read
// as attention does, and file systems that fail.
#pragma once

#include <stdlib.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "kv/kv_store.h"
#include "kv/tiers/ram.h"
#include "temporary_directory.h"

namespace fixture {

using namespace puna;

inline uint64_t mixed(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

// A text and its pictures, which can be appended to and cut off.
struct Text {
  std::vector<int32_t> tokens;
  std::vector<KvImageRun> images;

  KvText view() const { return {tokens, images}; }
  void grow(int64_t count, uint64_t seed) {
    for (int64_t i = 0; i < count; ++i)
      tokens.push_back(static_cast<int32_t>(mixed(seed * 1'000'003 + tokens.size()) % 200'000));
  }
  void cut(int64_t length) { tokens.resize(static_cast<size_t>(length)); }
  // Of the tokens up to the end of a page, as far as there are any.
  uint64_t key(int64_t page) const {
    uint64_t key = 0;
    const auto end = std::min<size_t>(tokens.size(), static_cast<size_t>((page + 1) * kPageTokens));
    for (size_t i = 0; i < end; ++i) key = mixed(key ^ static_cast<uint64_t>(tokens[i]));
    return key;
  }
};

// Begins a pass of one more token over `layers`; nothing of it stays.
inline void begin_pass_of_one_more(KvStore& store, KvStore::Sequence sequence, const Text& text,
                                   const std::vector<int64_t>& layers, bool partly = false) {
  Text more = text;
  more.grow(1, 999);
  const KvStore::Append append{sequence, 1, more.view()};
  store.apply(store.plan({&append, 1}));
  store.begin_pass(layers, partly);
}

inline void fill_page(void* page, size_t bytes, int64_t layer, uint64_t key) {
  auto* words = static_cast<uint64_t*>(page);
  for (size_t i = 0; i < bytes / 8; ++i)
    words[i] = mixed(key + static_cast<uint64_t>(layer) * 7919 + i);
}
inline bool page_is(const void* page, size_t bytes, int64_t layer, uint64_t key) {
  const auto* words = static_cast<const uint64_t*>(page);
  for (size_t i = 0; i < bytes / 8; ++i)
    if (words[i] != mixed(key + static_cast<uint64_t>(layer) * 7919 + i)) return false;
  return true;
}

// The keys of all full pages of a text; computing them anew for every page would be quadratic.
inline std::vector<uint64_t> page_keys(const Text& text) {
  std::vector<uint64_t> keys;
  uint64_t key = 0;
  for (size_t i = 0; i < text.tokens.size(); ++i) {
    key = mixed(key ^ static_cast<uint64_t>(text.tokens[i]));
    if ((i + 1) % kPageTokens == 0) keys.push_back(key);
  }
  return keys;
}

struct Member {
  KvStore::Sequence sequence;
  const Text* text;  // up to the end of the pass
  int64_t tokens;
};

// What attention reads of one layer: each stream once, with every sequence that shares it. `leaf`
// pages are held at a time. Returns the pages with the wrong content.
inline int64_t read_layer(KvStore& store, const std::vector<Member>& members, int64_t layer,
                          int64_t leaf = 8) {
  int64_t wrong = 0;
  std::map<KvStream*, std::vector<size_t>> shared;
  std::vector<KvView> views;
  for (const Member& member : members) {
    views.push_back(store.view(member.sequence, layer));
    shared[views.back().stream].push_back(views.size() - 1);
  }
  std::vector<std::vector<uint64_t>> keys;
  for (const Member& member : members) keys.push_back(page_keys(*member.text));
  const size_t bytes = store.geometry().sealed_bytes();
  for (const auto& [stream, indices] : shared) {
    int64_t most = 0;
    for (const size_t m : indices) most = std::max(most, views[m].first_open);
    for (int64_t first = 0; first < most; first += leaf) {
      for (int64_t i = first; i < std::min(most, first + leaf); ++i) {
        const void* streamed = nullptr;
        for (const size_t m : indices) {
          if (i >= views[m].first_open) continue;
          const void* page = views[m].sealed[static_cast<size_t>(i)];
          if (page == nullptr) {
            if (streamed == nullptr) streamed = stream->wait(i);
            page = streamed;
          }
          wrong += !page_is(page, bytes, layer, keys[m][static_cast<size_t>(i)]);
        }
      }
      if (stream) stream->passed(first + leaf);
    }
  }
  return wrong;
}

// Fills what the pass fills, as attention and its sealing would.
inline void fill(KvStore& store, const Member& member, int64_t layer) {
  const KvView view = store.view(member.sequence, layer);
  const KvGeometry& geometry = store.geometry();
  const auto end = static_cast<int64_t>(member.text->tokens.size());
  if (!geometry.global(static_cast<size_t>(layer))) {
    for (size_t i = 0; i < view.open.size(); ++i) {
      const int64_t position = view.first_position + static_cast<int64_t>(i) * kPageTokens;
      fill_page(view.open[i], geometry.open_bytes(), layer,
                member.text->key((position + kPageTokens) / kPageTokens - 1));
    }
    return;
  }
  const std::vector<uint64_t> keys = page_keys(*member.text);
  for (int64_t page = view.first_open; page < (end + kPageTokens - 1) / kPageTokens; ++page) {
    const bool full = (page + 1) * kPageTokens <= end;
    fill_page(view.open[page - view.first_open], geometry.open_bytes(), layer,
              full ? keys[page] : member.text->key(page));
    if (full && geometry.seal != KvSeal::kNone)
      fill_page(view.sealed[page], geometry.sealed_bytes(), layer, keys[page]);
  }
}

// One forward pass over all layers. Returns the pages read with the wrong content.
inline int64_t pass(KvStore& store, const std::vector<Member>& members, int64_t leaf = 8) {
  std::vector<KvStore::Append> appends;
  for (const Member& member : members)
    appends.push_back({member.sequence, member.tokens, member.text->view()});
  const KvStore::Plan plan = store.plan(appends);
  store.apply(plan);
  std::vector<int64_t> layers(store.geometry().chunk.size());
  for (size_t i = 0; i < layers.size(); ++i) layers[i] = static_cast<int64_t>(i);
  store.begin_pass(layers);
  int64_t wrong = 0;
  for (const int64_t layer : layers) {
    for (const Member& member : members) fill(store, member, layer);
    if (store.geometry().global(static_cast<size_t>(layer)))
      wrong += read_layer(store, members, layer, leaf);
  }
  store.commit(plan);
  return wrong;
}

// Appends tokens to text and sequence, by passes of at most `step`.
inline int64_t grow(KvStore& store, KvStore::Sequence sequence, Text& text, int64_t tokens,
                    uint64_t seed, int64_t step = 512) {
  int64_t wrong = 0;
  while (tokens > 0) {
    const int64_t taken = std::min({tokens, step, store.room(sequence)});
    text.grow(taken, seed);
    wrong += pass(store, {{sequence, &text, taken}});
    tokens -= taken;
  }
  return wrong;
}

// The system's files, seen through faults.
struct Faults {
  // Bytes that may still be written before the disk is full; -1: no bound.
  std::atomic<int64_t> space{-1};
  // Reads that still succeed before they all fail; -1: no bound.
  std::atomic<int64_t> good_reads{-1};
  std::atomic<bool> fail_sync{false};
  std::atomic<int64_t> reads{0};
  std::function<void(const std::string& path, uint64_t offset, size_t bytes)> on_read;
};

class FaultyFile final : public File {
 public:
  FaultyFile(std::unique_ptr<File> file, Faults& faults)
      : File(file->path()), file_(std::move(file)), faults_(faults) {}

  size_t read(void* to, size_t bytes, uint64_t offset) override {
    ++faults_.reads;
    if (faults_.on_read) faults_.on_read(path(), offset, bytes);
    int64_t good = faults_.good_reads;
    while (good > 0 && !faults_.good_reads.compare_exchange_weak(good, good - 1)) {
    }
    if (good == 0)
      fail(ErrorCode::kStorage, "[file] ", path(), " cannot be read: ", std::strerror(EIO));
    return file_->read(to, bytes, offset);
  }
  void write(std::span<const Part> parts, uint64_t offset) override {
    size_t bytes = 0;
    for (const Part& part : parts) bytes += part.size();
    if (faults_.space >= 0 && faults_.space < static_cast<int64_t>(bytes)) {
      // Some of it gets there.
      std::vector<Part> some;
      auto left = static_cast<size_t>(faults_.space.exchange(0)) / 4096 * 4096;
      for (const Part& part : parts) {
        some.push_back(part.first(std::min(left, part.size())));
        left -= some.back().size();
      }
      file_->write(some, offset);
      fail(ErrorCode::kStorage, "[file] ", path(), " cannot be written: ", std::strerror(ENOSPC));
    }
    if (faults_.space >= 0) faults_.space -= static_cast<int64_t>(bytes);
    file_->write(parts, offset);
  }
  void sync() override {
    if (faults_.fail_sync)
      fail(ErrorCode::kStorage, "[file] ", path(), " cannot be made durable: ", std::strerror(EIO));
    file_->sync();
  }
  void resize(uint64_t bytes) override { file_->resize(bytes); }
  void reserve(uint64_t) override {}  // as where the file system cannot
  FileFacts facts() override { return file_->facts(); }
  int descriptor() const override { return -1; }

 private:
  std::unique_ptr<File> file_;
  Faults& faults_;
};

class FaultyFiles final : public FileSystem {
 public:
  explicit FaultyFiles(Faults& faults) : faults_(faults) {}
  std::unique_ptr<File> open(const std::string& path, OpenMode mode) override {
    return std::make_unique<FaultyFile>(under_.open(path, mode), faults_);
  }
  bool exists(const std::string& path) override { return under_.exists(path); }
  std::vector<std::string> list(const std::string& path) override { return under_.list(path); }
  void make_directory(const std::string& path) override { under_.make_directory(path); }
  void rename(const std::string& from, const std::string& to) override { under_.rename(from, to); }
  bool link(const std::string& from, const std::string& to) override {
    return links && under_.link(from, to);
  }
  void remove(const std::string& path) override { under_.remove(path); }
  void remove_directory(const std::string& path) override { under_.remove_directory(path); }
  void sync_directory(const std::string& path) override { under_.sync_directory(path); }
  uint64_t free_bytes(const std::string& path) override { return under_.free_bytes(path); }
  std::unique_ptr<File> lock(const std::string& path) override { return under_.lock(path); }

  bool links = true;

 private:
  Faults& faults_;
  FileSystem& under_ = system_files();
};

}  // namespace fixture
