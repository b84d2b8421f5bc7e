"""The measuring sticks themselves: the reference agrees with the golden logits, and can tell."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import skip_or_fail

from . import float8, golden, random_bits, tiny
from .make_checkpoint import Stored, random_tensors, write_checkpoint
from .reference import Reference, moe_layers, rope_frequencies, rope_layers, round_to_bfloat16

CASES = [(name, p.name) for name, v in tiny.VARIANTS.items() for p in v.prompts]


@pytest.mark.parametrize(("name", "prompt_name"), CASES)
def test_reference_agrees_with_transformers(name: str, prompt_name: str) -> None:
    fixture = golden.load(name)
    prompt = fixture.variant.prompt(prompt_name)
    reference = Reference(fixture.config, random_tensors(fixture.config, fixture.variant.seed))
    got = reference.logits(fixture.tokens(prompt), fixture.variant.pixels(prompt))
    assert np.abs(got - fixture.logits(prompt)).max() <= 2e-5
    np.testing.assert_array_equal(fixture.tokens(prompt), fixture.variant.tokens(prompt))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("scout_like", {"attention_chunk_size": None}),
        ("scout_like", {"attention_chunk_size": 8}),
        ("scout_like", {"use_qk_norm": False}),
        ("scout_like", {"attn_temperature_tuning": False}),
        ("scout_like", {"floor_scale": 17}),
        ("scout_like", {"num_experts_per_tok": 2}),
        ("scout_like", {"no_rope_layers": [1] * 8}),
        ("scout_like", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("maverick_like", {"use_qk_norm": True}),
        ("guard_like", {"attention_chunk_size": 16}),
        ("top2", {"num_experts_per_tok": 1}),
        ("ragged", {"rms_norm_eps": 1e-5}),
    ],
)
def test_a_wrong_configuration_is_far_away(name: str, change: dict[str, Any]) -> None:
    """Each of these mistakes moves the logits by at least 100 times the tolerance."""
    fixture = golden.load(name)
    config = copy.deepcopy(fixture.config)
    config["text_config"].update(change)
    tensors = random_tensors(fixture.config, fixture.variant.seed)
    got = Reference(config, tensors).logits(fixture.tokens(tiny.TEXT))
    assert np.abs(got - fixture.logits(tiny.TEXT)).max() > 2e-3


def test_published_configurations() -> None:
    """The layers and frequencies of Scout, Maverick and Guard as their config.json gives them."""
    scout = {
        "num_hidden_layers": 48,
        "no_rope_layers": [],
        "interleave_moe_layer_step": 1,
        "head_dim": 128,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
    }
    maverick = scout | {"interleave_moe_layer_step": 2, "rope_scaling": None}
    guard = scout | {"interleave_moe_layer_step": 0, "moe_layers": []}
    assert [i for i, rope in enumerate(rope_layers(scout)) if not rope] == list(range(3, 48, 4))
    assert moe_layers(scout) == list(range(48))
    assert moe_layers(maverick) == list(range(1, 48, 2))
    assert moe_layers(guard) == []
    ratio = rope_frequencies(maverick) / rope_frequencies(scout)
    np.testing.assert_allclose(ratio[:35], 1, rtol=1e-12)
    np.testing.assert_allclose(ratio[35:], 16, rtol=1e-12)


def test_random_numbers_never_change() -> None:
    """Golden logits depend on these."""
    assert random_bits.integers("a", 1, 4, 1000).tolist() == [468, 595, 346, 594]
    many = random_bits.normal("a", 1, (100_000,))
    assert abs(many.mean()) < 0.01
    assert abs(many.std() - 1) < 0.01
    first = [0.09297721832990646, 1.1829619407653809, -0.7354925870895386, -1.4828253984451294]
    assert many[:4].tolist() == first


def test_bfloat16_rounds_to_nearest_even() -> None:
    one_and_a_bit = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1.0], np.float32)
    np.testing.assert_array_equal(
        round_to_bfloat16(one_and_a_bit), np.array([1, 1 + 2**-6, 1 + 2**-7, -1], np.float32)
    )
    stored = Stored.of(one_and_a_bit, "bfloat16")
    np.testing.assert_array_equal(stored.values(), round_to_bfloat16(one_and_a_bit))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_safetensors_reads_what_is_written(tmp_path: Path, dtype: str, shards: int) -> None:
    """Against the library of the format's authors, where it is installed."""
    safetensors = pytest.importorskip("safetensors")
    fixture = golden.load("text_only")
    tensors = write_checkpoint(tmp_path, fixture.config, 1, dtype=dtype, shards=shards)
    found: dict[str, bytes] = {}
    for file in tmp_path.glob("*.safetensors"):
        for name, entry in safetensors.deserialize(file.read_bytes()):
            assert tuple(entry["shape"]) == tensors[name].shape
            found[name] = bytes(entry["data"])
    assert found == {name: Stored.of(values, dtype).data for name, values in tensors.items()}
    if shards > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors.keys()


def test_tokenizer_reads_what_is_written(tmp_path: Path) -> None:
    """The tiny tokenizer.json is one to the library of the format's authors."""
    tokenizers = pytest.importorskip("tokenizers")
    fixture = golden.load("scout_like")
    write_checkpoint(tmp_path, fixture.config, 1, tokenizer=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "The other theatre\n\nön a ünïcode 12345 road <|eot|>"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tiny.SPECIAL["<|eot|>"] in ids
    assert max(ids) < fixture.config["text_config"]["vocab_size"]
    assert len(ids) < len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_float8_is_that_of_torch() -> None:
    try:
        import torch
    except ImportError:
        skip_or_fail("torch is not installed")
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(float8.VALUES, values)
    draws = random_bits.normal("float8", 1, (20000,)) * np.float32(100)
    draws = np.concatenate([draws, draws * np.float32(1e-4), (values[:126] + values[1:127]) / 2])
    draws = draws[np.abs(draws) <= 448]  # beyond, torch gives not-a-number, and puna the largest
    expected = torch.from_numpy(draws).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(float8.encode(draws), expected)
    assert float8.encode(np.float32([500, -np.inf])).tolist() == [0x7E, 0xFE]
