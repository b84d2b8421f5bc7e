"""The engine computes what transformers, Meta's own code and a float64 model compute."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import puna
from conftest import MakeCheckpoint, MakeEngine, oracle_module
from oracle import golden, tiny
from oracle.make_checkpoint import random_tensors, write_checkpoint
from oracle.reference import Reference, moe_layers

CASES = [(name, p.name) for name, v in tiny.VARIANTS.items() for p in v.prompts]

# An expert chosen by less than this may be another one in fp32: ten times what its sums can move.
SAFE_MARGIN = 2e-4


def device_options(device: str) -> dict[str, Any]:
    """Options of puna.load for "ref" or for an instruction set."""
    return {"device": "ref"} if device == "ref" else {"isa": device}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument `device` runs with each instruction set of this machine and `ref`."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize(
            "device", [*(isa["name"] for isa in puna.isas() if isa["available"]), "ref"]
        )


def assert_fp32_parity(got: np.ndarray, expected: np.ndarray) -> None:
    """Within what two orders of summation in fp32 may differ by.

    That is 2e-5 for logits of magnitude 4 (the largest difference between transformers and float64
    over all fixtures is 1.1e-5), and in proportion for others.
    """
    magnitude = np.abs(expected).max()
    assert 1 < magnitude < 16, "fixtures have logits of a size at which a mistake shows"
    assert got.shape == expected.shape
    assert got.dtype == np.float32
    assert np.abs(got - expected).max() <= 2e-5 * magnitude / 4


# --- golden fixtures ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "prompt_name"), CASES)
def test_logits_equal_transformers(
    engine: MakeEngine, device: str, name: str, prompt_name: str
) -> None:
    fixture = golden.load(name)
    prompt = fixture.variant.prompt(prompt_name)
    llm = engine(name, **device_options(device))
    got = llm.logits(fixture.tokens(prompt), fixture.variant.pixels(prompt))
    assert_fp32_parity(got, fixture.logits(prompt))


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_greedy_continuations_equal_transformers(
    engine: MakeEngine, device: str, name: str
) -> None:
    """40 tokens after 12, over chunk boundaries; made by transformers with its own cache."""
    prompt, expected = golden.load(name).greedy
    llm = engine(name, **device_options(device))
    options: dict[str, Any] = {"max_tokens": len(expected), "temperature": 0, "ignore_eos": True}
    completion = llm.generate(prompt, **options)
    assert list(completion.tokens) == expected
    assert completion.finish_reason == "length"
    streamed = [token for chunk in llm.stream(prompt, **options) for token in chunk.tokens]
    assert streamed == expected


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_hidden_states_are_what_the_head_multiplies(
    checkpoint: MakeCheckpoint, engine: MakeEngine, name: str
) -> None:
    """The head has more rows than columns, so that no other states give these logits."""
    fixture, tensors = golden.load(name), checkpoint(name).tensors
    heads = [values for key, values in tensors.items() if key.endswith("lm_head.weight")]
    embeddings = [values for key, values in tensors.items() if key.endswith("embed_tokens.weight")]
    head = (heads or embeddings)[0]
    for prompt in fixture.variant.prompts:
        tokens, pixels = fixture.tokens(prompt), fixture.variant.pixels(prompt)
        states = engine(name).hidden_states(tokens, pixels)
        assert states.shape == (len(tokens), head.shape[1])
        assert_fp32_parity((states @ head.T).astype(np.float32), fixture.logits(prompt))
        cuts = [5, 1, len(tokens) - 6]
        assert np.array_equal(engine(name).hidden_states(tokens, pixels, cuts), states)


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_scores_are_those_of_the_logits(engine: MakeEngine, name: str) -> None:
    fixture = golden.load(name)
    prompt = fixture.variant.prompts[0]
    tokens, logits = fixture.tokens(prompt), fixture.logits(prompt).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = logprobs[np.arange(len(tokens) - 1), tokens[1:]]
    score = engine(name).score(tokens.tolist())
    assert score.logprobs[0] == 0
    # A logit and the logarithm of the sum, each as far off as assert_fp32_parity allows.
    np.testing.assert_allclose(score.logprobs[1:], expected, rtol=0, atol=1e-4)
    assert score.total == pytest.approx(expected.sum(), abs=1e-4 * len(tokens))


# --- the forms that published configurations have -------------------------------------------------


def as_transformers_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same configuration in the words of the published checkpoints (transformers 4.51)."""
    old = copy.deepcopy(dict(config))
    text = old.get("text_config", old)
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    assert moe_layers(text) == moe_layers({**text, "moe_layers": None}) or not moe_layers(text)
    if moe_layers(text):
        text["moe_layers"] = None
    if not all(text["no_rope_layers"]):
        text["no_rope_layers"] = []
    text.pop("layer_types", None)
    text["attn_temperature_tuning"] = 4  # as Meta's params.json has it
    old.pop("dtype", None)
    old["torch_dtype"] = "bfloat16"  # whatever the tensors are
    if "vision_config" in old:
        vision_rope = old["vision_config"].pop("rope_parameters")
        old["vision_config"]["rope_theta"] = vision_rope["rope_theta"]
    return old


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_published_forms_of_a_configuration_are_the_same_model(
    engine: MakeEngine, tmp_path: Path, name: str
) -> None:
    fixture = golden.load(name)
    write_checkpoint(tmp_path, as_transformers_4(fixture.config), fixture.variant.seed)
    with puna.load(tmp_path, threads=1, progress=False) as llm:
        for prompt in fixture.variant.prompts:
            tokens, pixels = fixture.tokens(prompt), fixture.variant.pixels(prompt)
            expected = engine(name).logits(tokens, pixels)
            np.testing.assert_array_equal(llm.logits(tokens, pixels), expected)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [("float32", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16")],
)
def test_the_cache_is_as_exact_as_the_weights(
    engine: MakeEngine, checkpoint: Any, dtype: str, kv_dtype: str
) -> None:
    """What counts is the type that the tensors have: config.json here says none."""
    assert "dtype" not in str(checkpoint("scout_like", dtype=dtype).config)
    info = engine("scout_like", dtype=dtype).info
    assert (info.dtype, info.kv_dtype) == (dtype, kv_dtype)


# --- float64 --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A checkpoint that is no fixture, and its float64 reference."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]

    @property
    def reference(self) -> Reference:
        return Reference(self.config, self.tensors)


def make_model(path: Path, name: str, seed: int, dtype: str = "float32", **changes: Any) -> Model:
    """A variant with other weights, and other values in its text configuration."""
    config = copy.deepcopy(golden.load(name).config)
    config.get("text_config", config).update(changes)
    tensors = write_checkpoint(path, config, seed, dtype=dtype)
    return Model(path, config, tensors)


def text_tokens(seed: int, length: int) -> np.ndarray:
    return replace(tiny.VARIANTS["text_only"], seed=seed).tokens(tiny.Prompt("text", length))


@pytest.fixture(scope="module", params=[(64, 50, 300), (300, 256, 620), (None, 7, 300)])
def long_prompt(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, np.ndarray, np.ndarray]:
    """A checkpoint, a prompt of several chunks, and its logits in float64."""
    chunk, floor, length = request.param
    changes = {"attention_chunk_size": chunk, "floor_scale": floor}
    model = make_model(tmp_path_factory.mktemp("long"), "text_only", 3, **changes)
    tokens, reference = text_tokens(3, length), model.reference
    expected = reference.logits(tokens)
    assert reference.router_margin > SAFE_MARGIN / 10
    return model.path, tokens, expected


def test_longer_chunks(device: str, long_prompt: tuple[Path, np.ndarray, np.ndarray]) -> None:
    """Several pages of the cache (256 tokens), and chunks that are not made of whole pages."""
    path, tokens, expected = long_prompt
    with puna.load(path, threads=2, progress=False, **device_options(device)) as llm:
        assert_fp32_parity(llm.logits(tokens), expected)


# A number rounded to p significant bits is off by an error of 2^-p / sqrt(3) (of a uniform
# distribution) over its mantissa, which for numbers of all sizes has a mean square inverse of
# 3 / (8 ln 2): 0.42 * 2^-p.
ROUNDING = {"bfloat16": 0.42 * 2.0**-8, "float16": 0.42 * 2.0**-24, "float32": 0.42 * 2.0**-24}


def assert_rounding_only(
    got: np.ndarray, expected: np.ndarray, dtype: str, text: Mapping[str, Any], extra: int = 0
) -> None:
    """The difference has the size of independent roundings of all activations.

    Each product keeps the relative error of its input, and the residual stream adds up
    independent ones. Roundings of a layer: the inputs of q, k and v, of the output, of gate and
    up, of down; keys and values as stored; with experts, two more.
    """
    layers = text["num_hidden_layers"]
    roundings = 5 * layers + 2 * len(moe_layers(text)) + 1 + extra
    size = np.sqrt(np.mean(expected**2)) * ROUNDING[dtype] * np.sqrt(roundings)
    difference = got - expected
    # Twice for all, as layers are not equally sensitive; among 20,000 normal numbers the largest is
    # 4 times the mean, and rows differ in sensitivity by 2 once more.
    assert np.sqrt(np.mean(difference**2)) <= 2 * size
    assert np.abs(difference).max() <= 16 * size


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["scout_like", "mixed", "guard_like", "ragged"])
def test_half_precision_checkpoints(tmp_path: Path, device: str, dtype: str, name: str) -> None:
    """Every token takes every expert, so that no rounding can change a choice."""
    fixture = golden.load(name)
    text = fixture.config["text_config"]
    model = make_model(
        tmp_path, name, fixture.variant.seed, dtype, num_experts_per_tok=text["num_local_experts"]
    )
    reference = model.reference
    with puna.load(model.path, threads=2, progress=False, **device_options(device)) as llm:
        for prompt in fixture.variant.prompts:
            tokens, pixels = fixture.tokens(prompt), fixture.variant.pixels(prompt)
            # Of an image: patches, four per layer, two of the adapter, the projector.
            vision = 4 * fixture.config["vision_config"]["num_hidden_layers"] + 4
            extra = 0 if pixels is None else vision
            expected = reference.logits(tokens, pixels)
            got = llm.logits(tokens, pixels)
            if dtype == "float16" and device != "ref":
                assert_fp32_parity(got, expected)  # fp16 weights are computed with in fp32
            else:
                assert_rounding_only(got, expected, dtype, model.config["text_config"], extra)


