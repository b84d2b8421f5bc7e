"""puna: run Meta's Llama 4 herd on the machine you have.

import puna

llm = puna.load("demo")
print(llm.chat("Tell me a story about a fox."))
"""

from puna import errors
from puna._core import DeviceArray, StreamDecoder, StreamEncoder, Tokenizer, backends, isas
from puna._core import version as _version
from puna.attention import Attention, AttentionReport
from puna.engine import Engine
from puna.errors import (
    ContextOverflow,
    DeviceError,
    EngineClosed,
    Error,
    ImageError,
    InvalidRequest,
    ModelFormatError,
    ModelNotFound,
    OutOfMemory,
    SessionMismatch,
    StorageError,
    UnsupportedError,
)
from puna.evaluation import evaluate
from puna.loading import load, plan, quantize
from puna.planning import Plan, Remedy
from puna.session import Session
from puna.types import (
    Chunk,
    Comparison,
    Completion,
    Evaluation,
    ModelInfo,
    Score,
    Timings,
    Usage,
)

__version__ = _version()

__all__ = [
    "Attention",
    "AttentionReport",
    "Chunk",
    "Comparison",
    "Completion",
    "ContextOverflow",
    "DeviceArray",
    "DeviceError",
    "Engine",
    "EngineClosed",
    "Error",
    "Evaluation",
    "ImageError",
    "InvalidRequest",
    "ModelFormatError",
    "ModelInfo",
    "ModelNotFound",
    "OutOfMemory",
    "Plan",
    "Remedy",
    "Score",
    "Session",
    "SessionMismatch",
    "StorageError",
    "StreamDecoder",
    "StreamEncoder",
    "Timings",
    "Tokenizer",
    "UnsupportedError",
    "Usage",
    "__version__",
    "backends",
    "errors",
    "evaluate",
    "isas",
    "load",
    "plan",
    "quantize",
]
