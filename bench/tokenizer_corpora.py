"""The texts that tokenizers are measured on, made of installed packages and of a fixed seed.

    python bench/tokenizer_corpora.py FOLDER

English prose and docs are docstrings, code is the standard library; translations are those of
Django and Sphinx, which must be installed. The others are what tokenizers find hard.
"""

from __future__ import annotations

import ast
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PACKAGES = [
    Path(sysconfig.get_path("stdlib")),
    *(Path(p) for p in sys.path if "site-packages" in p),
]
LONG = 1_000_000
MULTILINGUAL = (
    *("fr", "de", "es", "pl", "el", "ar", "hi", "th", "vi", "he", "fa", "bn", "ta", "ka", "hy"),
    *("tr", "cs", "fi", "pt_BR", "ja", "ru", "zh_Hans", "ko", "uk"),
)
EAST_ASIAN = ("ja", "zh_Hans", "zh_Hant", "zh_CN", "zh_TW", "ko")


def docstrings() -> Iterator[str]:
    """Of more than a line."""
    for folder in reversed(PACKAGES):
        for file in sorted(folder.rglob("*.py")):
            try:
                tree = ast.parse(file.read_text("utf-8"))
            except (SyntaxError, ValueError, OSError, RecursionError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                    text = ast.get_docstring(node)
                    if text and len(text) > 120:
                        yield text


def joined(texts: Iterator[str], limit: int, between: str) -> str:
    """Texts up to a number of characters."""
    parts: list[str] = []
    size = 0
    for text in texts:
        parts.append(text)
        size += len(text)
        if size > limit:
            break
    return between.join(parts)[:limit]


def code() -> Iterator[str]:
    """Sources of the standard library."""
    for file in sorted(PACKAGES[0].rglob("*.py")):
        if "site-packages" not in file.parts:
            yield file.read_text("utf-8", "replace")


def prose(docs: str) -> str:
    """The lines of docstrings that read like prose, joined to paragraphs."""
    paragraphs = []
    for text in docs.split("\n\n"):
        lines = [line.strip() for line in text.splitlines()]
        lines = [line for line in lines if re.fullmatch(r"[A-Za-z][\w ,;:.'()-]{24,}", line)]
        if lines:
            paragraphs.append(" ".join(lines))
    return "\n".join(paragraphs)


def translations(*languages: str) -> str:
    """What the catalogues of installed packages say in some languages."""
    texts = []
    for language in languages:
        for folder in PACKAGES[1:]:
            for file in sorted(folder.glob(f"**/locale/{language}/LC_MESSAGES/*.po")):
                catalogue = file.read_text("utf-8")
                for match in re.finditer(r'msgstr(?:\[\d\])? ((?:".*"\n)+)', catalogue):
                    texts.append("".join(ast.literal_eval(line) for line in match[1].splitlines()))
    return "\n".join(text for text in texts if text)


def corpora() -> dict[str, str]:
    """Name to text."""
    rng = random.Random(1)

    def drawn(alphabet: str, count: int) -> str:
        return "".join(rng.choices(alphabet, k=count))

    def number() -> str:
        whole = rng.randint(0, 10 ** rng.randint(1, 7))
        return str(whole if rng.random() < 0.5 else round(rng.random() * 1000, 3))

    blanks = [" ", "  ", "\t", "\n", "    ", "\r\n", "\n\n", "        ", "x", "if", " a"]
    emoji = [
        *("👩\u200d💻", "😀", "❤\ufe0f", "👍🏽", "🇩🇪", "👨\u200d👩\u200d👧", " ", "!", "x"),
        *("1\ufe0f\u20e3", "🏴\u200d☠\ufe0f", "🤷\u200d♀\ufe0f"),
    ]
    docs = joined(docstrings(), 2 * LONG, "\n\n")
    noise = rng.randbytes(LONG // 2)
    return {
        "English prose": prose(docs),
        "source code": joined(code(), 2 * LONG, ""),
        "English docs": docs,
        "multilingual": translations(*MULTILINGUAL),
        "Japanese, Chinese, Korean": translations(*EAST_ASIAN),
        "Cyrillic": translations("ru", "uk", "bg", "sr", "mk", "be", "kk", "ky", "mn"),
        "numbers CSV": "\n".join(",".join(number() for _ in range(12)) for _ in range(25_000)),
        "digits, no break": drawn("0123456789", LONG),
        "white-space runs": "".join(rng.choice(blanks) * rng.randint(1, 6) for _ in range(200_000)),
        "emoji": "".join(rng.choice(emoji) for _ in range(120_000)),
        "one letter": "a" * LONG,
        "spaces": " " * LONG,
        "newlines": "\n" * LONG,
        "random a-z": drawn("abcdefghijklmnopqrstuvwxyz", LONG),
        "random punctuation": drawn("!@#$%^&*()-=+[]{}|;:<>,.?/", LONG),
        "random CJK, no break": drawn("".join(map(chr, range(0x4E00, 0x9FA5))), LONG // 3),
        "bytes as Latin-1": noise.decode("latin-1"),
        "bytes as UTF-8": noise.decode("utf-8", "replace"),
    }


def main() -> None:
    """Writes a file for each."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in corpora().items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8", newline="")
        print(f"{len(text.encode()):>9} bytes  {name}")


if __name__ == "__main__":
    main()