@pytest.mark.parametrize("seed", [656, 1296])
def test_bfloat16_with_one_expert(tmp_path: Path, device: str, seed: int) -> None:
    """With these seeds the first 20 tokens choose their experts by more than roundings move."""
    model = make_model(tmp_path, "text_only", seed, "bfloat16")
    tokens, reference = text_tokens(seed, 20), model.reference
    expected = reference.logits(tokens)
    # Router logits have the size of logits here, and errors of less than assert_rounding_only's.
    assert reference.router_margin > 8 * ROUNDING["bfloat16"] * np.sqrt(2 * 49)
    with puna.load(model.path, threads=2, progress=False, **device_options(device)) as llm:
        assert_rounding_only(llm.logits(tokens), expected, "bfloat16", model.config)


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_ref_is_exact_but_for_storing_activations(engine: MakeEngine, name: str) -> None:
    """The `ref` device computes in double and stores fp32: far nearer than fp32 sums are."""
    fixture = golden.load(name)
    tensors = random_tensors(fixture.config, fixture.variant.seed)
    reference = Reference(fixture.config, tensors)
    for prompt in fixture.variant.prompts:
        tokens, pixels = fixture.tokens(prompt), fixture.variant.pixels(prompt)
        got = engine(name, device="ref").logits(tokens, pixels)
        # Stored in addition: the norms, q and k after RoPE, the residual after each half.
        text = fixture.config.get("text_config", fixture.config)
        extra = 6 * text["num_hidden_layers"] + (0 if pixels is None else 40)
        assert_rounding_only(got, reference.logits(tokens, pixels), "float32", text, extra)


