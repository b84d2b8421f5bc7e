"""Results that stay where they were computed, handed out by DLPack; here in the host's memory.

In that of a GPU: test_cuda.py.
"""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

import puna
from conftest import MakeCheckpoint, MakeEngine

PROMPT = [3, 141, 59, 26, 53, 58, 97, 93]
HOST = (1, 0)  # kDLCPU


@pytest.fixture
def array(engine: MakeEngine) -> puna.DeviceArray:
    return engine("scout_like").logits(PROMPT, on_device=True)


def test_outputs_are_those_in_the_hosts_memory(engine: MakeEngine) -> None:
    llm = engine("scout_like")
    for compute, columns in (
        (llm.logits, llm.info.vocab_size),
        (llm.hidden_states, llm.info.hidden_size),
    ):
        expected = compute(PROMPT)
        for cuts in (None, [5, 1, 2]):
            array = compute(PROMPT, cuts=cuts, on_device=True)
            assert array.shape == (len(PROMPT), columns) == expected.shape
            assert array.dtype == expected.dtype == np.float32
            assert array.device == "cpu"
            assert array.__dlpack_device__() == HOST
            assert repr(array) == f"<puna.DeviceArray float32 [{len(PROMPT)}, {columns}] on cpu>"
            assert np.array_equal(np.from_dlpack(array), expected)


def test_what_takes_an_array_shares_its_memory(array: puna.DeviceArray) -> None:
    torch = pytest.importorskip("torch")
    taken, tensor = np.from_dlpack(array), torch.from_dlpack(array)
    assert np.shares_memory(taken, np.from_dlpack(array))
    tensor[1, 2] = 1234
    assert taken[1, 2] == 1234
    assert tensor.shape == array.shape
    assert tensor.stride() == (array.shape[1], 1)


def test_a_copy_shares_nothing(array: puna.DeviceArray) -> None:
    taken = np.from_dlpack(array)
    copied = np.from_dlpack(array, copy=True)
    assert np.array_equal(copied, taken)
    assert not np.shares_memory(copied, taken)
    assert np.shares_memory(np.from_dlpack(array, copy=False), taken)


@pytest.mark.parametrize(
    ("max_version", "name"),
    [
        (None, "dltensor"),
        ((0, 8), "dltensor"),
        ((1, 0), "dltensor_versioned"),
        ((2, 5), "dltensor_versioned"),  # who asks looks at what it is
    ],
)
def test_the_version_is_what_the_consumer_takes(
    array: puna.DeviceArray, max_version: tuple[int, int] | None, name: str
) -> None:
    assert f'"{name}"' in repr(array.__dlpack__(max_version=max_version))


def test_memory_outlives_the_engine(checkpoint: MakeCheckpoint) -> None:
    llm = puna.load(checkpoint("scout_like", dtype="float32").path, progress=False)
    expected = llm.logits(PROMPT)
    array = llm.logits(PROMPT, on_device=True)
    capsule = array.__dlpack__()
    llm.close()
    del llm
    gc.collect()
    taken = np.from_dlpack(array)
    del array, capsule
    gc.collect()
    assert np.array_equal(taken, expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stream": 1}, BufferError, "stream is 1; for the host's memory it must be None"),
        ({"stream": 0}, BufferError, "stream is 0; for the host's memory"),
        ({"stream": -1}, BufferError, "stream is -1; for the host's memory"),
        ({"stream": "1"}, TypeError, "stream must be None or an int, not .*str"),
        ({"stream": True}, TypeError, "stream must be None or an int, not .*bool"),
        ({"max_version": 1}, TypeError, "max_version must be None or a tuple of two ints"),
        ({"max_version": (1,)}, TypeError, "max_version must be None or a tuple of two ints"),
        ({"max_version": ("1", "0")}, TypeError, "max_version must be None or a tuple"),
        ({"max_version": (1 << 70, 0)}, TypeError, "max_version must be None or a tuple"),
        ({"dl_device": (2, 0)}, BufferError, r"the array is on cpu; it cannot go to device \(2, 0"),
        ({"dl_device": (1, 1)}, BufferError, r"the array is on cpu; it cannot go to device \(1, 1"),
        ({"dl_device": "cpu"}, TypeError, "dl_device must be None or a tuple of two ints"),
        ({"copy": "yes"}, TypeError, "copy must be None, True or False"),
        ({"copy": 1}, TypeError, "copy must be None, True or False"),
        ({"order": 1}, TypeError, "incompatible function arguments"),
    ],
)
def test_what_cannot_be_had_is_refused(
    array: puna.DeviceArray, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        array.__dlpack__(**options)


def test_arguments_are_checked_as_without(engine: MakeEngine, checkpoint: MakeCheckpoint) -> None:
    llm = engine("scout_like")
    with pytest.raises(puna.InvalidRequest, match="on_device is 'yes'; it must be True or False"):
        llm.logits(PROMPT, on_device="yes")  # type: ignore[call-overload]
    with pytest.raises(puna.InvalidRequest, match="the cuts add up to 3, the prompt has 8"):
        llm.logits(PROMPT, cuts=[3], on_device=True)
    with pytest.raises(puna.InvalidRequest, match="cuts is 0; it must be"):
        llm.hidden_states(PROMPT, cuts=[0, 8], on_device=True)
    with pytest.raises(puna.InvalidRequest, match="vocab"):
        llm.hidden_states([llm.info.vocab_size], on_device=True)
    closed = puna.load(checkpoint("scout_like", dtype="float32").path, progress=False)
    closed.close()
    with pytest.raises(puna.EngineClosed):
        closed.logits(PROMPT, on_device=True)


def test_an_array_is_made_by_an_engine_alone() -> None:
    with pytest.raises(TypeError, match="No constructor"):
        puna.DeviceArray()
