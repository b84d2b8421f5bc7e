"""Bad requests: the type of the error, and a message with the numbers and the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import puna
from conftest import MakeCheckpoint


@pytest.fixture(scope="module")
def llm() -> Iterator[puna.Engine]:
    with puna.load("demo", progress=False, threads=1, context=1024) as llm:
        yield llm


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature is -1; it must be from 0 to 100"),
    ({"temperature": float("nan")}, "temperature is nan; it must be from 0 to 100"),
    ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
    ({"temperature": True}, "temperature is True; it must be a number"),
    ({"temperature": 10**400}, "temperature is inf; it must be from 0 to 100"),
    ({"top_p": 0}, "top_p is 0; it must be above 0 and at most 1"),
    ({"top_p": 1.01}, "top_p is 1.01; it must be above 0 and at most 1"),
    ({"top_k": -1}, "top_k is -1; it must be 0 or more"),
    ({"top_k": 2.5}, "top_k is 2.5; it must be a whole number"),
    ({"top_k": 2**70}, f"top_k is {2**70}; it must be at most {2**63 - 1}"),
    ({"min_p": 1}, "min_p is 1; it must be from 0 (off) to below 1"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be above 0 and at most 100"),
    ({"presence_penalty": 101}, "presence_penalty is 101; it must be from -100 to 100"),
    ({"frequency_penalty": -101}, "frequency_penalty is -101; it must be from -100 to 100"),
    ({"max_tokens": 0}, "max_tokens is 0; it must be 1 or more"),
    ({"max_tokens": 1.0}, "max_tokens is 1.0; it must be a whole number"),
    ({"max_tokens": np.array([2])}, "max_tokens is array([2]); it must be a whole number"),
    ({"max_tokens": 2**70}, f"max_tokens is {2**70}; it must be at most {2**63 - 1}"),
    ({"min_tokens": -1}, "min_tokens is -1; it must be 0 or more"),
    ({"min_tokens": 9, "max_tokens": 4}, "min_tokens is 9, more than max_tokens, which is 4"),
    ({"seed": -1}, "seed is -1; it must be 0 or more"),
    ({"seed": 2**64}, f"seed is {2**64}; it must be at most {2**64 - 1}"),
    ({"n": 0}, "n is 0; it must be 1 or more"),
    ({"n": 65537}, "n is 65537; it must be at most 65536"),
    ({"logprobs": -1}, "logprobs is -1; it must be 0 or more"),
    ({"logprobs": 1025}, "logprobs is 1025; it must be at most 1024"),
    ({"stop": ""}, "stop holds an empty string; leave it out"),
    ({"stop": [""]}, "stop holds an empty string; leave it out"),
    ({"stop": 3.5}, "stop is 3.5; it must be a string, a token id, or a list of them"),
    ({"stop": b"x"}, "stop is b'x'; it must be a string, a token id, or a list of them"),
    ({"stop": [None]}, "stop[0] is None; a token id must be a whole number"),
    ({"stop": ["a", 1024]}, "stop[1] is 1024; the vocabulary has the ids 0 to 1023"),
    ({"stop": np.array([5.0])}, "stop[0] is np.float64(5.0); a token id must be a whole number"),
    ({"stop": np.array([[5]])}, "stop[0] is array([5]); a token id must be a whole number"),
    ({"stop": ["a", "\ud800"]}, "stop[1] holds half of a surrogate pair"),
    ({"stop": 2**40}, f"stop[0] is {2**40}; the vocabulary has the ids 0 to 1023"),
    ({"logit_bias": [3]}, "logit_bias is [3]; it must map token ids to numbers"),
    (
        {"logit_bias": {1024: 1}},
        "a key of logit_bias is 1024; the vocabulary has the ids 0 to 1023",
    ),
    ({"logit_bias": {"a": 1}}, "a key of logit_bias is 'a'; a token id must be a whole number"),
    ({"logit_bias": {1.5: 1}}, "a key of logit_bias is 1.5; a token id must be a whole number"),
    (
        {"logit_bias": {"9" * 5000: 1}},
        f"a key of logit_bias is {'9' * 5000!r:.80}; a token id must be a whole number",
    ),
    ({"logit_bias": {3: 10**400}}, "logit_bias of token 3 is inf; it must be from -1e9"),
    ({"logit_bias": {3: "x"}}, "logit_bias of token 3 is 'x'; it must be a number"),
    ({"logit_bias": {3: float("inf")}}, "logit_bias of token 3 is inf; it must be from -1e9"),
    ({"ignore_eos": "no"}, "ignore_eos is 'no'; it must be True or False"),
    ({"timeout": 0}, "timeout is 0.0 s; it must be above 0"),
    ({"timeout": float("nan")}, "timeout is nan s; it must be above 0"),
    ({"timeout": "1"}, "timeout is '1'; it must be a number"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[str(o)[:40] for o, _ in OPTIONS])
def test_options(llm: puna.Engine, options: dict[str, Any], message: str) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: llm.generate("x", **options),
        lambda: llm.chat("x", **options),
        lambda: llm.session().chat("x", **options),
        # Refused by the call, not by the first step.
        lambda: llm.session().stream("x", **options),
    ]
    if "n" not in options:
        calls.append(lambda: llm.stream("x", **options))
    for call in calls:
        with pytest.raises(puna.InvalidRequest, match=re.escape(message)) as raised:
            call()
        assert raised.value.param == next(iter(options))


NAMES = {
    ("generate", "max_new_tokens"): "; did you mean max_tokens?",
    ("generate", "temp"): "; did you mean temperature?",
    ("generate", "stop_token_ids"): "; did you mean stop?",
    ("generate", "tempreature"): "; did you mean temperature?",
    ("generate", "image"): "; did you mean images?",
    ("generate", "do_sample"): "; temperature=0 is greedy",
    ("generate", "stream"): "; use the method stream()",
    ("generate", "prompt_logprobs"): "; use the method score()",
    ("generate", "n_ctx"): "; context is an argument of load()",
    ("generate", "context"): "; context is an argument of load()",
    ("generate", "zzz"): "",
    ("chat", "max_completion_tokens"): "; did you mean max_tokens?",
    ("chat", "system"): '; use chat() with a message {"role": "system", "content": ...}',
    ("stream", "num_return_sequences"): "; did you mean n?",
    ("load", "n_ctx"): "; did you mean context?",
    ("load", "max_model_len"): "; did you mean context?",
    ("load", "load_in_4bit"): "; see quant, an argument of load()",
    ("load", "temp"): "; temperature is an argument of generate(), chat() and stream()",
    ("load", "max_tokens"): "; max_tokens is an argument of generate(), chat() and stream()",
    ("load", "zzz"): "",
}


@pytest.mark.parametrize(("function", "name"), NAMES)
def test_foreign_names(llm: puna.Engine, function: str, name: str) -> None:
    expected = f"{function}() got an unexpected keyword argument {name!r}{NAMES[function, name]}"
    call = puna.load if function == "load" else getattr(llm, function)
    with pytest.raises(TypeError) as raised:
        call("demo", **{name: 1})
    assert str(raised.value) == expected


def test_prompts(llm: puna.Engine) -> None:
    refused: list[tuple[Any, str]] = [
        (None, "the prompt is of type NoneType; it must be text, token ids, or a list of either"),
        (5, "the prompt is of type int; it must be"),
        (b"abc", "the prompt is of type bytes; it must be"),
        (bytearray(b"abc"), "the prompt is of type bytearray; it must be"),
        (memoryview(b"abc"), "the prompt is of type memoryview; it must be"),
        ({"a"}, "the prompt is of type set; it must be"),
        (1.5, "the prompt is of type float; it must be"),
        (np.zeros((2, 2), int), "the prompt is of type ndarray; it must be"),
        (np.zeros(3), "prompt is an array of float64 (3,); it must be one-dimensional"),
        ([1.5, 2], "the prompt is 1.5; it must be text or a non-empty list of token ids"),
        ([1, 2.5], "prompt[1] is 2.5; a token id must be a whole number"),
        ([1, "a"], "prompt[1] is 'a'; a token id must be a whole number"),
        ([True, False], "prompt[0] is True; a token id must be a whole number"),
        ([1, 1024], "prompt[1] is 1024; the vocabulary has the ids 0 to 1023"),
        ([-1], "prompt[0] is -1; the vocabulary has the ids 0 to 1023"),
        ([2**40], f"prompt[0] is {2**40}; the vocabulary has the ids 0 to 1023"),
        (np.array([], int), "the prompt has no tokens; give at least one"),
        (["a", []], "the prompt is []; it must be text or a non-empty list of token ids"),
        ([{"role": "user", "content": "x"}], "the prompt holds messages; use chat()"),
    ]
    for prompt, message in refused:
        with pytest.raises(puna.InvalidRequest, match=re.escape(message)) as raised:
            llm.generate(prompt)
        assert raised.value.param == "prompt"
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        llm.generate("half of a pair: \ud800")
    for prompt in ("\ud800", [{"role": "user", "content": "\ud800"}]):
        with pytest.raises(puna.InvalidRequest, match="half of a surrogate pair"):
            llm.chat(prompt)


@pytest.mark.parametrize(
    ("attention", "param"),
    [
        (puna.Attention.certified("x"), "tau"),  # type: ignore[arg-type]
        (puna.Attention.budget(sink_pages=2**70), "sink_pages"),
        (puna.Attention("half"), "attention"),  # type: ignore[arg-type]
    ],
)
def test_attention_of_other_types(llm: puna.Engine, attention: puna.Attention, param: str) -> None:
    with pytest.raises(puna.InvalidRequest) as raised:
        llm.generate("a", attention=attention)
    assert raised.value.param == param


def test_arrays_that_are_none(llm: puna.Engine) -> None:
    for arguments, param in (
        (([[1], [1, 2]],), "tokens"),
        (([1, 2], "abc"), "pixel_values"),
        (([1, 2], None, 5), "cuts"),
    ):
        with pytest.raises(puna.InvalidRequest) as raised:
            llm.logits(*arguments)
        assert raised.value.param == param


def test_a_folder_for_keys_and_values_that_cannot_be() -> None:
    with pytest.raises(puna.StorageError, match="kv_offload is 'disk:/proc/y'"):
        puna.load("demo", progress=False, context=512, kv_offload="disk:/proc/y")


def test_a_prompt_longer_than_the_context(llm: puna.Engine) -> None:
    calls: list[Callable[[list[int]], Any]] = [llm.generate, llm.stream, llm.logits, llm.score]
    for call in calls:
        with pytest.raises(puna.ContextOverflow) as raised:
            call([5] * 1025)
        assert str(raised.value) == (
            "[prompt] the prompt has 1025 tokens, the context holds 1024 "
            "(the model allows 10485760); shorten it or load with context=1025 or more"
        )
        assert (raised.value.prompt_tokens, raised.value.limit) == (1025, 1024)
    with pytest.raises(puna.ContextOverflow, match="and the model allows 10485760; shorten it"):
        llm.generate(np.full(10485761, 5, np.int32))


def test_images(llm: puna.Engine) -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    calls: list[Callable[..., Any]] = [llm.generate, llm.chat, llm.stream, llm.session().chat]
    for call in calls:
        for single in ("cat.jpg", b"...", Path("cat.jpg"), picture):
            message = rf"images is of type {type(single).__name__}; it must be a list"
            with pytest.raises(puna.InvalidRequest, match=message) as raised:
                call("x", images=single)
            assert raised.value.param == "images"
        with pytest.raises(puna.ImageError, match=r"/nowhere/cat\.jpg cannot be read"):
            call("x", images=["/nowhere/cat.jpg"])
    with pytest.raises(puna.InvalidRequest, match="single prompt, not with a list"):
        llm.generate(["a", "b"], images=[picture])
    with pytest.raises(puna.InvalidRequest, match="images go with text"):
        llm.generate([1, 2], images=[picture])
    with puna.load("demo", progress=False, vision=False, context=1024) as blind:
        for call in (blind.generate, blind.chat):
            with pytest.raises(puna.InvalidRequest, match="no vision tower or was loaded without"):
                call("x", images=[picture])


def test_logits_arguments(llm: puna.Engine) -> None:
    image = llm.info.image_token
    tile = np.zeros((1, 3, 56, 56), np.float32)
    refused: list[tuple[tuple[Any, ...], str]] = [
        (([],), "the prompt has no tokens"),
        (([1.0, 2.0],), "tokens is an array of float64 (2,); it must be one-dimensional"),
        (([[1, 2]],), "tokens is an array of int64 (1, 2); it must be one-dimensional"),
        (([1, 1024],), "tokens[1] is 1024; the vocabulary has the ids 0 to 1023"),
        (([1, 2], None, [1]), "the cuts add up to 1, the prompt has 2 tokens"),
        (([1, 2], None, [2**63 - 1, 2**63 - 1, 4]), f"the cuts add up to {2**63 - 1}, the prompt"),
        (([1, 2], None, [2, 0]), "cuts is 0; it must be a whole number of 1 or more"),
        (([1, 2], None, [1.0, 1]), "cuts is 1.0; it must be a whole number of 1 or more"),
        (([1, 2], tile[0]), "pixel_values has shape (3, 56, 56); it must be (tiles, 3, size,"),
        (([1, 2], tile), f"fill 16 places, but the prompt has the image token {image} 0 times"),
        (([image] * 17, tile), f"fill 16 places, but the prompt has the image token {image} 17 t"),
    ]
    for arguments, message in refused:
        with pytest.raises(puna.InvalidRequest, match=re.escape(message)):
            llm.logits(*arguments)
    with pytest.raises(puna.ImageError, match=r"the model wants tiles of \(3, 56, 56\)"):
        llm.logits([image] * 16, np.zeros((1, 3, 28, 28)))
    assert llm.logits(np.array([1, 2], np.uint64)).shape == (2, 1024)


def test_streams_and_sessions_have_one_answer(llm: puna.Engine) -> None:
    for call in (llm.stream, llm.session().chat, llm.session().stream):
        with pytest.raises(puna.InvalidRequest, match=r"^n is 2; a \w+ has one answer"):
            call("x", n=2)


# --- loading -------------------------------------------------------------------------------------

LOADING: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"device": "tpu"}, puna.InvalidRequest, "device is 'tpu'; it must be 'auto' or one of cuda"),
    ({"device": None}, puna.InvalidRequest, "device is None; it must be a string"),
    ({"isa": "avx9"}, puna.InvalidRequest, "no instruction set 'avx9' in this build; it has"),
    ({"isa": 2}, puna.InvalidRequest, "isa is 2; it must be a string"),
    ({"quant": 4}, puna.InvalidRequest, "quant is 4; it must be a string"),
    (
        {"kv": "q4"},
        puna.InvalidRequest,
        "kv is 'q4'; it must be 'auto', 'bf16', 'fp32', 'int8' or 'int4'",
    ),
    ({"kv": 8}, puna.InvalidRequest, "kv is 8; it must be a string"),
    ({"kv_offload": "tape"}, puna.InvalidRequest, "kv_offload is 'tape'; it must be 'auto'"),
    ({"kv_disk": "some"}, puna.InvalidRequest, "kv_disk is 'some'; write a number"),
    ({"experts": "disk"}, puna.UnsupportedError, "experts='disk' is not available yet"),
    (
        {"experts": "most"},
        puna.InvalidRequest,
        "experts is 'most'; it must be 'auto', 'gpu', 'cpu'",
    ),
    ({"experts": -1}, puna.InvalidRequest, "experts is -1; it must be 'auto', 'gpu', 'cpu' or"),
    ({"experts": 3}, puna.InvalidRequest, "experts is 3, which is for device='cuda'; device is"),
    ({"vision": "no"}, puna.InvalidRequest, "vision is 'no'; it must be True or False"),
    ({"threads": 0}, puna.InvalidRequest, "threads is 0; it must be a whole number of 1 or more"),
    ({"threads": 10**6}, puna.InvalidRequest, "1000000 threads were asked for; the most is 1024"),
    ({"threads": 2**40}, puna.InvalidRequest, f"threads is {2**40}; it must be at most"),
    ({"context": "lots"}, puna.InvalidRequest, "context is 'lots'; write a number, or one like"),
    ({"context": 1.5}, puna.InvalidRequest, "context is 1.5; it must be a whole number"),
    ({"context": 2**70}, puna.InvalidRequest, f"context is {2**70}; it must be at most"),
    ({"context": "9" * 400}, puna.InvalidRequest, "context is '9999"),
    ({"kv_offload": "disk:a\0b"}, puna.InvalidRequest, r"kv_offload is 'a\x00b'; a path holds no"),
    ({"mmproj": ""}, puna.InvalidRequest, "mmproj is empty; it must be a path"),
    ({"memory": "-1G"}, puna.InvalidRequest, "memory is '-1G'; write a number"),
]


@pytest.mark.parametrize(
    ("options", "kind", "message"), LOADING, ids=[str(o) for o, _, _ in LOADING]
)
def test_loading(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        puna.load("demo", progress=False, **options)


def test_an_isa_that_the_processor_lacks() -> None:
    missing = [isa["name"] for isa in puna.isas() if not isa["available"]]
    for name in missing:
        with pytest.raises(puna.DeviceError, match=f"this processor cannot run '{name}'; it runs"):
            puna.load("demo", progress=False, isa=name)
    assert [isa["name"] for isa in puna.isas()][-1] == "scalar"


def test_more_context_than_the_model_allows() -> None:
    with pytest.raises(
        puna.ContextOverflow, match="context=16777216 was asked for, the model"
    ) as e:
        puna.load("demo", progress=False, context="16M")
    assert (e.value.prompt_tokens, e.value.limit) == (16 << 20, 10485760)


def test_memory_that_is_too_small() -> None:
    with puna.load("demo", progress=False) as llm:
        needed = llm.plan.weight_bytes
    message = rf"the weights need {needed / (1 << 20):.2f} MiB of memory, the budget .* is 1 MiB"
    with pytest.raises(puna.OutOfMemory, match=message) as e:
        puna.load("demo", progress=False, memory="1M")
    assert (e.value.needed, e.value.available) == (needed, 1 << 20)
    # Enough for the text model alone: the message says so, and it is true.
    with pytest.raises(puna.OutOfMemory, match="vision=False leaves the vision tower on disk"):
        puna.load("demo", progress=False, memory=needed - 1)


def test_a_context_that_does_not_fit_names_the_one_that_does() -> None:
    budget: dict[str, Any] = {"memory": "12M", "progress": False}
    with pytest.raises(puna.OutOfMemory, match="the largest context that fits is") as raised:
        puna.load("demo", context=131072, **budget)
    assert raised.value.needed is not None
    assert raised.value.available is not None
    assert raised.value.needed > raised.value.available
    fits = re.search(r"use context=(\d+)$", str(raised.value))
    assert fits is not None
    with puna.load("demo", context=int(fits[1]), **budget) as llm:
        assert llm.plan.context == int(fits[1])
    with pytest.raises(puna.OutOfMemory):
        puna.load("demo", context=int(fits[1]) + 1, **budget)
    with puna.load("demo", **budget) as llm:
        assert llm.plan.context == int(fits[1])


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(puna.ModelNotFound, match=r'there is no directory .* or "demo"$'):
        puna.load(tmp_path / "nothing")
    with pytest.raises(puna.ModelNotFound, match=r"config\.json"):
        puna.load(tmp_path)
    with pytest.raises(TypeError):
        puna.load(5)  # type: ignore[arg-type]
    for path, message in (
        ("", "model is empty; it must be a path"),
        ("~nobody-of-this-name/x", "which cannot be a path here: Could not determine home"),
        ("\udcff", "which cannot be a path here: 'utf-8' codec can't encode"),
        ("a\0b", "a path holds no null characters"),
    ):
        with pytest.raises(puna.InvalidRequest, match=re.escape(message)):
            puna.load(path)


def test_arguments_of_one_kind_each(llm: puna.Engine, tmp_path: Path) -> None:
    with pytest.raises(puna.InvalidRequest, match="allow_special is 'yes'; it must be True or"):
        llm.generate("x", allow_special="yes")
    with pytest.raises(puna.InvalidRequest, match="readonly is 1; it must be True or False"):
        llm.session(tmp_path / "s", readonly=1)  # type: ignore[arg-type]
    session = llm.session()
    session.append("Once upon a time")
    for prompts in ("Who?", None, iter(["a"]), [1, 2], b"ab"):
        with pytest.raises(
            puna.InvalidRequest, match=r"^prompts is .*; it must be a list of texts"
        ):
            session.branch(prompts)  # type: ignore[arg-type]
    for length in (1.5, "1", None, True, 2**70, -1):
        with pytest.raises(puna.InvalidRequest, match=r"^length is .*; it must be a whole number"):
            session.truncate(length)  # type: ignore[arg-type]
        with pytest.raises(puna.InvalidRequest, match=r"^length is .*; it must be a whole number"):
            llm.truncate(tmp_path, length)  # type: ignore[arg-type]
    for calibration in (5, b"abc", {"a": 1}):
        with pytest.raises(puna.InvalidRequest, match=r"^calibration is .*; it must be a text or"):
            puna.quantize("demo", tmp_path, quant="int4", calibration=calibration)  # type: ignore[arg-type]
    with pytest.raises(puna.InvalidRequest, match=r"^model is 'demo'; it must be a loaded model"):
        puna.evaluate("demo", "Once")  # type: ignore[arg-type]
    with pytest.raises(puna.InvalidRequest, match=r"^reference is 5; it must be a loaded model"):
        puna.evaluate(llm, "Once", reference=5)  # type: ignore[arg-type]


def test_a_stop_string_takes_no_more_than_its_length(llm: puna.Engine) -> None:
    # Each of its beginnings was once kept: 20 GB of them.
    answer = llm.generate("Once", stop=["ab" * 100_000], max_tokens=2, temperature=0)
    assert isinstance(answer, puna.Completion)
    assert answer.finish_reason == "length"


def test_a_checkpoint_without_a_tokenizer(checkpoint: MakeCheckpoint) -> None:
    with puna.load(checkpoint("text_only").path, progress=False, context=64) as llm:
        result = llm.generate([1, 2, 3], temperature=0, max_tokens=3, logprobs=1)
        assert isinstance(result, puna.Completion)
        assert len(result.tokens) == 3
        assert result.text == ""
        assert llm.score([1, 2, 3]).tokens == (1, 2, 3)
        calls: list[Callable[[], Any]] = [
            lambda: llm.tokenizer,
            lambda: llm.generate("x"),
            lambda: llm.chat("x"),
            lambda: llm.score("x"),
        ]
        for call in calls:
            with pytest.raises(puna.UnsupportedError, match=r"put one beside config\.json"):
                call()
        with pytest.raises(puna.InvalidRequest, match="stop strings need a tokenizer"):
            llm.generate([1], stop="x")


def test_a_closed_engine(tmp_path: Path) -> None:
    llm = puna.load("demo", progress=False, context=256)
    session = llm.session()
    stream = llm.stream("x")
    next(stream)
    llm.close()
    llm.close()
    assert llm.closed
    assert repr(llm).endswith("(closed)>")
    calls: list[Callable[[], Any]] = [
        lambda: llm.generate("x"),
        lambda: llm.generate([]),
        lambda: llm.chat("x"),
        lambda: llm.stream("x"),
        llm.session,
        lambda: llm.logits([1]),
        lambda: llm.score("x"),
        lambda: llm.tokenizer,
        lambda: session.chat("x"),
        session.fork,
        lambda: next(stream),
    ]
    for call in calls:
        with pytest.raises(puna.EngineClosed, match="the engine was closed; load the model again"):
            call()
    assert llm.info.vocab_size == 1024