# --- live -----------------------------------------------------------------------------------------


def fresh_models(
    path: Path, config: Mapping[str, Any], variant: tiny.Variant, first_seed: int, count: int
) -> Iterator[tuple[tiny.Variant, dict[str, np.ndarray]]]:
    """The first `count` seeds from `first_seed` on with which no expert is chosen by a hair."""

    def is_safe(fresh: tiny.Variant) -> bool:
        reference = Reference(config, random_tensors(config, fresh.seed))
        for prompt in fresh.prompts:
            reference.logits(fresh.tokens(prompt), fresh.pixels(prompt))
            if reference.router_margin <= SAFE_MARGIN:
                return False
        return True

    candidates = (replace(variant, seed=seed) for seed in itertools.count(first_seed))
    for fresh in itertools.islice(filter(is_safe, candidates), count):
        yield fresh, write_checkpoint(path, config, fresh.seed)


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_fresh_models_equal_transformers(tmp_path: Path, name: str) -> None:
    """Weights, prompts and images that are in no fixture, and a configuration it has just saved."""
    with_transformers = oracle_module("with_transformers", "torch", "transformers")
    variant = tiny.VARIANTS[name]
    config = with_transformers.save_config(variant, tmp_path)
    for fresh, _ in fresh_models(tmp_path, config, variant, 1000, 2):
        model = with_transformers.load(tmp_path)
        with puna.load(tmp_path, threads=2, progress=False) as llm:
            for prompt in fresh.prompts:
                tokens, pixels = fresh.tokens(prompt), fresh.pixels(prompt)
                expected = with_transformers.logits(model, tokens, pixels)
                assert_fp32_parity(llm.logits(tokens, pixels), expected)


@pytest.mark.parametrize(
    "name",
    [name for name in tiny.VARIANTS if name != "ragged"],  # whose widths Meta cannot state
)
def test_fresh_models_equal_metas_own_code(tmp_path: Path, name: str) -> None:
    with_meta = oracle_module("with_meta", "torch", "llama_models", "pydantic")
    fixture = golden.load(name)
    config = copy.deepcopy(fixture.config)
    rope = config.get("text_config", config)["rope_parameters"]
    if rope["rope_type"] == "llama3":
        rope["original_max_position_embeddings"] = 8192  # which Meta's code takes for granted
    for fresh, tensors in fresh_models(tmp_path, config, fixture.variant, 2000, 2):
        with puna.load(tmp_path, threads=2, progress=False) as llm:
            for prompt in fresh.prompts:
                tokens, pixels = fresh.tokens(prompt), fresh.pixels(prompt)
                expected = with_meta.logits(config, tensors, tokens, pixels)
                assert_fp32_parity(llm.logits(tokens, pixels), expected)
