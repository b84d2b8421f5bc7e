import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict, final, overload, type_check_only

import numpy as np
from numpy.typing import NDArray
from typing_extensions import CapsuleType, Never

_Ids: TypeAlias = NDArray[np.integer[Any]] | Sequence[int]

class _Backend(TypedDict):
    name: str
    available: bool
    why: str

class _Isa(TypedDict):
    name: str
    available: bool

class _WeightFormat(TypedDict):
    name: str
    bits_per_weight: float
    can_encode: bool

class _System(TypedDict):
    processor: str
    threads: int
    memory_total: int
    memory_available: int

class _Info(TypedDict):
    path: str
    device: str
    dtype: str
    kv_dtype: str
    parameters: int
    active_parameters: int
    weight_bytes: int
    context: int
    max_context: int
    vocab_size: int
    hidden_size: int
    layers: int
    image_size: int
    tokens_per_tile: int
    bos_token: int
    image_token: int
    eos_tokens: list[int]
    load_seconds: float
    warnings: list[str]
    temperature: float | None
    top_p: float | None
    top_k: int | None

class _Plan(TypedDict):
    kv: str
    context: int
    max_context: int
    largest_context: int
    weight_bytes: int
    vision_bytes: int
    scratch_bytes: int
    kv_sealed_bytes: int
    kv_open_bytes: int
    kv_local_bytes: int
    kv_bytes_per_token: int
    kv_memory_bytes: int
    kv_disk_bytes: int
    memory_needed: int
    memory_bytes: int
    memory_given: bool
    disk_needed: int
    disk_bytes: int
    fits: bool
    step_memory_bytes: int
    step_disk_bytes: int
    step_host_bytes: int
    on_gpu: bool
    expert_layers: int
    host_layers: int
    host_expert_bytes: int
    expert_window_bytes: int
    host_needed: int
    host_bytes: int
    kv_offloads: bool
    kv_host_bytes: int
    step_link_bytes: int
    remedies: list[tuple[str, int, int]]

class _Timings(TypedDict):
    load_seconds: float
    first_token_seconds: float
    prefill_seconds: float
    decode_seconds: float
    prefill_tokens: int
    decode_tokens: int
    cached_tokens: int
    image_tokens: int
    kv_bytes: int
    peak_bytes: int

class _Inspection(TypedDict, total=False):
    path: str
    parameters: int
    active_parameters: int
    weight_bytes: int
    dtype: str
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    chunked_layers: int
    chunk: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    kv_bytes_per_token: int
    kv_fixed_bytes: int
    image_size: int
    tokens_per_tile: int
    tokenizer: str
    memory: list[tuple[int, int]]
    warnings: list[str]
    tensors: list[tuple[str, str, tuple[int, ...]]]

@type_check_only
class _PybindType(type): ...

@final
class Tokenizer(metaclass=_PybindType):
    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @staticmethod
    def from_file(path: str | os.PathLike[str]) -> Tokenizer: ...
    @overload
    def encode(
        self,
        text: str | bytes,
        *,
        allowed_special: str | Iterable[str] = "none",
        cut: str = "none",
        threads: int | None = 1,
    ) -> NDArray[np.uint32]: ...
    @overload
    def encode(
        self,
        text: list[str] | list[bytes] | tuple[str, ...],
        *,
        allowed_special: str | Iterable[str] = "none",
        cut: str = "none",
        threads: int | None = 1,
    ) -> list[NDArray[np.uint32]]: ...
    def count(
        self,
        text: str | bytes,
        *,
        allowed_special: str | Iterable[str] = "none",
        cut: str = "none",
        threads: int | None = 1,
    ) -> int: ...
    def decode(
        self, ids: Sequence[int] | NDArray[np.integer[Any]], *, skip_special: bool = False
    ) -> str: ...
    def decode_bytes(
        self, ids: Sequence[int] | NDArray[np.integer[Any]], *, skip_special: bool = False
    ) -> bytes: ...
    def stream_encoder(
        self,
        *,
        allowed_special: str | Iterable[str] = "none",
        cut: str = "none",
        max_pending: int = 1048576,
    ) -> StreamEncoder: ...
    def stream_decoder(
        self,
        *,
        stop: Sequence[str] = [],
        skip_special: bool = True,
        events: bool = False,
        include_stop: bool = False,
    ) -> StreamDecoder: ...
    def is_special(self, id: int) -> bool: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def special_tokens(self) -> dict[str, int]: ...

@final
class StreamEncoder(metaclass=_PybindType):
    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    def feed(self, text: str | bytes) -> NDArray[np.uint32]: ...
    def finish(self) -> NDArray[np.uint32]: ...
    def provisional(self) -> NDArray[np.uint32]: ...
    @property
    def pending_bytes(self) -> int: ...

@final
class StreamDecoder(metaclass=_PybindType):
    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    def push(self, id: int) -> str: ...
    def finish(self) -> str: ...
    def copy(self) -> StreamDecoder: ...
    @property
    def stopped(self) -> bool: ...
    @property
    def stop(self) -> str: ...
    @property
    def stop_token(self) -> int | None: ...
    @property
    def event(self) -> int | None: ...

