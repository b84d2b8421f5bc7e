"""Loading a checkpoint and generating from it."""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from puna import _core
from puna.chat_template import (
    ImagePlaceholder,
    RenderedPrompt,
    SpecialToken,
    find_template,
    render,
)
from puna.errors import EngineClosed, InvalidRequest, UnsupportedError
from puna.images import to_rgb
from puna.options import Request, parse_request, unknown_keyword
from puna.types import (
    Chunk,
    Completion,
    FinishReason,
    Logprobs,
    ModelInfo,
    Plan,
    Score,
    Timings,
    TokenLogprob,
    Usage,
)

# A turn that meets no end-of-turn token stops here unless max_tokens says otherwise.
_DEFAULT_MAX_TOKENS = 4096
_DEMO_NAME = "demo"

Prompt = str | Sequence[int]
Messages = str | Sequence[Mapping[str, Any]]


def load(
    model: str | os.PathLike[str],
    *,
    quant: str | None = None,
    context: int | str | None = None,
    kv: str = "auto",
    kv_offload: str = "auto",
    device: str = "auto",
    experts: str | float = "auto",
    memory: int | str | None = None,
    threads: int | None = None,
    vision: bool = True,
    isa: str | None = None,
    progress: bool = True,
    **unknown: Any,
) -> Engine:
    """Loads a Llama 4 checkpoint.

    Args:
        model: A Hugging Face directory (config.json, safetensors, tokenizer.json or
            tokenizer.model), or "demo" for the small model that comes with puna.
        quant: Weight format; None keeps them as stored, the only choice so far.
        context: Tokens a session may hold, as a number or like "128k" or "1M" (powers of 1024);
            None is the largest that fits.
        kv: Format of the KV cache: "auto" (as the weights), "bf16" or "fp32".
        kv_offload: Where the KV cache may live besides memory: "auto" or "none" so far.
        device: "auto", "cpu", or "ref": the slow double-precision reference.
        experts: Where expert weights live: "auto" or "cpu" so far.
        memory: Bytes for weights and KV cache together, as a number or like "24G"; None is what the
            system has free.
        threads: Compute threads; None is the physical cores this process may use.
        vision: False leaves the vision tower on disk.
        isa: Instruction set, e.g. "avx2"; None is the best the processor supports.
        progress: Show a progress bar on stderr when loading takes more than a moment.

    Raises:
        ModelNotFound: There is no checkpoint at `model`.
        ModelFormatError: A file is damaged, or a tensor is missing or misshapen.
        UnsupportedError: The checkpoint or an argument asks for what this version cannot do.
        OutOfMemory: Weights or context do not fit; nothing has been read.
        DeviceError: The device or instruction set is not available here.
    """
    if unknown:
        raise unknown_keyword("load", next(iter(unknown)), _LOAD_NAMES)
    if quant is not None:
        raise UnsupportedError(
            f"quant={quant!r} is not available yet; leave it out to compute with the weights as stored"
        )
    if kv_offload not in ("auto", "none"):
        raise UnsupportedError(
            f"kv_offload={kv_offload!r} is not available yet; the KV cache lives in memory: use 'auto'"
        )
    if experts not in ("auto", "cpu"):
        raise UnsupportedError(f"experts={experts!r} is not available yet; use 'auto'")
    path = demo_directory() if os.fspath(model) == _DEMO_NAME else Path(model).expanduser()
    bar = _LoadBar(path.name) if progress else None
    try:
        core = _core.load(
            path=os.fspath(path),
            device=device,
            isa=isa or "",
            threads=_whole("threads", threads),
            kv=kv,
            context=_amount("context", context),
            memory=_amount("memory", memory),
            vision=vision,
            progress=bar.update if bar else None,
        )
    finally:
        if bar:
            bar.close()
    return Engine(core, path)


_LOAD_NAMES = (
    "quant",
    "context",
    "kv",
    "kv_offload",
    "device",
    "experts",
    "memory",
    "threads",
    "vision",
    "isa",
    "progress",
)


