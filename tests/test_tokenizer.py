"""The tokenizer against tiktoken and Meta's own special tokens, on Llama 4's ranks.

Meta's tokenizer.model comes from the package llama-models; it is not part of this repository.
"""

from __future__ import annotations

import importlib.resources
import itertools
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import puna
from conftest import skip_or_fail

# Pieces that meet at the borders of the regular expression's alternatives.
BLANKS = [
    *(" ", "  ", "\n", "\r", "\r\n", "\t", "\u3000", "\xa0", "\u2028", "\x85", "\x0b", "\x1c"),
    *("\u200b", "\ufeff", "\x00"),
]
CONTRACTIONS = ["'s", "'S", "'\u017f", "'ll", "'LL", "'lL", "'re", "'ve", "'t", "'d", "'m", "'"]
LETTERS = [
    *(
        "a",
        "b",
        "A",
        "B",
        "é",
        "É",
        "E\u0301",
        "\u0301",
        "日",
        "本",
        "ก",
        "ʰ",
        "ǅ",
        "ß",
        "\u017f",
        "ﬁ",
    ),
    *("İ", "\u0131", "ab", "The", "the ", "ING", "ing", "क", "\u094d", "ष", "\u0640"),
]
NUMBERS = ["1", "12", "123", "1234", "½", "²", "Ⅷ", "٣"]
SIGNS = [
    *("!", "!!", "/", "//", "\n/", "/\n", ".", "…", "—", "<|", "|>", "\ufffd", "\U000e0001"),
    *("😀", "❤\ufe0f", "👩\u200d💻", "\u200d", "\U0001f1e6\U0001f1e8"),
]
ALPHABET = [*BLANKS, *CONTRACTIONS, *LETTERS, *NUMBERS, *SIGNS]

EDGE_CASES = [
    "",
    *("don'Tell", "it''s", "a'\u017f x", "IT'\u017f", "we'LL", "a'r", "a'", "'s"),
    *("日A b", "日Ab", "A日B", "ÉCOLE", "E\u0301COLE", "e\u0301A", "ǅabc", "Aʰ", "AB\u0301"),
    *("❤\ufe0f", "😀❤\ufe0f", "1\ufe0f\u20e3", "👍🏽", "👨\u200d👩\u200d👧"),
    *("\n   x", "\n   \n", "x \n y", "x  ", "\r\n\r\n", "\tx", "\t!", "\xa0x", "\u3000x", "\vx"),
    *("\x1cx", "\u200bx", "\ufeffx", "//\n/!", "!!\r\n\r\n/", "a\x00b", "\ufffd", "\ufffe\uffff"),
    *("\u088f", "\U000323b0", "\U0010ffff"),
    *("<|eot|>", "<|eot|", "<<|eot|>>", "x  <|eot|>", "x  <y", "a<|eot|>b", "<|eot|><|image|>"),
    *("1" * n for n in range(1, 9)),
    *(" " * n + tail for n in range(1, 201) for tail in ("", "\n", "a", "!", "<|eot|>")),
]


@pytest.fixture(scope="module")
def meta_file() -> Path:
    try:
        folder = importlib.resources.files("llama_models")
    except ModuleNotFoundError:
        skip_or_fail("llama-models is not installed: pip install --no-deps llama-models==0.3.0")
    return Path(str(folder)) / "llama4" / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer(meta_file: Path) -> puna.Tokenizer:
    return puna.Tokenizer.from_file(str(meta_file))


@pytest.fixture(scope="module")
def meta(meta_file: Path) -> Any:
    """Meta's own tokenizer; its `model` is tiktoken's Encoding."""
    try:
        from llama_models.llama4.tokenizer import Tokenizer
    except ModuleNotFoundError as missing:
        skip_or_fail(f"{missing.name} is not installed, which llama_models' tokenizer needs")
    return Tokenizer(meta_file)


@pytest.fixture(scope="module")
def reference(meta: Any) -> Any:
    return meta.model


def fuzzed(count: int, alphabet: list[str], seed: int = 0) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 14)))


def assert_same_ids(tokenizer: puna.Tokenizer, reference: Any, texts: Iterable[str]) -> None:
    different = [
        text for text in texts if tokenizer.encode(text) != reference.encode_ordinary(text)
    ]
    assert not different, f"{len(different)} texts differ, the shortest: " + ascii(
        sorted(different, key=len)[:5]
    )


