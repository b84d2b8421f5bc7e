"""Loading a checkpoint and generating from it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from puna import _core
from puna.arguments import (
    array_of,
    count,
    ids_of,
    is_batch,
    is_ids,
    place,
    tiles_array,
    token_ids,
    truth,
    whole,
)
from puna.attention import report_of
from puna.chat_template import (
    ChatTemplate,
    ImagePlaceholder,
    RenderedPrompt,
    SpecialToken,
    image_list,
    plain_tools,
    render,
)
from puna.daemon_threads import close_at_exit
from puna.errors import (
    ContextOverflow,
    EngineClosed,
    InvalidRequest,
    ModelFormatError,
    SessionMismatch,
    UnsupportedError,
)
from puna.images import to_rgb
from puna.options import Request, parse_request
from puna.planning import Plan
from puna.running import BuiltPrompt, Deadline, Job, prefill, read, timings, usage
from puna.session import Session
from puna.session_notes import read_notes, write_notes
from puna.types import (
    Chunk,
    Completion,
    Logprobs,
    ModelInfo,
    Score,
    SessionReport,
    TokenLogprob,
)

_LOGGER = logging.getLogger("puna")

Prompt = str | Sequence[int] | NDArray[np.integer[Any]]
Messages = str | Sequence[Mapping[str, Any]]


class Engine:
    """A loaded model. Made by `puna.load`; safe to use from several threads; a context manager.

    Requests of several threads take turns token by token. Breaking out of a stream, Ctrl-C and
    `close()` stop within a token.
    """

    def __init__(
        self, core: _core.Engine, path: Path, template: ChatTemplate, progress: bool
    ) -> None:
        """Wraps a loaded core engine; use `puna.load`."""
        self._core = core
        _require_image_tokens(core)
        close_at_exit(self)
        self._progress = progress
        self._template = template
        self._warned_of_markup = False
        raw = core.info()
        self._raw_info = raw
        given = {name: raw[name] for name in ("temperature", "top_p", "top_k")}
        defaults = {name: value for name, value in given.items() if value is not None}
        self.info = ModelInfo(
            path=str(path),
            dtype=raw["dtype"],
            kv_dtype=raw["kv_dtype"],
            parameters=raw["parameters"],
            active_parameters=raw["active_parameters"],
            layers=raw["layers"],
            hidden_size=raw["hidden_size"],
            vocab_size=raw["vocab_size"],
            image_size=raw["image_size"],
            tokens_per_tile=raw["tokens_per_tile"],
            bos_token=_token(raw["bos_token"]),
            eos_tokens=tuple(raw["eos_tokens"]),
            image_token=_token(raw["image_token"]),
            defaults=defaults,
        )
        self.plan = Plan.of(core.plan(), device=raw["device"], warnings=tuple(raw["warnings"]))

    # --- generation ------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt] | Iterator[Prompt],
        *,
        images: Sequence[Any] | None = None,
        allow_special: bool = False,
        **options: Any,
    ) -> Completion | list[Completion]:
        """Continues raw text; no chat template is applied.

        Args:
            prompt: Text, or token ids, or a list of either: a list is computed as one batch and
                gives a list. Text gets the begin-of-text token in front; ids are taken as they are.
                An iterator of pieces of one text (or of ids) is computed while it arrives.
            images: Pictures for a single prompt, put in front of its text (paths, PIL images,
                arrays, encoded bytes, base64).
            allow_special: Read special tokens written in the text, such as "<|eot|>", as such.
            **options: What is left out or None has its default.
                max_tokens: Most tokens to generate; by default 4096, which an answer rarely needs.
                min_tokens: No token that ends the turn before so many; stop strings end it anyway.
                temperature: 0 takes the most likely token; default of the checkpoint, else 0.6.
                top_p: Draw from the likeliest tokens that hold this share; the checkpoint's or 0.9.
                top_k: Draw from the likeliest k; 0 (the default) is off.
                min_p: Drop tokens below this fraction of the likeliest one's probability.
                seed: The same seed gives the same text, whatever the number of threads.
                stop: Strings or token ids (or one of them) that end the turn; not part of the text.
                logprobs: True for those of the generated tokens, k for the k likeliest as well.
                n: Completions per prompt, with the seeds seed, seed + 1, ...
                repetition_penalty: Divides the logits of tokens seen in prompt or answer; 1 is off.
                presence_penalty: Subtracted from the logits of tokens in the answer.
                frequency_penalty: The same, times how often they occur.
                logit_bias: Token id to a number added to its logit; -1e9 bans it.
                ignore_eos: Go on after tokens that end the turn.
                timeout: Seconds after which the completion ends as it is.
                attention: A puna.Attention: exact, or what may be left out of a long context.

        Returns:
            A Completion per prompt; with n > 1 a list of n per prompt, in order.

        Raises:
            InvalidRequest: An option or a prompt that makes no sense.
            ContextOverflow: The prompt is longer than the context.
            ImageError: A picture that cannot be read.
            EngineClosed: close() was called.
        """
        request = self._request("generate", options, ("images", "allow_special"))
        if isinstance(prompt, Iterator):
            if images is not None and image_list(images):
                raise InvalidRequest("images go with a text that is complete", param="images")
            deadline = Deadline(request.timeout)
            session = self._core_engine().session()
            read(session, self._arriving(prompt, allow_special, first=True), deadline)
            if session.length == 0:
                raise InvalidRequest("the prompt has no tokens; give at least one", param="prompt")
            results = self._complete([session], request, deadline)
            return results[0] if request.n == 1 else results
        if is_batch(prompt):
            if images is not None and image_list(images):
                raise InvalidRequest(
                    "images go with a single prompt, not with a list", param="images"
                )
            prompts = [self._raw_prompt(item, allow_special, None) for item in prompt]  # type: ignore[arg-type]
            sessions = [self._open(item) for item in prompts]
            return self._complete(sessions, request, Deadline(request.timeout))
        single = self._raw_prompt(prompt, allow_special, images)  # type: ignore[arg-type]
        results = self._complete([self._open(single)], request, Deadline(request.timeout))
        return results[0] if request.n == 1 else results

    def chat(
        self,
        messages: Messages,
        *,
        images: Sequence[Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> Completion | list[Completion]:
        """Answers a message or a conversation, through the checkpoint's chat template.

        Args:
            messages: A string (one user message), or messages with "role" and "content"; content is
                a string or a list of parts in the Hugging Face or OpenAI form.
            images: Pictures that go with the last user message, in front of its text.
            tools: JSON schemas of functions that the model may call.
            **options: As for `generate`.

        Raises:
            InvalidRequest, ContextOverflow, ImageError, EngineClosed: As for `generate`.
        """
        request = self._request("chat", options, ("images", "tools"))
        session = self._open(self._chat_prompt(messages, images, tools))
        results = self._complete([session], request, Deadline(request.timeout))
        return results[0] if request.n == 1 else results

    def stream(
        self,
        prompt: Messages | Prompt,
        *,
        images: Sequence[Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        raw: bool = False,
        allow_special: bool = False,
        **options: Any,
    ) -> Iterator[Chunk]:
        """Yields the answer piece by piece; the last chunk says how it ended.

        A string or messages are a chat, as in `chat`; with raw=True, or token ids, the prompt is
        continued as in `generate`. Leaving the loop stops the generation.

        Args:
            prompt: Text, messages, or token ids.
            images: As for `chat` and `generate`.
            tools: As for `chat`.
            raw: Continue the text instead of answering it.
            allow_special: As for `generate`.
            **options: As for `generate`, without n.
        """
        request = self._request("stream", options, ("images", "tools", "raw", "allow_special"))
        if request.n != 1:
            raise InvalidRequest(
                f"n is {request.n}; a stream has one answer: use generate", param="n"
            )
        if raw or is_ids(prompt):
            built = self._raw_prompt(prompt, allow_special, images)  # type: ignore[arg-type]
        else:
            built = self._chat_prompt(prompt, images, tools)  # type: ignore[arg-type]
        session = self._open(built)  # refuses what is wrong now, not at the first step
        return self._chunks(session, request, Deadline(request.timeout))

    def session(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        readonly: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Session:
        """A conversation or text that keeps what it has computed; a turn costs only what is new.

        Args:
            path: A directory, opened if a session was saved there and else made, if it is not there
                or empty. From then on each attention chunk (8192 tokens of Scout) is on disk soon
                after it is computed, so that a crash loses less than one; `Session.save` keeps the
                rest too. Such a session has its keys and values to itself: a beginning that others
                have is computed again.
            readonly: Only read what is at `path`, which must be there; several may do so at once.
            tools: JSON schemas of functions that the model may call, in every turn of the
                conversation; None: those that were saved with it.

        Raises:
            SessionMismatch: What is at `path` is no session, of another model or another format of
                keys and values, damaged, or in use.
            ContextOverflow: It is longer than the context.
        """
        tools = None if tools is None else plain_tools(tools) or []
        if path is None:
            return Session(self, self._core_engine().session(), tools=tools)
        directory = place("path", path)
        return Session(
            self,
            self._open_saved(directory, not truth("readonly", readonly)),
            directory,
            readonly=readonly,
            tools=tools,
        )

    def _open_saved(self, directory: Path, resume: bool) -> _core.Session:
        try:
            return self._core_engine().open(os.fspath(directory), resume)
        except ContextOverflow as error:
            # The core knows nothing of ids that were not computed when the session was saved.
            held, notes = error.prompt_tokens, read_notes(directory)
            if held is None or not notes.pending or notes.computed != held:
                raise
            needed = held + len(notes.pending)
            raise ContextOverflow(
                f"[session] {directory} holds {needed} tokens, the context {error.limit}; "
                f"load with context={needed} or more",
                prompt_tokens=needed,
                limit=error.limit,
            ) from None

    def verify(
        self, path: str | os.PathLike[str], extent: Literal["journal", "sampled", "full"] = "full"
    ) -> SessionReport:
        """Reads a saved session and says what of it is good.

        Args:
            path: The directory.
            extent: "journal": all but keys and values; "sampled": and a page of each layer of each
                chunk; "full": and all pages.

        Raises:
            SessionMismatch: It is another model's.
        """
        if extent not in ("journal", "sampled", "full"):
            raise InvalidRequest(
                f"extent is {extent!r}; it must be 'journal', 'sampled' or 'full'", param="extent"
            )
        directory = place("path", path)
        report = self._core_engine().verify(os.fspath(directory), extent)
        if not report["fault"]:
            try:
                read_notes(directory)
            except SessionMismatch as error:
                report["fault"] = str(error)
        return SessionReport(**report)

    def truncate(self, path: str | os.PathLike[str], length: int) -> int:
        """Cuts a saved session down to the whole chunks within its first `length` tokens.

        Also one that is damaged behind them: `verify` and the message that refuses it say how many
        tokens are good. The messages of a conversation stay, and are computed again from there.

        Args:
            path: The directory, which no session may have open for writing.
            length: Tokens to keep at most. If all are within it, so is what follows the last chunk.

        Returns:
            How many tokens are left.

        Raises:
            SessionMismatch: It is another model's, in use, or no session.
            InvalidRequest: `length` is negative.
        """
        length = count("length", length)
        directory = place("path", path)
        notes = read_notes(directory)
        left = self._core_engine().truncate_session(os.fspath(directory), length)
        if notes.pending:  # they came after the end
            write_notes(directory, replace(notes, pending=[]))
        return left

    # --- evaluation ------------------------------------------------------------------------------

    @overload
    def logits(
        self,
        tokens: ArrayLike,
        pixel_values: ArrayLike | None = None,
        cuts: Sequence[int] | None = None,
        *,
        on_device: Literal[False] = False,
    ) -> NDArray[np.float32]: ...
    @overload
    def logits(
        self,
        tokens: ArrayLike,
        pixel_values: ArrayLike | None = None,
        cuts: Sequence[int] | None = None,
        *,
        on_device: Literal[True],
    ) -> _core.DeviceArray: ...
    def logits(
        self,
        tokens: ArrayLike,
        pixel_values: ArrayLike | None = None,
        cuts: Sequence[int] | None = None,
        *,
        on_device: bool = False,
    ) -> NDArray[np.float32] | _core.DeviceArray:
        """Logits at every position of a prompt.

        Args:
            tokens: [T] ids; the image token stands at each place of an image row.
            pixel_values: [tiles, 3, S, S] normalised tiles in the order of their places.
            cuts: Lengths, summing to T, of the pieces in which the prompt is computed; 1 is a
                decode step. The result does not depend on them.
            on_device: True leaves them in the memory of the device that computes, for
                `torch.from_dlpack(llm.logits(ids, on_device=True))` and whatever else takes DLPack,
                without a copy. A GPU needs room for them beside the model: see `memory` of `load`.

        Returns:
            float32 [T, vocab], in the host's memory unless `on_device` says otherwise.

        Raises:
            InvalidRequest: Ids outside the vocabulary, cuts that do not add up, or more or fewer
                image places than rows.
            OutOfMemory: They do not fit where they are to be.
        """
        core, pieces = self._core_engine(), self._pieces(tokens, pixel_values, cuts)
        return (core.device_logits if truth("on_device", on_device) else core.logits)(*pieces)

    @overload
    def hidden_states(
        self,
        tokens: ArrayLike,
        pixel_values: ArrayLike | None = None,
        cuts: Sequence[int] | None = None,
        *,
        on_device: Literal[False] = False,
    ) -> NDArray[np.float32]: ...
    @overload
    def hidden_states(
        self,
        tokens: ArrayLike,
        pixel_values: ArrayLike | None = None,
        cuts: Sequence[int] | None = None,
        *,
        on_device: Literal[True],
    ) -> _core.DeviceArray: ...
    def hidden_states(
        self,
        tokens: ArrayLike,
        pixel_values: ArrayLike | None = None,
        cuts: Sequence[int] | None = None,
        *,
        on_device: bool = False,
    ) -> NDArray[np.float32] | _core.DeviceArray:
        """What the head multiplies, at every position of a prompt: the last layer's, normed.

        Args and errors are those of `logits`.

        Returns:
            float32 [T, hidden], where `logits` has its own; `logits(ids)` is this times the head's
            matrix.
        """
        core, pieces = self._core_engine(), self._pieces(tokens, pixel_values, cuts)
        on_device = truth("on_device", on_device)
        return (core.device_hidden_states if on_device else core.hidden_states)(*pieces)

    def _pieces(
        self, tokens: ArrayLike, pixel_values: ArrayLike | None, cuts: Sequence[int] | None
    ) -> tuple[list[int], list[NDArray[np.float32]], list[int]]:
        ids = token_ids(array_of("tokens", tokens), self.info.vocab_size, "tokens")
        pixels = [] if pixel_values is None else [tiles_array(pixel_values)]
        lengths = () if cuts is None else cuts
        if not isinstance(lengths, Sequence | np.ndarray):
            raise InvalidRequest(
                f"cuts is {cuts!r:.80}; it must be a list of lengths", param="cuts"
            )
        return ids, pixels, [whole("cuts", cut) for cut in lengths]

    def score(self, text: Prompt) -> Score:
        """Log-probability of a text (with the begin-of-text token in front) or of token ids.

        Args:
            text: Text, or token ids, which are taken as they are.

        Raises:
            InvalidRequest: There are no tokens, or ids outside the vocabulary.
            ContextOverflow: The text is longer than the context.
            EngineClosed: close() was called.
        """
        tokens = self._raw_prompt(text, False, None).tokens
        logprobs = self._core_engine().score(tokens)
        total = math.fsum(logprobs)
        mean = total / max(len(tokens) - 1, 1)
        return Score(tuple(tokens), tuple(logprobs), total, math.exp(-mean))

    # --- the rest --------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> _core.Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            UnsupportedError: The checkpoint has none.
        """
        tokenizer = self._core_engine().tokenizer()
        if tokenizer is None:
            raise UnsupportedError(
                "this checkpoint has neither tokenizer.json nor tokenizer.model; "
                "put one beside config.json, or pass token ids"
            )
        return tokenizer

    def close(self) -> None:
        """Stops running requests and frees the model. Later calls raise EngineClosed."""
        self._core.close()

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._core.closed

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else self.plan.device
        return f"<puna.Engine {self.info.path} ({state})>"

    # --- how it is done --------------------------------------------------------------------------

    def _core_engine(self) -> _core.Engine:
        if self._core.closed:
            raise EngineClosed("the engine was closed; load the model again")
        return self._core

    def _request(self, function: str, options: Mapping[str, Any], other: Sequence[str]) -> Request:
        core = self._core_engine()
        request = parse_request(function, options, self.info.defaults, self.info.vocab_size, other)
        core.check(_core.Sampling(**request.core))
        return request

    def _raw_prompt(
        self,
        prompt: Prompt,
        allow_special: bool,
        images: Sequence[Any] | None,
        first: bool = True,
    ) -> BuiltPrompt:
        """Raw text or ids; the `first` text of a session gets the begin-of-text token."""
        images = image_list(images)
        if not isinstance(prompt, str):
            if images:
                raise InvalidRequest(
                    "images go with text; with token ids use logits() and pixel_values",
                    param="images",
                )
            return BuiltPrompt(token_ids(ids_of(prompt), self.info.vocab_size, "prompt"), [])
        tokenizer = self.tokenizer
        if not truth("allow_special", allow_special):
            self._warn_of_markup(prompt, tokenizer)
        tokens = [self.info.bos_token] if first and self.info.bos_token is not None else []
        pixels: list[NDArray[np.float32]] = []
        for image in images:
            self._place_image(to_rgb(image), tokens, pixels)
        ids = tokenizer.encode(prompt, allowed_special="all" if allow_special else "none")
        if tokens and len(ids) and ids[0] == tokens[0]:
            ids = ids[1:]  # the text brought its own begin-of-text
        return BuiltPrompt(tokens + ids.tolist(), pixels)

    def _arriving(
        self, pieces: Iterator[Prompt], allow_special: bool, first: bool
    ) -> Iterator[NDArray[np.integer[Any]] | list[int]]:
        """The ids of a text that comes in pieces, as soon as no later piece can change them."""
        special = "all" if truth("allow_special", allow_special) else "none"
        encoder = None
        for piece in pieces:
            if isinstance(piece, str):
                if encoder is None:
                    encoder = self.tokenizer.stream_encoder(allowed_special=special)
                    if first and self.info.bos_token is not None:
                        yield [self.info.bos_token]
                yield encoder.feed(piece)
            else:
                if encoder is not None:
                    yield encoder.finish()
                    encoder = None
                yield token_ids(ids_of(piece), self.info.vocab_size, "prompt")
            first = False
        if encoder is not None:
            yield encoder.finish()

    def _warn_of_markup(self, text: str, tokenizer: _core.Tokenizer) -> None:
        """Says once that special tokens typed into a raw prompt are plain text."""
        if self._warned_of_markup or "<|" not in text:
            return
        name = next((name for name in tokenizer.special_tokens if name in text), None)
        if name is not None:
            self._warned_of_markup = True
            _LOGGER.warning(
                "the prompt holds %s, which is read as plain text: use chat(), which applies the "
                "model's template, or allow_special=True",
                name,
            )

    def _chat_prompt(
        self,
        messages: Messages,
        images: Sequence[Any] | None,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> BuiltPrompt:
        tokenizer = self.tokenizer
        rendered: RenderedPrompt = render(
            messages,
            images=images,
            template=self._template,
            special_tokens=frozenset(tokenizer.special_tokens),
            tools=tools,
        )
        tokens: list[int] = []
        pixels: list[NDArray[np.float32]] = []
        for part in rendered.parts:
            if isinstance(part, SpecialToken):
                tokens.append(tokenizer.special_tokens[part.name])
            elif isinstance(part, ImagePlaceholder):
                self._place_image(rendered.images[part.index], tokens, pixels)
            else:
                tokens.extend(tokenizer.encode(part).tolist())
        return BuiltPrompt(tokens, pixels)

    def _place_image(
        self, rgb: NDArray[np.uint8], tokens: list[int], pixels: list[NDArray[np.float32]]
    ) -> None:
        if not self.info.image_size:
            raise InvalidRequest(
                "an image was given, but this model has no vision tower or was loaded without",
                param="images",
            )
        tiles, rows, columns = _core.prepare_image(rgb, self.info.image_size)
        special = self.tokenizer.special_tokens
        tokens.extend(
            _core.image_token_layout(
                rows,
                columns,
                self.info.tokens_per_tile,
                {name: special[f"<|{name}|>"] for name in _IMAGE_TOKENS},
            )
        )
        pixels.append(tiles)

    def _open(self, prompt: BuiltPrompt) -> _core.Session:
        """A session that holds the prompt; what an earlier request computed of it is taken over."""
        session = self._core_engine().session()
        session.prompt(prompt.tokens, prompt.pixels, reuse=True)
        return session

    def _complete(
        self, sessions: Sequence[_core.Session], request: Request, deadline: Deadline
    ) -> list[Completion]:
        """Continues each session n times, all as one batch."""
        engine = self._core_engine()
        jobs: list[Job] = []
        for session in sessions:
            if request.n > 1 or session.length > _LONG_PROMPT:
                prefill(session, deadline, self._progress)
            # Before the first one adds tokens to what the others start from.
            forks = [session]
            while len(forks) < request.n and deadline.left() > 0:
                forks.append(session.fork())
            for i in range(request.n):
                seed = (request.seed + i) % (1 << 64)
                if i < len(forks):
                    jobs.append(Job(forks[i], request, seed))
                else:
                    jobs.append(Job(session, request, seed, late=True))
        running = [job for job in jobs if job.finish is None]
        while running:
            steps = engine.step([job.session for job in running], deadline.left())
            for job, step in zip(running, steps, strict=True):
                job.take(self._chunk(step), deadline.reason(step.finish))
            running = [job for job in running if job.finish is None]
        return [self._completion(job) for job in jobs]

    def _chunks(
        self, session: _core.Session, request: Request, deadline: Deadline
    ) -> Iterator[Chunk]:
        engine = self._core_engine()
        if session.length > _LONG_PROMPT:
            prefill(session, deadline, self._progress)
        job = Job(session, request, request.seed)
        while job.finish is None:
            step = engine.step([session], deadline.left())[0]
            chunk = self._chunk(step)
            job.take(chunk, deadline.reason(step.finish))
            if job.finish is None:
                yield chunk
        yield Chunk(
            text=chunk.text,
            tokens=chunk.tokens,
            logprobs=chunk.logprobs,
            finish_reason=job.finish,
            stop=chunk.stop,
            usage=usage(job),
            seed=job.seed,
            timings=timings(session.timings()),
            attention=report_of(session, job.attention),
        )

    def _chunk(self, step: _core.Step) -> Chunk:
        logprobs: tuple[Logprobs, ...] = ()
        if step.logprob is not None:
            chosen = self._token_logprob(step.token, step.logprob)
            logprobs = (Logprobs(chosen, tuple(self._token_logprob(*pair) for pair in step.top)),)
        tokens = () if step.token < 0 else (step.token,)
        return Chunk(text=step.text, tokens=tokens, logprobs=logprobs, stop=step.stop or None)

    def _token_logprob(self, token: int, logprob: float) -> TokenLogprob:
        tokenizer = self._core.tokenizer()
        # Ids that only pad the vocabulary have no text.
        has_text = tokenizer is not None and token < tokenizer.vocab_size
        raw = tokenizer.decode_bytes([token]) if tokenizer is not None and has_text else b""
        return TokenLogprob(token, logprob, raw.decode("utf-8", "replace"), raw)

    def _completion(self, job: Job) -> Completion:
        assert job.finish is not None
        return Completion(
            text="".join(chunk.text for chunk in job.chunks),
            tokens=tuple(token for chunk in job.chunks for token in chunk.tokens),
            finish_reason=job.finish,
            stop=job.chunks[-1].stop if job.chunks else None,
            usage=usage(job),
            logprobs=tuple(item for chunk in job.chunks for item in chunk.logprobs),
            seed=job.seed,
            timings=timings(job.session.timings()),
            attention=None if job.late else report_of(job.session, job.attention),
        )


# A prompt beyond this is computed pass by pass before the answer begins, with a progress bar.
_LONG_PROMPT = 8192

_IMAGE_TOKENS = (
    "image_start",
    "image_end",
    "tile_x_separator",
    "tile_y_separator",
    "image",
    "patch",
)


def _require_image_tokens(core: _core.Engine) -> None:
    """Refuses a model with a vision tower whose tokenizer has no names for where pictures go.

    Raises:
        ModelFormatError: It is one.
    """
    tokenizer = core.tokenizer()
    if tokenizer is None or not core.info()["image_size"]:
        return
    names = [f"<|{name}|>" for name in _IMAGE_TOKENS]
    missing = [name for name in names if name not in tokenizer.special_tokens]
    if missing:
        raise ModelFormatError(
            f"the checkpoint has a vision tower, and its tokenizer no special token "
            f"{' or '.join(missing)}, with which pictures are written: take the tokenizer of the "
            "original, or load with vision=False"
        )


def _token(raw: int) -> int | None:
    return None if raw < 0 else raw
