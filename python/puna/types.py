"""What puna's calls return: frozen dataclasses, all of them plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from puna.attention import AttentionReport

FinishReason = Literal["stop", "length", "cancelled", "timeout"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token and its natural-log probability under the model's own distribution.

    Log-probabilities are taken before temperature, penalties and cuts. `text` is the token's bytes
    decoded with replacement characters; `bytes` are exact.
    """

    token: int
    logprob: float
    text: str = ""
    bytes: bytes = b""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """The chosen token and, most likely first, the alternatives that were asked for."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request.

    `prompt` counts the whole prompt, of which `cached` tokens were already computed in the session
    and `image` tokens stand for image rows.
    """

    prompt: int
    completion: int
    cached: int = 0
    image: int = 0

    @property
    def total(self) -> int:
        """Prompt and completion together."""
        return self.prompt + self.completion


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, in seconds and tokens per second, and memory in bytes."""

    load_s: float
    first_token_s: float
    prefill_s: float
    decode_s: float
    prefill_tps: float
    decode_tps: float
    kv_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Completion:
    """The result of one request. `str(completion)` is its text.

    Attributes:
        text: The generated text, without stop strings and special tokens.
        tokens: Every id the model produced, the one that ended the turn included.
        finish_reason: "stop" (end of turn, stop id or stop string), "length" (max_tokens or the
            context), "cancelled" or "timeout".
        stop: The stop string that ended the text, if one did.
        usage: Token counts.
        logprobs: One entry per token if logprobs were asked for, else empty.
        seed: The seed in force; passing it again gives the same text.
        timings: Speeds and memory.
        attention: What was left out, if attention was not exact.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stop: str | None
    usage: Usage
    logprobs: tuple[Logprobs, ...]
    seed: int
    timings: Timings
    attention: AttentionReport | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed completion: usually the text of one token. `str(chunk)` is its text.

    The last chunk of a stream has `finish_reason`, `usage`, `seed`, `timings` and, if it was not
    exact, `attention`; the others None.
    """

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop: str | None = None
    usage: Usage | None = None
    seed: int | None = None
    timings: Timings | None = None
    attention: AttentionReport | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class SessionReport:
    """What was found in a saved session.

    Attributes:
        chunks: Chunks looked at.
        pages: Pages of keys and values read and checked.
        good_tokens: Tokens up to the first fault.
        fault: What is wrong, or "".
    """

    chunks: int
    pages: int
    good_tokens: int
    fault: str


@dataclass(frozen=True, slots=True)
class Score:
    """Log-probability of a given text under the model.

    Attributes:
        tokens: The ids that were scored.
        logprobs: Natural-log probability of each id given those before it; 0.0 for the first.
        total: Their sum.
        perplexity: exp(-mean) over all ids but the first.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    total: float
    perplexity: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a model's predictions are from a reference's on the same text.

    KL divergences are KL(reference || model) of the next-token distributions, in nats, at each
    scored token.

    Attributes:
        reference_perplexity: The reference's perplexity.
        perplexity_ratio: The model's perplexity over the reference's.
        kl_mean: Mean of the KL divergences.
        kl_error: Standard error of that mean, as if the tokens were independent.
        kl_p99: Their 99th percentile.
        kl_max: The largest.
        top1_agreement: Share of tokens at which both think the same token most likely.
    """

    reference_perplexity: float
    perplexity_ratio: float
    kl_mean: float
    kl_error: float
    kl_p99: float
    kl_max: float
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
        tokens: Tokens that were scored.
        windows: Pieces in which the text was read, each from the begin-of-text token on.
        context: Tokens of a full window, the begin-of-text token included.
        cross_entropy: Mean negative log-probability of a token, in nats.
        perplexity: exp(cross_entropy).
        comparison: With the reference, if one was given.
    """

    tokens: int
    windows: int
    context: int
    cross_entropy: float
    perplexity: float
    comparison: Comparison | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts about a loaded checkpoint, from its configuration and its tensors."""

    path: str
    dtype: str
    kv_dtype: str
    parameters: int
    active_parameters: int
    layers: int
    hidden_size: int
    vocab_size: int
    image_size: int
    tokens_per_tile: int
    bos_token: int | None
    eos_tokens: tuple[int, ...]
    image_token: int | None
    defaults: Mapping[str, float] = field(default_factory=dict)
