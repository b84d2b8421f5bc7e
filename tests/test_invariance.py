"""Results depend on their inputs alone, bit for bit: not on cuts, threads, batches or history.

See docs/adr/0003-results-depend-on-inputs-only.md.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import puna
from conftest import MakeEngine, greedy
from oracle import golden, tiny
from oracle.make_checkpoint import write_checkpoint

DTYPES = ("float32", "bfloat16")
# Each with what the others lack: images and experts everywhere; no QK norm; no chunks; ragged
# widths; two experts; a flat configuration.
NAMES = ("scout_like", "maverick_like", "guard_like", "ragged", "top2", "text_only")

Cuts = list[int]


@dataclass(frozen=True)
class Input:
    """Token ids, and the tiles of each image in order."""

    tokens: list[int]
    images: tuple[np.ndarray, ...] = ()

    @staticmethod
    def of(fixture: golden.Golden, prompt: tiny.Prompt) -> Input:
        pixels = fixture.variant.pixels(prompt)
        return Input(fixture.tokens(prompt).tolist(), () if pixels is None else (pixels,))

    def start(self, length: int) -> Input:
        """Its first tokens; only for inputs without images."""
        assert not self.images
        return Input(self.tokens[:length])


def random_text(seed: int, length: int) -> Input:
    return Input(
        [random.Random(seed * 1000 + i).randrange(tiny.FIRST_SPECIAL) for i in range(length)]
    )


def random_cuts(total: int, rng: random.Random) -> Cuts:
    """Lengths that add up to `total`, from mostly single tokens to mostly long pieces."""
    longest = rng.choice([1, 2, 3, 5, 17, total])
    cuts: Cuts = []
    while total:
        cuts.append(rng.randint(1, min(longest, total)))
        total -= cuts[-1]
    return cuts


def assert_same_bits(got: np.ndarray, expected: np.ndarray, what: object) -> None:
    assert got.dtype == expected.dtype == np.float32
    if not np.array_equal(got.view(np.uint32), expected.view(np.uint32)):
        rows = np.flatnonzero((got != expected).any(-1))
        raise AssertionError(
            f"{what}: rows {rows[:10].tolist()} of {len(got)} differ, "
            f"by up to {np.abs(got - expected).max():.1e}"
        )


# --- cuts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_cuts_of_a_prompt(engine: MakeEngine, isa: str, dtype: str, name: str) -> None:
    """Prefill, decode, and anything between; images are cut in the middle as well."""
    fixture = golden.load(name)
    llm = engine(name, dtype=dtype, isa=isa)
    rng = random.Random(1)
    for prompt in fixture.variant.prompts:
        tokens, pixels = fixture.tokens(prompt), fixture.variant.pixels(prompt)
        whole = llm.logits(tokens, pixels)
        assert np.isfinite(whole).all()
        for cuts in ([1] * len(tokens), *(random_cuts(len(tokens), rng) for _ in range(6))):
            assert_same_bits(llm.logits(tokens, pixels, cuts), whole, (prompt.name, cuts))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_cut_at_every_place(engine: MakeEngine, dtype: str) -> None:
    """Two images, chunk boundaries at 16, 32 and 48, temperature steps one token before each."""
    fixture = golden.load("scout_like")
    llm = engine("scout_like", dtype=dtype)
    tokens = fixture.tokens(tiny.TWO_IMAGES)
    pixels = fixture.variant.pixels(tiny.TWO_IMAGES)
    whole = llm.logits(tokens, pixels)
    for cut in range(1, len(tokens)):
        cuts = [cut, len(tokens) - cut]
        assert_same_bits(llm.logits(tokens, pixels, cuts), whole, cuts)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    pieces=st.lists(st.integers(1, 40), min_size=1, max_size=24),
    name=st.sampled_from(NAMES),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 5),
)
def test_any_cuts_of_any_text(
    engine: MakeEngine, pieces: Cuts, name: str, dtype: str, seed: int
) -> None:
    llm = engine(name, dtype=dtype)
    tokens = random_text(seed, sum(pieces)).tokens
    assert_same_bits(llm.logits(tokens, cuts=pieces), llm.logits(tokens), pieces)


@pytest.fixture(scope="module")
def demo() -> Iterator[puna.Engine]:
    """The bundled model: real weights, chunks and temperature steps of 256 tokens."""
    with puna.load("demo", threads=2, progress=False) as llm:
        yield llm


def demo_text(llm: puna.Engine, length: int) -> list[int]:
    story = llm.generate("Once upon a time", max_tokens=200, temperature=0, ignore_eos=True)
    assert isinstance(story, puna.Completion)
    return (list(story.tokens) * (length // 200 + 1))[:length]


def test_long_prompts(demo: puna.Engine) -> None:
    """Three boundaries of chunks, which here are those of the cache's pages too."""
    tokens = demo_text(demo, 800)
    whole = demo.logits(tokens)
    rng = random.Random(2)
    boundaries = [255, 1, 1, 254, 1, 1, 255, 32]
    for cuts in ([1] * 800, boundaries, *(random_cuts(800, rng) for _ in range(3))):
        assert_same_bits(demo.logits(tokens, cuts=cuts), whole, cuts[:20])


