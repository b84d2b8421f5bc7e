"""Writes the tiny checkpoints as GGUF, with the `gguf` package: names, layout and keys as
llama.cpp's converter has them, and puna's own keys for what that converter cannot say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Type = gguf.GGMLQuantizationType
# The type of a matrix by its name in GGUF; everything else is float32.
TypeOf = Callable[[str], Type]

_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "feed_forward.router.weight": "ffn_gate_inp.weight",
    "feed_forward.experts.down_proj": "ffn_down_exps.weight",
} | {
    f"feed_forward.{part}{which}_proj.weight": f"ffn_{which}{suffix}.weight"
    for part, suffix in (("", ""), ("shared_expert.", "_shexp"))
    for which in ("gate", "up", "down")
}
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "lm_head.weight": "output.weight",
    "model.norm.weight": "output_norm.weight",
}
_VISION = {
    "vision_model.class_embedding": "v.class_embd",
    "vision_model.positional_embedding_vlm": "v.position_embd.weight",
    "vision_model.patch_embedding.linear.weight": "v.patch_embd.weight",
    "vision_model.layernorm_pre": "v.pre_ln",
    "vision_model.layernorm_post": "v.post_ln",
    "vision_model.vision_adapter.mlp.fc1.weight": "mm.model.mlp.1.weight",
    "vision_model.vision_adapter.mlp.fc2.weight": "mm.model.mlp.2.weight",
    "multi_modal_projector.linear_1.weight": "mm.model.fc.weight",
}
_VISION_LAYER = {
    "input_layernorm": "ln1",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


def text_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of the text model under their names in GGUF, in its layout."""
    out = {}
    for name, values in tensors.items():
        if "vision_model." in name or "multi_modal_projector." in name:
            continue
        short = name.removeprefix("language_model.")
        if short in _WHOLE:
            out[_WHOLE[short]] = values
            continue
        _, _, layer, part = short.split(".", 3)
        if part == "feed_forward.experts.gate_up_proj":
            gate, up = np.split(values.transpose(0, 2, 1), 2, axis=1)
            out[f"blk.{layer}.ffn_gate_exps.weight"] = gate
            out[f"blk.{layer}.ffn_up_exps.weight"] = up
        else:
            swap = part.endswith("experts.down_proj")
            out[f"blk.{layer}.{_LAYER[part]}"] = values.transpose(0, 2, 1) if swap else values
    return {name: np.ascontiguousarray(values) for name, values in out.items()}


def vision_tensors(
    tensors: Mapping[str, np.ndarray], post_norm: str = "ln2"
) -> dict[str, np.ndarray]:
    """The tensors of the vision tower under their names in GGUF."""
    names = _VISION_LAYER | {"post_attention_layernorm": post_norm}
    out = {}
    for name, values in tensors.items():
        if name in _VISION:
            out[_VISION[name]] = values
        elif name.startswith("vision_model.layernorm_"):
            stem, _, kind = name.rpartition(".")
            out[f"{_VISION[stem]}.{kind}"] = values
        elif name.startswith("vision_model.model.layers."):
            layer, _, rest = name.removeprefix("vision_model.model.layers.").partition(".")
            stem, _, kind = rest.rpartition(".")
            out[f"v.blk.{layer}.{names[stem]}.{kind}"] = values
    return out


