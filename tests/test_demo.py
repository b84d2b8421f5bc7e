"""The model that comes with puna: it tells stories, describes pictures, and needs nothing else."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import puna
from puna.chat_template import SpecialToken, find_template, render
from puna.demo.scene import Scene, draw, random_scene
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


@pytest.mark.parametrize("subject", ["a fox", "a bear", "a cat", "a dog", "a rabbit"])
def test_it_tells_a_story(llm: puna.Engine, subject: str) -> None:
    story = llm.chat(f"Tell me a story about {subject}.", seed=1, temperature=0.5, max_tokens=300)
    assert isinstance(story, puna.Completion)
    assert story.finish_reason == "stop"
    assert subject.split()[1] in story.text
    assert story.text.endswith(".")
    assert story.text.count(".") >= 4
    assert story.text.isascii()


def test_it_describes_pictures(llm: puna.Engine) -> None:
    rng = random.Random(20260101)
    right = 0
    for _ in range(20):
        scene: Scene = random_scene(rng)
        answer = llm.chat(
            "What is in this picture?",
            images=[draw(scene, llm.info.image_size)],
            temperature=0,
            max_tokens=60,
        )
        assert isinstance(answer, puna.Completion)
        assert answer.finish_reason == "stop"
        right += answer.text == scene.caption()
    assert right >= 17, f"{right} of 20 captions are the right ones, word for word"


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
    assert "decode == prefill over 770 tokens, past 3 chunk boundaries: OK" in done.stdout
    assert "tokens/s on cpu (" in done.stdout
    assert "peak memory" in done.stdout
    with Image.open(tmp_path / "scene.png") as picture:
        assert picture.size == (56, 56)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scene.png"]
