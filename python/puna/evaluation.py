"""How well a model predicts a text, and how far it is from a reference: `puna.evaluate`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from puna import _core
from puna.arguments import truth, whole
from puna.engine import Engine, Prompt
from puna.errors import InvalidRequest
from puna.progress import ProgressBar
from puna.types import Comparison, Evaluation

# Rows of logits that a model is asked for at once: as many as the core computes in one pass.
_ROWS = 256
# Numbers that are looked at once in float64: 8 MiB for each of a handful of arrays.
_BLOCK = 1 << 20


def evaluate(
    model: Engine,
    text: Prompt,
    *,
    reference: Engine | None = None,
    context: int = 512,
    max_tokens: int | None = None,
    allow_special: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Perplexity of a text and, with a reference, the KL divergence from its predictions.

    The text is read in windows that follow one another. Each starts with the begin-of-text token
    and scores all its other tokens, so that every token of the text is scored once, from what
    stands before it in its window. (A model without that token leaves the first of each window
    unscored.) Log-probabilities are taken in float64; no more than 256 rows of logits are held.

    Args:
        model: The model to judge.
        text: Text, or token ids.
        reference: The model to compare with, usually the same one before it was quantised. It must
            have the same tokenizer.
        context: Tokens of a window, the begin-of-text token included.
        max_tokens: Read only so many tokens of the text; None reads all.
        allow_special: Read special tokens written in the text, such as "<|eot|>", as such.
        progress: Show a progress bar on stderr when it takes more than a moment.

    Raises:
        InvalidRequest: The text has no tokens to score, or the two models have different
            tokenizers.
        ContextOverflow: A window is longer than the context of a model.
        EngineClosed: close() was called.
    """
    context = whole("context", context)
    most = whole("max_tokens", max_tokens) or None
    truth("allow_special", allow_special)
    engines = [model] if reference is None else [model, reference]
    for name, engine in zip(("model", "reference"), engines, strict=False):
        if not isinstance(engine, Engine):
            raise InvalidRequest(
                f"{name} is {engine!r:.80}; it must be a loaded model, as puna.load() gives one",
                param=name,
            )
    if reference is not None:
        _require_same_tokens(model, reference, by_text=isinstance(text, str))
    ids = model._raw_prompt(text, allow_special, None).tokens
    if ids and ids[0] == model.info.bos_token:
        ids = ids[1:]
    ids = ids[:most]
    windows = list(_windows(ids, model.info.bos_token, context))
    total = sum(len(targets) for _, targets in windows)
    if total == 0:
        raise InvalidRequest(
            f"the text has {len(ids)} tokens, none of which can be scored in windows of {context}; "
            "give a longer text or a larger context",
            param="text",
        )
    tally = _Tally(total, compares=reference is not None)
    bar = ProgressBar("Evaluating", " tokens") if progress else None
    try:
        for fed, targets in windows:
            sessions = [engine._core_engine().session() for engine in engines]
            for session in sessions:
                session.prompt(fed, [])
            for first in range(0, len(targets), _ROWS):
                wanted = np.asarray(targets[first : first + _ROWS])
                tally.add(wanted, *(_rows(session, len(wanted)) for session in sessions))
                if bar:
                    bar.update(tally.count, total)
    finally:
        if bar:
            bar.close()
    return tally.result(len(windows), context)


def _require_same_tokens(model: Engine, reference: Engine, by_text: bool) -> None:
    """Ids must mean the same to both. By ids alone, a model may have no tokenizer."""
    for name in ("vocab_size", "bos_token"):
        ours, theirs = getattr(model.info, name), getattr(reference.info, name)
        if ours != theirs:
            raise InvalidRequest(
                f"the model's {name} is {ours} and the reference's is {theirs}; compare models "
                "that have the same tokenizer",
                param="reference",
            )
    if not by_text:
        return
    ours, theirs = model.tokenizer, reference.tokenizer
    for token in range(min(ours.vocab_size, theirs.vocab_size)):
        one, other = ours.decode_bytes([token]), theirs.decode_bytes([token])
        if one != other:
            raise InvalidRequest(
                f"token {token} is {one!r:.80} to the model and {other!r:.80} to the reference; "
                "compare models that have the same tokenizer",
                param="reference",
            )


def _windows(
    ids: Sequence[int], bos: int | None, context: int
) -> Iterator[tuple[list[int], list[int]]]:
    """(tokens to compute, the token that comes after each) of every window."""
    start = [] if bos is None else [bos]
    step = context - len(start)
    if step < 1:
        return
    for first in range(0, len(ids), step):
        whole_window = [*start, *ids[first : first + step]]
        if len(whole_window) > 1:
            yield whole_window[:-1], whole_window[1:]


def _rows(session: _core.Session, count: int) -> NDArray[np.float32]:
    """The next `count` rows of logits, float32 [count, vocab]."""
    rows = session.logits(count)
    while len(rows) < count:  # a pass ends where a chunk of the model's attention does
        rows = np.concatenate([rows, session.logits(count - len(rows))])
    return rows


def _log_softmax(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    x = rows.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


class _Tally:
    """What is known of each token: its log-probability and, with a reference, the rest."""

    def __init__(self, total: int, compares: bool) -> None:
        self.count = 0
        self._compares = compares
        self._logprob = np.empty(total)
        self._reference_logprob = np.empty(total)
        self._kl = np.empty(total)
        self._agrees = np.empty(total, bool)

    def add(
        self,
        targets: NDArray[np.integer],
        rows: NDArray[np.float32],
        reference_rows: NDArray[np.float32] | None = None,
    ) -> None:
        """Logits float32 [tokens, vocab] of the model, and of the reference if there is one."""
        step = max(1, _BLOCK // rows.shape[1])
        for first in range(0, len(targets), step):
            part = slice(first, first + step)
            wanted = targets[part, None]
            place = slice(self.count, self.count + len(wanted))
            q = self._log_softmax(rows[part])
            self._logprob[place] = np.take_along_axis(q, wanted, axis=1)[:, 0]
            if reference_rows is not None:
                p = self._log_softmax(reference_rows[part], "reference")
                self._reference_logprob[place] = np.take_along_axis(p, wanted, axis=1)[:, 0]
                self._agrees[place] = p.argmax(axis=1) == q.argmax(axis=1)
                # A divergence is never negative; what rounding makes of one that is 0 may be.
                self._kl[place] = np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0)
            self.count += len(wanted)

    def _log_softmax(self, rows: NDArray[np.float32], which: str = "model") -> NDArray[np.float64]:
        if not np.isfinite(rows).all():
            raise InvalidRequest(
                f"the {which}'s logits are not finite within tokens {self.count} to "
                f"{self.count + len(rows) - 1} of the text; its weights are damaged"
            )
        return _log_softmax(rows)

    def result(self, windows: int, context: int) -> Evaluation:
        """The means over all tokens."""
        entropy = -float(self._logprob.mean())
        comparison = None
        if self._compares:
            reference_entropy = -float(self._reference_logprob.mean())
            comparison = Comparison(
                reference_perplexity=_exp(reference_entropy),
                perplexity_ratio=_exp(entropy - reference_entropy),
                kl_mean=float(self._kl.mean()),
                kl_error=float(self._kl.std() / math.sqrt(len(self._kl))),
                kl_p99=float(np.percentile(self._kl, 99)),
                kl_max=float(self._kl.max()),
                top1_agreement=float(self._agrees.mean()),
            )
        return Evaluation(self.count, windows, context, entropy, _exp(entropy), comparison)


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
