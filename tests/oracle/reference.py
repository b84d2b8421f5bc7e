"""Llama 4 in NumPy and float64: the text model, the vision model, and the merging of the two.

Written to be read beside the papers and to be compared with. It has no cache, no batches and no
blocks: a whole prompt goes in, the logits of all its positions come out. It was checked against
transformers (golden/make_golden.py does so each time) and shares no code with the engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray

VISION_EPSILON = 1e-5  # of all layer norms; the references do not read it from the configuration


def round_to_bfloat16(x: Array) -> Array:
    """The nearest bfloat16 of each number, ties to even, as float32."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def rope_layers(text: Mapping[str, Any]) -> list[bool]:
    """Which layers have RoPE (and attend in chunks)."""
    layers = text["num_hidden_layers"]
    given = text.get("no_rope_layers") or [
        (i + 1) % text.get("no_rope_layer_interval", 4) for i in range(layers)
    ]
    return [bool(flag) for flag in given[:layers]]


def moe_layers(text: Mapping[str, Any]) -> list[int]:
    """Which layers have experts."""
    if text.get("moe_layers") is not None:
        return list(text["moe_layers"])
    step = text.get("interleave_moe_layer_step", 1)
    return list(range(step - 1, text["num_hidden_layers"], step)) if step else []


def rope_frequencies(text: Mapping[str, Any]) -> Array:
    """Radians per position of each pair of channels, [head_dim / 2]."""
    rope = text.get("rope_parameters")
    if rope is None:  # the form of transformers 4
        rope = {"rope_theta": text["rope_theta"], **(text.get("rope_scaling") or {})}
    width = text["head_dim"]
    frequencies = float(rope["rope_theta"]) ** (-np.arange(0, width, 2) / width)
    if rope.get("rope_type", "default") == "default":
        return frequencies
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    slow, fast = turns < low, turns > high  # turns within the length of pre-training
    # In between the two are mixed in proportion; with low == high there is no between.
    share = np.where(slow | fast, 0, (turns - low) / max(high - low, 1e-30))
    mixed = (1 - share) * frequencies / rope["factor"] + share * frequencies
    return np.where(fast, frequencies, np.where(slow, frequencies / rope["factor"], mixed))


def rms_norm(x: Array, epsilon: float) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon)


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    return centred / np.sqrt(variance + VISION_EPSILON) * weight + bias


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def rotate(x: Array, angles: Array) -> Array:
    """RoPE on neighbouring pairs of channels: x [..., tokens, heads, 2n], angles [tokens, n]."""
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None, :]
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def attend(q: Array, k: Array, v: Array, visible: Array | None = None) -> Array:
    """Softmax attention, [..., tokens, heads, head_dim]; visible [queries, keys] or all."""
    scores = np.einsum("...qhd,...khd->...hqk", q, k) / math.sqrt(q.shape[-1])
    if visible is not None:
        scores = np.where(visible, scores, -np.inf)
    return np.einsum("...hqk,...khd->...qhd", softmax(scores), v)


