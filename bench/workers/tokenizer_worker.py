"""Measures one tokenizer on one text, in CPU time of one thread: NAME MODEL JSON TEXT.

MODEL is tokenizer.model, JSON the same vocabulary as tokenizer.json. Prints one line of JSON:
seconds of loading (with what has been imported before) and of one pass over a text that the process
has not seen before, a digest of the ids, seconds of decoding them, and the peak of the resident
memory. A stream's parts are there before its time begins, and its arrays are joined after it. Runs
with an interpreter that has the tokenizer's package.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHUNK = 1024

Encode = Callable[[Any], Any]
Decode = Callable[[Any], Any]


def ranks(model: str) -> dict[bytes, int]:
    """The lines of tokenizer.model."""
    lines = (line.split() for line in Path(model).read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def puna(model: str, document: str) -> tuple[Encode, Decode]:
    """This project's."""
    from puna import Tokenizer

    tokenizer = Tokenizer.from_file(model)
    return tokenizer.encode, tokenizer.decode


def puna_json(model: str, document: str) -> tuple[Encode, Decode]:
    """This project's, from tokenizer.json."""
    return puna(document, document)


def puna_stream(model: str, document: str) -> tuple[Encode, Decode]:
    """This project's, which takes a text in parts and gives an array for each."""
    from puna import Tokenizer

    tokenizer = Tokenizer.from_file(model)

    def encode(parts: Iterable[bytes]) -> list[Any]:
        encoder = tokenizer.stream_encoder()
        return [*map(encoder.feed, parts), encoder.finish()]

    return encode, tokenizer.decode


def parts_of(text: str) -> list[bytes]:
    """As they might come from elsewhere."""
    raw = text.encode()
    return [raw[at : at + CHUNK] for at in range(0, len(raw), CHUNK)]


def tiktoken(model: str, document: str) -> tuple[Encode, Decode]:
    """OpenAI's."""
    from tiktoken import Encoding

    encoding = Encoding("llama4", pat_str=PATTERN, mergeable_ranks=ranks(model), special_tokens={})
    return encoding.encode_ordinary, encoding.decode


def tokenizers(model: str, document: str) -> tuple[Encode, Decode]:
    """Hugging Face's."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(document)
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.decode


def gigatoken(model: str, document: str) -> tuple[Encode, Decode]:
    """The package gigatoken."""
    from gigatoken import Tokenizer

    tokenizer = Tokenizer.from_json(Path(document).read_bytes())
    return tokenizer.encode, tokenizer.decode


def fastokens(model: str, document: str) -> tuple[Encode, Decode]:
    """The package fastokens."""
    from fastokens import _native

    tokenizer = _native.Tokenizer.from_file(document)
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.decode


def quicktok(model: str, document: str) -> tuple[Encode, Decode]:
    """The package quicktok-v1; it keeps an imported vocabulary, which is made once."""
    from quicktok import get_encoding, import_tokenizer

    folder = Path(document).parent / "quicktok"
    if not (folder / "llama4.enc").exists():
        folder.mkdir(exist_ok=True)
        import_tokenizer(document, "llama4", data_dir=str(folder))
    encoding = get_encoding("llama4", str(folder))
    return encoding.encode_ordinary, encoding.decode


OPEN = {
    function.__name__: function
    for function in (
        *(puna, puna_json, puna_stream),
        *(tiktoken, tokenizers, gigatoken, fastokens, quicktok),
    )
}


def main() -> None:
    """Reads the command line and measures."""
    name, model, document, path = sys.argv[1:5]
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    text = Path(path).read_bytes().decode()
    importlib.import_module(name.split("_")[0])
    start = time.process_time()
    encode, decode = OPEN[name](model, document)
    load = time.process_time() - start
    prepared = parts_of if name == "puna_stream" else str
    encode(prepared("Warm up: hello, 123."))
    given = prepared(text)
    start = time.process_time()
    ids = encode(given)
    seconds = time.process_time() - start
    if name == "puna_stream":
        ids = np.concatenate(ids)
    array = np.asarray(ids, dtype=np.uint32)
    row = {
        "load": load,
        "encode": seconds,
        "bytes": len(text.encode()),
        "tokens": len(array),
        "digest": hashlib.sha256(array.tobytes()).hexdigest()[:16],
    }
    if decode is not None:
        # From what its own encode() gives: an array, or a list of numbers.
        own = (
            ids if isinstance(ids, np.ndarray) and name.startswith(("puna", "giga")) else list(ids)
        )
        start = time.process_time()
        decode(own)
        row["decode"] = time.process_time() - start
    # Not getrusage(), whose peak is inherited from the parent.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    row["rss"] = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print(json.dumps(row))


if __name__ == "__main__":
    main()