def rope_divisors(text: Mapping[str, Any]) -> np.ndarray | None:
    """rope_freqs.weight: what the llama3 scaling divides each frequency by; None if it has none."""
    rope = text["rope_parameters"]
    if rope["rope_type"] != "llama3":
        return None
    head = text["head_dim"]
    frequencies = rope["rope_theta"] ** -(np.arange(0, head, 2) / head)
    wavelengths = 2 * np.pi / frequencies
    old, low, high = (
        rope["original_max_position_embeddings"],
        rope["low_freq_factor"],
        rope["high_freq_factor"],
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        smooth = (old / wavelengths - low) / np.float64(high - low)  # unused where high is low
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    divisors = np.where(wavelengths > old / low, rope["factor"], between)
    return np.where(wavelengths < old / high, 1.0, divisors).astype(np.float32)


def add_text_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any], *, own_keys: bool) -> None:
    """The metadata that llama.cpp's converter writes; with `own_keys` puna's too."""
    text = config.get("text_config", config)
    experts = text["num_local_experts"]
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(text["intermediate_size_mlp"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_key_length(text["head_dim"])
    writer.add_value_length(text["head_dim"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_freq_base(text["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(text["head_dim"])
    writer.add_vocab_size(text["vocab_size"])
    writer.add_interleave_moe_layer_step(text["interleave_moe_layer_step"])
    writer.add_expert_feed_forward_length(text["intermediate_size"])
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(text["num_experts_per_tok"])
    if not own_keys:
        return
    interval = text.get("no_rope_layer_interval", 4)
    if ropes := text.get("no_rope_layers"):
        # The period of the layers without RoPE: the first of them, or 0 if there is none.
        interval = ropes.index(0) + 1 if 0 in ropes else 0
        assert ropes == [int(interval == 0 or (i + 1) % interval != 0) for i in range(len(ropes))]
    writer.add_uint32("puna.attention.no_rope_interval", interval)
    writer.add_uint32("puna.attention.chunk_size", text["attention_chunk_size"] or 0)
    writer.add_bool("puna.attention.qk_norm", text["use_qk_norm"])
    writer.add_bool("puna.attention.temperature", bool(text["attn_temperature_tuning"]))
    writer.add_uint32("puna.attention.temperature_floor", int(text["floor_scale"]))
    writer.add_float32("puna.attention.temperature_scale", text["attn_scale"])


def add_tokenizer(writer: gguf.GGUFWriter, directory: Path, vocabulary: int) -> None:
    """The tokenizer.json of `directory` as metadata."""
    document = json.loads((directory / "tokenizer.json").read_text())
    tokens = {i: f"[PAD{i}]" for i in range(vocabulary)}
    types = dict.fromkeys(range(vocabulary), gguf.TokenType.UNUSED)
    for name, i in document["model"]["vocab"].items():
        tokens[i], types[i] = name, gguf.TokenType.NORMAL
    for token in document["added_tokens"]:
        i = token["id"]
        tokens[i] = token["content"]
        types[i] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    ids = {name: i for i, name in tokens.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama4")
    writer.add_token_list([tokens[i] for i in range(vocabulary)])
    writer.add_token_types([types[i] for i in range(vocabulary)])
    writer.add_token_merges([" ".join(merge) for merge in document["model"]["merges"]])
    writer.add_bos_token_id(ids["<|begin_of_text|>"])
    writer.add_eos_token_id(ids["<|eot|>"])
    writer.add_pad_token_id(ids["<|finetune_right_pad|>"])


def encode(values: np.ndarray, kind: Type) -> tuple[np.ndarray, Type]:
    """`values` in a type; those whose rows are no whole blocks stay float32."""
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if values.ndim < 2 or values.shape[-1] % block:
        kind = Type.F32
    return gguf.quants.quantize(values.astype(np.float32), kind), kind


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    type_of: TypeOf = lambda _: Type.F32,
    tokenizer: Path | None = None,
    template: str | None = None,
    own_keys: bool = True,
    encoded: Mapping[str, tuple[np.ndarray, Type]] | None = None,
    split: int = 0,
) -> None:
    """The text model of a checkpoint (config.json, Hugging Face tensors) as a GGUF file.

    `encoded` holds tensors that are written as they are, by their names in GGUF; with `split`,
    there are parts of that many tensors each.
    """
    writer = gguf.GGUFWriter(path, "llama4", split_max_tensors=split)
    add_text_keys(writer, config, own_keys=own_keys)
    text = config.get("text_config", config)
    if tokenizer:
        add_tokenizer(writer, tokenizer, text["vocab_size"])
    elif text.get("bos_token_id") is not None:
        writer.add_bos_token_id(text["bos_token_id"])
    if template:
        writer.add_chat_template(template)
    everything = text_tensors(tensors)
    divisors = rope_divisors(text)
    if divisors is not None:
        everything["rope_freqs.weight"] = divisors
    for name, values in everything.items():
        plain = values.ndim < 2 or name.endswith("ffn_gate_inp.weight")
        data, kind = encode(values, Type.F32 if plain else type_of(name))
        if encoded and name in encoded:
            data, kind = encoded[name]
        writer.add_tensor(name, data, raw_dtype=kind)
    _finish(writer)


def write_mmproj(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    type_of: TypeOf = lambda _: Type.F32,
    post_norm: str = "ln2",
) -> None:
    """The vision tower of a checkpoint as a GGUF file of its own."""
    vision = config["vision_config"]
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(gguf.VisionProjectorType.LLAMA4)
    writer.add_vision_projection_dim(config["text_config"]["hidden_size"])
    writer.add_vision_image_size(vision["image_size"])
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_block_count(vision["num_hidden_layers"])
    writer.add_vision_head_count(vision["num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(1e-5)
    writer.add_vision_projector_scale_factor(int(1 / vision["pixel_shuffle_ratio"]))
    writer.add_vision_image_mean([0.5] * 3)
    writer.add_vision_image_std([0.5] * 3)
    writer.add_vision_use_gelu(True)
    for name, values in vision_tensors(tensors, post_norm).items():
        plain = values.ndim < 2 or name.startswith("v.position_embd")
        data, kind = encode(values, Type.F32 if plain else type_of(name))
        writer.add_tensor(name, data, raw_dtype=kind)
    _finish(writer)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
