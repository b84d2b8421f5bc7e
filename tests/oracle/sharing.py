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


class _Tensor(ctypes.Structure):
    """DLTensor, with DLDevice and DLDataType in their places."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_number", ctypes.c_int32),
        ("dimensions", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(_Tensor):
    """DLManagedTensor."""

    _fields_ = (
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    )


_PYTHON = ctypes.pythonapi
_PYTHON.PyCapsule_GetPointer.restype = ctypes.c_void_p
_PYTHON.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_PYTHON.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]
_USED = b"used_dltensor"


def contents(managed: _Managed) -> np.ndarray:
    """What a tensor of fp32 in the device's memory holds."""
    assert (managed.type_code, managed.bits, managed.lanes, managed.byte_offset) == (2, 32, 1, 0)
    assert managed.dimensions == 2
    rows, columns = managed.shape[0], managed.shape[1]
    assert (managed.strides[0], managed.strides[1]) == (columns, 1)
    found = np.empty((rows, columns), np.float32)
    if EMULATOR:
        ctypes.memmove(found.ctypes.data, managed.data, found.nbytes)
    else:
        from cuda.bindings import runtime

        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        (error,) = runtime.cudaMemcpy(found.ctypes.data, managed.data, found.nbytes, kind)
        assert int(error) == 0, error
    return found


def refused(array: puna.DeviceArray, **options: Any) -> str:
    """With what an array is not handed out; "" if it is."""
    try:
        array.__dlpack__(**options)
    except BufferError as error:
        return str(error)
    return ""


def array(path: str) -> dict[str, Any]:
    """Results that stay on the device, also when the engine is gone."""
    made, report = EmulatedStream(0) if EMULATOR else GpuStream(), {}
    llm = load(path, stream=made)
    logits, hidden = llm.logits(PROMPT), llm.hidden_states(PROMPT)
    if EMULATOR:
        EMULATOR.emulator_set_late(True)
    cut = llm.logits(PROMPT, cuts=[5, 3], on_device=True)
    held = llm.hidden_states(PROMPT, on_device=True)
    report["device"] = [held.device, held.__dlpack_device__()]
    report["refused"] = {
        "stream 0": refused(held, stream=0),
        "stream -2": refused(held, stream=-2),
        "host without a copy": refused(held, dl_device=(1, 0), copy=False),
        "stream of the host": refused(held, dl_device=(1, 0), stream=1),
        "another": refused(held, dl_device=(2, 1)),
    }
    report["same_on_host"] = bool(np.array_equal(np.from_dlpack(held, device="cpu"), hidden))
    streams = (None, -1, 1, 2, made.__cuda_stream__()[1])
    report["handed_out"] = [refused(held, stream=stream) for stream in streams]
    report["handed_out"].append(refused(held, dl_device=(2, 0), copy=False, max_version=(1, 0)))

    def managed_of(capsule: object) -> _Managed:
        pointer = _PYTHON.PyCapsule_GetPointer(capsule, b"dltensor")
        return _Managed.from_address(pointer)

    capsule = cut.__dlpack__()
    report["same_logits"] = bool(np.array_equal(contents(managed_of(capsule)), logits))
    del cut
    capsule, dropped, copied = held.__dlpack__(), held.__dlpack__(), held.__dlpack__(copy=True)
    managed, copy = managed_of(capsule), managed_of(copied)
    report["copied"] = copy.data not in (None, managed.data) and bool(
        np.array_equal(contents(copy), hidden)
    )
    report["copy_device"] = [copy.device_type, copy.device_number]
    del copied
    alive = weakref.ref(made)
    del made
    llm.close()
    report["refused_when_closed"] = [refused(held, copy=True), refused(held, dl_device=(1, 0))]
    del llm
    report["refused_when_gone"] = refused(held, copy=True)
    del held
    gc.collect()
    report["alive_while_held"] = alive() is not None
    report["same_hidden_states"] = bool(np.array_equal(contents(managed), hidden))
    # As who takes it does.
    _PYTHON.PyCapsule_SetName(capsule, _USED)
    del capsule
    report["alive_while_taken"] = alive() is not None
    managed.deleter(ctypes.addressof(managed))
    report["alive_by_the_other"] = alive() is not None
    del dropped
    gc.collect()
    report["alive_at_last"] = alive() is not None
    return report


if __name__ == "__main__":
    print(json.dumps({"stream": stream, "array": array}[sys.argv[1]](sys.argv[2])))
