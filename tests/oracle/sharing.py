"""Shares what is of CUDA with an engine, in a process of its own, as the library is chosen once.

`python -m oracle.sharing SUBJECT CHECKPOINT` prints what came of it as JSON. On the emulator, if it
is what PUNA_CUDA_LIBRARY names; else on a GPU, with cuda-python.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import weakref
from typing import Any

import numpy as np

import puna

PROMPT = [3, 141, 59, 26, 53, 58, 97, 93]
EMULATOR = (
    ctypes.CDLL(os.environ["PUNA_CUDA_LIBRARY"]) if "PUNA_CUDA_LIBRARY" in os.environ else None
)


class EmulatedStream:
    """A stream of one of the emulator's devices, as cuda.core has them of a GPU."""

    def __init__(self, ordinal: int) -> None:
        assert EMULATOR is not None
        EMULATOR.emulator_make_stream.restype = ctypes.c_void_p
        EMULATOR.emulator_asked.argtypes = [ctypes.c_void_p]
        EMULATOR.emulator_asked.restype = ctypes.c_int64
        self.handle = EMULATOR.emulator_make_stream(ordinal)

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self.handle)

    @property
    def asked(self) -> int:
        """How often a device has asked it for something."""
        assert EMULATOR is not None
        return int(EMULATOR.emulator_asked(self.handle))


class GpuStream:
    """A stream of cuda.core, which it hands on: an extension class may not have weak references."""

    def __init__(self) -> None:
        from cuda.core import Device

        device = Device(0)
        device.set_current()
        self.stream = device.create_stream()
        self.asked = 0  # nobody counts

    def __cuda_stream__(self) -> tuple[int, int]:
        version, handle = self.stream.__cuda_stream__()
        return version, handle


def load(path: str, **options: Any) -> puna.Engine:
    return puna.load(path, progress=False, **{"device": "cuda:0"} | options)


def stream(path: str) -> dict[str, Any]:
    """An engine on a stream, beside one on its own."""
    made, report = EmulatedStream(0) if EMULATOR else GpuStream(), {}
    with load(path) as own:
        expected = own.logits(PROMPT)
        tokens = own.generate([PROMPT], temperature=0, max_tokens=4, ignore_eos=True)
    report["asked_by_others"] = made.asked
    llm = load(path, stream=made)
    report["same_logits"] = bool(np.array_equal(llm.logits(PROMPT), expected))
    got = llm.generate([PROMPT], temperature=0, max_tokens=4, ignore_eos=True)
    report["same_tokens"] = got[0].tokens == tokens[0].tokens
    report["asked"] = made.asked
    alive = weakref.ref(made)
    if EMULATOR:
        try:
            load(path, device="cuda:1", stream=made)
        except puna.InvalidRequest as error:
            report["refused"] = str(error)
    del made
    gc.collect()
    report["alive_while_open"] = alive() is not None
    llm.close()
    report["alive_when_closed"] = alive() is not None
    return report


if __name__ == "__main__":
    print(json.dumps({"stream": stream}[sys.argv[1]](sys.argv[2])))
