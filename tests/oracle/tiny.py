"""The tiny models of the tests: their configurations, their seeds, and the prompts given to them.

Each variant stands for one member of the family, or for one thing that implementations get wrong.
Only data here; `make_checkpoint` turns a configuration into files and `with_transformers` into a
transformers model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import random_bits

# The vocabulary of make_checkpoint.write_tokenizer: bytes, merges, and from here special tokens.
FIRST_SPECIAL = 280
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eom|>",
    "<|eot|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|finetune_right_pad|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    "<|image|>",
    "<|patch|>",
)
SPECIAL = {name: FIRST_SPECIAL + i for i, name in enumerate(SPECIAL_TOKENS)}
IMAGE_TOKEN = SPECIAL["<|patch|>"]  # marks the place of one patch of an image


@dataclass(frozen=True)
class Prompt:
    """`length` random tokens; `tiles` are the positions at which the patches of each tile start."""

    name: str
    length: int
    tiles: tuple[int, ...] = ()


TEXT = Prompt("text", 53)  # chunk boundaries 16, 32 and 48
ONE_TILE = Prompt("one_tile", 30, (7,))
# Three tiles of one image, separators between them; the second crosses the chunk boundary at 16.
THREE_TILES = Prompt("three_tiles", 40, (5, 13, 20))
# An image of one tile, text, and an image of two tiles without a separator between them.
TWO_IMAGES = Prompt("two_images", 52, (3, 29, 33))


@dataclass(frozen=True)
class Variant:
    """A configuration in the words of transformers 5, and what is asked of it."""

    name: str
    text: dict[str, Any]
    seed: int  # of weights, tokens and pixels; one with which no expert is chosen by a hair
    vision: dict[str, Any] | None = None
    prompts: tuple[Prompt, ...] = (TEXT,)
    # What the published config.json says and transformers cannot run; written over what it saves.
    published_text: dict[str, Any] = field(default_factory=dict)

    @property
    def patches_per_tile(self) -> int:
        """How many tokens one tile takes."""
        assert self.vision is not None
        grid = self.vision["image_size"] // self.vision["patch_size"]
        return int(grid * self.vision["pixel_shuffle_ratio"]) ** 2

    def prompt(self, name: str) -> Prompt:
        """The prompt of that name."""
        return next(p for p in self.prompts if p.name == name)

    def tokens(self, prompt: Prompt) -> np.ndarray:
        """The ids of a prompt, int32 [length]: plain tokens, and patches where its tiles are."""
        ids = random_bits.integers(f"{prompt.name} tokens", self.seed, prompt.length, FIRST_SPECIAL)
        for start in prompt.tiles:
            ids[start : start + self.patches_per_tile] = IMAGE_TOKEN
        return ids.astype(np.int32)

    def pixels(self, prompt: Prompt) -> np.ndarray | None:
        """The pixel values of a prompt's tiles, float32 [tiles, 3, size, size], or None."""
        if not prompt.tiles:
            return None
        assert self.vision is not None
        size = self.vision["image_size"]
        shape = (len(prompt.tiles), 3, size, size)
        return random_bits.normal(f"{prompt.name} pixels", self.seed, shape)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
}

MIXED_TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 1,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "use_qk_norm": True,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 16,
    "attn_temperature_tuning": True,
    "floor_scale": 16,  # as small as the chunk: the temperature is at work within every prompt
    "attn_scale": 0.1,
    "pad_token_id": SPECIAL["<|finetune_right_pad|>"],
    "bos_token_id": SPECIAL["<|begin_of_text|>"],
    "eos_token_id": [SPECIAL["<|end_of_text|>"], SPECIAL["<|eom|>"], SPECIAL["<|eot|>"]],
    "rope_parameters": LLAMA3_ROPE,
}

VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 192,  # transformers needs hidden_size / pixel_shuffle_ratio ** 2
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 40,  # these three must be equal
    "projector_output_dim": 40,
    "vision_output_dim": 40,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}

# Nothing here is a multiple of a vector's width: the tails of all kernels are used.
RAGGED_TEXT = MIXED_TEXT | {
    "vocab_size": 301,
    "hidden_size": 72,
    "intermediate_size": 50,
    "intermediate_size_mlp": 70,
    "num_hidden_layers": 7,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "num_local_experts": 5,
    "no_rope_layer_interval": 3,
    "attention_chunk_size": 12,
    "floor_scale": 10,
    "attn_scale": 0.3,
    "rms_norm_eps": 1e-3,  # far from the usual 1e-5, which must not be built in
    # Frequencies below, within and above the band that is interpolated.
    "rope_parameters": LLAMA3_ROPE
    | {"factor": 8.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
RAGGED_VISION = VISION | {
    "hidden_size": 36,
    "intermediate_size": 144,
    "num_attention_heads": 3,
    "image_size": 36,
    "patch_size": 6,
    "projector_input_dim": 27,
    "projector_output_dim": 27,
    "vision_output_dim": 27,
}

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        # Scout: experts in each layer, QK norm, scaled RoPE.
        Variant(
            "scout_like",
            MIXED_TEXT | {"interleave_moe_layer_step": 1},
            seed=34,
            vision=VISION,
            prompts=(TEXT, ONE_TILE, THREE_TILES, TWO_IMAGES),
        ),
        # Dense and MoE layers in turn, with everything that Scout has.
        Variant("mixed", MIXED_TEXT, seed=39, vision=VISION, prompts=(TEXT, THREE_TILES)),
        # Maverick: layers in turn, many experts, no QK norm, plain RoPE.
        Variant(
            "maverick_like",
            MIXED_TEXT
            | {
                "num_local_experts": 32,
                "use_qk_norm": False,
                "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            },
            seed=34,
            vision=VISION,
        ),
        # Llama Guard: dense, RoPE in each layer, no chunks.
        Variant(
            "guard_like",
            MIXED_TEXT
            | {
                "moe_layers": [],
                "num_local_experts": 0,
                "interleave_moe_layer_step": 0,
                "no_rope_layers": [1] * 8,
                "attention_chunk_size": 4096,  # longer than any prompt: the same as none
            },
            seed=1,
            vision=VISION,
            prompts=(TEXT, ONE_TILE),
            published_text={"attention_chunk_size": None},
        ),
        Variant(
            "top2",
            MIXED_TEXT | {"num_experts_per_tok": 2, "num_local_experts": 6},
            seed=48,
            vision=VISION,
        ),
        # Llama4ForCausalLM: a flat config.json, and tensors without the prefix language_model.
        Variant("text_only", MIXED_TEXT, seed=49),
        Variant(
            "ragged",
            RAGGED_TEXT,
            seed=16,
            vision=RAGGED_VISION,
            prompts=(TEXT, Prompt("image", 48, (4, 16))),
        ),
    )
}