def demo_directory() -> Path:
    """Where the bundled demo checkpoint lies."""
    return Path(__file__).parent / "demo"


class Engine:
    """A loaded model. Made by `puna.load`; safe to use from several threads; a context manager.

    Requests of several threads take turns token by token. Breaking out of a stream, Ctrl-C and
    `close()` stop within a token.
    """

    def __init__(self, core: _core.Engine, path: Path) -> None:
        """Wraps a loaded core engine; use `puna.load`."""
        self._core = core
        self._template = find_template(path)
        raw = core.info()
        self._raw_info = raw
        defaults = {
            name: raw[name] for name in ("temperature", "top_p", "top_k") if raw[name] is not None
        }
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
        self.plan = Plan(
            weight_bytes=raw["weight_bytes"],
            kv_bytes_per_token=raw["kv_bytes_per_token"],
            context=raw["context"],
            max_context=raw["max_context"],
            memory_bytes=raw["memory_bytes"],
            device=raw["device"],
            warnings=tuple(raw["warnings"]),
        )

    # --- generation ------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        images: Sequence[Any] | None = None,
        allow_special: bool = False,
        **options: Any,
    ) -> Completion | list[Completion]:
        """Continues raw text; no chat template is applied.

        Args:
            prompt: Text, or token ids, or a list of either: a list is computed as one batch and
                gives a list. Text gets the begin-of-text token in front; ids are taken as they are.
            images: Pictures for a single prompt, put in front of its text (paths, PIL images,
                arrays, encoded bytes, base64).
            allow_special: Read special tokens written in the text, such as "<|eot|>", as such.
            **options: max_tokens, temperature, top_p, top_k, min_p, seed, stop, logprobs, n,
                repetition_penalty, presence_penalty, frequency_penalty, logit_bias, min_tokens,
                ignore_eos, timeout (seconds).

        Returns:
            A Completion per prompt; with n > 1 a list of n per prompt, in order.

        Raises:
            InvalidRequest: An option or a prompt that makes no sense.
            ContextOverflow: The prompt is longer than the context.
            ImageError: A picture that cannot be read.
            EngineClosed: close() was called.
        """
        request = self._request("generate", options, ("images", "allow_special"))
        if _is_batch(prompt):
            if images:
                raise InvalidRequest(
                    "images go with a single prompt, not with a list", param="images"
                )
            prompts = [self._raw_prompt(item, allow_special, None) for item in prompt]  # type: ignore[arg-type]
            return self._complete(prompts, request)
        single = self._raw_prompt(prompt, allow_special, images)  # type: ignore[arg-type]
        results = self._complete([single], request)
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
        results = self._complete([self._chat_prompt(messages, images, tools)], request)
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
        if raw or _is_ids(prompt):
            built = self._raw_prompt(prompt, allow_special, images)  # type: ignore[arg-type]
        else:
            built = self._chat_prompt(prompt, images, tools)  # type: ignore[arg-type]
        session = self._core_engine().session()
        session.prompt(built.tokens, built.pixels)
        return self._chunks(session, built, request)

    def session(self, path: str | os.PathLike[str] | None = None) -> Session:
        """A conversation that keeps what it has computed; each turn costs only what is new.

        Raises:
            UnsupportedError: `path` was given: saved sessions are not available yet.
        """
        if path is not None:
            raise UnsupportedError(
                "sessions cannot be saved or opened yet; use session() without a path"
            )
        return Session(self)

    # --- evaluation ------------------------------------------------------------------------------

    def logits(
        self,
        tokens: ArrayLike,
        pixel_values: ArrayLike | None = None,
        cuts: Sequence[int] | None = None,
    ) -> NDArray[np.float32]:
        """Logits at every position of a prompt.

        Args:
            tokens: [T] ids; the image token stands at each place of an image row.
            pixel_values: [tiles, 3, S, S] normalised tiles in the order of their places.
            cuts: Lengths, summing to T, of the pieces in which the prompt is computed; 1 is a
                decode step. The result does not depend on them.

        Returns:
            float32 [T, vocab].

        Raises:
            InvalidRequest: Ids outside the vocabulary, cuts that do not add up, or more or fewer image
                places than rows.
        """
        ids = np.asarray(tokens)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise InvalidRequest(
                f"tokens is an array of {ids.dtype} {ids.shape}; it must be one-dimensional and of integers",
                param="tokens",
            )
        pixels = [] if pixel_values is None else [_pixel_values(pixel_values)]
        return self._core_engine().logits(ids.tolist(), pixels, list(cuts or ()))

    def score(self, text: Prompt) -> Score:
        """Log-probability of a text (with the begin-of-text token in front) or of token ids."""
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
        self._core_engine()
        return parse_request(function, options, self.info.defaults, other)

    def _raw_prompt(
        self, prompt: Prompt, allow_special: bool, images: Sequence[Any] | None
    ) -> _BuiltPrompt:
        if not isinstance(prompt, str):
            if images:
                raise InvalidRequest(
                    "images go with text; with token ids use logits() and pixel_values",
                    param="images",
                )
            return _BuiltPrompt([int(token) for token in _ids(prompt)], [])
        tokenizer = self.tokenizer
        tokens = [] if self.info.bos_token is None else [self.info.bos_token]
        pixels: list[NDArray[np.float32]] = []
        for image in images or ():
            self._place_image(to_rgb(image), tokens, pixels)
        ids = tokenizer.encode(prompt, allowed_special="all" if allow_special else "none")
        if tokens and len(ids) and ids[0] == tokens[0]:
            ids = ids[1:]  # the text brought its own begin-of-text
        return _BuiltPrompt(tokens + list(ids), pixels)

    def _chat_prompt(
        self,
        messages: Messages,
        images: Sequence[Any] | None,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> _BuiltPrompt:
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
                tokens.extend(tokenizer.encode(part))
        return _BuiltPrompt(tokens, pixels)

    def _place_image(
        self, rgb: NDArray[np.uint8], tokens: list[int], pixels: list[NDArray[np.float32]]
    ) -> None:
        if not self.info.image_size:
            raise InvalidRequest(
                "an image was given, but this model has no vision tower or was loaded with vision=False",
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

    def _complete(self, prompts: Sequence[_BuiltPrompt], request: Request) -> list[Completion]:
        """Runs n sessions per prompt as one batch."""
        engine = self._core_engine()
        jobs: list[_Job] = []
        for prompt in prompts:
            for i in range(request.n):
                job = _Job(engine.session(), prompt, request, seed=(request.seed + i) % (1 << 64))
                job.session.prompt(prompt.tokens, prompt.pixels)
                jobs.append(job)
        for job in jobs:
            job.begin()
        deadline = None if request.timeout is None else time.monotonic() + request.timeout
        running = list(jobs)
        while running:
            for job, step in zip(
                running, engine.step([job.session for job in running]), strict=True
            ):
                job.take(self._chunk(step), step.finish)
            running = [job for job in running if job.finish is None]
            if deadline is not None and time.monotonic() > deadline:
                for job in running:
                    job.finish = "timeout"
                break
        return [self._completion(job) for job in jobs]

    def _chunks(
        self, session: _core.Session, prompt: _BuiltPrompt, request: Request
    ) -> Iterator[Chunk]:
        job = _Job(session, prompt, request, request.seed)
        job.begin()
        deadline = None if request.timeout is None else time.monotonic() + request.timeout
        while job.finish is None:
            step = session.step()
            chunk = self._chunk(step)
            job.take(chunk, step.finish)
            if job.finish is None and deadline is not None and time.monotonic() > deadline:
                job.finish = "timeout"
            if job.finish is None:
                yield chunk
        yield Chunk(
            text=chunk.text,
            tokens=chunk.tokens,
            logprobs=chunk.logprobs,
            finish_reason=job.finish,
            stop=chunk.stop,
            usage=_usage(job),
            seed=job.seed,
            timings=_timings(session.timings()),
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
        raw = b"" if tokenizer is None else tokenizer.decode_bytes([token])
        return TokenLogprob(token, logprob, raw.decode("utf-8", "replace"), raw)

    def _completion(self, job: _Job) -> Completion:
        assert job.finish is not None
        return Completion(
            text="".join(chunk.text for chunk in job.chunks),
            tokens=tuple(token for chunk in job.chunks for token in chunk.tokens),
            finish_reason=job.finish,
            stop=job.chunks[-1].stop if job.chunks else None,
            usage=_usage(job),
            logprobs=tuple(item for chunk in job.chunks for item in chunk.logprobs),
            seed=job.seed,
            timings=_timings(job.session.timings()),
        )


class Session:
    """A conversation with one model. Made by `Engine.session`.

    The KV cache of everything said so far is kept, so a turn computes only its own tokens. One thread
    at a time may use a session.
    """

    def __init__(self, engine: Engine) -> None:
        """Opens an empty conversation; use `Engine.session`."""
        self._engine = engine
        self._session = engine._core_engine().session()
        self._lock = threading.Lock()
        self.messages: list[dict[str, Any]] = []

    def chat(
        self, message: Messages, *, images: Sequence[Any] | None = None, **options: Any
    ) -> Completion:
        """Says something and returns the answer; both become part of the conversation.

        Args:
            message: A string (a user message) or messages to add.
            images: Pictures that go with it.
            **options: As for `Engine.generate`, without n.
        """
        chunks = list(self.stream(message, images=images, **options))
        last = chunks[-1]
        assert last.finish_reason and last.usage and last.timings and last.seed is not None
        return Completion(
            text="".join(chunk.text for chunk in chunks),
            tokens=tuple(token for chunk in chunks for token in chunk.tokens),
            finish_reason=last.finish_reason,
            stop=last.stop,
            usage=last.usage,
            logprobs=tuple(item for chunk in chunks for item in chunk.logprobs),
            seed=last.seed,
            timings=last.timings,
        )

    def stream(
        self, message: Messages, *, images: Sequence[Any] | None = None, **options: Any
    ) -> Iterator[Chunk]:
        """As `chat`, piece by piece. If the loop is left early, what was said so far stays."""
        engine = self._engine
        request = engine._request("stream", options, ("images",))
        if request.n != 1:
            raise InvalidRequest(f"n is {request.n}; a session has one answer", param="n")
        added = _user_messages(message, images)
        prompt = engine._chat_prompt([*self.messages, *added], None, None)
        return self._run(added, prompt, request)

    def _run(
        self, added: list[dict[str, Any]], prompt: _BuiltPrompt, request: Request
    ) -> Iterator[Chunk]:
        with self._lock:
            self._session.prompt(prompt.tokens, prompt.pixels)
            said: list[str] = []
            try:
                for chunk in self._engine._chunks(self._session, prompt, request):
                    said.append(chunk.text)
                    yield chunk
            finally:
                answer = {"role": "assistant", "content": "".join(said)}
                self.messages += [*added, answer]

    def fork(self) -> Session:
        """A second conversation that continues from here; what was computed is shared."""
        other = Session.__new__(Session)
        other._engine = self._engine
        other._session = self._session.fork()
        other._lock = threading.Lock()
        other.messages = list(self.messages)
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Not available yet.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(f"sessions cannot be saved yet ({os.fspath(path)} was not written)")

    def __len__(self) -> int:
        """Tokens held by the conversation."""
        return self._session.length


_IMAGE_TOKENS = (
    "image_start",
    "image_end",
    "tile_x_separator",
    "tile_y_separator",
    "image",
    "patch",
)


@dataclass(slots=True)
class _BuiltPrompt:
    """Token ids, and the normalised tiles [tiles, 3, S, S] of each image in order."""

    tokens: list[int]
    pixels: list[NDArray[np.float32]]


class _Job:
    """One session that is being stepped, and what came out of it so far."""

    def __init__(self, session: _core.Session, prompt: _BuiltPrompt, request: Request, seed: int):
        self.session = session
        self.prompt = prompt
        self.seed = seed
        self.chunks: list[Chunk] = []
        self.finish: FinishReason | None = None
        self._options = dict(request.core, seed=seed)
        self._options["max_tokens"] = request.core["max_tokens"] or _DEFAULT_MAX_TOKENS

    def begin(self) -> None:
        self.session.begin(**self._options)

    def take(self, chunk: Chunk, finish: FinishReason | None) -> None:
        self.chunks.append(chunk)
        self.finish = finish


class _LoadBar:
    """A progress bar on stderr for loads that take longer than a moment."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._bar: Any = None
        self._started = time.monotonic()

    def update(self, done: int, total: int) -> None:
        if self._bar is None:
            if time.monotonic() - self._started < 1.0:
                return
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"Loading {self._name}")
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _usage(job: _Job) -> Usage:
    raw = job.session.timings()
    return Usage(
        prompt=len(job.prompt.tokens),
        completion=sum(len(chunk.tokens) for chunk in job.chunks),
        cached=raw["cached_tokens"],
        image=raw["image_tokens"],
    )


def _timings(raw: Mapping[str, Any]) -> Timings:
    def rate(tokens: int, seconds: float) -> float:
        return tokens / seconds if seconds > 0 else 0.0

    return Timings(
        load_s=raw["load_seconds"],
        first_token_s=raw["first_token_seconds"],
        prefill_s=raw["prefill_seconds"],
        decode_s=raw["decode_seconds"],
        prefill_tps=rate(raw["prefill_tokens"], raw["prefill_seconds"]),
        decode_tps=rate(raw["decode_tokens"], raw["decode_seconds"]),
        kv_bytes=raw["kv_bytes"],
        peak_bytes=raw["peak_bytes"],
    )


def _user_messages(message: Messages, images: Sequence[Any] | None) -> list[dict[str, Any]]:
    """Messages to add to a conversation, with the pictures in the last one."""
    added = (
        [{"role": "user", "content": message}]
        if isinstance(message, str)
        else [dict(item) for item in message]
    )
    if images:
        content = added[-1]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        # Decoded once: the conversation is rendered again at every turn.
        pictures = [{"type": "image", "image": to_rgb(image)} for image in images]
        added[-1]["content"] = [*pictures, *parts]
    return added


def _is_ids(prompt: Any) -> bool:
    """Whether `prompt` is a sequence of token ids."""
    if isinstance(prompt, np.ndarray):
        return prompt.ndim == 1
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str | bytes)
        and len(prompt) > 0
        and hasattr(prompt[0], "__index__")
    )


def _is_batch(prompt: Any) -> bool:
    if isinstance(prompt, str) or _is_ids(prompt):
        return False
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
        return True
    raise InvalidRequest(
        f"the prompt is {type(prompt).__name__}; it must be text, token ids, or a list of either",
        param="prompt",
    )


def _ids(prompt: Any) -> Sequence[int]:
    if not _is_ids(prompt):
        raise InvalidRequest(
            f"the prompt is {prompt!r:.80}; it must be text or a non-empty list of token ids",
            param="prompt",
        )
    return prompt


def _pixel_values(pixel_values: ArrayLike) -> NDArray[np.float32]:
    pixels = np.ascontiguousarray(pixel_values, dtype=np.float32)
    if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] != pixels.shape[3]:
        raise InvalidRequest(
            f"pixel_values has shape {pixels.shape}; it must be (tiles, 3, size, size)",
            param="pixel_values",
        )
    return pixels


def _token(raw: int) -> int | None:
    return None if raw < 0 else raw


_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def _amount(name: str, value: int | str | None) -> int:
    """A count given as a number or like "128k", "24GiB"; 0 if not given."""
    if value is None:
        return 0
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", value.lower())
        if match is None:
            raise InvalidRequest(
                f'{name} is {value!r}; write a number, or one like "128k" or "24G"', param=name
            )
        value = int(float(match[1]) * _UNITS[match[2]])
    return _whole(name, value)


def _whole(name: str, value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 1:
        raise InvalidRequest(
            f"{name} is {value!r}; it must be a whole number of 1 or more", param=name
        )
    return value.__index__()