def probes_of_code_points(step: int) -> Iterator[str]:
    for code in range(0, 0x110000, step):
        if not 0xD800 <= code < 0xE000:
            c = chr(code)
            yield f"A{c}a b{c}B 1{c}1 !{c}!{c}\n {c} x {c}'s"


def test_vocabulary_is_metas(tokenizer: puna.Tokenizer, meta: Any, reference: Any) -> None:
    assert tokenizer.vocab_size == reference.n_vocab == 202_048
    assert tokenizer.special_tokens == meta.special_tokens
    for token in range(tokenizer.vocab_size):
        assert tokenizer.decode_bytes([token]) == reference.decode_single_token_bytes(token)


def test_edge_cases(tokenizer: puna.Tokenizer, reference: Any) -> None:
    assert_same_ids(tokenizer, reference, EDGE_CASES)


def test_sampled_code_points(tokenizer: puna.Tokenizer, reference: Any) -> None:
    # 17 is no divisor of a block's size: over the planes it meets every place of a block.
    assert_same_ids(tokenizer, reference, probes_of_code_points(17))


@pytest.mark.nightly
def test_all_code_points(tokenizer: puna.Tokenizer, reference: Any) -> None:
    assert_same_ids(tokenizer, reference, probes_of_code_points(1))


def test_fuzzed_texts(tokenizer: puna.Tokenizer, reference: Any) -> None:
    assert_same_ids(tokenizer, reference, fuzzed(20_000, ALPHABET))


@pytest.mark.nightly
def test_many_fuzzed_texts(tokenizer: puna.Tokenizer, reference: Any) -> None:
    assert_same_ids(tokenizer, reference, fuzzed(1_000_000, ALPHABET, seed=1))


def test_every_token_as_text(tokenizer: puna.Tokenizer, reference: Any) -> None:
    rng = random.Random(0)
    texts = []
    for token in range(0, 200_000, 7):
        try:
            texts.append(reference.decode_single_token_bytes(token).decode())
        except UnicodeDecodeError:
            continue
    pairs = (rng.choice(texts) + rng.choice(texts) for _ in range(20_000))
    assert_same_ids(tokenizer, reference, itertools.chain(texts, pairs))