# --- threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["scout_like", "ragged"])
def test_threads(engine: MakeEngine, isa: str, dtype: str, name: str) -> None:
    fixture = golden.load(name)
    alone = engine(name, dtype=dtype, isa=isa, threads=1)
    for threads in (2, 3):
        llm = engine(name, dtype=dtype, isa=isa, threads=threads)
        for prompt in fixture.variant.prompts:
            tokens, pixels = fixture.tokens(prompt), fixture.variant.pixels(prompt)
            for cuts in (None, [len(tokens) - 5, 1, 1, 1, 1, 1]):
                expected = alone.logits(tokens, pixels, cuts)
                assert_same_bits(llm.logits(tokens, pixels, cuts), expected, (threads, prompt))


def test_threads_on_a_long_prompt_and_on_sampled_text(demo: puna.Engine) -> None:
    tokens = demo_text(demo, 600)
    options: dict[str, Any] = {"max_tokens": 60, "temperature": 1.2, "seed": 7, "logprobs": 3}
    expected, text = demo.logits(tokens), demo.generate("A fox", **options)
    assert isinstance(text, puna.Completion)
    for threads in (1, 3):
        with puna.load("demo", threads=threads, progress=False) as llm:
            assert_same_bits(llm.logits(tokens), expected, threads)
            other = llm.generate("A fox", **options)
            assert isinstance(other, puna.Completion)
            assert (other.tokens, other.logprobs) == (text.tokens, text.logprobs)


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_each_alone(engine: MakeEngine, isa: str, dtype: str, name: str) -> None:
    """Prompts of unequal lengths: chunks end at different steps, prompts run beside answers."""
    llm = engine(name, dtype=dtype, isa=isa)
    prompts = [random_text(seed, length).tokens for seed, length in enumerate((3, 15, 16, 17, 50))]
    for options in (
        {"temperature": 0, "max_tokens": 20, "ignore_eos": True, "logprobs": 4},
        {"temperature": 1.0, "max_tokens": 20, "seed": 5, "top_p": 0.95, "logprobs": 4},
    ):
        batch = llm.generate(prompts, **options)
        assert isinstance(batch, list)
        for prompt, together in zip(prompts, batch, strict=True):
            alone = llm.generate(prompt, **options)
            assert isinstance(alone, puna.Completion)
            assert together.tokens == alone.tokens
            assert together.logprobs == alone.logprobs
            assert together.finish_reason == alone.finish_reason


# --- sessions -------------------------------------------------------------------------------------


