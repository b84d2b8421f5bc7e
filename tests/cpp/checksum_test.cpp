// SHA-256 and CRC-32C against published vectors and against plain forms of themselves.
#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "base/crc32c.h"
#include "base/sha256.h"
#include "check.h"

using namespace puna;

namespace {

std::string sha(const std::string& text) { return hex(Sha256::of(text)); }

// One bit at a time.
uint32_t plain_crc(const std::vector<uint8_t>& data) {
  uint32_t crc = ~0u;
  for (const uint8_t byte : data) {
    crc ^= byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? crc >> 1 ^ 0x82f63b78 : crc >> 1;
  }
  return ~crc;
}

}  // namespace

// FIPS 180-4 examples, and NIST's message of a million letters.
TEST(sha256_vectors) {
  CHECK_EQ(sha(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK_EQ(sha("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK_EQ(sha("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
           "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  CHECK_EQ(sha(std::string(1'000'000, 'a')),
           "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(sha256_does_not_depend_on_how_it_is_fed) {
  std::mt19937 random(1);
  std::string text;
  for (int length = 0; length < 200; ++length) {
    Sha256 pieces;
    for (size_t at = 0; at < text.size();) {
      const size_t taken = std::min<size_t>(text.size() - at, 1 + random() % 70);
      pieces.update(text.data() + at, taken);
      at += taken;
    }
    CHECK_EQ(hex(pieces.digest()), sha(text));
    text += static_cast<char>(random());
  }
  const uint8_t bytes[8] = {8, 7, 6, 5, 4, 3, 2, 1};
  CHECK(Sha256().number(0x0102030405060708).digest() == Sha256::of(bytes, 8));
}

TEST(sha256_forms_agree_at_every_length) {
  std::mt19937 random(3);
  std::string text;
  for (int length = 0; length < 600; ++length) {
    CHECK_EQ(hex(Sha256(/*plainly=*/true).update(text.data(), text.size()).digest()), sha(text));
    text += static_cast<char>(random());
  }
}

// RFC 3720, B.4.
TEST(crc32c_vectors) {
  std::vector<uint8_t> data(32, 0);
  CHECK_EQ(crc32c(data.data(), 32), 0x8a9136aau);
  data.assign(32, 0xff);
  CHECK_EQ(crc32c(data.data(), 32), 0x62a8ab43u);
  for (size_t i = 0; i < 32; ++i) data[i] = static_cast<uint8_t>(i);
  CHECK_EQ(crc32c(data.data(), 32), 0x46dd794eu);
  CHECK_EQ(crc32c(nullptr, 0), 0u);
}

TEST(crc32c_forms_agree_at_every_length) {
  std::mt19937 random(2);
  std::vector<uint8_t> data;
  for (const size_t length : {1, 7, 8, 9, 63, 1024, 3071, 3072, 3073, 6144, 9999}) {
    data.resize(length);
    for (uint8_t& byte : data) byte = static_cast<uint8_t>(random());
    const uint32_t expected = plain_crc(data);
    CHECK_EQ(crc32c(data.data(), length), expected);
    CHECK_EQ(crc32c_by_table(data.data(), length), expected);
    const size_t cut = random() % (length + 1);
    CHECK_EQ(crc32c(data.data() + cut, length - cut, crc32c(data.data(), cut)), expected);
    CHECK_EQ(crc32c_by_table(data.data() + cut, length - cut, crc32c(data.data(), cut)), expected);
  }
}
