"""Takes up the weights of a Hugging Face directory that `export` wrote, whatever its tokenizer."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from tools.demo_model.export import named_tensors
from tools.demo_model.model import DemoModel
from tools.demo_model.tokenizer import RANKS, SPECIAL_TOKENS, rank_bytes, rank_bytes_of


@torch.no_grad()
def take_up(model: DemoModel, tokenizer: Tokenizer, directory: Path) -> None:
    """Copies every tensor; rows of the vocabulary go with the bytes of their tokens.

    A token that the older tokenizer lacks begins as the word that differs from it by the space in
    front, or else as the mean of the tokens that the older one cuts it into.
    """
    stored = load_file(directory / "model.safetensors")
    old = rank_bytes(directory / "tokenizer.model")
    rows = _rows_of_old_tokens(tokenizer, old)
    for name, tensor in named_tensors(model).items():
        value = stored[name].float()
        if "embed_tokens" in name or "lm_head" in name:
            specials = value[len(old) : len(old) + len(SPECIAL_TOKENS)]
            value = torch.cat([*(value[row].mean(0, keepdim=True) for row in rows), specials])
        tensor.copy_(value)


def _rows_of_old_tokens(tokenizer: Tokenizer, old: dict[bytes, int]) -> list[Tensor]:
    new = {rank: token for token, rank in rank_bytes_of(tokenizer).items()}
    rows = []
    for rank in range(RANKS):
        token = new[rank]
        for same in (token, b" " + token, token.removeprefix(b" ")):
            if same in old:
                rows.append(torch.tensor([old[same]]))
                break
        else:
            rows.append(torch.tensor(_cut(token, old)))
    return rows


def _cut(token: bytes, old: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding of one token by the older ranks."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        pairs = [old.get(a + b, len(old)) for a, b in itertools.pairwise(parts)]
        if not pairs or min(pairs) == len(old):
            return [old[part] for part in parts]
        first = pairs.index(min(pairs))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
