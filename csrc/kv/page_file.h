// Files of KV pages. A chunk file holds the sealed pages of every global layer for one unit of
// tokens (KvGeometry::unit()); a tail file holds the pages of every layer after the last such unit.
//
//   header: kHeaderBlock bytes or more, the last four of them the CRC-32C of the others
//   sections, one per layer and kind of page: its pages one after another
//
// Every section begins at a multiple of 4 KiB, and every page is a whole number of such blocks, so
// that pages are read by direct I/O; each has a CRC-32C in the header. No byte of the file is
// outside a checksum. Numbers are little-endian. docs/formats.md has the table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "base/sha256.h"
#include "kv/kv_chain.h"
#include "platform/file_system.h"

namespace puna {

enum class PageFileKind : uint32_t { kChunk = 1, kTail = 2 };
enum class PageKind : uint32_t { kSealed = 1, kOpen = 2 };

struct PageSection {
  int64_t layer = 0;
  PageKind kind = PageKind::kSealed;
  int64_t pages = 0;
  uint64_t page_bytes = 0;
  uint64_t offset = 0;     // in the file
  int64_t first_page = 0;  // in PageFileHeader::checksums
};

struct PageFileHeader {
  PageFileKind kind = PageFileKind::kChunk;
  int64_t begin = 0, end = 0;  // tokens
  Digest parent{}, chain{};    // names of the prefixes up to begin and end
  std::vector<PageSection> sections;
  std::vector<uint32_t> checksums;  // of the pages, section by section
  uint64_t file_bytes = 0;
  Digest digest{};  // of the header as it lies in the file, and so of everything in it

  const PageSection* find(int64_t layer, PageKind kind) const;
};

// The sections that a file of this geometry must have.
std::vector<PageSection> chunk_sections(const KvGeometry& geometry);
std::vector<PageSection> tail_sections(const KvGeometry& geometry, int64_t begin, int64_t end);
uint64_t page_file_bytes(std::span<const PageSection> sections);

// Writes `directory`/`name` by replace_file(), durably. `pages`: in the order of header.sections,
// whose places, checksums, size and digest it fills in.
void write_page_file(FileSystem& files, const std::string& directory, const std::string& name,
                     const KvIdentity& identity, PageFileHeader& header,
                     std::span<const void* const> pages,
                     const std::function<void()>& ready = nullptr);

// Throws SessionMismatch: what `path` is or has, that it should not.
[[noreturn]] void mismatch(const std::string& path, const std::string& reason);

// Throws SessionMismatch with the reason if the file is not of this identity, or damaged.
PageFileHeader read_page_file_header(FileSystem& files, const std::string& path,
                                     const KvIdentity& identity);

// Throws SessionMismatch unless the bytes are those of page `index` of the section.
void check_page(const PageFileHeader& header, const PageSection& section, int64_t index,
                const void* page, const std::string& path);

}  // namespace puna
