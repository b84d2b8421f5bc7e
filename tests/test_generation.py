"""Generation: each sampling option against what it must do, computed again with NumPy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import puna
from conftest import MakeEngine
from oracle.tiny import SPECIAL

PROMPT = [3, 141, 59, 26, 53, 58, 97, 93]
EOS = {SPECIAL["<|end_of_text|>"], SPECIAL["<|eom|>"], SPECIAL["<|eot|>"]}


@pytest.fixture(scope="module")
def llm(engine: MakeEngine) -> puna.Engine:
    return engine("scout_like", tokenizer=True)


@pytest.fixture(scope="module")
def demo() -> Iterator[puna.Engine]:
    with puna.load("demo", progress=False, threads=2) as llm:
        yield llm


def one(llm: puna.Engine, prompt: Any, **options: Any) -> puna.Completion:
    result = llm.generate(prompt, **options)
    assert isinstance(result, puna.Completion)
    return result


def many(llm: puna.Engine, prompt: Any, count: int, **options: Any) -> list[puna.Completion]:
    """`count` completions with the seeds 0, 1, ..., few enough at a time for the memory."""
    results: list[puna.Completion] = []
    while len(results) < count:
        n = min(250, count - len(results))
        batch = llm.generate(prompt, n=n, seed=len(results), **options)
        results += batch if isinstance(batch, list) else [batch]
    return results


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def distribution(
    logits: NDArray[Any],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> NDArray[np.float64]:
    """What the next token is drawn from: temperature, then each cut on what the last one left."""
    probabilities = softmax(logits.astype(np.float64) / temperature)
    order = np.lexsort((np.arange(len(logits)), -logits))
    if top_k:
        probabilities[order[top_k:]] = 0
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities[order]) - probabilities[order]
    probabilities[order[before >= top_p]] = 0
    probabilities[probabilities < min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


def assert_drawn_from(drawn: Counter[Any], expected: dict[Any, float]) -> None:
    """Pearson's chi-square. Seeds are fixed, so this passes always or never."""
    total = drawn.total()
    assert set(drawn) <= {key for key, p in expected.items() if p > 0}
    rare = [key for key, p in expected.items() if 0 < p * total < 5]
    cells = [(drawn[key], p * total) for key, p in expected.items() if p * total >= 5]
    if rare:
        cells.append((sum(drawn[key] for key in rare), sum(expected[key] for key in rare) * total))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    freedom = len(cells) - 1
    assert freedom >= 1
    # Mean + 4 standard deviations of chi-square, with something for its skew: about 1 in 10^4.
    assert statistic < freedom + 4 * np.sqrt(2 * freedom) + 6, (statistic, freedom, cells)


# --- drawing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 0.4, "top_p": 1.0},
        {"temperature": 2.5, "top_p": 1.0},
        {"temperature": 1.0, "top_p": 1.0, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 1.3, "top_p": 1.0, "min_p": 0.2},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 1.0, "top_p": 1.0, "top_k": 10**12},
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_exact_distribution(
    llm: puna.Engine, options: dict[str, Any]
) -> None:
    logits = llm.logits(PROMPT)[-1]
    cuts = {name: value for name, value in options.items() if name != "temperature"}
    expected = distribution(logits, options["temperature"], **cuts)
    drawn = Counter(r.tokens[0] for r in many(llm, PROMPT, 1500, max_tokens=1, **options))
    assert_drawn_from(drawn, dict(enumerate(expected)))


def test_the_second_draw_is_independent_of_the_first(llm: puna.Engine) -> None:
    # Three tokens are left by a bias that puts the others out of reach.
    few = [11, 70, 200]
    options = {"logit_bias": dict.fromkeys(few, 500.0), "temperature": 1.0, "top_p": 1.0}
    first = softmax(llm.logits(PROMPT)[-1][few])
    expected = {}
    for i, token in enumerate(few):
        second = softmax(llm.logits([*PROMPT, token])[-1][few])
        expected |= {(token, other): first[i] * p for other, p in zip(few, second, strict=True)}
    drawn = Counter(r.tokens for r in many(llm, PROMPT, 1000, max_tokens=2, **options))
    assert_drawn_from(drawn, expected)


