"""Checkpoints as people have them, and as they should not be.

Every accepted form gives the logits of the plain one; every rejected one raises an error that names
the file, the place and the numbers, before a weight is read.
"""

from __future__ import annotations

import copy
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import puna
from conftest import MakeCheckpoint
from oracle import golden, tiny
from oracle.make_checkpoint import (
    Stored,
    random_tensors,
    safetensors_bytes,
    write_checkpoint,
    write_safetensors,
)
from puna import _core

Config = dict[str, Any]
VARIANT = "mixed"  # experts and dense layers, chunked and full ones, a vision tower
PROMPT = golden.load(VARIANT).tokens(tiny.TEXT)[:24]  # over one chunk boundary


def changed(variant: str = VARIANT, text: Config | None = None, **root: Any) -> Config:
    """A variant's config.json with fields set; `...` removes one."""
    config = copy.deepcopy(golden.load(variant).config)
    for fields, changes in ((config.get("text_config", config), text or {}), (config, root)):
        for name, value in changes.items():
            if value is ...:
                fields.pop(name, None)
            else:
                fields[name] = value
    return config


def logits(directory: Path) -> np.ndarray:
    """float32 [24, vocabulary]: the scalar kernels suffice, one thread is enough."""
    with puna.load(directory, threads=1, device="cpu", progress=False, memory="256M") as llm:
        return np.asarray(llm.logits(PROMPT))


