"""The ledger: a Llama 4 checkpoint whose weights are made by hand to be an exact dictionary.

A prompt is a list of records, three tokens each: K1 K2 V. After it, the pair K1 K2 of any record
makes V the likeliest next token, at any distance. What the model must answer, and with what logits,
follows on paper, so it shows at any length of context whether attention sees every key once, in the
right chunk, with the right temperature.

How it works. The residual stream is divided into slots; every token has a code of 32 signs.

* embedding: CURRENT = 2 code, CONSTANT = 8, and the class of the tokens that are in no record.
* layer 0 (RoPE, chunks): head 0 copies CURRENT of the token before into BEFORE_1, head 1 that of
  the one before it into BEFORE_2. A query is the key turned back by one or two places, so the score
  is a sum of cosines that is largest exactly there. At the start of a chunk there is nothing before
  it, and what is copied is the chunk's first token.
* layers 1 and 2 attend as layer 0 does and write nothing. With `moe`, layer 1 has experts: each
  permutes the code in its own way into TRANSFORMED, and the router picks by two signs of the code.
* layer 3 (NoPE, everything, temperature): head 0 asks with (CURRENT, BEFORE_1) for the position
  whose (BEFORE_1, BEFORE_2) are the same: it is that of V, whose code goes to FOUND. The score of a
  match is `sharpness` times the temperature. Head 1 has queries of 0: its uniform mean over all
  positions of what MARKER holds goes to MEAN.
* with two hops, layers 4 to 7 repeat this: layer 7 finds the position in the same way, and returns
  what layer 3 had FOUND at that position.
* lm_head: row t is the code of t, and MEAN_READOUT reads MEAN.

Feed-forward blocks write nothing. The codes are words of a BCH code: two tokens of one third of the
vocabulary agree in at most 20 of 32 signs, any two in at most 24, so a key that is nearly right
scores 3/8 of the sharpness less. K1, K2 and V are of different thirds, or a V and the K1 that
follows it might be somebody's key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .make_checkpoint import Stored, write_safetensors

CODE = 32
HEAD = 2 * CODE  # a query is two codes
HEADS = 2
EXPERTS = 4
MARKERS = 8  # channels of MARKER and MEAN, all alike

# Channels of the residual stream.
CURRENT, BEFORE_1, BEFORE_2, FOUND, TRANSFORMED = (CODE * i for i in range(5))
ANSWER = TRANSFORMED  # of two hops; a ledger has either these or experts
MEAN = CODE * 5
MARKER = MEAN + MARKERS
CONSTANT = MARKER + MARKERS
FILLER = CONSTANT + 1
PADDING = FILLER + 1  # 2 channels
HIDDEN = 192  # the sum of squares of a token's embedding: RMSNorm leaves it as it is

AMPLITUDE = 2.0  # of a code in the residual stream
CONSTANT_VALUE = 8.0
CODE_SQUARES = CODE * AMPLITUDE**2  # also of whatever takes the place of a code
GATE = 32.0  # silu(32) is 32 in fp32
ROUTER = 16.0  # sigmoid(2 * 16) is 1 in fp32

Array = NDArray[Any]


def _product(a: int, b: int) -> int:
    """Of two polynomials over the field of two elements, a bit for a coefficient."""
    result = 0
    while b:
        result ^= a * (b & 1)
        a, b = a << 1, b >> 1
    return result


# Generators of the BCH codes of length 31 with 16 and 11 information bits. The first divides the
# second; with a bit of parity the distances are 8 and 12.
_GENERATOR_16 = 0o107657
_QUOTIENT = 0b101111  # of the generator with 11 bits, 0o5423325
assert _product(_GENERATOR_16, _QUOTIENT) == 0o5423325


def code_of(third: int, index: int) -> NDArray[np.float32]:
    """The signs, [32], of token `index` of one third of the vocabulary."""
    word = _product(_product(index, _QUOTIENT) ^ third, _GENERATOR_16)
    word |= (word.bit_count() & 1) << 31
    return np.array([1 - 2 * (word >> i & 1) for i in range(CODE)], np.float32)


@dataclass(frozen=True)
class Ledger:
    """One ledger model.

    Attributes:
        chunk: Length of the attention chunks of RoPE layers.
        third: Tokens of each kind, K1, K2 and V; at most 2048.
        sharpness: Score of a match before the temperature; log(context) and some more.
        floor_scale: Positions of one step of the temperature.
        attn_scale: Growth of the temperature.
        tuned: Whether there is a temperature at all.
        kv_heads: 1, or 2 that are alike.
        moe: Layer 1 has experts, without which no answer is right.
        hops: Look-ups of which each needs the one before: 1 or 2.
        previous_gain: How sharply layer 0 looks at the token before.
        max_position: What config.json promises.
    """

    chunk: int = 64
    third: int = 256
    sharpness: float = 64.0
    floor_scale: int = 8192
    attn_scale: float = 0.1
    tuned: bool = True
    kv_heads: int = 1
    moe: bool = False
    hops: int = 1
    previous_gain: float = 2000.0
    max_position: int = 1 << 20
    rope_theta: float = 500000.0

    def __post_init__(self) -> None:
        assert self.hops == 1 or not self.moe

    # --- vocabulary ------------------------------------------------------------------------------

    @property
    def filler(self) -> int:
        """A token that is in no record; layer 3 finds FILLER_FOUND there."""
        return 3 * self.third

    @property
    def filler_found(self) -> int:
        """The answer that means: a filler was found. In no prompt."""
        return self.filler + 1

    @property
    def blank(self) -> int:
        """A token with keys and values of 0."""
        return self.filler + 2

    @property
    def plus(self) -> int:
        """A marker that counts 1 in the mean."""
        return self.filler + 3

    @property
    def minus(self) -> int:
        """A marker that counts -1."""
        return self.filler + 4

    @property
    def mean_readout(self) -> int:
        """Its logit is the mean of the markers, times what `expected_logits` says."""
        return self.filler + 5

    @property
    def vocab_size(self) -> int:
        """All of them."""
        return self.filler + 6

    def records(self, count: int, seed: int = 0) -> Array:
        """Random records [count, 3] of int32 with pairs (K1, K2) that are all different.

        And of codes that do not resemble each other: where V is the second token of a chunk, its
        K2 is in both of its slots, and must not pass for K1.
        """
        random = np.random.default_rng(seed)
        thirds = np.arange(3) * self.third
        first, second = (self.codes[start : start + self.third] for start in thirds[:2])
        apart = np.flatnonzero(first @ second.T <= CODE / 4)
        pairs = random.choice(apart, count, replace=False)
        value = random.integers(0, self.third, count)
        return (np.stack([*np.divmod(pairs, self.third), value], 1) + thirds).astype(np.int32)

    @cached_property
    def codes(self) -> NDArray[np.float32]:
        """[vocab, 32]; 0 for tokens that are in no record, but for the one that is an answer."""
        codes = np.zeros((self.vocab_size, CODE), np.float32)
        for token in range(3 * self.third):
            codes[token] = code_of(*divmod(token, self.third))
        codes[self.filler_found] = code_of(3, 0)
        return codes

    @cached_property
    def _transforms(self) -> list[tuple[Array, Array]]:
        """(permutation, signs) of each expert."""
        random = np.random.default_rng(1)
        return [
            (random.permutation(CODE), random.choice([-1.0, 1.0], CODE)) for _ in range(EXPERTS)
        ]

    @cached_property
    def readouts(self) -> NDArray[np.float32]:
        """The code of each token as its value at layer 3 shows it, [vocab, 32]."""
        if not self.moe:
            return self.codes
        shown = self.codes.copy()
        for token, code in enumerate(self.codes[: self.filler]):
            permutation, signs = self._transforms[(code[0] < 0) + 2 * (code[1] < 0)]
            shown[token] = signs * code[permutation]
        return shown

    # --- the checkpoint --------------------------------------------------------------------------

    @property
    def layers(self) -> int:
        """Groups of three RoPE layers and one that sees everything."""
        return 4 * self.hops

    def config(self) -> dict[str, Any]:
        """config.json."""
        return {
            "architectures": ["Llama4ForCausalLM"],
            "model_type": "llama4_text",
            "vocab_size": self.vocab_size,
            "hidden_size": HIDDEN,
            "intermediate_size": CODE,
            "intermediate_size_mlp": 16,
            "num_hidden_layers": self.layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": self.kv_heads,
            "head_dim": HEAD,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position,
            "rms_norm_eps": 1e-12,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "use_qk_norm": False,
            "no_rope_layer_interval": 4,
            "attention_chunk_size": self.chunk,
            "attn_temperature_tuning": self.tuned,
            "floor_scale": self.floor_scale,
            "attn_scale": self.attn_scale,
            "moe_layers": [1] if self.moe else [],
            "num_local_experts": EXPERTS if self.moe else 0,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }

    def _scale(self, layer: int) -> float:
        """What RMSNorm multiplies a record's residual stream with at the input of a layer."""
        codes = 1 if layer == 0 else 3
        codes += self.moe and layer > 1
        codes += layer > 3
        return math.sqrt(HIDDEN / (codes * CODE_SQUARES + CONSTANT_VALUE**2))

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """All tensors of the checkpoint by name."""
        norm = np.ones(HIDDEN, np.float32)
        tensors = {
            "model.embed_tokens.weight": self._embedding(),
            "model.norm.weight": norm,
            "lm_head.weight": self._head(),
        }
        for layer in range(self.layers):
            name = f"model.layers.{layer}"
            tensors[f"{name}.input_layernorm.weight"] = norm
            tensors[f"{name}.post_attention_layernorm.weight"] = norm
            projections = self._look_up(layer) if layer % 4 == 3 else self._look_back(layer)
            for letter, values in zip("qkvo", projections, strict=True):
                tensors[f"{name}.self_attn.{letter}_proj.weight"] = values
            if self.moe and layer == 1:
                tensors |= self._experts(f"{name}.feed_forward")
            else:
                tensors |= _idle(f"{name}.feed_forward", 16)
        return tensors

    def write(self, directory: Path, dtype: str = "float32") -> Path:
        """Writes config.json and model.safetensors; "float32" or "bfloat16"."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config(), indent=2))
        stored = {name: Stored.of(values, dtype) for name, values in self.tensors().items()}
        write_safetensors(directory / "model.safetensors", stored)
        return directory

    def _embedding(self) -> Array:
        rows = np.zeros((self.vocab_size, HIDDEN), np.float32)
        rows[:, CONSTANT] = CONSTANT_VALUE
        rows[: self.filler, CURRENT : CURRENT + CODE] = AMPLITUDE * self.codes[: self.filler]
        # The same sum of squares as a code has: RMSNorm is the same for all tokens at layer 0.
        eighth = math.sqrt(CODE_SQUARES / MARKERS)
        half = math.sqrt(CODE_SQUARES / 2)
        rows[self.filler, [FILLER, PADDING]] = half
        rows[[self.blank, self.filler_found, self.mean_readout], PADDING] = half
        rows[[self.blank, self.filler_found, self.mean_readout], PADDING + 1] = half
        rows[self.plus, MARKER : MARKER + MARKERS] = eighth
        rows[self.minus, MARKER : MARKER + MARKERS] = -eighth
        return rows

    def _head(self) -> Array:
        rows = np.zeros((self.vocab_size, HIDDEN), np.float32)
        answer = ANSWER if self.hops == 2 else FOUND
        rows[:, answer : answer + CODE] = self.readouts
        rows[self.mean_readout, MEAN : MEAN + MARKERS] = 1
        return rows

    def _projections(self) -> tuple[Array, Array, Array, Array]:
        return (
            np.zeros((HEADS, HEAD, HIDDEN), np.float32),
            np.zeros((HEAD, HIDDEN), np.float32),
            np.zeros((HEAD, HIDDEN), np.float32),
            np.zeros((HIDDEN, HEADS, HEAD), np.float32),
        )

    def _stored(self, q: Array, k: Array, v: Array, o: Array) -> tuple[Array, Array, Array, Array]:
        """As the checkpoint has them: heads and channels in one, every KV head the same."""
        return (
            q.reshape(-1, HIDDEN),
            np.tile(k, (self.kv_heads, 1)),
            np.tile(v, (self.kv_heads, 1)),
            o.reshape(HIDDEN, -1),
        )

    def _look_back(self, layer: int) -> tuple[Array, Array, Array, Array]:
        q, k, v, o = self._projections()
        # Score of a key d + n places back, by the head that looks d back:
        # previous_gain / 32 * sum over the pairs of cos(n * frequency).
        strength = math.sqrt(self.previous_gain * math.sqrt(HEAD) / (HEAD // 2))
        strength /= self._scale(0) * CONSTANT_VALUE
        frequencies = self.rope_theta ** (-np.arange(0, HEAD, 2) / HEAD)
        k[0::2, CONSTANT] = strength
        for head in range(HEADS):
            q[head, 0::2, CONSTANT] = strength * np.cos((head + 1) * frequencies)
            q[head, 1::2, CONSTANT] = -strength * np.sin((head + 1) * frequencies)
        code = np.arange(CODE)
        v[code, CURRENT + code] = 1 / self._scale(0)
        if layer == 0:
            o[BEFORE_1 + code, 0, code] = 1
            o[BEFORE_2 + code, 1, code] = 1
        return self._stored(q, k, v, o)

    def _look_up(self, layer: int) -> tuple[Array, Array, Array, Array]:
        q, k, v, o = self._projections()
        code = np.arange(CODE)
        scale = self._scale(layer)
        match = 2 * CODE_SQUARES * scale**2 / math.sqrt(HEAD)
        q[0, code, CURRENT + code] = self.sharpness / match
        q[0, CODE + code, BEFORE_1 + code] = self.sharpness / match
        k[code, BEFORE_1 + code] = 1
        k[CODE + code, BEFORE_2 + code] = 1
        if layer == 3:
            value = TRANSFORMED if self.moe else CURRENT
            # Among fillers, whose residual stream has codes of 0, the scale is another.
            filler = math.sqrt(CODE_SQUARES / 2) * self._scale(0)
            v[code, FILLER] = self.codes[self.filler_found] / filler
            marker = math.sqrt(CODE_SQUARES / MARKERS) * self._scale(0)
            channel = np.arange(MARKERS)
            v[CODE + channel, MARKER + channel] = 1 / marker
            o[MEAN + channel, 1, CODE + channel] = 1
        else:
            value = FOUND
        v[code, value + code] = 1 / (AMPLITUDE * scale)
        o[(FOUND if layer == 3 else ANSWER) + code, 0, code] = AMPLITUDE
        return self._stored(q, k, v, o)

    def _experts(self, name: str) -> dict[str, Array]:
        gate_up = np.zeros((EXPERTS, HIDDEN, 2 * CODE), np.float32)
        down = np.zeros((EXPERTS, CODE, HIDDEN), np.float32)
        router = np.zeros((EXPERTS, HIDDEN), np.float32)
        scale = math.sqrt(HIDDEN / (3 * CODE_SQUARES + CONSTANT_VALUE**2))
        code = np.arange(CODE)
        gate_up[:, CONSTANT, :CODE] = GATE / (CONSTANT_VALUE * scale)
        down[:, code, TRANSFORMED + code] = 1 / GATE
        for expert, (permutation, signs) in enumerate(self._transforms):
            gate_up[expert, CURRENT + permutation, CODE + code] = signs / scale
            for bit in range(2):
                sign = 1 - 2 * (expert >> bit & 1)
                router[expert, CURRENT + bit] = sign * ROUTER / (AMPLITUDE * scale)
        return {
            f"{name}.router.weight": router,
            f"{name}.experts.gate_up_proj": gate_up,
            f"{name}.experts.down_proj": down,
            **_idle(f"{name}.shared_expert", CODE),
        }

    # --- what it must answer ---------------------------------------------------------------------

    def temperature(self, position: int) -> float:
        """The factor of layer 3's queries."""
        if not self.tuned:
            return 1.0
        return 1 + self.attn_scale * math.log1p((position + 1) // self.floor_scale)

    def expected_logits(
        self, tokens: ArrayLike, position: int, temperature: float | None = None
    ) -> NDArray[np.float64]:
        """Logits after the token at `position`, [vocab], worked out without a network; one hop.

        `temperature` is the right one unless it is given.
        """
        assert self.hops == 1
        ids = np.asarray(tokens, np.int64)[: position + 1]
        places = np.arange(position + 1)
        start = places - places % self.chunk
        codes = self.codes.astype(np.float64)
        current = codes[ids] * (ids < self.filler)[:, None]
        before_1, before_2 = (current[np.maximum(start, places - back)] for back in (1, 2))
        # Of each position: how many of its slots hold a code, which is what RMSNorm depends on.
        slots = sum((np.abs(slot).sum(1) > 0).astype(int) for slot in (before_1, before_2))
        shown = self.moe * (ids < self.filler)
        squares = (1 + slots + shown) * CODE_SQUARES + CONSTANT_VALUE**2
        scale = np.sqrt(HIDDEN / squares) / self._scale(3)
        warmth = self.temperature(position) if temperature is None else temperature
        products = before_1 @ current[-1] + before_2 @ before_1[-1]
        scores = self.sharpness * warmth * scale * scale[-1] * products / (2 * CODE)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()

        readouts = self.readouts.astype(np.float64)
        values = readouts[ids] * (scale * (ids < self.filler))[:, None]
        plain = scale * self._scale(3) / self._scale(0)  # of what is not scaled as a record is
        fillers = float(weights @ (plain * (ids == self.filler)))
        found = AMPLITUDE * (weights @ values + fillers * readouts[self.filler_found])
        marks = (ids == self.plus).astype(float) - (ids == self.minus)
        mean = float((plain * marks).mean())
        total = squares[-1] + found @ found + MARKERS * mean**2
        final = math.sqrt(HIDDEN / total)
        logits = final * (readouts @ found)
        logits[self.mean_readout] = final * MARKERS * mean
        return logits


def _idle(name: str, width: int) -> Mapping[str, Array]:
    """A feed-forward block that computes and adds 0."""
    read = np.zeros((width, HIDDEN), np.float32)
    read[:, CONSTANT] = 0.5
    return {
        f"{name}.gate_proj.weight": read,
        f"{name}.up_proj.weight": read,
        f"{name}.down_proj.weight": np.zeros((HIDDEN, width), np.float32),
    }
