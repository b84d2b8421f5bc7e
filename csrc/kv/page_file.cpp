#include "kv/page_file.h"

#include <algorithm>
#include <cstring>

#include "base/crc32c.h"
#include "base/error.h"
#include "kv/bytes.h"
#include "platform/memory.h"

namespace puna {
namespace {

constexpr uint64_t kMagic = 0x3153'4547'4150'5650;  // "PVPAGES1"
constexpr uint32_t kPageFileVersion = 1;
constexpr size_t kFixedBytes = 256, kSectionBytes = 40;
// More than any geometry needs; keeps a damaged header from asking for memory.
constexpr uint32_t kMostHeaderBytes = uint32_t{1} << 28;

size_t header_bytes(size_t sections, size_t pages) {
  return whole_blocks(kFixedBytes + sections * kSectionBytes + pages * sizeof(uint32_t) +
                      sizeof(uint32_t));
}

std::string name_of_seal(KvSeal seal, DType dtype) {
  if (seal == KvSeal::kInt8) return "int8";
  if (seal == KvSeal::kInt4) return "int4";
  return name_of(dtype);
}

// Gives the sections their places.
void place(std::vector<PageSection>& sections) {
  int64_t pages = 0;
  for (PageSection& section : sections) {
    section.first_page = pages;
    pages += section.pages;
  }
  uint64_t offset = header_bytes(sections.size(), static_cast<size_t>(pages));
  for (PageSection& section : sections) {
    section.offset = offset;
    offset += static_cast<uint64_t>(section.pages) * section.page_bytes;
  }
}

std::vector<std::byte> encode(const KvIdentity& identity, const PageFileHeader& header) {
  const KvGeometry& geometry = identity.geometry;
  const size_t bytes = header_bytes(header.sections.size(), header.checksums.size());
  ByteWriter out;
  out.put(kMagic).put(kPageFileVersion).put(static_cast<uint32_t>(bytes));
  out.put(static_cast<uint32_t>(header.kind));
  out.put(static_cast<uint32_t>(geometry.layout.dtype)).put(static_cast<uint32_t>(geometry.seal));
  out.put(static_cast<uint32_t>(kPageTokens));
  out.put(static_cast<uint64_t>(geometry.layout.kv_heads));
  out.put(static_cast<uint64_t>(geometry.layout.head_dim));
  out.put(identity.model).put(identity.root());
  out.put(header.begin).put(header.end).put(header.parent).put(header.chain);
  out.put(static_cast<uint32_t>(header.sections.size()));
  out.put(static_cast<uint32_t>(header.checksums.size()));
  out.pad(kFixedBytes);
  for (const PageSection& section : header.sections)
    out.put(section.layer)
        .put(static_cast<uint64_t>(section.kind))
        .put(section.pages)
        .put(section.page_bytes)
        .put(section.offset);
  for (const uint32_t checksum : header.checksums) out.put(checksum);
  out.pad(bytes - sizeof(uint32_t));
  out.put(crc32c(out.bytes().data(), out.size()));
  return out.bytes();
}

}  // namespace

void mismatch(const std::string& path, const std::string& reason) {
  fail(ErrorCode::kSessionMismatch, "[session] ", path, " ", reason);
}

const PageSection* PageFileHeader::find(int64_t layer, PageKind kind) const {
  for (const PageSection& section : sections)
    if (section.layer == layer && section.kind == kind) return &section;
  return nullptr;
}

std::vector<PageSection> chunk_sections(const KvGeometry& geometry) {
  std::vector<PageSection> sections;
  for (size_t layer = 0; layer < geometry.chunk.size(); ++layer)
    if (geometry.global(layer))
      sections.push_back({static_cast<int64_t>(layer), PageKind::kSealed,
                          geometry.unit() / kPageTokens, geometry.sealed_bytes(), 0, 0});
  place(sections);
  return sections;
}

std::vector<PageSection> tail_sections(const KvGeometry& geometry, int64_t begin, int64_t end) {
  std::vector<PageSection> sections;
  for (size_t layer = 0; layer < geometry.chunk.size(); ++layer) {
    const auto index = static_cast<int64_t>(layer);
    if (geometry.global(layer)) {
      const int64_t sealed = (end - begin) / kPageTokens;
      const int64_t open = pages_for(end - begin) - sealed;
      if (sealed > 0)
        sections.push_back({index, PageKind::kSealed, sealed, geometry.sealed_bytes(), 0, 0});
      if (open > 0) sections.push_back({index, PageKind::kOpen, open, geometry.open_bytes(), 0, 0});
    } else if (const int64_t held = end % geometry.chunk[layer]; held > 0) {
      sections.push_back({index, PageKind::kOpen, pages_for(held), geometry.open_bytes(), 0, 0});
    }
  }
  place(sections);
  return sections;
}

uint64_t page_file_bytes(std::span<const PageSection> sections) {
  if (sections.empty()) return header_bytes(0, 0);
  const PageSection& last = sections.back();
  return last.offset + static_cast<uint64_t>(last.pages) * last.page_bytes;
}

void write_page_file(FileSystem& files, const std::string& directory, const std::string& name,
                     const KvIdentity& identity, PageFileHeader& header,
                     std::span<const void* const> pages, const std::function<void()>& ready) {
  header.checksums.clear();
  for (const PageSection& section : header.sections)
    for (int64_t i = 0; i < section.pages; ++i)
      header.checksums.push_back(crc32c(pages[section.first_page + i], section.page_bytes));
  header.file_bytes = page_file_bytes(header.sections);
  const std::vector<std::byte> encoded = encode(identity, header);
  header.digest = Sha256::of(encoded.data(), encoded.size());

  const auto write = [&](File& file) {
    file.reserve(header.file_bytes);
    // Direct writes want aligned memory, which pages are and a vector is not.
    const Memory block(encoded.size());
    std::memcpy(block.data(), encoded.data(), encoded.size());
    const File::Part head{static_cast<const std::byte*>(block.data()), encoded.size()};
    file.write({&head, 1}, 0);
    for (const PageSection& section : header.sections) {
      std::vector<File::Part> parts;
      for (int64_t i = 0; i < section.pages; ++i)
        parts.push_back(
            {static_cast<const std::byte*>(pages[section.first_page + i]), section.page_bytes});
      file.write(parts, section.offset);
    }
  };
  replace_file(files, directory + "/" + name, OpenMode::kWriteDirect, write, ready);
  files.sync_directory(directory);
}

PageFileHeader read_page_file_header(FileSystem& files, const std::string& path,
                                     const KvIdentity& identity) {
  const auto file = files.open(path, OpenMode::kRead);
  std::vector<std::byte> bytes(kPageAlignment);
  if (file->read(bytes.data(), bytes.size(), 0) != bytes.size()) mismatch(path, "is cut short");
  ByteReader start(bytes);
  if (start.get<uint64_t>() != kMagic) mismatch(path, "is not a file of KV pages, or is damaged");
  const auto version = start.get<uint32_t>();
  const auto size = start.get<uint32_t>();
  if (version != kPageFileVersion)
    mismatch(path, "has version " + std::to_string(version) + " of the format, this puna reads " +
                       std::to_string(kPageFileVersion));
  if (size % kPageAlignment != 0 || size == 0 || size > kMostHeaderBytes)
    mismatch(path, "is damaged: a header of " + std::to_string(size) + " bytes");
  bytes.resize(size);
  if (file->read(bytes.data(), bytes.size(), 0) != bytes.size()) mismatch(path, "is cut short");
  uint32_t checksum = 0;
  std::memcpy(&checksum, bytes.data() + size - sizeof checksum, sizeof checksum);
  if (crc32c(bytes.data(), size - sizeof checksum) != checksum)
    mismatch(path, "is damaged: its header does not have the checksum that it should");

  PageFileHeader header;
  header.digest = Sha256::of(bytes.data(), bytes.size());
  ByteReader in(bytes);
  (void)in.get<uint64_t>();  // magic, version and size again
  (void)in.get<uint64_t>();
  header.kind = static_cast<PageFileKind>(in.get<uint32_t>());
  const KvGeometry& geometry = identity.geometry;
  const auto dtype = static_cast<DType>(in.get<uint32_t>());
  const auto seal = static_cast<KvSeal>(in.get<uint32_t>());
  const auto page_tokens = in.get<uint32_t>();
  const auto kv_heads = in.get<int64_t>(), head_dim = in.get<int64_t>();
  const Digest model = in.digest(), root = in.digest();
  if (model != identity.model) mismatch(path, "belongs to another model");
  if (dtype != geometry.layout.dtype || seal != geometry.seal)
    mismatch(path, "holds keys and values in " + name_of_seal(seal, dtype) +
                       ", the model was loaded with kv=" +
                       name_of_seal(geometry.seal, geometry.layout.dtype));
  if (root != identity.root() || page_tokens != kPageTokens ||
      kv_heads != geometry.layout.kv_heads || head_dim != geometry.layout.head_dim)
    mismatch(path, "belongs to a model of other layers or heads");
  header.begin = in.get<int64_t>();
  header.end = in.get<int64_t>();
  header.parent = in.digest();
  header.chain = in.digest();
  const auto section_count = in.get<uint32_t>(), page_count = in.get<uint32_t>();
  if (header.begin < 0 || header.end < header.begin ||
      header_bytes(section_count, page_count) != size)
    mismatch(path, "is damaged: its header contradicts itself");
  header.sections = header.kind == PageFileKind::kChunk
                        ? chunk_sections(geometry)
                        : tail_sections(geometry, header.begin, header.end);
  ByteReader table(std::span<const std::byte>(bytes).subspan(kFixedBytes));
  bool fits = header.sections.size() == section_count;
  for (size_t i = 0; fits && i < section_count; ++i) {
    const PageSection& expected = header.sections[i];
    fits = table.get<int64_t>() == expected.layer;
    fits &= table.get<uint64_t>() == static_cast<uint64_t>(expected.kind);
    fits &= table.get<int64_t>() == expected.pages;
    fits &= table.get<uint64_t>() == expected.page_bytes;
    fits &= table.get<uint64_t>() == expected.offset;
  }
  int64_t pages = 0;
  for (const PageSection& section : header.sections) pages += section.pages;
  if (!fits || pages != page_count) mismatch(path, "has other pages than its model's layers");
  for (uint32_t i = 0; i < page_count; ++i) header.checksums.push_back(table.get<uint32_t>());
  header.file_bytes = page_file_bytes(header.sections);
  if (file->facts().bytes != header.file_bytes)
    mismatch(path, "is damaged: it has " + std::to_string(file->facts().bytes) + " bytes, " +
                       std::to_string(header.file_bytes) + " were written");
  return header;
}

void check_page(const PageFileHeader& header, const PageSection& section, int64_t index,
                const void* page, const std::string& path) {
  if (crc32c(page, section.page_bytes) == header.checksums[section.first_page + index]) return;
  mismatch(path, "is damaged: page " + std::to_string(index) + " of layer " +
                     std::to_string(section.layer) + ", for the tokens from " +
                     std::to_string(header.begin + index * kPageTokens) +
                     " on, does not have the checksum that it should");
}

}  // namespace puna