class Distributions:
    """The whole distribution after each token of a session, as the engine's steps report it."""

    def __init__(self, llm: puna.Engine) -> None:
        self.core = llm._core_engine()
        self.vocabulary = llm.info.vocab_size

    def begin(self, session: Any, prompt: Input) -> Any:
        session.prompt(prompt.tokens, list(prompt.images))
        session.begin(greedy(logprobs=self.vocabulary, want_logprobs=True))
        return session

    @staticmethod
    def of(step: Any) -> tuple[int, tuple[tuple[int, float], ...]]:
        return step.token, tuple(step.top)

    def run(self, session: Any, prompt: Input, steps: int) -> list[Any]:
        self.begin(session, prompt)
        return [self.of(self.core.step([session])[0]) for _ in range(steps)]

    def fresh(self, prompt: Input, steps: int) -> list[Any]:
        return self.run(self.core.session(), prompt, steps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_distributions_of_a_batch_with_images(engine: MakeEngine, isa: str, dtype: str) -> None:
    fixture = golden.load("scout_like")
    engine_of = Distributions(engine("scout_like", dtype=dtype, isa=isa))
    inputs = [Input.of(fixture, prompt) for prompt in fixture.variant.prompts]
    inputs += [random_text(8, 31), random_text(9, 1)]
    expected = [engine_of.fresh(prompt, 12) for prompt in inputs]
    sessions = [engine_of.begin(engine_of.core.session(), prompt) for prompt in inputs]
    got: list[list[Any]] = [[] for _ in inputs]
    for turn in range(24):
        # Every other step is one of some of them, in another order.
        order = random.Random(turn).sample(range(len(inputs)), len(inputs) if turn % 2 else 3)
        members = [i for i in order if len(got[i]) < 12]
        for i, step in zip(
            members, engine_of.core.step([sessions[i] for i in members]), strict=True
        ):
            got[i].append(engine_of.of(step))
    for one, alone in zip(got, expected, strict=True):
        assert one == alone[: len(one)]
        assert len(one) > 8


def test_long_prompts_in_one_batch(demo: puna.Engine) -> None:
    """More tokens than one pass takes (1024): prompts are computed in turns, boundaries apart."""
    text = demo_text(demo, 900)
    engine_of = Distributions(demo)
    inputs = [
        Input(text[start : start + length]) for start, length in ((0, 700), (3, 513), (9, 256))
    ]
    expected = [engine_of.fresh(prompt, 3) for prompt in inputs]
    sessions = [engine_of.begin(engine_of.core.session(), prompt) for prompt in inputs]
    for turn in range(3):
        steps = engine_of.core.step(sessions)
        assert [engine_of.of(step) for step in steps] == [steps_of[turn] for steps_of in expected]


def reuse_cases(chunk: int) -> Sequence[tuple[int, int]]:
    """(tokens that a session holds, tokens of them that its next prompt starts with)."""
    return [
        (held, shared)
        for held in (chunk - 1, chunk, chunk + 1, 2 * chunk, 3 * chunk + 5)
        for shared in (0, 1, chunk - 1, chunk, chunk + 1, held - 1, held)
        if shared <= held
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "chunk"), [("scout_like", 16), ("ragged", 12), ("guard_like", 16)]
)
def test_a_session_that_kept_a_prefix(
    engine: MakeEngine, dtype: str, name: str, chunk: int
) -> None:
    engine_of = Distributions(engine(name, dtype=dtype))
    first, other = random_text(1, 60), random_text(2, 60)
    for held, shared in reuse_cases(chunk):
        session = engine_of.core.session()
        said = [token for token, _ in engine_of.run(session, first.start(held), 3)]
        following = Input(first.tokens[:shared] + other.tokens[shared : shared + 9])
        if shared == held:  # the answer becomes part of the prompt, as in a chat
            following = Input(first.tokens[:held] + said + other.tokens[:9])
        got = engine_of.run(session, following, 4)
        cached = session.timings()["cached_tokens"]
        assert cached <= len(following.tokens) - 1
        # Chunked layers can go back to the start of a chunk that is over, and anywhere in this one.
        least = shared if name == "guard_like" else shared // chunk * chunk
        assert cached >= min(least, len(following.tokens) - 1)
        assert got == engine_of.fresh(following, 4), (held, shared)