def test_source_files(tokenizer: puna.Tokenizer, reference: Any) -> None:
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py")) + sorted(folder.glob("encodings/*.py"))
    assert_same_ids(tokenizer, reference, (file.read_text("utf-8", "replace") for file in files))


@pytest.mark.parametrize("unit", ["a", "\n", "7", "-", "日", "ab日A", "'s"])
def test_long_pieces(tokenizer: puna.Tokenizer, reference: Any, unit: str) -> None:
    text = unit * (200_000 // len(unit.encode()))
    assert_same_ids(tokenizer, reference, [text])


def test_long_random_piece(tokenizer: puna.Tokenizer, reference: Any) -> None:
    text = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=100_000))
    assert_same_ids(tokenizer, reference, [text])


def test_long_run_of_spaces(tokenizer: puna.Tokenizer) -> None:
    # tiktoken's regular expression overflows its stack here.
    text = " " * 1_000_000
    ids = tokenizer.encode(text)
    assert len(ids) == 1_000_000 // 64
    assert tokenizer.decode(ids) == text


def test_special_tokens_of_text(tokenizer: puna.Tokenizer, reference: Any, meta: Any) -> None:
    names = list(meta.special_tokens)
    texts = [*EDGE_CASES, *names, "".join(names)]
    texts += fuzzed(2_000, [*ALPHABET, "<|eot|>", "<|eot|", "<|image|>", "<|begin_of_text|>"])
    for text in texts:
        ids = tokenizer.encode(text, allowed_special="all")
        assert ids == reference.encode(text, allowed_special="all")
        some = {"<|eot|>", "<|image|>"}
        wanted = reference.encode(text, allowed_special=some, disallowed_special=())
        assert tokenizer.encode(text, allowed_special=some) == wanted


def test_plain_text_never_becomes_special(tokenizer: puna.Tokenizer, meta: Any) -> None:
    special = set(meta.special_tokens.values())
    for name in meta.special_tokens:
        ids = tokenizer.encode(f"a{name}b")
        assert not special & set(ids)
        assert tokenizer.decode(ids) == f"a{name}b"


def test_random_ids_decode_as_tiktoken(tokenizer: puna.Tokenizer, reference: Any) -> None:
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(1, 300))]
        assert tokenizer.decode_bytes(ids) == reference.decode_bytes(ids)
        assert tokenizer.decode(ids) == reference.decode(ids)


def test_streamed_ids_decode_as_tiktoken(tokenizer: puna.Tokenizer, reference: Any) -> None:
    rng = random.Random(0)
    single_bytes = range(256)
    for _ in range(1000):
        ids = [
            rng.choice(single_bytes) if rng.random() < 0.7 else rng.randrange(tokenizer.vocab_size)
            for _ in range(rng.randint(1, 60))
        ]
        decoder = tokenizer.stream_decoder(skip_special=False)
        pieces = [decoder.push(token) for token in ids]
        assert "".join(pieces) + decoder.finish() == reference.decode(ids)


def test_stream_decoder_stops(tokenizer: puna.Tokenizer) -> None:
    text = "One, two, three. <|eot|> Four"
    for stop in ("three", ", t", " Four", "O"):
        decoder = tokenizer.stream_decoder(stop=[stop, "nowhere"])
        shown = ""
        for token in tokenizer.encode(text):
            shown += decoder.push(token)
            if decoder.stopped:
                break
        assert decoder.stopped and decoder.stop == stop
        assert shown + decoder.finish() == text[: text.index(stop)]


def test_bytes_are_read_as_python_replaces_them(tokenizer: puna.Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(2000):
        raw = bytes(rng.choice([0x41, 0x80, 0xC3, 0xE0, 0xED, 0xA0, 0xF0, 0x9F, 0xF4, 0xFF])
                    for _ in range(rng.randint(1, 12)))  # fmt: skip
        assert tokenizer.encode(raw) == tokenizer.encode(raw.decode("utf-8", "replace"))


def test_bad_arguments(tokenizer: puna.Tokenizer) -> None:
    with pytest.raises(puna.InvalidRequest, match="202048"):
        tokenizer.decode([202_048])
    with pytest.raises(puna.InvalidRequest):
        tokenizer.stream_decoder().push(-1)
    with pytest.raises(puna.InvalidRequest):
        tokenizer.stream_decoder(stop=[""])
    with pytest.raises(puna.InvalidRequest, match="no_such"):
        tokenizer.encode("a", allowed_special={"<|no_such|>"})
    with pytest.raises(TypeError):
        tokenizer.encode(3)  # type: ignore[arg-type]


def test_lone_surrogates_are_refused(tokenizer: puna.Tokenizer) -> None:
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("a\ud800")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"YQ== \xff\n")
    with pytest.raises(puna.ModelFormatError, match="line 1"):
        puna.Tokenizer.from_file(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
    with pytest.raises(puna.UnsupportedError, match="WordPiece"):
        puna.Tokenizer.from_file(str(tmp_path))
    with pytest.raises(puna.ModelNotFound):
        puna.Tokenizer.from_file(str(tmp_path / "nowhere"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tokenizer_json_gives_the_same_ids(
    tokenizer: puna.Tokenizer, meta: Any, meta_file: Path, tmp_path: Path
) -> None:
    """A tokenizer.json as Hugging Face's converter writes it from the same ranks."""
    try:
        from transformers.convert_slow_tokenizer import TikTokenConverter
    except ModuleNotFoundError as missing:
        skip_or_fail(f"{missing.name} is not installed")
    names = sorted(meta.special_tokens, key=meta.special_tokens.__getitem__)
    options = {"pattern": meta.O200K_PATTERN, "extra_special_tokens": names}
    TikTokenConverter(str(meta_file), **options).converted().save(str(tmp_path / "tokenizer.json"))
    converted = puna.Tokenizer.from_file(str(tmp_path))
    assert converted.vocab_size == tokenizer.vocab_size
    assert converted.special_tokens == tokenizer.special_tokens
    for text in itertools.chain(EDGE_CASES, fuzzed(20_000, ALPHABET), probes_of_code_points(101)):
        assert converted.encode(text) == tokenizer.encode(text)


def test_special_tokens_of_tokenizer_config(tmp_path: Path, meta_file: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(meta_file.read_bytes())
    config = {"added_tokens_decoder": {"200000": {"content": "<|only|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = puna.Tokenizer.from_file(str(tmp_path))
    assert tokenizer.special_tokens == {"<|only|>": 200_000}
    assert tokenizer.encode("a<|only|>", allowed_special="all")[-1] == 200_000