@pytest.fixture
def directory(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A copy of the plain checkpoint, to be changed."""
    return Path(shutil.copytree(checkpoint(VARIANT).path, tmp_path / "model"))


@pytest.fixture(scope="module")
def plain(checkpoint: MakeCheckpoint) -> np.ndarray:
    """The logits of the plain checkpoint."""
    return logits(checkpoint(VARIANT).path)


def write_config(directory: Path, config: Config) -> None:
    (directory / "config.json").write_text(json.dumps(config))


def refusal(directory: Path, kind: type[puna.Error]) -> str:
    """What load() and inspect() say, in one line."""
    messages = []
    for read in (
        lambda: puna.load(directory, progress=False),
        lambda: _core.inspect(str(directory)),
    ):
        with pytest.raises(kind) as caught:
            read()
        assert type(caught.value) is kind
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    assert len(messages[0]) < 1000
    return messages[0]


# --- config.json: forms that mean the same --------------------------------------------------------

ROPE = {k: v for k, v in tiny.LLAMA3_ROPE.items() if k != "rope_theta"}
LAYERS = tiny.MIXED_TEXT["num_hidden_layers"]
SAME = {
    "transformers 4: rope_scaling beside rope_theta": {
        "rope_parameters": ...,
        "rope_theta": 500000.0,
        "rope_scaling": ROPE,
    },
    "rope_scaling with the older key type": {
        "rope_parameters": ...,
        "rope_scaling": {**ROPE, "type": "llama3", "rope_type": None},
    },
    "rope_theta beside rope_parameters": {"rope_parameters": ROPE, "rope_theta": 500000},
    "whole numbers in rope_parameters": {
        "rope_parameters": {**ROPE, "rope_theta": 500000, "factor": 16, "low_freq_factor": 1}
    },
    "rope_scaling null": {"rope_scaling": None},
    "rope_scaling empty": {"rope_scaling": {}},
    "no_rope_layers null": {"no_rope_layers": None},
    "no_rope_layers empty": {"no_rope_layers": []},
    "no_rope_layers absent, no interval": {"no_rope_layers": ..., "no_rope_layer_interval": ...},
    "no_rope_layers for more layers than there are": {"no_rope_layers": [1, 1, 1, 0] * 3},
    "moe_layers null": {"moe_layers": None},
    "moe_layers absent": {"moe_layers": ...},
    "moe_layers without an interleave": {"interleave_moe_layer_step": 1},
    "layer_types null": {"layer_types": None},
    "layer_types absent": {"layer_types": ...},
    "temperature tuning as a number": {"attn_temperature_tuning": 4},
    "temperature tuning absent": {"attn_temperature_tuning": ...},
    "floor_scale with a point": {"floor_scale": 16.0},
    "qk norm absent": {"use_qk_norm": ...},
    "head_dim null": {"head_dim": None},
    "numbers of tokens null": {"pad_token_id": None, "bos_token_id": None},
    "one end token": {"eos_token_id": 281},
    "fields of other versions": {"for_llm_compressor": False, "cache_implementation": "hybrid"},
}


@pytest.mark.parametrize("text", SAME.values(), ids=SAME.keys())
def test_forms_of_config_that_mean_the_same(
    directory: Path, plain: np.ndarray, text: Config
) -> None:
    write_config(directory, changed(text=text))
    np.testing.assert_array_equal(logits(directory), plain)


SAME_ROOT = {
    "torch_dtype": {"torch_dtype": "float32"},
    "dtype": {"dtype": "float32"},
    "dtype of another file": {"torch_dtype": "bfloat16"},
    "image_token_id": {"image_token_index": ..., "image_token_id": 294},
    "quantization_config null": {"quantization_config": None},
}


@pytest.mark.parametrize("root", SAME_ROOT.values(), ids=SAME_ROOT.keys())
def test_forms_of_the_outer_config(directory: Path, plain: np.ndarray, root: Config) -> None:
    write_config(directory, changed(**root))
    np.testing.assert_array_equal(logits(directory), plain)


DIFFERENT = {
    "chunks lifted": {"attention_chunk_size": None},
    "other chunks": {"attention_chunk_size": 8},
    "RoPE everywhere": {"no_rope_layers": [1] * LAYERS},
    "full attention everywhere": {"layer_types": ["full_attention"] * LAYERS},
    "no temperature": {"attn_temperature_tuning": False},
    "no temperature, as a number": {"attn_temperature_tuning": 0},
    "no qk norm": {"use_qk_norm": False},
    "plain RoPE": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "the older RoPE scaling goes before": {"rope_scaling": {**ROPE, "factor": 2.0}},
    "another rope_theta": {"rope_parameters": {**ROPE, "rope_theta": 10000.0}},
    "another epsilon": {"rms_norm_eps": 0.1},
}


@pytest.mark.parametrize("text", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_fields_that_must_change_the_logits(
    directory: Path, plain: np.ndarray, text: Config
) -> None:
    """Each field is obeyed: the test of equal forms would pass if none were."""
    write_config(directory, changed(text=text))
    assert np.abs(logits(directory) - plain).max() > 1e-3


def test_guard_has_no_chunks(checkpoint: MakeCheckpoint) -> None:
    report = _core.inspect(str(checkpoint("guard_like").path))
    assert (report["chunked_layers"], report["chunk"], report["moe_layers"]) == (0, 0, 0)
    assert report["kv_fixed_bytes"] == 0


def test_a_text_only_config_is_flat(checkpoint: MakeCheckpoint) -> None:
    report = _core.inspect(str(checkpoint("text_only").path))
    assert (report["image_size"], report["hidden_size"], report["layers"]) == (0, 64, LAYERS)


def test_the_text_part_alone_reads_the_same(
    directory: Path, plain: np.ndarray, tmp_path: Path
) -> None:
    """A multimodal checkpoint reduced to Llama4ForCausalLM: a flat config, other names."""
    seed = golden.load(VARIANT).variant.seed
    config = golden.load(VARIANT).config
    prefix = "language_model."
    tensors = {
        name.removeprefix(prefix): Stored.of(values, "float32")
        for name, values in random_tensors(config, seed).items()
        if name.startswith(prefix)
    }
    write_config(directory, config["text_config"])
    write_safetensors(directory / "model.safetensors", tensors)
    np.testing.assert_array_equal(logits(directory), plain)
    # The form without a vision tower that keeps the outer config and the names.
    write_config(directory, changed(vision_config=...))
    write_safetensors(
        directory / "model.safetensors", {prefix + name: t for name, t in tensors.items()}
    )
    np.testing.assert_array_equal(logits(directory), plain)


def test_tied_embeddings(directory: Path) -> None:
    """The head is the embedding, whether or not the file has one."""
    seed = golden.load(VARIANT).variant.seed
    random = random_tensors(golden.load(VARIANT).config, seed)
    head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    stored = {name: Stored.of(values, "float32") for name, values in random.items()}
    file = directory / "model.safetensors"
    write_safetensors(file, stored | {head: stored[embedding]})
    untied = logits(directory)
    for config in (
        changed(text={"tie_word_embeddings": True}),
        changed(text={"tie_word_embeddings": ...}, tie_word_embeddings=True),
    ):
        write_config(directory, config)
        write_safetensors(file, stored)
        np.testing.assert_array_equal(logits(directory), untied)
        write_safetensors(file, {name: t for name, t in stored.items() if name != head})
        np.testing.assert_array_equal(logits(directory), untied)


def test_scout_of_the_first_week_is_warned_about(directory: Path) -> None:
    rope = {**ROPE, "rope_theta": 500000.0, "factor": 8.0, "high_freq_factor": 4.0}
    write_config(directory, changed(text={"rope_parameters": rope}))
    (warning,) = _core.inspect(str(directory))["warnings"]
    assert all(number in warning for number in ("8", "4", "16"))


def test_moe_layers_beyond_the_last_are_warned_about(directory: Path) -> None:
    write_config(directory, changed(text={"moe_layers": [1, 3, 5, 7, 9]}))
    (warning,) = _core.inspect(str(directory))["warnings"]
    assert "9" in warning and "8" in warning


def test_rope_layers_beyond_the_last_are_warned_about(directory: Path) -> None:
    write_config(directory, changed(text={"no_rope_layers": [1, 1, 1, 0] * 3}))
    (warning,) = _core.inspect(str(directory))["warnings"]
    assert "no_rope_layers for 12 layers" in warning and "8" in warning


def test_the_epsilon_of_the_vision_tower_is_that_of_transformers(directory: Path) -> None:
    """Its layer norms have PyTorch's default, whatever the file says."""
    pixels = np.random.default_rng(1).standard_normal((1, 3, 56, 56), dtype=np.float32)

    def with_picture() -> np.ndarray:
        with puna.load(directory, threads=1, progress=False) as llm:
            return llm.logits([1, *[tiny.IMAGE_TOKEN] * llm.info.tokens_per_tile, 2], pixels)

    write_config(directory, changed())
    expected = with_picture()
    write_config(directory, changed(**vision(norm_eps=0.1)))
    np.testing.assert_array_equal(with_picture(), expected)
    (warning,) = _core.inspect(str(directory))["warnings"]
    assert "norm_eps is 0.1" in warning and "1e-05" in warning


# --- config.json: what is refused -----------------------------------------------------------------

FORMAT, UNSUPPORTED = puna.ModelFormatError, puna.UnsupportedError
LLAMA3 = tiny.LLAMA3_ROPE
BAD_TEXT: dict[str, tuple[Config, type[puna.Error], tuple[str, ...]]] = {
    "size zero": ({"hidden_size": 0}, FORMAT, ("hidden_size", "0", "1")),
    "size negative": ({"num_hidden_layers": -3}, FORMAT, ("num_hidden_layers", "-3")),
    "size huge": ({"vocab_size": 2**63}, FORMAT, ("vocab_size", str(2**63), str(2**24))),
    "size beyond 64 bits": ({"vocab_size": 2**64}, FORMAT, ("vocab_size", "1.8446744073709552e+19")),
    "size not whole": ({"hidden_size": 64.5}, FORMAT, ("hidden_size", "64.5")),
    "size a text": ({"hidden_size": "64"}, FORMAT, ("hidden_size", '"64"')),
    "size a list": ({"head_dim": [16]}, FORMAT, ("head_dim", "[16]")),
    "product of sizes": (
        {"intermediate_size": 2**24, "hidden_size": 2**24, "num_local_experts": 65536},
        FORMAT,
        ("parameters", "1e+15"),
    ),
    "cache": ({"max_position_embeddings": 2**40, "head_dim": 65536, "num_key_value_heads": 4}, FORMAT, ("max_position_embeddings", str(2**40))),
    "heads": ({"num_key_value_heads": 3}, FORMAT, ("num_attention_heads", "4", "3")),
    "odd head": ({"head_dim": 15}, FORMAT, ("head_dim", "15")),
    "no experts": ({"num_local_experts": 0}, FORMAT, ("num_local_experts", "0", "layer 1")),
    "too many of few experts": ({"num_experts_per_tok": 5}, FORMAT, ("num_experts_per_tok", "5", "4")),
    "no expert of some": ({"num_experts_per_tok": 0}, FORMAT, ("num_experts_per_tok", "0", "4")),
    "experts of all layers": ({"num_local_experts": 65536}, FORMAT, ("experts in all", "131072")),
    "short no_rope_layers": ({"no_rope_layers": [1, 0]}, FORMAT, ("no_rope_layers", "[1,0]", "8")),
    "no_rope_layers of indices": ({"no_rope_layers": [3, 7]}, FORMAT, ("no_rope_layers", "3")),
    "no_rope_layers no list": ({"no_rope_layers": 4}, FORMAT, ("no_rope_layers", "4")),
    "interval zero": ({"no_rope_layer_interval": 0, "no_rope_layers": []}, FORMAT, ("no_rope_layer_interval", "0")),
    "moe_layers negative": ({"moe_layers": [-1]}, FORMAT, ("moe_layers", "-1")),
    "layer_types short": ({"layer_types": ["full_attention"]}, FORMAT, ("layer_types", "8")),
    "layer_types unknown": ({"layer_types": ["sliding_attention"] * 8}, UNSUPPORTED, ("layer_types", "sliding_attention")),
    "chunk zero": ({"attention_chunk_size": 0}, FORMAT, ("attention_chunk_size", "0")),
    "chunk a flag": ({"attention_chunk_size": True}, FORMAT, ("attention_chunk_size", "true")),
    "floor zero": ({"floor_scale": 0}, FORMAT, ("floor_scale", "0")),
    "floor broken": ({"floor_scale": 16.5}, FORMAT, ("floor_scale", "16.5")),
    "epsilon": ({"rms_norm_eps": -1e-5}, FORMAT, ("rms_norm_eps", "-1e-05")),
    "activation": ({"hidden_act": "gelu"}, UNSUPPORTED, ("hidden_act", "gelu", "silu")),
    "bias": ({"attention_bias": True}, UNSUPPORTED, ("attention_bias", "true")),
    "rope a list": ({"rope_parameters": [16]}, FORMAT, ("rope_parameters",)),
    "rope of another kind": ({"rope_parameters": {"rope_type": "yarn"}}, UNSUPPORTED, ("rope_type", "yarn", "llama3")),
    "rope without a factor": ({"rope_parameters": {"rope_type": "llama3"}}, FORMAT, ("factor",)),
    "rope factors crossed": ({"rope_parameters": LLAMA3 | {"high_freq_factor": 0.5}}, FORMAT, ("high_freq_factor", "0.5", "1")),
    "rope per type of layer": ({"rope_parameters": {"full_attention": LLAMA3}}, UNSUPPORTED, ("full_attention",)),
    "rope theta": ({"rope_parameters": LLAMA3 | {"rope_theta": 0}}, FORMAT, ("rope_theta", "0")),
    "rope divisor": ({"rope_parameters": {"rope_type": "puna_divisors", "divisors": [1.0] * 7 + [1e-300]}}, FORMAT, ("divisors", "1e-300", "1e-06")),
    "rope partial": ({"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, UNSUPPORTED, ("partial_rotary_factor", "0.5")),
    "end token": ({"eos_token_id": [281, "x"]}, FORMAT, ("eos_token_id", '"x"')),
}  # fmt: skip


@pytest.mark.parametrize(("text", "kind", "named"), BAD_TEXT.values(), ids=BAD_TEXT.keys())
def test_refused_text_configs(
    directory: Path, text: Config, kind: type[puna.Error], named: tuple[str, ...]
) -> None:
    write_config(directory, changed(text=text))
    message = refusal(directory, kind)
    assert all(part in message for part in ("config.json", *named)), message


def vision(**fields: Any) -> Config:
    return {"vision_config": golden.load(VARIANT).config["vision_config"] | fields}


BAD_ROOT: dict[str, tuple[Config, type[puna.Error], tuple[str, ...]]] = {
    "another model": ({"model_type": "llama"}, UNSUPPORTED, ("model_type", '"llama"', "llama4")),
    "no model type": ({"model_type": ...}, UNSUPPORTED, ("model_type",)),
    "no text config": ({"text_config": None}, FORMAT, ("text_config",)),
    "text config a list": ({"text_config": []}, FORMAT, ("text_config",)),
    "patches": (vision(patch_size=15), FORMAT, ("image_size", "56", "15")),
    "image not square": (vision(image_size=[56, 28]), FORMAT, ("image_size", "[56,28]")),
    "shuffle": (vision(pixel_shuffle_ratio=0.3), FORMAT, ("pixel_shuffle_ratio", "0.3")),
    "grid": (vision(image_size=42), FORMAT, ("3", "2")),
    "vision heads": (vision(num_attention_heads=5), FORMAT, ("48", "5")),
    "adapter": (vision(intermediate_size=96), FORMAT, ("intermediate_size", "96", "192")),
    "projector": (vision(vision_output_dim=41), FORMAT, ("vision_output_dim", "41", "40")),
    "projector bias": (vision(multi_modal_projector_bias=True), UNSUPPORTED, ("multi_modal_projector_bias",)),
    "channels": (vision(num_channels=1), UNSUPPORTED, ("num_channels", "1", "3")),
    "gptq": (
        {"quantization_config": {"quant_method": "gptq"}}, UNSUPPORTED, ("gptq", "bf16"),
    ),
    "compressed tensors": (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        UNSUPPORTED,
        ("compressed-tensors", "pack-quantized"),
    ),
    "compressed tensors, older": (
        {"compression_config": {"quant_method": "compressed-tensors"}}, UNSUPPORTED, ("compressed-tensors",),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("root", "kind", "named"), BAD_ROOT.values(), ids=BAD_ROOT.keys())
def test_refused_outer_configs(
    directory: Path, root: Config, kind: type[puna.Error], named: tuple[str, ...]
) -> None:
    write_config(directory, changed(**root))
    message = refusal(directory, kind)
    assert all(part in message for part in ("config.json", *named)), message


GOOD_CONFIG = json.dumps(golden.load(VARIANT).config)
BAD_JSON = {
    "empty": ("", ("empty",)),
    "cut": (GOOD_CONFIG[:200], ("not valid JSON", "line 1")),
    "no object": ("[1, 2]", ("no JSON object",)),
    "NaN": ('{"model_type": NaN}', ("not valid JSON", "line 1")),
    "beyond double": ('{"model_type": 1e999}', ("not valid JSON", "1e999")),
    "a key twice": (GOOD_CONFIG[:-1] + ', "model_type": "llama4"}', ("model_type", "twice")),
    "an inner key twice": (
        GOOD_CONFIG.replace('"hidden_size"', '"head_dim": 8, "hidden_size"', 1), ("head_dim", "twice"),
    ),
    "deep": ('{"model_type": ' + "[" * 5000 + "]" * 5000 + "}", ("64",)),
    "bytes": ('{"model_type": "\udcff"}', ("not valid JSON",)),
}  # fmt: skip


@pytest.mark.parametrize(("text", "named"), BAD_JSON.values(), ids=BAD_JSON.keys())
def test_config_that_is_no_json(directory: Path, text: str, named: tuple[str, ...]) -> None:
    (directory / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    message = refusal(directory, FORMAT)
    assert all(part in message for part in ("config.json", *named)), message


# --- generation_config.json -----------------------------------------------------------------------


def test_generation_config(directory: Path) -> None:
    def info(**fields: Any) -> puna.ModelInfo:
        (directory / "generation_config.json").write_text(json.dumps(fields))
        with puna.load(directory, threads=1, progress=False, memory="256M") as llm:
            return llm.info

    assert info(eos_token_id=281).eos_tokens == (281,)
    assert info(eos_token_id=[282, 283]).eos_tokens == (282, 283)
    assert info(eos_token_id=None, temperature=None).eos_tokens == (281, 284, 285)
    # Ids of the published vocabulary, which this small one does not have.
    assert info(eos_token_id=[200001, 284]).eos_tokens == (284,)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": -1}, ("temperature", "-1", "0")),
        ({"temperature": "hot"}, ("temperature", '"hot"')),
        ({"top_p": 1.5}, ("top_p", "1.5", "1")),
        ({"top_k": -5}, ("top_k", "-5")),
        ({"eos_token_id": [-7]}, ("eos_token_id", "-7")),
        ({"do_sample": "yes"}, ("do_sample", '"yes"')),
        ([], ("no JSON object",)),
    ],
)
def test_refused_generation_configs(directory: Path, fields: Any, named: tuple[str, ...]) -> None:
    (directory / "generation_config.json").write_text(json.dumps(fields))
    message = refusal(directory, FORMAT)
    assert all(part in message for part in ("generation_config.json", *named)), message


# --- weights -------------------------------------------------------------------------------------


def test_shards_give_the_same(checkpoint: MakeCheckpoint, plain: np.ndarray) -> None:
    for shards in (2, 5):
        path = checkpoint(VARIANT, shards=shards).path
        assert not (path / "model.safetensors").exists()
        np.testing.assert_array_equal(logits(path), plain)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types_of_tensors(checkpoint: MakeCheckpoint, tmp_path: Path, dtype: str) -> None:
    """The logits are those of the rounded values stored as float32."""
    made = checkpoint(VARIANT, dtype=dtype)
    widened = {name: Stored.of(values, "float32") for name, values in made.tensors.items()}
    write_config(tmp_path, changed(torch_dtype="float32"))
    write_safetensors(tmp_path / "model.safetensors", widened)
    got, wanted = logits(made.path), logits(tmp_path)
    if dtype == "float16":  # computed in float32, exactly
        np.testing.assert_array_equal(got, wanted)
        return
    # Products with bfloat16 weights round their inputs to 8 bits: some 8 layers of 4 products.
    assert np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()
    assert not np.array_equal(got, wanted)


def test_types_may_be_mixed(directory: Path, plain: np.ndarray) -> None:
    """Norms in float32 beside matrices in bfloat16 or float16; alignment is kept by the order."""
    tensors = random_tensors(golden.load(VARIANT).config, golden.load(VARIANT).variant.seed)
    stored = {
        name: Stored.of(values, "float32" if values.ndim == 1 else "float16")
        for name, values in sorted(tensors.items(), key=lambda item: item[1].ndim)
    }
    write_safetensors(directory / "model.safetensors", stored)
    assert np.abs(logits(directory) - plain).max() < 0.02 * np.abs(plain).max()


def stored() -> dict[str, Stored]:
    tensors = random_tensors(golden.load(VARIANT).config, golden.load(VARIANT).variant.seed)
    return {name: Stored.of(values, "float32") for name, values in tensors.items()}


LAYER1 = "language_model.model.layers.1."
BAD_TENSORS: dict[
    str, tuple[Callable[[dict[str, Stored]], None], type[puna.Error], tuple[str, ...]]
] = {
    "missing": (
        lambda t: t.pop(LAYER1 + "self_attn.q_proj.weight"),
        FORMAT,
        (LAYER1 + "self_attn.q_proj.weight", "lacks 1 of"),
    ),
    "renamed": (
        lambda t: t.update({LAYER1 + "self_attn.q_prox.weight": t.pop(LAYER1 + "self_attn.q_proj.weight")}),
        FORMAT,
        (LAYER1 + "self_attn.q_proj.weight", "nearest", LAYER1 + "self_attn.q_prox.weight"),
    ),
    "unexpected": (
        lambda t: t.update({LAYER1 + "self_attn.q_proj.bias": Stored("F32", (64,), bytes(256))}),
        FORMAT,
        (LAYER1 + "self_attn.q_proj.bias", "model.safetensors", "nearest", LAYER1 + "self_attn.q_proj.weight"),
    ),
    "wrong shape": (
        lambda t: t.update({LAYER1 + "self_attn.k_proj.weight": Stored("F32", (16, 64), bytes(4096))}),
        FORMAT,
        (LAYER1 + "self_attn.k_proj.weight", "(16, 64)", "(32, 64)", "model.safetensors"),
    ),
    "transposed": (
        lambda t: t.update({LAYER1 + "self_attn.k_proj.weight": Stored("F32", (64, 32), bytes(8192))}),
        FORMAT,
        (LAYER1 + "self_attn.k_proj.weight", "(64, 32)", "(32, 64)", "another order"),
    ),
    "wrong rank": (
        lambda t: t.update({LAYER1 + "input_layernorm.weight": Stored("F32", (1, 64), bytes(256))}),
        FORMAT,
        (LAYER1 + "input_layernorm.weight", "(1, 64)", "(64)"),
    ),
    "integers": (
        lambda t: t.update({LAYER1 + "input_layernorm.weight": Stored("I32", (64,), bytes(256))}),
        FORMAT,
        (LAYER1 + "input_layernorm.weight", "int32", "bfloat16"),
    ),
    "doubles": (
        lambda t: t.update({LAYER1 + "input_layernorm.weight": Stored("F64", (64,), bytes(512))}),
        FORMAT,
        (LAYER1 + "input_layernorm.weight", "float64", "float32"),
    ),
    "fp8 without scales": (
        lambda t: t.update({LAYER1 + "feed_forward.experts.down_proj": Stored("F8_E4M3", (4, 48, 64), bytes(12288))}),
        FORMAT,
        (LAYER1 + "feed_forward.experts.down_proj", "float8_e4m3", "down_proj_scale"),
    ),
    "scales of what is not fp8": (
        lambda t: t.update({LAYER1 + "feed_forward.experts.down_proj_scale": Stored("F32", (4, 64, 1), bytes(1024))}),
        UNSUPPORTED,
        (LAYER1 + "feed_forward.experts.down_proj_scale", "FP8"),
    ),
    "compressed-tensors": (
        lambda t: t.update({LAYER1 + "feed_forward.experts.0.gate_proj.weight_packed": Stored("I32", (48, 8), bytes(1536))}),
        UNSUPPORTED,
        ("weight_packed", "compressed-tensors"),
    ),
    "nvfp4": (
        lambda t: t.update({LAYER1 + "feed_forward.experts.gate_up_proj_weight_scale_2": Stored("F32", (), bytes(4))}),
        UNSUPPORTED,
        ("weight_scale_2", "NVFP4"),
    ),
    "bitsandbytes": (
        lambda t: t.update({LAYER1 + "self_attn.q_proj.weight.absmax": Stored("F32", (8,), bytes(32))}),
        UNSUPPORTED,
        ("absmax", "bitsandbytes"),
    ),
    "gptq": (
        lambda t: t.update({LAYER1 + "self_attn.q_proj.qweight": Stored("I32", (8, 64), bytes(2048))}),
        UNSUPPORTED,
        ("qweight", "GPTQ"),
    ),
    "a type that is not read": (
        lambda t: t.update({"x": Stored("F8_E8M0", (4,), bytes(4))}),
        UNSUPPORTED,
        ("tensor x", "F8_E8M0"),
    ),
    "a type that does not exist": (
        lambda t: t.update({"x": Stored("F13", (4,), bytes(4))}),
        FORMAT,
        ("tensor x", "F13"),
    ),
    "types that cannot be joined": (
        lambda t: t.update({LAYER1 + "feed_forward.shared_expert.up_proj.weight": Stored("BF16", (48, 64), bytes(6144))}),
        FORMAT,
        ("layer 1", "bfloat16", "float32"),
    ),
    "a name with control characters": (
        lambda t: t.update({"\x1b[31mred\n": Stored("F32", (1,), bytes(4))}),
        FORMAT,
        (r"\x1b[31mred\x0a",),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "named"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_refused_tensors(
    directory: Path,
    change: Callable[[dict[str, Stored]], None],
    kind: type[puna.Error],
    named: tuple[str, ...],
) -> None:
    tensors = stored()
    change(tensors)
    # The largest elements first, so that all lie at multiples of their size.
    order = sorted(
        tensors.items(), key=lambda item: -len(item[1].data) / max(1, np.prod(item[1].shape))
    )
    write_safetensors(directory / "model.safetensors", dict(order))
    message = refusal(directory, kind)
    assert all(part in message for part in named), message


def test_buffers_that_exporters_add_are_no_matter(directory: Path, plain: np.ndarray) -> None:
    extra = {"language_model.model.rotary_emb.inv_freq": Stored("F32", (8,), bytes(32))}
    write_safetensors(directory / "model.safetensors", stored() | extra)
    np.testing.assert_array_equal(logits(directory), plain)


# --- the safetensors format ----------------------------------------------------------------------


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> Config:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


BAD_FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("empty",)),
    "seven bytes": (b"1234567", ("7", "8")),
    "header longer than the file": (struct.pack("<Q", 100) + b"{}", ("100", "10")),
    "header of 2^64": (b"\xff" * 8 + b"{}", (str(2**64 - 1), "10")),
    "header of 100 MB": (struct.pack("<Q", 100_000_001) + b"{}", ("100000001", "100000000")),
    "header no JSON": (safetensors_bytes({}, b"").replace(b"{}", b"{{"), ("header", "not valid JSON")),
    "header no object": (struct.pack("<Q", 2) + b"[]", ("no JSON object",)),
    "a tensor twice": (
        safetensors_bytes({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)).replace(b'"b"', b'"a"'),
        ('"a"', "twice"),
    ),
    "offsets exchanged": (safetensors_bytes({"a": entry(0, 4) | {"data_offsets": [4, 0]}}, bytes(4)), ("tensor a", "4 to 0")),
    "past the end": (safetensors_bytes({"a": entry(0, 8)}, bytes(4)), ("tensor a", "0 to 8", "4 bytes")),
    "far past the end": (safetensors_bytes({"a": entry(0, 2**62, [2**60])}, bytes(4)), ("tensor a", str(2**62), "4 bytes")),
    "end before 2^64": (safetensors_bytes({"a": entry(0, 2**64 - 4, [1])}, bytes(4)), ("tensor a", str(2**64 - 4), "4 bytes")),
    "overlap": (safetensors_bytes({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), ("tensor b", "4", "8", "overlap")),
    "gap": (safetensors_bytes({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), ("tensor b", "4 to 8")),
    "more data": (safetensors_bytes({"a": entry(0, 4)}, bytes(12)), ("4", "12")),
    "shape and offsets": (safetensors_bytes({"a": entry(0, 8, [3])}, bytes(8)), ("tensor a", "(3)", "12", "8")),
    "shape overflows": (safetensors_bytes({"a": entry(0, 4, [2**32, 2**32])}, bytes(4)), ("tensor a", str(2**32), "overflow")),
    "shape overflows before a zero": (safetensors_bytes({"a": entry(0, 0, [2**62, 3, 0], "U8")}, b""), ("tensor a", str(2**62), "overflow")),
    "dimension negative": (safetensors_bytes({"a": entry(0, 4, [-1])}, bytes(4)), ("tensor a", "dimension")),
    "dimension no integer": (safetensors_bytes({"a": entry(0, 4, [1.0])}, bytes(4)), ("tensor a", "dimension")),
    "five dimensions": (safetensors_bytes({"a": entry(0, 4, [1] * 5)}, bytes(4)), ("tensor a", "5", "4")),
    "offsets missing": (safetensors_bytes({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), ("tensor a", "data_offsets")),
    "three offsets": (safetensors_bytes({"a": entry(0, 4) | {"data_offsets": [0, 2, 4]}}, bytes(4)), ("tensor a", "data_offsets")),
    "offset negative": (safetensors_bytes({"a": entry(0, 4) | {"data_offsets": [-4, 0]}}, bytes(4)), ("tensor a", "data_offsets")),
    "tensor no object": (safetensors_bytes({"a": 4}, bytes(4)), ("tensor a", "dtype")),
    "metadata": (safetensors_bytes({"__metadata__": {"format": 1}}, b""), ("__metadata__",)),
    "misaligned": (safetensors_bytes({"a": entry(0, 2, [1], "BF16"), "b": entry(2, 6, [1])}, bytes(6)), ("tensor b", "4-byte")),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", ("Git LFS", "pull")),
}  # fmt: skip


@pytest.mark.parametrize(("content", "named"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_files_that_are_no_safetensors(
    directory: Path, content: bytes, named: tuple[str, ...]
) -> None:
    (directory / "model.safetensors").write_bytes(content)
    message = refusal(directory, FORMAT)
    assert all(part in message for part in ("model.safetensors", *named)), message


def test_every_truncation_is_found(directory: Path) -> None:
    """As an interrupted download leaves it."""
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 5000, 8):
        file.write_bytes(whole[:size])
        assert "model.safetensors" in refusal(directory, FORMAT)


# --- the index -----------------------------------------------------------------------------------


@pytest.fixture
def sharded(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint(VARIANT, shards=2).path, tmp_path / "model"))


INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
NORM = "language_model.model.norm.weight"


def change_index(directory: Path, **places: str) -> None:
    """Puts the final norm elsewhere."""
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] |= places
    (directory / INDEX).write_text(json.dumps(index))


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    message = refusal(sharded, puna.ModelNotFound)
    assert all(part in message for part in (INDEX, "2 shards", "1 absent", SHARDS[1])), message


@pytest.mark.parametrize(
    "place",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "x\\y.safetensors",
        "model.bin",
        "",
        "..",
        "\0.safetensors",
    ],
)
def test_an_index_that_leads_elsewhere(sharded: Path, place: str) -> None:
    shutil.copy(sharded / SHARDS[0], sharded.parent / "model.safetensors")
    change_index(sharded, **{NORM: place})
    message = refusal(sharded, FORMAT)
    assert INDEX in message and NORM in message


def test_an_index_that_names_the_wrong_shard(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    here = index["weight_map"][NORM]
    other = next(shard for shard in SHARDS if shard != here)
    change_index(sharded, **{NORM: other})
    message = refusal(sharded, FORMAT)
    assert all(part in message for part in (INDEX, NORM, here, other)), message


def test_an_index_that_names_too_much_or_too_little(sharded: Path) -> None:
    good = (sharded / INDEX).read_text()
    change_index(sharded, extra=SHARDS[0])
    message = refusal(sharded, FORMAT)
    assert "extra" in message and SHARDS[0] in message
    index = json.loads(good)
    del index["weight_map"][NORM]
    (sharded / INDEX).write_text(json.dumps(index))
    message = refusal(sharded, FORMAT)
    assert NORM in message and INDEX in message


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 4}}', "{"]
)
def test_an_index_that_is_none(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    assert INDEX in refusal(sharded, FORMAT)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    tensors = stored()
    names = list(tensors)
    for i, shard in enumerate(SHARDS):
        mine = {name: tensors[name] for name in names[i::2]} | {NORM: tensors[NORM]}
        write_safetensors(sharded / shard, mine)
    message = refusal(sharded, FORMAT)
    assert all(part in message for part in (NORM, *SHARDS)), message


# --- directories ---------------------------------------------------------------------------------


def test_paths_that_are_no_checkpoint(directory: Path) -> None:
    near = directory.with_name("modle")
    message = refusal(near, puna.ModelNotFound)
    assert str(near) in message and "model" in message
    message = refusal(directory / "config.json", puna.ModelNotFound)
    assert str(directory) in message
    message = refusal(directory.parent, puna.ModelNotFound)
    assert "config.json" in message and str(directory) in message
    (directory / "original").mkdir()
    message = refusal(directory / "original", puna.ModelNotFound)
    assert str(directory) in message
    gguf = directory / "x.gguf"
    gguf.write_bytes(b"GGUF")
    assert "truncated" in refusal(gguf, FORMAT)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("adapter_config.json", "LoRA"),
        ("params.json", "Meta"),
        ("consolidated.00.pth", "Meta"),
        ("pytorch_model.bin", "PyTorch"),
    ],
)
def test_other_kinds_of_models(tmp_path: Path, name: str, named: str) -> None:
    (tmp_path / name).write_bytes(b"{}")
    message = refusal(tmp_path, UNSUPPORTED)
    assert named in message and name in message and "config.json" in message


def test_a_config_without_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    message = refusal(directory, puna.ModelNotFound)
    assert "model.safetensors" in message and INDEX in message and "config.json" in message


def test_a_trailing_slash_is_no_matter(checkpoint: MakeCheckpoint) -> None:
    path = str(checkpoint(VARIANT).path)
    assert _core.inspect(path + "/")["parameters"] == _core.inspect(path)["parameters"]


def test_writing_a_checkpoint_is_deterministic(tmp_path: Path) -> None:
    """The tests of this file compare logits of checkpoints that were written twice."""
    config = golden.load(VARIANT).config
    first, second = (write_checkpoint(tmp_path / n, config, 7) for n in ("a", "b"))
    assert all(np.array_equal(first[name], second[name]) for name in first)
