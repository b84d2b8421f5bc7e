"""Which tokenizer a checkpoint brings: tokenizer.json, tokenizer.model, both, none, or a bad one."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
from pathlib import Path

import pytest

import puna
from conftest import MakeCheckpoint
from oracle import tiny
from oracle.make_checkpoint import write_tokenizer
from puna import _core


@pytest.fixture
def directory(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A copy of a checkpoint without a tokenizer, to be changed."""
    return Path(shutil.copytree(checkpoint("mixed").path, tmp_path / "model"))


def write_ranks(directory: Path) -> None:
    """tokenizer.model with the tokens of tokenizer.json, its special tokens beside it."""
    document = json.loads((directory / "tokenizer.json").read_text())
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = itertools.count(0x100)
    byte_of = {chr(b if b in printable else next(others)): b for b in range(256)}
    ranks = "".join(
        f"{base64.b64encode(bytes(byte_of[c] for c in token)).decode()} {rank}\n"
        for token, rank in document["model"]["vocab"].items()
    )
    (directory / "tokenizer.model").write_text(ranks)
    added = {t["id"]: {"content": t["content"]} for t in document["added_tokens"]}
    config = {"added_tokens_decoder": {str(i): entry for i, entry in added.items()}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


TEXT = "the end of things, and in the rain\n\n123 €"


def test_tokenizer_json_or_model_or_both(directory: Path) -> None:
    write_tokenizer(directory)
    write_ranks(directory)
    both = puna.Tokenizer.from_file(str(directory))
    ids = list(both.encode(TEXT))
    assert _core.inspect(str(directory))["tokenizer"] == "tokenizer.json"
    json_file = directory / "tokenizer.json"
    json_text = json_file.read_text()
    json_file.unlink()
    assert _core.inspect(str(directory))["tokenizer"] == "tokenizer.model"
    with puna.load(directory, threads=1, progress=False, memory="256M") as llm:
        assert list(llm.tokenizer.encode(TEXT)) == ids
        assert list(llm.tokenizer.encode("<|eot|>", allowed_special="all")) == [
            tiny.SPECIAL["<|eot|>"]
        ]
    (directory / "tokenizer.model").unlink()
    json_file.write_text(json_text)
    with puna.load(directory, threads=1, progress=False, memory="256M") as llm:
        assert list(llm.tokenizer.encode(TEXT)) == ids
        assert len(llm.generate("the", max_tokens=2, temperature=0).tokens) == 2


def test_a_checkpoint_without_a_tokenizer(directory: Path) -> None:
    """Ids still work; text is refused, saying which files were looked for."""
    assert _core.inspect(str(directory))["tokenizer"] == ""
    with puna.load(directory, threads=1, progress=False, memory="256M") as llm:
        with pytest.raises(puna.Error, match=r"tokenizer\.json"):
            llm.generate("text")
        assert len(llm.generate([1, 2, 3], max_tokens=2, temperature=0).tokens) == 2
    with pytest.raises(puna.ModelNotFound, match=r"tokenizer\.json nor tokenizer\.model"):
        puna.Tokenizer.from_file(str(directory))


BAD_TOKENIZERS: dict[str, tuple[str, str, type[puna.Error], tuple[str, ...]]] = {
    "json cut": ("tokenizer.json", '{"model": {', puna.ModelFormatError, ("tokenizer.json", "JSON")),
    "json without a model": ("tokenizer.json", "{}", puna.ModelFormatError, ("tokenizer.json", "model")),
    "json of another kind": ("tokenizer.json", '{"model": {"type": "Unigram"}}', puna.UnsupportedError, ("Unigram", "BPE")),
    "ranks that are none": ("tokenizer.model", "not base64\n", puna.ModelFormatError, ("line 1",)),
    "ranks out of order": ("tokenizer.model", "YQ== 0\nYg== 2\n", puna.ModelFormatError, ("line 2", "2", "1")),
    "a rank twice": ("tokenizer.model", "YQ== 0\nYQ== 1\n", puna.ModelFormatError, ("tokens 0 and 1 are the same",)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "kind", "named"), BAD_TOKENIZERS.values(), ids=BAD_TOKENIZERS.keys()
)
def test_refused_tokenizers(
    directory: Path, name: str, text: str, kind: type[puna.Error], named: tuple[str, ...]
) -> None:
    (directory / name).write_text(text)
    with pytest.raises(kind) as caught:
        puna.load(directory, progress=False, memory="256M")
    assert all(part in str(caught.value) for part in named), str(caught.value)
