"""Writes csrc/text/unicode_tables.inc: the classes of characters of the pre-tokeniser.

    pip install "unicodedata2==16.*" && python tools/make_unicode_tables.py

Unicode 16, because that is what the regular expressions of tiktoken 0.14 and tokenizers 0.23
follow: their ids agree with these tables on every code point, and with those of Unicode 17 they
differ on the 4,699 characters that it adds. tests/test_tokenizer.py notices when they move on.
"""

from pathlib import Path

import unicodedata2

BLOCK = 128
# The order of enum CharClass in csrc/text/unicode_classes.h.
OTHER, UPPER, LOWER, LETTER, MARK, NUMBER, SPACE, NEWLINE = range(8)
CATEGORIES = {"Lu": UPPER, "Lt": UPPER, "Ll": LOWER, "Lm": LETTER, "Lo": LETTER}
# White_Space of PropList.txt; Python's str.isspace() has four more.
WHITE_SPACE = [
    *range(0x09, 0x0E),
    *(0x20, 0x85, 0xA0, 0x1680),
    *range(0x2000, 0x200B),
    *(0x2028, 0x2029, 0x202F, 0x205F, 0x3000),
]


def class_of(code: int) -> int:
    """The class of one code point."""
    if code in (0x0A, 0x0D):
        return NEWLINE
    if code in WHITE_SPACE:
        return SPACE
    category = unicodedata2.category(chr(code))
    if category[0] == "M":
        return MARK
    if category[0] == "N":
        return NUMBER
    return CATEGORIES.get(category, OTHER)


def main() -> None:
    """Writes the file."""
    assert unicodedata2.unidata_version.startswith("16."), unicodedata2.unidata_version
    classes = [class_of(code) for code in range(0x110000)]
    blocks: dict[tuple[int, ...], int] = {}
    index = []
    for start in range(0, len(classes), BLOCK):
        # Two classes of four bits to a byte, the even code point in the low half.
        block = classes[start : start + BLOCK]
        packed = tuple(low | high << 4 for low, high in zip(block[0::2], block[1::2], strict=True))
        index.append(blocks.setdefault(packed, len(blocks)))
    assert len(blocks) < 65536
    lines = [
        f"// Made by tools/make_unicode_tables.py from Unicode {unicodedata2.unidata_version}.",
        "// clang-format off",
        f"constexpr uint16_t kBlockOfCodePoint[{len(index)}] = {{",
        *rows(index),
        "};",
        f"constexpr uint8_t kClassesOfBlock[{len(blocks)}][{BLOCK // 2}] = {{",
        *("{" + ",".join(map(str, block)) + "}," for block in blocks),
        "};",
        "// clang-format on",
    ]
    target = Path(__file__).parent.parent / "csrc" / "text" / "unicode_tables.inc"
    target.write_text("\n".join(lines) + "\n")


def rows(numbers: list[int], width: int = 64) -> list[str]:
    """Numbers in lines of `width`."""
    return [",".join(map(str, numbers[i : i + width])) + "," for i in range(0, len(numbers), width)]


if __name__ == "__main__":
    main()
