"""The exception classes: their built-in kin, their attributes, and the way through pickle."""

import copy
import pickle

import pytest

import puna
from puna import _core, errors

KIN = {
    errors.ModelNotFound: FileNotFoundError,
    errors.ModelFormatError: ValueError,
    errors.UnsupportedError: NotImplementedError,
    errors.OutOfMemory: MemoryError,
    errors.ContextOverflow: ValueError,
    errors.InvalidRequest: ValueError,
    errors.ImageError: ValueError,
    errors.DeviceError: RuntimeError,
    errors.SessionMismatch: ValueError,
    errors.StorageError: OSError,
    errors.EngineClosed: RuntimeError,
}


@pytest.mark.parametrize("kind", [errors.Error, *KIN])
def test_an_error_is_its_message(kind: type[errors.Error]) -> None:
    error = kind("[config] hidden_size is 0: it must be positive")
    assert str(error) == "[config] hidden_size is 0: it must be positive"
    assert isinstance(error, errors.Error)
    assert isinstance(error, KIN.get(kind, Exception))
    assert kind.__doc__
    assert getattr(puna, kind.__name__) is kind
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is kind
        assert str(other) == str(error)


def test_every_class_is_listed() -> None:
    classes = {kind for kind in vars(errors).values() if isinstance(kind, type)}
    assert classes == {errors.Error, *KIN}


def test_attributes() -> None:
    assert errors.OutOfMemory("m").needed is None
    assert errors.OutOfMemory("m").available is None
    memory = errors.OutOfMemory("m", needed=3, available=2)
    assert (memory.needed, memory.available) == (3, 2)
    assert errors.ContextOverflow("m").prompt_tokens is None
    assert errors.ContextOverflow("m").limit is None
    context = errors.ContextOverflow("m", prompt_tokens=9, limit=8)
    assert (context.prompt_tokens, context.limit) == (9, 8)
    assert errors.InvalidRequest("m").param is None
    request = errors.InvalidRequest("m", param="top_p")
    assert request.param == "top_p"
    assert pickle.loads(pickle.dumps(request)).param == "top_p"


def test_the_core_raises_them() -> None:
    with pytest.raises(puna.ImageError, match=r"^\[image\] the picture is 7 x 0 pixels"):
        _core.plan_tiles(0, 7, 336, 16)