def test_top_p_keeps_the_token_that_crosses_it(llm: puna.Engine) -> None:
    probabilities = np.sort(distribution(llm.logits(PROMPT)[-1]))[::-1]
    order = np.argsort(-llm.logits(PROMPT)[-1], kind="stable")
    for kept in (1, 2, 5):
        share = probabilities[:kept].sum()
        for top_p, wanted in ((share * 0.999, kept), (share * 1.001, kept + 1)):
            results = many(llm, PROMPT, 400, max_tokens=1, temperature=1.0, top_p=top_p)
            assert {r.tokens[0] for r in results} == set(order[:wanted].tolist())


def test_ways_to_say_greedy(llm: puna.Engine) -> None:
    greedy = one(llm, PROMPT, temperature=0, max_tokens=40, ignore_eos=True)
    for options in (
        {"top_k": 1, "temperature": 5.0},
        {"top_p": 1e-9, "temperature": 1.0},
        {"min_p": 0.999999, "temperature": 1.0},
        {"temperature": 1e-6, "top_p": 1.0},
        {"temperature": 0, "top_p": 0.1, "seed": 5},
    ):
        other = one(llm, PROMPT, max_tokens=40, ignore_eos=True, **options)
        assert other.tokens == greedy.tokens, options
    rows = llm.logits([*PROMPT, *greedy.tokens])[len(PROMPT) - 1 : -1]
    assert greedy.tokens == tuple(rows.argmax(axis=1).tolist())


# --- penalties and bias --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repetition", "presence", "frequency"),
    [(1.3, 0, 0), (0.8, 0, 0), (1, 1.5, 0), (1, 0, 0.7), (1, -0.5, -0.25), (1.2, 0.5, 0.3)],
)
def test_penalties(llm: puna.Engine, repetition: float, presence: float, frequency: float) -> None:
    result = one(
        llm,
        PROMPT,
        temperature=0,
        max_tokens=60,
        ignore_eos=True,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias={17: 2.0, 33: -3.0},
    )
    whole = [*PROMPT, *result.tokens]
    rows = llm.logits(whole)
    plain = rows[len(PROMPT) - 1 : -1].argmax(axis=1)
    assert tuple(plain) != result.tokens  # they change something
    for i, token in enumerate(result.tokens):
        x = rows[len(PROMPT) - 1 + i].copy()
        seen = sorted(set(whole[: len(PROMPT) + i]))
        factor = np.float32(repetition)
        x[seen] = np.where(x[seen] > 0, x[seen] / factor, x[seen] * factor)
        for other, count in Counter(result.tokens[:i]).items():
            x[other] -= np.float32(presence + frequency * count)
        x[17] += np.float32(2.0)
        x[33] -= np.float32(3.0)
        assert x.argmax() == token, f"token {i}"


def test_logit_bias_bans_and_forces(llm: puna.Engine) -> None:
    greedy = one(llm, PROMPT, temperature=0, max_tokens=5).tokens
    without = one(llm, PROMPT, temperature=0, max_tokens=5, logit_bias={greedy[0]: -1e9})
    order = np.argsort(-llm.logits(PROMPT)[-1], kind="stable")
    assert without.tokens[0] == order[1]
    assert greedy[0] not in without.tokens
    assert one(llm, PROMPT, max_tokens=3, logit_bias={"42": 1e9}).tokens == (42, 42, 42)


# --- seeds ---------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_text_on_any_number_of_threads(engine: MakeEngine) -> None:
    texts = {
        one(
            engine("scout_like", tokenizer=True, threads=threads),
            PROMPT,
            seed=7,
            temperature=1.5,
            max_tokens=60,
        ).tokens
        for threads in (1, 2, 3)
    }
    assert len(texts) == 1


def test_seeds(llm: puna.Engine) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 20, "ignore_eos": True}
    first = one(llm, PROMPT, **options)
    again = one(llm, PROMPT, seed=first.seed, **options)
    assert again.tokens == first.tokens
    assert again.seed == first.seed
    assert one(llm, PROMPT, **options).seed != first.seed
    assert one(llm, PROMPT, seed=2**64 - 1, **options).seed == 2**64 - 1


