"""What puna raises. Each error is also of the built-in type that fits it best."""

# The public names say what happened; the suffix would add nothing.
# ruff: noqa: N818

from __future__ import annotations


class Error(Exception):
    """Base of all errors of puna; raised itself only for a fault of puna's own."""


class ModelNotFound(Error, FileNotFoundError):
    """There is no checkpoint where one was looked for, or a file of it is missing."""


class ModelFormatError(Error, ValueError):
    """A file of the checkpoint is damaged or contradicts itself or the others."""


class UnsupportedError(Error, NotImplementedError):
    """The request is sound, but this version cannot do it."""


class OutOfMemory(Error, MemoryError):
    """Weights, context or results do not fit into memory.

    Attributes:
        needed: Bytes that were needed, where known.
        available: Bytes that were free, where known.
    """

    def __init__(
        self, message: str, *, needed: int | None = None, available: int | None = None
    ) -> None:
        super().__init__(message)
        self.needed = needed
        self.available = available


class ContextOverflow(Error, ValueError):
    """A prompt or a requested context is longer than what is possible.

    Attributes:
        prompt_tokens: Length of the prompt, where known.
        limit: Tokens that the context holds, where known.
    """

    def __init__(
        self, message: str, *, prompt_tokens: int | None = None, limit: int | None = None
    ) -> None:
        super().__init__(message)
        self.prompt_tokens = prompt_tokens
        self.limit = limit


class InvalidRequest(Error, ValueError):
    """An argument makes no sense.

    Attributes:
        param: Name of the argument, where known.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ImageError(Error, ValueError):
    """A picture cannot be read, is empty or is too large."""


class DeviceError(Error, RuntimeError):
    """The device or instruction set that was asked for is not available here."""


class SessionMismatch(Error, ValueError):
    """A saved session belongs to another model or is damaged."""


class StorageError(Error, OSError):
    """A disk is full, fails, or a file on it that is needed is missing."""


class EngineClosed(Error, RuntimeError):
    """The engine was closed."""