class Reference:
    """A checkpoint, ready to be asked for logits.

    Args:
        config: config.json.
        tensors: The checkpoint's tensors by name.
        round_activations: Round the input of every product with weights to bfloat16, as the engine
            does with bfloat16 weights; the router stays exact.
        round_kv: Round keys and values to bfloat16, as a bfloat16 cache does.

    After `logits`, `router_margin` is the smallest distance, over all tokens and layers, between
    the last expert taken and the first not taken: where it is small, another order of summation
    may take another expert, and logits are not comparable.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, Array],
        *,
        round_activations: bool = False,
        round_kv: bool = False,
    ) -> None:
        self.config = config
        self.text = config.get("text_config", config)
        self.prefix = "language_model." if "text_config" in config else ""
        self.tensors = {name: t.astype(np.float64) for name, t in tensors.items()}
        self.round_activations = round_activations
        self.round_kv = round_kv
        self.router_margin = math.inf

    def logits(self, tokens: Array, pixel_values: Array | None = None) -> Array:
        """The logits after each token, float64 [tokens, vocabulary]."""
        tokens = np.asarray(tokens)
        hidden = self.tensors[f"{self.prefix}model.embed_tokens.weight"][tokens]
        if pixel_values is not None:
            rows = self.image_embeddings(pixel_values)
            hidden[tokens == self.config["image_token_index"]] = rows
        self.router_margin = math.inf
        for layer in range(self.text["num_hidden_layers"]):
            hidden = hidden + self._attention(layer, hidden)
            hidden = hidden + self._feed_forward(layer, hidden)
        return self._linear("lm_head", self._norm("model.norm", hidden))

    # --- text ------------------------------------------------------------------------------------

    def _product(self, x: Array, matrix: Array) -> Array:
        """x @ matrix, with the rounding of x that was asked for."""
        return (round_to_bfloat16(x) if self.round_activations else x) @ matrix

    def _linear(self, name: str, x: Array) -> Array:
        return self._product(x, self.tensors[f"{self.prefix}{name}.weight"].T)

    def _norm(self, name: str, x: Array) -> Array:
        weight = self.tensors[f"{self.prefix}{name}.weight"]
        return rms_norm(x, self.text["rms_norm_eps"]) * weight

    def _attention(self, layer: int, hidden: Array) -> Array:
        text, name = self.text, f"model.layers.{layer}"
        length = len(hidden)
        positions = np.arange(length)
        x = self._norm(f"{name}.input_layernorm", hidden)
        q, k, v = (
            self._linear(f"{name}.self_attn.{p}_proj", x).reshape(length, -1, text["head_dim"])
            for p in "qkv"
        )
        visible = positions[None, :] <= positions[:, None]
        if rope_layers(text)[layer]:
            angles = positions[:, None] * rope_frequencies(text)
            q, k = rotate(q, angles), rotate(k, angles)
            if text["use_qk_norm"]:  # each head by itself, without a weight
                q, k = rms_norm(q, text["rms_norm_eps"]), rms_norm(k, text["rms_norm_eps"])
            if chunk := text["attention_chunk_size"]:  # blocks from position 0, not a window
                visible &= positions[None, :] // chunk == positions[:, None] // chunk
        elif text["attn_temperature_tuning"]:
            steps = np.floor((positions + 1) / text["floor_scale"])
            q = q * (np.log1p(steps) * text["attn_scale"] + 1)[:, None, None]
        if self.round_kv:
            k, v = (round_to_bfloat16(t).astype(np.float64) for t in (k, v))
        heads_per_kv = q.shape[1] // k.shape[1]
        k, v = np.repeat(k, heads_per_kv, axis=1), np.repeat(v, heads_per_kv, axis=1)
        out = attend(q, k, v, visible).reshape(length, -1)
        return self._linear(f"{name}.self_attn.o_proj", out)

    def _feed_forward(self, layer: int, hidden: Array) -> Array:
        name = f"model.layers.{layer}"
        x = self._norm(f"{name}.post_attention_layernorm", hidden)
        name += ".feed_forward"
        if layer not in moe_layers(self.text):
            return self._gated(name, x)
        tensor = self.tensors[f"{self.prefix}{name}.router.weight"]
        scores = x @ tensor.T
        order = np.argsort(-scores, axis=-1, kind="stable")
        top_k = self.text["num_experts_per_tok"]
        ranked = np.take_along_axis(scores, order, -1)
        if top_k < scores.shape[-1]:
            gap = (ranked[:, top_k - 1] - ranked[:, top_k]).min()
            self.router_margin = min(self.router_margin, float(gap))
        out = self._gated(f"{name}.shared_expert", x)
        gate_up = self.tensors[f"{self.prefix}{name}.experts.gate_up_proj"]
        down = self.tensors[f"{self.prefix}{name}.experts.down_proj"]
        for expert in range(scores.shape[-1]):
            rows = np.flatnonzero((order[:, :top_k] == expert).any(-1))
            # The score multiplies what goes in, not what comes out.
            scaled = x[rows] / (1 + np.exp(-scores[rows, expert, None]))
            gate, up = np.split(self._product(scaled, gate_up[expert]), 2, axis=-1)
            out[rows] += self._product(silu(gate) * up, down[expert])
        return out

    def _gated(self, name: str, x: Array) -> Array:
        gate, up = self._linear(f"{name}.gate_proj", x), self._linear(f"{name}.up_proj", x)
        return self._linear(f"{name}.down_proj", silu(gate) * up)

    # --- vision ----------------------------------------------------------------------------------

    def image_embeddings(self, pixel_values: Array) -> Array:
        """The rows that tiles [tiles, 3, size, size] put in the place of their patch tokens."""
        vision = self.config["vision_config"]
        hidden = self._encode_tiles(pixel_values.astype(np.float64))
        tiles, patches, width = hidden.shape
        grid, factor = math.isqrt(patches), round(1 / vision["pixel_shuffle_ratio"])
        # Each square of factor x factor neighbours becomes one token, their channels end to end.
        squares = hidden.reshape(tiles, grid // factor, factor, grid // factor, factor, width)
        rows = squares.transpose(0, 1, 3, 2, 4, 5).reshape(-1, factor * factor * width)
        for name in ("vision_model.vision_adapter.mlp.fc1", "vision_model.vision_adapter.mlp.fc2"):
            rows = gelu(self._product(rows, self.tensors[f"{name}.weight"].T))
        return self._product(rows, self.tensors["multi_modal_projector.linear_1.weight"].T)

    def _encode_tiles(self, pixels: Array) -> Array:
        """[tiles, 3, size, size] -> [tiles, patches, hidden]; tiles do not see each other."""
        vision = self.config["vision_config"]
        tiles, patch = len(pixels), vision["patch_size"]
        grid = vision["image_size"] // patch
        cut = pixels.reshape(tiles, 3, grid, patch, grid, patch).transpose(0, 2, 4, 1, 3, 5)
        columns = cut.reshape(tiles, grid * grid, 3 * patch * patch)
        embedding = self.tensors["vision_model.patch_embedding.linear.weight"]
        hidden = self._product(columns, embedding.T)
        last = np.broadcast_to(
            self.tensors["vision_model.class_embedding"], (tiles, 1, hidden.shape[-1])
        )
        hidden = np.concatenate([hidden, last], axis=1)
        hidden = hidden + self.tensors["vision_model.positional_embedding_vlm"]
        hidden = self._vision_norm("layernorm_pre", hidden)
        for layer in range(vision["num_hidden_layers"]):
            hidden = self._vision_layer(f"model.layers.{layer}", hidden, grid)
        return self._vision_norm("layernorm_post", hidden)[:, :-1]

    def _vision_layer(self, name: str, hidden: Array, grid: int) -> Array:
        vision = self.config["vision_config"]
        tiles, length, width = hidden.shape
        heads = vision["num_attention_heads"]
        x = self._vision_norm(f"{name}.input_layernorm", hidden)
        q, k, v = (
            self._vision_linear(f"{name}.self_attn.{p}_proj", x).reshape(tiles, length, heads, -1)
            for p in "qkv"
        )
        angles = self._vision_angles(grid, width // heads)
        out = attend(rotate(q, angles), rotate(k, angles), v).reshape(hidden.shape)
        hidden = hidden + self._vision_linear(f"{name}.self_attn.o_proj", out)
        x = self._vision_norm(f"{name}.post_attention_layernorm", hidden)
        x = gelu(self._vision_linear(f"{name}.mlp.fc1", x))
        return hidden + self._vision_linear(f"{name}.mlp.fc2", x)

    def _vision_angles(self, grid: int, head_dim: int) -> Array:
        """[patches + 1, head_dim / 2]: half of the pairs turn with x + 1, half with y + 1."""
        rope = self.config["vision_config"].get("rope_parameters") or self.config["vision_config"]
        half = head_dim // 2
        frequencies = float(rope["rope_theta"]) ** (-np.arange(0, half, 2) / half)
        y, x = np.divmod(np.arange(grid * grid), grid)
        angles = np.concatenate([np.outer(x + 1, frequencies), np.outer(y + 1, frequencies)], 1)
        return np.concatenate([angles, np.zeros((1, half))])  # the class token does not turn

    def _vision_linear(self, name: str, x: Array) -> Array:
        name = f"vision_model.{name}"
        return self._product(x, self.tensors[f"{name}.weight"].T) + self.tensors[f"{name}.bias"]

    def _vision_norm(self, name: str, x: Array) -> Array:
        name = f"vision_model.{name}"
        return layer_norm(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])