def test_n_completions_are_those_of_the_seeds_that_follow(llm: puna.Engine) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 12}
    batch = llm.generate([PROMPT, PROMPT[:3]], n=3, seed=2**64 - 2, **options)
    assert isinstance(batch, list)
    assert [r.seed for r in batch] == [2**64 - 2, 2**64 - 1, 0] * 2
    for i, result in enumerate(batch):
        alone = one(llm, (PROMPT, PROMPT[:3])[i // 3], seed=result.seed, **options)
        assert alone.tokens == result.tokens
        assert alone.text == result.text


# --- where a turn ends ---------------------------------------------------------------------------


def test_max_tokens(llm: puna.Engine) -> None:
    for count in (1, 2, 9):
        result = one(llm, PROMPT, temperature=0, max_tokens=count, ignore_eos=True)
        assert len(result.tokens) == count == result.usage.completion
        assert result.finish_reason == "length"
        assert result.stop is None


def test_the_context_ends_a_turn(engine: MakeEngine) -> None:
    llm = engine("text_only", tokenizer=True, context=20)
    assert llm.plan.context == 20
    result = one(llm, PROMPT, temperature=0, ignore_eos=True)
    assert result.finish_reason == "length"
    assert result.usage.total == 20
    full = one(llm, list(range(19)), max_tokens=5, ignore_eos=True)
    assert len(full.tokens) == 1


def test_min_tokens_keeps_the_turn_open(llm: puna.Engine) -> None:
    eot = SPECIAL["<|eot|>"]
    bias = {eot: 1e9}
    ended = one(llm, PROMPT, logit_bias=bias, max_tokens=10)
    assert ended.tokens == (eot,)
    assert ended.finish_reason == "stop"
    assert ended.text == ""
    later = one(llm, PROMPT, logit_bias=bias, max_tokens=10, min_tokens=4)
    assert len(later.tokens) == 5
    assert not EOS & set(later.tokens[:4])
    assert later.tokens[4] == eot


def test_ignore_eos(llm: puna.Engine) -> None:
    eot = SPECIAL["<|eot|>"]
    result = one(llm, PROMPT, logit_bias={eot: 1e9}, max_tokens=4, ignore_eos=True)
    assert result.tokens == (eot,) * 4
    assert result.finish_reason == "length"
    assert result.text == ""
    # Stop ids are the caller's own and stay in force.
    stopped = one(llm, PROMPT, logit_bias={eot: 1e9}, max_tokens=4, ignore_eos=True, stop=eot)
    assert stopped.tokens == (eot,)


def test_stop_ids(llm: puna.Engine) -> None:
    free = one(llm, PROMPT, temperature=0, max_tokens=30, ignore_eos=True).tokens
    stop = free[6]
    first = free.index(stop)
    for given in (stop, [stop], (stop, 5), [np.int64(stop)]):
        result = one(llm, PROMPT, temperature=0, max_tokens=30, ignore_eos=True, stop=given)
        assert result.tokens == free[: first + 1] or 5 in result.tokens
        assert result.finish_reason == "stop"
        assert result.stop is None


def test_stop_strings(demo: puna.Engine) -> None:
    free = one(demo, "Once upon a time", temperature=0, max_tokens=60).text
    middle = free[20:23]
    for stop in (middle, [middle], ["never met", middle, free[21:30]]):
        result = one(demo, "Once upon a time", temperature=0, max_tokens=60, stop=stop)
        assert result.text == free[: free.index(middle)]
        assert result.finish_reason == "stop"
        assert result.stop == middle
    # No piece of a stream shows a part of it.
    pieces = list(
        demo.stream("Once upon a time", raw=True, temperature=0, max_tokens=60, stop=middle)
    )
    assert "".join(str(piece) for piece in pieces) == free[: free.index(middle)]
    assert pieces[-1].stop == middle
    # What looked like the beginning of one comes out when the turn ends.
    longer = one(demo, "Once upon a time", temperature=0, max_tokens=8, stop=free + "?")
    assert longer.text == one(demo, "Once upon a time", temperature=0, max_tokens=8).text


def test_timeout_ends_a_turn(demo: puna.Engine) -> None:
    result = one(demo, "Once upon a time", ignore_eos=True, max_tokens=100_000, timeout=0.2)
    assert result.finish_reason == "timeout"
    assert 0 < len(result.tokens) < 100_000
    assert result.text
    # Within the prompt too, and for every member of a batch.
    long = [5] * 60_000
    results = demo.generate([long, long], timeout=0.1)
    assert isinstance(results, list)
    assert [r.finish_reason for r in results] == ["timeout", "timeout"]
    assert [r.tokens for r in results] == [(), ()]
    assert max(r.timings.prefill_s for r in results) < 2
    last = list(demo.stream(long, timeout=0.1))[-1]
    assert (last.finish_reason, last.tokens) == ("timeout", ())


def test_timeout_ends_what_is_not_begun(demo: puna.Engine) -> None:
    """Many completions of one prompt: the time may be over before all are forked."""
    results = demo.generate("Once", n=20_000, timeout=0.05)
    assert isinstance(results, list)
    assert len(results) == 20_000
    assert results[-1].finish_reason == "timeout"
    assert (results[-1].text, results[-1].tokens, results[-1].usage.completion) == ("", (), 0)
    assert results[-1].seed == (results[0].seed + 19_999) % (1 << 64)


# --- what comes out ------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_model(llm: puna.Engine) -> None:
    # The model's own: whatever the options do to the drawing.
    options: dict[str, Any] = {
        "temperature": 1.7,
        "top_k": 50,
        "repetition_penalty": 1.4,
        "seed": 3,
        "max_tokens": 25,
        "ignore_eos": True,
    }
    result = one(llm, PROMPT, logprobs=4, **options)
    rows = llm.logits([*PROMPT, *result.tokens])[len(PROMPT) - 1 : -1]
    assert len(result.logprobs) == len(result.tokens)
    for token, row, entry in zip(result.tokens, rows, result.logprobs, strict=True):
        expected = np.log(softmax(row))
        assert entry.chosen.token == token
        assert entry.chosen.logprob == pytest.approx(expected[token], abs=1e-9)
        best = np.argsort(-row, kind="stable")[:4]
        assert [item.token for item in entry.top] == best.tolist()
        assert [item.logprob for item in entry.top] == pytest.approx(expected[best], abs=1e-9)
        if token < llm.tokenizer.vocab_size:
            assert entry.chosen.bytes == llm.tokenizer.decode_bytes([token])
    assert result.tokens == one(llm, PROMPT, **options).tokens
    for asked in (True, 0):
        plain = one(llm, PROMPT, logprobs=asked, **options)
        assert [item.chosen for item in plain.logprobs] == [r.chosen for r in result.logprobs]
        assert all(item.top == () for item in plain.logprobs)
    assert one(llm, PROMPT, **options).logprobs == ()
    everything = one(llm, PROMPT, logprobs=llm.info.vocab_size, max_tokens=1)
    assert sum(np.exp(item.logprob) for item in everything.logprobs[0].top) == pytest.approx(1)


def test_score_is_the_sum_of_logprobs(llm: puna.Engine) -> None:
    result = one(llm, PROMPT, temperature=1.0, max_tokens=20, ignore_eos=True, logprobs=True)
    score = llm.score([*PROMPT, *result.tokens])
    assert score.tokens == (*PROMPT, *result.tokens)
    assert score.logprobs[0] == 0
    assert score.logprobs[len(PROMPT) :] == pytest.approx(
        [item.chosen.logprob for item in result.logprobs], abs=1e-9
    )
    assert score.total == pytest.approx(sum(score.logprobs))
    mean = score.total / (len(score.tokens) - 1)
    assert score.perplexity == pytest.approx(np.exp(-mean))
    assert llm.score([5]).total == 0
    assert llm.score("ab").tokens == (llm.info.bos_token, *llm.tokenizer.encode("ab"))


def counts(usage: puna.Usage | None) -> tuple[int, int, int]:
    """Of a request, whatever earlier ones left to it."""
    assert usage is not None
    return usage.prompt, usage.completion, usage.image


def test_a_stream_is_the_completion_in_pieces(demo: puna.Engine) -> None:
    options: dict[str, Any] = {"seed": 11, "max_tokens": 50, "logprobs": 2}
    whole = demo.chat("Tell me a story about a bear.", **options)
    chunks = list(demo.stream("Tell me a story about a bear.", **options))
    assert isinstance(whole, puna.Completion)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(t for chunk in chunks for t in chunk.tokens) == whole.tokens
    assert tuple(item for chunk in chunks for item in chunk.logprobs) == whole.logprobs
    assert all(
        (chunk.finish_reason, chunk.usage, chunk.seed, chunk.timings) == (None,) * 4
        for chunk in chunks[:-1]
    )
    last = chunks[-1]
    assert (last.finish_reason, last.seed) == (whole.finish_reason, 11)
    assert counts(last.usage) == counts(whole.usage)
    assert last.timings is not None
    assert last.timings.decode_tps > 0


def test_usage_and_timings(demo: puna.Engine) -> None:
    result = one(demo, "Once upon a time", temperature=0, max_tokens=10)
    assert counts(result.usage) == (1 + len(demo.tokenizer.encode("Once upon a time")), 10, 0)
    assert result.usage.total == result.usage.prompt + 10
    timings = result.timings
    assert timings.first_token_s > 0
    assert timings.prefill_tps == pytest.approx(
        (result.usage.prompt - result.usage.cached) / timings.prefill_s
    )
    assert timings.decode_tps == pytest.approx(9 / timings.decode_s)
    assert timings.load_s > 0
    assert timings.kv_bytes > 0
    assert timings.peak_bytes > demo.plan.weight_bytes


def test_forms_of_a_prompt(llm: puna.Engine) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
    bos = llm.info.bos_token
    assert bos is not None
    text = one(llm, "abc", **options)
    ids = [bos, *llm.tokenizer.encode("abc")]
    for same in (ids, tuple(ids), np.array(ids), np.array(ids, dtype=np.uint16)):
        assert one(llm, same, **options).tokens == text.tokens
    # Without text there is the begin-of-text token; with allow_special it may be written out.
    assert one(llm, "", **options).tokens == one(llm, [bos], **options).tokens
    written = one(llm, "<|begin_of_text|>abc", allow_special=True, **options)
    assert written.tokens == text.tokens
    assert counts(written.usage) == counts(text.usage)
    assert llm.generate([], **options) == []


def test_a_batch_is_each_alone(llm: puna.Engine) -> None:
    options: dict[str, Any] = {"seed": 1, "temperature": 1.0, "max_tokens": 30}
    prompts = ["abc", PROMPT, "", list(range(60)), "the end of it"]
    batch = llm.generate(prompts, **options)
    assert isinstance(batch, list)
    for prompt, result in zip(prompts, batch, strict=True):
        alone = one(llm, prompt, **options)
        assert (result.text, result.tokens) == (alone.text, alone.tokens)
        assert result.finish_reason == alone.finish_reason
        assert counts(result.usage) == counts(alone.usage)


def test_ids_without_text(llm: puna.Engine) -> None:
    # The model's vocabulary is longer than the tokenizer's, as where it is padded.
    assert llm.tokenizer.vocab_size < 300 < llm.info.vocab_size
    result = one(llm, PROMPT, logit_bias={300: 1e9}, max_tokens=2, logprobs=1)
    assert result.tokens == (300, 300)
    assert result.text == ""
    assert result.logprobs[0].chosen.bytes == b""


def test_defaults_come_from_the_checkpoint(demo: puna.Engine) -> None:
    assert demo.info.defaults == {"temperature": 0.6, "top_p": 0.9}
    options: dict[str, Any] = {"seed": 4, "max_tokens": 40}
    assert one(demo, "The", **options).tokens == (
        one(demo, "The", temperature=0.6, top_p=0.9, top_k=None, **options).tokens
    )


def test_typed_markup_is_plain_text_and_said_once(
    demo: puna.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    demo._warned_of_markup = False
    typed = one(demo, "a <|eot|> b", max_tokens=1)
    one(demo, "a <|eot|> b", max_tokens=1)
    read = one(demo, "a <|eot|> b", max_tokens=1, allow_special=True)
    assert typed.usage.prompt > read.usage.prompt
    [record] = caplog.records
    assert record.name == "puna"
    assert "<|eot|>, which is read as plain text: use chat()" in record.getMessage()
