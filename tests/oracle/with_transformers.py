"""The tiny models in transformers: the reference that everyone shares. Needs torch."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from . import tiny

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from transformers import (
        Llama4Config,
        Llama4ForCausalLM,
        Llama4ForConditionalGeneration,
        Llama4TextConfig,
        PreTrainedModel,
    )
    from transformers.utils import logging

# "high_freq_factor must be greater than low_freq_factor" on the published configuration.
logging.set_verbosity_error()
logging.disable_progress_bar()


def save_config(variant: tiny.Variant, directory: Path) -> dict[str, Any]:
    """Writes the variant's config.json as transformers does, and returns it as it can be run."""
    if variant.vision is None:
        config = Llama4TextConfig(**variant.text, architectures=["Llama4ForCausalLM"])
    else:
        config = Llama4Config(
            text_config=variant.text,
            vision_config=variant.vision,
            image_token_index=tiny.IMAGE_TOKEN,
            boi_token_index=tiny.SPECIAL["<|image_start|>"],
            eoi_token_index=tiny.SPECIAL["<|image_end|>"],
            architectures=["Llama4ForConditionalGeneration"],
        )
    config.save_pretrained(directory)
    return json.loads((directory / "config.json").read_text())


def published_config(variant: tiny.Variant, config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the values of published checkpoints that transformers cannot run."""
    if variant.vision is None:
        return config | variant.published_text
    return config | {"text_config": config["text_config"] | variant.published_text}


def load(directory: Path, dtype: str = "float32") -> PreTrainedModel:
    """The checkpoint as a transformers model; refuses missing and unexpected tensors."""
    torch.set_num_threads(1)
    config = json.loads((directory / "config.json").read_text())
    kind = Llama4ForConditionalGeneration if "text_config" in config else Llama4ForCausalLM
    model, report = kind.from_pretrained(
        directory,
        dtype=getattr(torch, dtype),
        attn_implementation="eager",
        output_loading_info=True,
    )
    wrong = {kind: found for kind, found in report.items() if found}
    if wrong:
        raise AssertionError(f"transformers did not load the checkpoint cleanly: {wrong}")
    return model.eval()


@torch.no_grad()
def logits(
    model: PreTrainedModel, tokens: np.ndarray, pixel_values: np.ndarray | None = None
) -> np.ndarray:
    """float32 [tokens, vocabulary]."""
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(tokens.astype(np.int64))[None]}
    if pixel_values is not None:
        inputs["pixel_values"] = torch.from_numpy(pixel_values).to(model.dtype)
    return model(**inputs).logits[0].float().numpy()


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    tokens: np.ndarray,
    max_tokens: int,
    pixel_values: np.ndarray | None = None,
) -> list[int]:
    """The `max_tokens` tokens that follow, with transformers' own cache; nothing ends it early."""
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(tokens.astype(np.int64))[None]}
    if pixel_values is not None:
        inputs["pixel_values"] = torch.from_numpy(pixel_values).to(model.dtype)
    model.generation_config.eos_token_id = None
    out = model.generate(
        **inputs,
        attention_mask=torch.ones_like(inputs["input_ids"]),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(tokens) :].tolist()
