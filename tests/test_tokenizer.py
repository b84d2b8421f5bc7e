"""The tokenizer against tiktoken and Meta's own special tokens, on Llama 4's ranks.

Meta's tokenizer.model comes from the package llama-models; it is not part of this repository.
"""

from __future__ import annotations

import gc
import importlib.resources
import itertools
import json
import random
import sys
import sysconfig
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import puna
from conftest import skip_or_fail
from puna.loading import demo_directory

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
        "ж",
        "Ж",
        "Σ",
        "λ",
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


def package_texts(limit: int) -> Iterator[str]:
    """Texts of about 1 MB, up to `limit` characters, out of what is installed: code and its English
    comments, translations, and data."""
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    folders += [Path(path) for path in sys.path if path.endswith("site-packages")]
    kinds = ("*.py", "*.po", "*.md", "*.rst", "*.json", "*.pyi", "*.h", "*.txt")
    files = (file for folder in dict.fromkeys(folders) for kind in kinds
             for file in sorted(folder.rglob(kind)))  # fmt: skip
    text, total = "", 0
    for file in files:
        try:
            text += file.read_bytes()[:2_000_000].decode("utf-8", "replace")
        except OSError:
            continue
        if len(text) > 1_000_000:
            yield text
            total += len(text)
            if total > limit:
                return
            text = ""
    if text:
        yield text


# Prose, code, and characters of many scripts: the standard library's own texts.
CORPUS_SAMPLE = [
    (Path(sysconfig.get_path("stdlib")) / name).read_text("utf-8", "replace")[:200_000]
    for name in ("argparse.py", "html/entities.py", "pydoc_data/topics.py", "encodings/cp1251.py")
] + [
    "".join(map(chr, range(0xA0, 0x3000))),
    "日本語のテキスト、中文文本。Русский текст и ещё. " * 300,
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
        text for text in texts if tokenizer.encode(text).tolist() != reference.encode_ordinary(text)
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
        assert ids.tolist() == reference.encode(text, allowed_special="all")
        some = {"<|eot|>", "<|image|>"}
        wanted = reference.encode(text, allowed_special=some, disallowed_special=())
        assert tokenizer.encode(text, allowed_special=some).tolist() == wanted


def test_plain_text_never_becomes_special(tokenizer: puna.Tokenizer, meta: Any) -> None:
    special = set(meta.special_tokens.values())
    for name in meta.special_tokens:
        ids = tokenizer.encode(f"a{name}b")
        assert not special & set(ids.tolist())
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
        replaced = tokenizer.encode(raw.decode("utf-8", "replace"))
        assert np.array_equal(tokenizer.encode(raw), replaced)


def test_bad_arguments(tokenizer: puna.Tokenizer) -> None:
    with pytest.raises(puna.InvalidRequest, match="202048"):
        tokenizer.decode([202_048])
    with pytest.raises(puna.InvalidRequest):
        tokenizer.stream_decoder().push(-1)
    with pytest.raises(puna.InvalidRequest):
        tokenizer.stream_decoder(stop=[""])
    with pytest.raises(puna.InvalidRequest, match="no_such"):
        tokenizer.encode("a", allowed_special={"<|no_such|>"})
    with pytest.raises(puna.InvalidRequest, match='"all of it"'):
        tokenizer.encode("a", cut="all of it")
    with pytest.raises(puna.InvalidRequest, match="threads is 0"):
        tokenizer.encode("a", threads=0)
    for wrong in (3, ["a", 3]):
        with pytest.raises(TypeError):
            tokenizer.encode(wrong)  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        tokenizer.decode(["a"])  # type: ignore[list-item]
    for unknown in ([1 << 40], [-1], np.array([1 << 40]), np.array([-1], np.int64)):
        with pytest.raises(puna.InvalidRequest):
            tokenizer.decode(unknown)


def test_a_str_is_its_utf8_however_wide_its_characters(tokenizer: puna.Tokenizer) -> None:
    rng = random.Random(0)
    texts = [*EDGE_CASES, *CORPUS_SAMPLE, "é" + "a" * 200_000 + "日" * 50_000, "é" * 70_000]
    for limit in (0x80, 0x100, 0x800, 0xD800, 0x110000):
        for _ in range(300):
            codes = [rng.randrange(rng.choice((0x80, limit))) for _ in range(rng.randint(1, 80))]
            texts.append("".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000))
    for text in texts:
        for special in ("none", "all"):
            ids = tokenizer.encode(text, allowed_special=special)
            assert np.array_equal(ids, tokenizer.encode(text.encode(), allowed_special=special))
            assert tokenizer.decode(ids) == text
        assert tokenizer.count(text) == tokenizer.count(text.encode())