def test_a_session_keeps_images_that_stay(engine: MakeEngine) -> None:
    """The same tokens with another picture share only what precedes it."""
    fixture = golden.load("scout_like")
    engine_of = Distributions(engine("scout_like"))
    prompt = Input.of(fixture, tiny.THREE_TILES)
    tokens, (pixels,) = prompt.tokens, prompt.images
    longer = Input([*tokens, 7, 8, 9], (pixels,))
    changed = Input(tokens, (pixels[::-1].copy(),))
    apart = Input(tokens, (pixels[:1], pixels[1:]))
    session = engine_of.core.session()
    engine_of.run(session, prompt, 2)
    for following, least, most in (
        (longer, 32, 40),
        (changed, 0, 5),
        (prompt, 0, 5),
        (apart, 0, 39),
    ):
        got = engine_of.run(session, following, 3)
        assert least <= session.timings()["cached_tokens"] <= most
        assert got == engine_of.fresh(following, 3)
    assert engine_of.fresh(changed, 3) != engine_of.fresh(prompt, 3)
    assert engine_of.fresh(apart, 3) == engine_of.fresh(prompt, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["scout_like", "ragged"])
def test_forks(engine: MakeEngine, dtype: str, name: str) -> None:
    """Forked at every length around chunk boundaries; all branches go on, step by step in turn."""
    engine_of = Distributions(engine(name, dtype=dtype))
    first, other = random_text(3, 60), random_text(4, 60)
    for held in (1, 11, 12, 13, 15, 16, 17, 31, 32, 40):
        parent = engine_of.core.session()
        said = [token for token, _ in engine_of.run(parent, first.start(held), 2)]
        start = first.tokens[:held] + said
        branches = [Input(start + other.tokens[i : i + 3 * i + 1]) for i in range(3)]
        sessions = [parent, parent.fork(), parent.fork()]
        expected = [engine_of.fresh(branch, 14) for branch in branches]
        for session, branch in zip(sessions, branches, strict=True):
            engine_of.begin(session, branch)
        for turn in range(14):
            got = [engine_of.of(step) for step in engine_of.core.step(sessions)]
            assert got == [steps[turn] for steps in expected], (held, turn)


def test_a_fork_outlives_its_parent(engine: MakeEngine) -> None:
    engine_of = Distributions(engine("scout_like"))
    prompt = random_text(5, 37)
    parent = engine_of.core.session()
    engine_of.run(parent, prompt, 1)
    child = parent.fork()
    del parent
    engine_of.fresh(random_text(6, 50), 2)  # would take the pages, had they been given back
    following = Input([*prompt.tokens, 1, 2, 3])
    assert engine_of.run(child, following, 5) == engine_of.fresh(following, 5)


# --- positions ------------------------------------------------------------------------------------


def text_model(path: Path, **changes: Any) -> puna.Engine:
    """The flat fixture with other weights and other values in its configuration."""
    write_checkpoint(path, golden.load("text_only").config | changes, 1)
    return puna.load(path, threads=1, progress=False)


def test_chunks_hide_what_is_before_them(engine: MakeEngine, tmp_path: Path) -> None:
    """Without layers that see everything a chunk is a text of its own: positions start again."""
    tokens = random_text(1, 40).tokens
    kinds = {"no_rope_layers": [1] * 8, "layer_types": ["chunked_attention"] * 8}
    with text_model(tmp_path, **kinds) as llm:
        whole = llm.logits(tokens)
        assert_same_bits(whole[16:32], llm.logits(tokens[16:32]), "the second chunk by itself")
        assert_same_bits(whole[32:], llm.logits(tokens[32:]), "the third chunk by itself")
    usual = engine("text_only")
    assert not np.isclose(usual.logits(tokens)[16:32], usual.logits(tokens[16:32])).all()


def test_temperature_steps_at_floor_boundaries_alone(tmp_path: Path) -> None:
    """Two floors give the same logits exactly where floor((position + 1) / floor) is the same.

    With one layer the temperature of a position reaches no other.
    """
    tokens = random_text(1, 60).tokens
    layer = {"num_hidden_layers": 1, "moe_layers": [], "no_rope_layers": [0]}
    layer |= {"layer_types": ["full_attention"]}
    logits = {}
    for floor in (5, 7):
        with text_model(tmp_path, **layer, floor_scale=floor) as llm:
            logits[floor] = llm.logits(tokens)
    same = (logits[5] == logits[7]).all(-1)
    expected = [(p + 1) // 5 == (p + 1) // 7 for p in range(60)]
    # Position 0 sees itself alone, whatever the temperature.
    assert same.tolist() == expected
    assert expected.count(True) == 4 + 3 + 1
