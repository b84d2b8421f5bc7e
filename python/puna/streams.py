"""CUDA streams of other libraries, by the protocol that cuda.core describes."""

from __future__ import annotations

from typing import Any, Protocol

from puna.errors import InvalidRequest

_VERSION = 0  # of the protocol


class StreamLike(Protocol):
    """What is a CUDA stream: `cuda.core.Stream`, and whatever other libraries have that is one."""

    def __cuda_stream__(self) -> tuple[int, int]:
        """The protocol's version, 0, and the address of the `cudaStream_t`."""
        ...


def stream_handle(stream: Any) -> int:
    """The address of a stream's `cudaStream_t`.

    Raises:
        InvalidRequest: It has no `__cuda_stream__`, or this returns what is not of the protocol.
    """
    method = getattr(stream, "__cuda_stream__", None)
    if not callable(method):
        raise InvalidRequest(
            f"stream is {stream!r:.80}, which has no method __cuda_stream__; it must be a stream as"
            " cuda.core.Device().create_stream() makes them, not its address",
            param="stream",
        )
    got = method()
    if not (
        isinstance(got, tuple)
        and len(got) == 2
        and all(isinstance(part, int) and not isinstance(part, bool) for part in got)
    ):
        raise InvalidRequest(
            f"stream.__cuda_stream__() returned {got!r:.80}; it must be (0, address), two ints",
            param="stream",
        )
    version, handle = (int(part) for part in got)
    if version != _VERSION:
        raise InvalidRequest(
            f"stream.__cuda_stream__() is of version {version}; this puna knows version {_VERSION}",
            param="stream",
        )
    if not 0 <= handle < 1 << 64:
        raise InvalidRequest(
            f"stream.__cuda_stream__() returned the address {handle}; it must be 0 to 2**64 - 1",
            param="stream",
        )
    return handle