def test_arguments_of_other_types() -> None:
    """They are refused; with pybind11's keep_alive some ended the process."""
    tokenizer = puna.Tokenizer.from_file(demo_directory())
    for call in (
        lambda: tokenizer.stream_encoder(max_pending="x"),  # type: ignore[arg-type]
        lambda: tokenizer.stream_encoder(max_pending=-1),
        lambda: tokenizer.stream_decoder(stop=5),  # type: ignore[arg-type]
        lambda: puna.Tokenizer.stream_encoder(5),  # type: ignore[arg-type]
        lambda: type(tokenizer.stream_decoder()).copy(5),
        lambda: tokenizer.encode("a", allowed_special=5),  # type: ignore[arg-type]
        lambda: tokenizer.encode("a", allowed_special=[5]),  # type: ignore[list-item]
    ):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(puna.InvalidRequest, match="no special token"):
        tokenizer.encode("a", allowed_special=["\ud800"])


def test_encoders_keep_their_tokenizer() -> None:
    made = [puna.Tokenizer.from_file(demo_directory()) for _ in range(2)]
    encoder, decoder = made[0].stream_encoder(), made[1].stream_decoder().copy()
    kept = [weakref.ref(one) for one in made]
    ids = [*encoder.feed("a word"), *encoder.finish()]
    del made
    gc.collect()
    assert all(one() is not None for one in kept)
    assert [*encoder.feed("a word"), *encoder.finish()] == ids
    assert "".join(decoder.push(int(token)) for token in ids) + decoder.finish() == "a word"


