"""The model that comes with puna: it tells stories, describes pictures, and needs nothing else."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tools.demo_model import evaluate, pictures

import puna
from conftest import oracle_module
from puna.chat_template import SpecialToken, find_template, render
from puna.demo import passkey, records
from puna.demo.scene import draw, random_scene
from puna.demo.stories import random_story, story_request
from puna.demo.sums import random_sum
from puna.demo.toolbox import random_task
from puna.loading import demo_directory


@pytest.fixture(scope="module")
def llm() -> Iterator[puna.Engine]:
    with puna.load("demo", progress=False) as llm:
        yield llm


def test_it_is_a_llama_4_in_miniature(llm: puna.Engine) -> None:
    assert llm.info.path == str(demo_directory())
    assert llm.info.dtype == "bfloat16"
    assert llm.info.image_size
    assert llm.info.active_parameters < llm.info.parameters
    assert llm.plan.warnings == ()
    assert llm.plan.context == llm.plan.max_context


# The shares of the whole measurement are in the model card; these are of samples of it, greedy, and
# of what training never showed. Other instruction sets give the same words.
@pytest.mark.parametrize(
    ("measure", "count", "least"),
    [
        (evaluate.captions, 20, 0.95),
        (evaluate.stories, 40, 0.95),
        (evaluate.told, 4, 1.0),
        (lambda llm, count: evaluate.written_json(llm, count)[0], 21, 1.0),
        (evaluate.tool_calls, 40, 0.925),
        (evaluate.sums, 40, 0.975),
        (lambda llm, count: evaluate.passkeys(llm, 4096, count), 8, 1.0),
        (lambda llm, count: evaluate.passkeys(llm, 65536, count), 2, 1.0),
    ],
    ids=["captions", "stories", "told", "json", "tool_calls", "sums", "passkey_4k", "passkey_64k"],
)
def test_what_it_can_do(
    llm: puna.Engine, measure: Callable[[puna.Engine, int], float], count: int, least: float
) -> None:
    assert measure(llm, count) >= least


def test_pictures_of_words() -> None:
    rng = random.Random(4)
    shown, others = ({pictures.random_word(rng, of) for _ in range(200)} for of in (False, True))
    assert not shown & others
    word = min(shown)
    drawn = [pictures.draw_word(random.Random(seed), word, 112) for seed in (1, 1, 2)]
    assert drawn[0].tobytes() == drawn[1].tobytes() != drawn[2].tobytes()
    for picture in drawn:
        # One colour of paper around the letters, which take their part of it.
        paper = max(picture.getcolors(112 * 112))[0]
        assert 0.5 < paper / 112**2 < 0.98
    for character, name in list(pictures.emoji_names().items())[:3]:
        assert name and pictures.draw_emoji(rng, character, 112).size == (112, 112)


def test_greedy_text_is_the_same_everywhere() -> None:
    """Of every instruction set and number of threads."""
    rng = random.Random(5)
    prompts = [
        story_request("fox"),
        random_sum(rng).request(),
        records.random_record(rng).request(),
    ]
    texts = set()
    for isa in (isa["name"] for isa in puna.isas() if isa["available"]):
        for threads in (1, 2):
            with puna.load("demo", isa=isa, threads=threads, context=2048, progress=False) as llm:
                answers = [llm.chat(prompt, temperature=0, max_tokens=40) for prompt in prompts]
                texts.add("\n".join(str(answer) for answer in answers))
    assert len(texts) == 1


def test_logits_are_those_of_transformers(demo_checkpoint: Path) -> None:
    """The shipped weights, over chunk boundaries, with activations that are not quantised."""
    with_transformers = oracle_module("with_transformers", "torch", "transformers")
    model = with_transformers.load(demo_checkpoint)
    rng = random.Random(11)
    with puna.load("demo", device="ref", kv="fp32", progress=False) as llm:
        text = " ".join(random_story(rng).text() for _ in range(12))
        tokens = llm.tokenizer.encode(text)[: 3 * 256 + 9]
        own = llm.logits(tokens)
        picture = draw(random_scene(rng), llm.info.image_size)
        pixels = (np.asarray(picture, np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]
        seen = [llm.info.image_token] * llm.info.tokens_per_tile
        with_picture = np.array([*tokens[:5], *seen, *tokens[5:20]])
        own_with_picture = llm.logits(with_picture, pixels)
    for got, expected in (
        (own, with_transformers.logits(model, tokens, None)),
        (own_with_picture, with_transformers.logits(model, with_picture, pixels)),
    ):
        # transformers takes RoPE's angle from the position in fp32, not from its remainder in the
        # chunk: at position 777 it is off by up to 777 * 2**-24 = 5e-5.
        assert np.abs(got - expected).max() <= 5e-5 * np.abs(expected).max()


def test_a_larger_picture_of_the_same(llm: puna.Engine, tmp_path: Path) -> None:
    # From a file, at another size: read, resized and cut as any picture is.
    scene = random_scene(random.Random(8))
    path = tmp_path / "scene.png"
    draw(scene, llm.info.image_size).resize((168, 168), Image.Resampling.BICUBIC).save(path)
    answer = llm.chat("What is in this picture?", images=[path], temperature=0, max_tokens=60)
    assert isinstance(answer, puna.Completion)
    assert answer.usage.image > llm.info.tokens_per_tile  # several tiles and the whole
    assert answer.text


def test_its_chat_template(llm: puna.Engine) -> None:
    rendered = render(
        "Hello.",
        template=find_template(demo_directory()),
        special_tokens=frozenset(llm.tokenizer.special_tokens),
    )
    names = [part.name for part in rendered.parts if isinstance(part, SpecialToken)]
    assert names == [
        "<|begin_of_text|>",
        *("<|header_start|>", "<|header_end|>", "<|eot|>"),
        *("<|header_start|>", "<|header_end|>"),
    ]
    text = [str(part) for part in rendered.parts if isinstance(part, str)]
    assert text == ["user", "\n\nHello.", "assistant", "\n\n"]


def test_offline_from_a_bare_process(tmp_path: Path) -> None:
    """`puna demo` with no network, no home and no environment but the path to the package."""
    package = Path(puna.__file__).parent.parent
    program = (
        "import socket, sys\n"
        "def refuse(*_, **__): raise AssertionError('the demo opened a socket')\n"
        "socket.socket = socket.create_connection = refuse\n"
        "from puna.cli import main\n"
        "sys.exit(main(['demo', '--seed', '3', '--image-out', 'scene.png']))\n"
    )
    environment = {
        "PYTHONPATH": os.pathsep.join([str(package), *sys.path]),
        "HOME": str(tmp_path / "none"),
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "> Tell me a story about " in done.stdout
    scene = random_scene(random.Random(3))
    assert f"(drawn: {scene.caption()})" in done.stdout
    task = random_task(random.Random(3))
    assert f"> {task.request}  (tools: {', '.join(task.offered)})" in done.stdout
    assert f"{records.write(task.call())}\n(the right call)" in done.stdout
    key = passkey.random_key(random.Random(3))
    assert re.search(rf"^{passkey.answer(key)}\n\(it was {key}, in 10[12],\d+ ", done.stdout, re.M)
    assert "decode == prefill over 770 tokens, past 3 chunk boundaries: OK" in done.stdout
    assert "tokens/s on cpu (" in done.stdout
    assert "peak memory" in done.stdout
    with Image.open(tmp_path / "scene.png") as picture:
        assert picture.size == (56, 56)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scene.png"]