@final
class Step(metaclass=_PybindType):
    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def token(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def logprob(self) -> float | None: ...
    @property
    def top(self) -> list[tuple[int, float]]: ...
    @property
    def finish(self) -> Literal["stop", "length", "cancelled"] | None: ...
    @property
    def stop(self) -> str: ...

@final
class AttentionMode(metaclass=_PybindType):
    def __init__(
        self,
        kind: str,
        tau: float,
        delta: float,
        fraction: float,
        sample: float,
        sink_pages: int,
        recent_pages: int,
    ) -> None: ...

@final
class Sampling(metaclass=_PybindType):
    def __init__(
        self,
        *,
        temperature: float,
        top_p: float,
        top_k: int,
        min_p: float,
        repetition_penalty: float,
        presence_penalty: float,
        frequency_penalty: float,
        logit_bias: Sequence[tuple[int, float]],
        seed: int,
        max_tokens: int,
        min_tokens: int,
        stop_ids: Sequence[int],
        stop: Sequence[str],
        ignore_eos: bool,
        logprobs: int,
        want_logprobs: bool,
        attention: AttentionMode,
    ) -> None: ...

class _SessionReport(TypedDict):
    chunks: int
    pages: int
    good_tokens: int
    fault: str

@final
class Session(metaclass=_PybindType):
    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    def prompt(
        self, tokens: _Ids, images: Sequence[NDArray[np.float32]], reuse: bool = ...
    ) -> None: ...
    def append(self, tokens: _Ids) -> None: ...
    def truncate(self, tokens: int) -> None: ...
    def prefill(self, seconds: float = ...) -> int: ...
    def begin(self, options: Sampling) -> None: ...
    def logits(self, most: int) -> NDArray[np.float32]: ...
    def cancel(self) -> None: ...
    def save(self, path: str) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...
    def fork(self) -> Session: ...
    def tokens(self, first: int = 0) -> list[int]: ...
    @property
    def length(self) -> int: ...
    @property
    def batch_rows(self) -> int: ...
    def pending(self) -> int: ...
    def attention(self) -> tuple[int, int, float, float, int]: ...
    def timings(self) -> _Timings: ...

@final
class DeviceArray(metaclass=_PybindType):
    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> np.dtype[np.float32]: ...
    @property
    def device(self) -> str: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = ...,
        max_version: tuple[int, int] | None = ...,
        dl_device: tuple[int, int] | None = ...,
        copy: bool | None = ...,
    ) -> CapsuleType: ...

@final
class Engine(metaclass=_PybindType):
    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    def info(self) -> _Info: ...
    def plan(self) -> _Plan: ...
    def tokenizer(self) -> Tokenizer | None: ...
    def session(self) -> Session: ...
    def open(self, path: str, resume: bool) -> Session: ...
    def verify(self, path: str, extent: str) -> _SessionReport: ...
    def truncate_session(self, path: str, tokens: int) -> int: ...
    def check(self, options: Sampling) -> None: ...
    def step(self, sessions: Sequence[Session], seconds: float = ...) -> list[Step]: ...
    def logits(
        self, tokens: _Ids, images: Sequence[NDArray[np.float32]], cuts: Sequence[int]
    ) -> NDArray[np.float32]: ...
    def hidden_states(
        self, tokens: _Ids, images: Sequence[NDArray[np.float32]], cuts: Sequence[int]
    ) -> NDArray[np.float32]: ...
    def device_logits(
        self, tokens: _Ids, images: Sequence[NDArray[np.float32]], cuts: Sequence[int]
    ) -> DeviceArray: ...
    def device_hidden_states(
        self, tokens: _Ids, images: Sequence[NDArray[np.float32]], cuts: Sequence[int]
    ) -> DeviceArray: ...
    def score(self, tokens: _Ids) -> list[float]: ...
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...

def load(
    *,
    path: str,
    mmproj: str,
    device: str,
    isa: str,
    threads: int,
    kv: str,
    kv_host: bool,
    kv_disk: str,
    kv_disk_bytes: int,
    context: int,
    memory: int,
    vision: bool,
    quant: str,
    quant_overrides: Sequence[tuple[str, str]],
    device_experts: int,
    host_memory: int,
    stream: object | None,
    stream_handle: int,
    progress: Callable[[int, int], object] | None,
) -> Engine: ...
def plan(
    *,
    path: str,
    mmproj: str,
    kv: str,
    context: int,
    memory: int,
    disk: int,
    vision: bool,
    quant: str,
    quant_overrides: Sequence[tuple[str, str]],
    device_experts: int,
    kv_host: bool,
    host_memory: int,
    gpu_memory: int | None,
) -> _Plan: ...
def memory_bandwidth() -> float: ...
def quantize(
    *,
    path: str,
    mmproj: str,
    out: str,
    quant: str,
    quant_overrides: Sequence[tuple[str, str]],
    threads: int,
    calibration: Sequence[int],
    progress: Callable[[int, int], object] | None,
    calibration_progress: Callable[[int, int], object] | None,
) -> list[str]: ...
def inspect(path: str, mmproj: str = ...) -> _Inspection: ...
def read_tensor(path: str, name: str) -> NDArray[np.float32]: ...
def gguf_chat(path: str) -> tuple[dict[str, str], dict[str, str]]: ...
def is_gguf(path: str) -> bool: ...
def backends() -> list[_Backend]: ...
def isas() -> list[_Isa]: ...
def weight_formats() -> list[_WeightFormat]: ...
def system() -> _System: ...
def version() -> str: ...
def plan_tiles(
    height: int, width: int, tile: int, max_tiles: int = 16
) -> tuple[int, int, int, int]: ...
def prepare_image(
    rgb: NDArray[np.uint8], tile: int, max_tiles: int = 16
) -> tuple[NDArray[np.float32], int, int]: ...
def image_token_layout(
    rows: int, columns: int, tokens_per_tile: int, ids: Mapping[str, int]
) -> list[int]: ...