def test_lone_surrogates_are_refused(tokenizer: puna.Tokenizer) -> None:
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("ids", ["ab", ["a"], [1.5], np.array([1.5]), np.array([[5]]), iter("a")])
def test_ids_that_are_no_numbers(ids: Any) -> None:
    tokenizer = puna.Tokenizer.from_file(demo_directory())
    with pytest.raises(TypeError, match=r"cannot be interpreted as an integer|only integer scalar"):
        tokenizer.decode(ids)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(puna.ModelNotFound, match=r"neither tokenizer.json nor tokenizer.model"):
        puna.Tokenizer.from_file(tmp_path)  # a Path
    (tmp_path / "tokenizer.model").write_bytes(b"YQ== \xff\n")
    with pytest.raises(puna.ModelFormatError, match="line 1"):
        puna.Tokenizer.from_file(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
    with pytest.raises(puna.UnsupportedError, match="WordPiece"):
        puna.Tokenizer.from_file(str(tmp_path))
    with pytest.raises(puna.ModelNotFound):
        puna.Tokenizer.from_file(str(tmp_path / "nowhere"))
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(puna.ModelFormatError, match=r"has 2147483648 bytes; .* at most 1073741824"):
        puna.Tokenizer.from_file(tmp_path / "large.json")


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
        assert np.array_equal(converted.encode(text), tokenizer.encode(text))


def test_a_tokenizer_from_the_cache_is_the_one_that_was_built(
    tokenizer: puna.Tokenizer, meta_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> tuple[puna.Tokenizer, float]:
        start = time.process_time()
        loaded = puna.Tokenizer.from_file(str(meta_file))
        return loaded, time.process_time() - start

    monkeypatch.setenv("PUNA_CACHE", "off")
    built, cold = load()
    monkeypatch.setenv("PUNA_CACHE", str(tmp_path / "cache"))
    load()
    (kept,) = (tmp_path / "cache" / "tokenizers").iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600
    content = kept.read_bytes()
    found, warm = min((load() for _ in range(3)), key=lambda run: run[1])
    assert warm < cold / 3
    assert found.vocab_size == built.vocab_size
    assert found.special_tokens == built.special_tokens
    for text in [*EDGE_CASES, *fuzzed(3000, ALPHABET, seed=7), *CORPUS_SAMPLE, " " * 50_000]:
        ids = built.encode(text, allowed_special="all")
        assert np.array_equal(found.encode(text, allowed_special="all"), ids)
        assert found.decode(ids) == text
    for text in CORPUS_SAMPLE:
        assert stream(found, text, random_cuts(len(text), 700))[0] == built.encode(text).tolist()
    # What is damaged is built anew, and kept.
    kept.write_bytes(content[:-1])
    assert np.array_equal(load()[0].encode(CORPUS_SAMPLE[0]), built.encode(CORPUS_SAMPLE[0]))
    assert kept.read_bytes() == content


def test_special_tokens_of_tokenizer_config(tmp_path: Path, meta_file: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(meta_file.read_bytes())
    config = {"added_tokens_decoder": {"200000": {"content": "<|only|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = puna.Tokenizer.from_file(str(tmp_path))
    assert tokenizer.special_tokens == {"<|only|>": 200_000}
    assert tokenizer.encode("a<|only|>", allowed_special="all")[-1] == 200_000


def test_lists_counts_and_threads(tokenizer: puna.Tokenizer) -> None:
    texts = [*EDGE_CASES, *fuzzed(500, ALPHABET), *CORPUS_SAMPLE]
    expected = [tokenizer.encode(text) for text in texts]
    for threads in (1, 2, None):
        found = tokenizer.encode(texts, threads=threads)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        assert tokenizer.encode([], threads=threads) == []
    assert expected[0].dtype == np.uint32
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.count(text) == len(ids)
    long = "".join(texts) * 20
    for special in ("none", "all"):
        alone = tokenizer.encode(long, allowed_special=special)
        assert np.array_equal(tokenizer.encode(long, allowed_special=special, threads=3), alone)
        assert tokenizer.count(long, allowed_special=special, threads=2) == len(alone)


def test_decoding_takes_any_form_of_ids(tokenizer: puna.Tokenizer) -> None:
    text = "Forms of ids: 日本語, \U0001f600 <|eot|>"
    ids = tokenizer.encode(text)
    wide = ids.astype(np.int64)
    backwards, column = ids[::-1].copy()[::-1], np.stack([ids, ids], 1)[:, 0]
    for form in (ids, ids.tolist(), tuple(ids.tolist()), wide, backwards, column, iter(ids)):
        assert tokenizer.decode(form) == text  # type: ignore[arg-type]
    assert tokenizer.decode_bytes(np.broadcast_to(ids[:1], (4,))) == tokenizer.decode_bytes(
        [ids[0]] * 4
    )


def stream(
    tokenizer: puna.Tokenizer, text: str | bytes, cuts: Iterable[int], **options: Any
) -> tuple[list[int], int]:
    """Ids of a text fed in parts, and the most bytes that ever waited."""
    encoder = tokenizer.stream_encoder(**options)
    ids: list[int] = []
    begin = most = 0
    for end in [*cuts, len(text)]:
        ids += encoder.feed(text[begin:end]).tolist()
        most = max(most, encoder.pending_bytes)
        begin = end
    ids += encoder.finish().tolist()
    assert encoder.pending_bytes == 0
    return ids, most


def short_texts(count: int) -> list[str]:
    special = [*ALPHABET, "<|eot|>", "<|eo", "<|image|>", "    ", "\n \n", "AAA", "日AB"]
    return [*(text for text in EDGE_CASES if len(text) < 40), *fuzzed(count, special, seed=5)]


def test_arrays_are_the_callers(tokenizer: puna.Tokenizer) -> None:
    """Copied ones, and those that take over the memory of a long list."""
    encoder = tokenizer.stream_encoder()
    for repeats in (0, 1, 100, 10_000):
        text = "One two three. " * repeats
        for ids in (tokenizer.encode(text), encoder.feed(text)):
            assert ids.dtype == np.uint32
            assert ids.ndim == 1
            assert ids.flags.c_contiguous
            kept = ids.copy()
            tokenizer.encode("Something else. " * (repeats + 1))
            encoder.feed("Something else. " * (repeats + 1))
            assert np.array_equal(ids, kept)
            ids[:] = 0  # may be written


@pytest.mark.parametrize("special", ["none", "all"])
def test_streaming_at_every_cut(tokenizer: puna.Tokenizer, special: str) -> None:
    for text in short_texts(2000):
        expected = tokenizer.encode(text, allowed_special=special).tolist()
        raw = text.encode()
        for cut in range(len(raw) + 1):
            assert stream(tokenizer, raw, [cut], allowed_special=special)[0] == expected
        one_by_one = stream(tokenizer, raw, range(len(raw)), allowed_special=special)[0]
        assert one_by_one == expected


def random_cuts(size: int, longest: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    cuts = [0]
    while cuts[-1] < size:
        cuts.append(cuts[-1] + rng.randint(1, longest))
    return cuts[:-1]


def test_streaming_keeps_little(tokenizer: puna.Tokenizer) -> None:
    """No more than 256 bytes wait, in texts and in runs that never end."""
    rng = random.Random(0)
    runs = [unit * (20_000 // len(unit)) for unit in (
        *("a", " ", "\n", "-", "=", "7", "A", "\t ", "\r\n", "日A", "ab日A", "'s", "/", "\u3000"),
    )]  # fmt: skip
    alphabets = ("abcdefghijklmnopqrstuvwxyz", " \t", " \t\n", "ABCDEFGH", "-=_.!/#*", "日本語AB")
    runs += ["".join(rng.choices(alphabet, k=20_000)) for alphabet in alphabets]
    starts = ("", "x\n", "日", "!")
    texts = [start + run for run in runs for start in starts] + CORPUS_SAMPLE
    for text in texts:
        expected = tokenizer.encode(text).tolist()
        for longest in (64, 1500):
            ids, most = stream(tokenizer, text, random_cuts(len(text), longest))
            assert most <= 256, (text[:20], most)
            assert ids == expected, text[:20]


def test_streaming_tokens_cut_short(tokenizer: puna.Tokenizer) -> None:
    """What waits longest: the beginnings of long tokens."""
    lengths = {t: len(tokenizer.decode_bytes([t])) for t in range(200_000)}
    longest = sorted(lengths, key=lengths.__getitem__)[-1000:]
    for token in longest:
        text = tokenizer.decode_bytes([token])[:-1] * 4
        ids, most = stream(tokenizer, text, range(0, len(text), 7))
        assert most <= 256
        assert ids == tokenizer.encode(text).tolist()


def test_provisional_ids_are_those_of_the_text_so_far(tokenizer: puna.Tokenizer) -> None:
    for text in short_texts(300):
        encoder = tokenizer.stream_encoder()
        given: list[int] = []
        for at in range(len(text)):
            given += encoder.feed(text[at]).tolist()
            ids = given + encoder.provisional().tolist()
            assert ids == tokenizer.encode(text[: at + 1]).tolist()


def meta_boundaries() -> Iterator[str]:
    """Around the 25,000 characters of a run and the 400,000 of a text."""
    for size in (24_999, 25_000, 25_001, 50_000, 50_001):
        for unit in ("a", " ", "日", "\x1c", "\u3000"):
            yield unit * size
            yield "b " + unit * size + "\x1fc d"
    for size in (399_999, 400_000, 400_001):
        yield ("words and more words, " * (size // 22 + 1))[:size] + "x y"
    yield "<|eot|>" * 8000


def test_meta_cuts_are_metas(tokenizer: puna.Tokenizer, meta: Any) -> None:
    for text in [*meta_boundaries(), *EDGE_CASES]:
        for special in (set(), "all"):
            wanted = meta.encode(text, bos=False, eos=False, allowed_special=special)
            name = "all" if special else "none"
            options = {"allowed_special": name, "cut": "meta"}
            assert tokenizer.encode(text, **options).tolist() == wanted
            ids, _ = stream(tokenizer, text, random_cuts(len(text), 30_000), **options)
            assert ids == wanted


def test_corpora(tokenizer: puna.Tokenizer, reference: Any) -> None:
    for text in CORPUS_SAMPLE:
        expected = reference.encode_ordinary(text)
        assert tokenizer.encode(text).tolist() == expected
        raw = text.encode()
        for longest in (7, 4096):
            assert stream(tokenizer, raw, random_cuts(len(raw), longest))[0] == expected


@pytest.fixture(scope="module")
def hugging_face(meta: Any, meta_file: Path) -> Any:
    """The same ranks as a tokenizer of Hugging Face's library."""
    try:
        from transformers.convert_slow_tokenizer import TikTokenConverter
    except ModuleNotFoundError as missing:
        skip_or_fail(f"{missing.name} is not installed")
    names = sorted(meta.special_tokens, key=meta.special_tokens.__getitem__)
    options = {"pattern": meta.O200K_PATTERN, "extra_special_tokens": names}
    return TikTokenConverter(str(meta_file), **options).converted()


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_hugging_face_gives_the_same_ids(tokenizer: puna.Tokenizer, hugging_face: Any) -> None:
    texts = [*EDGE_CASES, *probes_of_code_points(1), *fuzzed(1_000_000, ALPHABET, seed=2)]
    for begin in range(0, len(texts), 10_000):
        part = texts[begin : begin + 10_000]
        wanted = hugging_face.encode_batch_fast(part, add_special_tokens=False)
        found = tokenizer.encode(part, allowed_special="all", threads=None)
        for text, theirs, ours in zip(part, wanted, found, strict=True):
            assert ours.tolist() == theirs.ids, ascii(text)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_all_corpora(tokenizer: puna.Tokenizer, reference: Any, hugging_face: Any) -> None:
    """100 MB of text out of installed packages, whole and in random parts."""
    done = 0
    for text in package_texts(100_000_000):
        expected = reference.encode_ordinary(text)
        assert tokenizer.encode(text, threads=None).tolist() == expected
        raw = text.encode()
        assert stream(tokenizer, raw, random_cuts(len(raw), 4096, seed=done))[0] == expected
        if done % 10 == 0:
            plain = text.replace("<|", "<")
            theirs = hugging_face.encode(plain, add_special_tokens=False).ids
            assert tokenizer.encode(plain).tolist() == theirs
        done += 1
    assert done > 50


@pytest.mark.parametrize(
    "limit", [10_000_000, pytest.param(1_000_000_000, marks=pytest.mark.nightly)]
)
def test_a_long_stream_keeps_memory_flat(tokenizer: puna.Tokenizer, limit: int) -> None:
    """One text without end, of samples and of runs, in parts of 1 KB; ids are dropped. What the
    encoder itself keeps is counted in tests/cpp/stream_encoder_test.cpp."""
    import resource

    letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=50_000))
    runs = [unit * 50_000 for unit in ("a", " ", "\n", "-", "日A", "\t ")]
    parts = [text.encode() for text in (*CORPUS_SAMPLE, letters, *runs)]
    parts = [raw[i : i + 1024] for raw in parts for i in range(0, len(raw), 1024)]
    encoder = tokenizer.stream_encoder()
    fed = most = peak = 0
    for part in itertools.cycle(parts):
        encoder.feed(part)
        most = max(most, encoder.pending_bytes)
        fed += len(part)
        if fed > min(limit // 2, 50_000_000) and not peak:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if fed > limit:
            break
    assert most <= 256
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss <= peak + 1024  # KiB


@pytest.mark.nightly
def test_many_random_ids_decode_as_tiktoken(tokenizer: puna.Tokenizer, reference: Any) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, tokenizer.vocab_size, 1_000_000)
    assert tokenizer.decode_bytes(ids) == reference.decode_bytes(ids.tolist())
    decoder = tokenizer.stream_decoder(skip_special=False)
    shown = "".join(decoder.push(token) for token in ids.tolist())
    assert shown + decoder.finish() == reference.decode(ids.tolist())
    few = ids[:2000].tolist()
    for end in range(len(few)):
        assert tokenizer.decode(few[:end]) == reference.decode(few[:end])


def test_decoder_tells_of_stops_and_events(tokenizer: puna.Tokenizer) -> None:
    ids = tokenizer.encode("One, two, three.<|eot|> Four", allowed_special="all").tolist()
    eot = tokenizer.special_tokens["<|eot|>"]
    decoder = tokenizer.stream_decoder(stop=[" Four"], events=True, include_stop=True)
    events = []
    shown = ""
    for token in ids:
        shown += decoder.push(token)
        events.append(decoder.event)
    assert shown == "One, two, three. Four"
    assert [event for event in events if event is not None] == [eot]
    assert decoder.stop_token == ids.index(eot) + 1
    assert tokenizer.stream_decoder().stop_token is None
