"""The command line, as a shell sees it: streams, exit codes, pipes and signals."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import puna
from conftest import MakeCheckpoint
from puna.cli import main
from puna.demo.scene import draw, random_scene

PUNA = [sys.executable, "-m", "puna"]
COMMANDS = (
    *("generate", "chat", "inspect", "tokenize", "quantize", "eval", "bench", "demo", "doctor"),
)


def run(
    *arguments: str | Path, stdin: str = "", expect: int = 0, **options: Any
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*PUNA, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )
    assert done.returncode == expect, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def scene_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    scene = random_scene(random.Random(3))
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    draw(scene, 56).save(path)
    return path, scene.caption()


# --- usage ---------------------------------------------------------------------------------------


def test_help_and_version() -> None:
    done = run("--help")
    for command in COMMANDS:
        assert re.search(rf"^ +{command} ", done.stdout, re.MULTILINE)
    assert run("--version").stdout == f"puna {puna.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command: str) -> None:
    done = run(command, "--help")
    assert "usage" in done.stdout.lower()
    assert done.stderr == ""


def test_usage_errors_are_2(capsys: pytest.CaptureFixture[str]) -> None:
    arguments: list[str]
    for arguments in (
        [],
        ["nonsense"],
        ["generate"],
        ["generate", "demo", "x", "--top-p", "high"],
        ["generate", "demo", "x", "--kv", "q9"],
        ["generate", "demo", "x", "--n", "2"],
        ["generate", "demo", "x", "--logit-bias", "7"],
        ["doctor", "extra"],
    ):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "usage: puna" in printed.err
    assert "usage: puna" in run("nonsense", expect=2).stderr


def test_failures_are_1_and_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["generate", "/nowhere/model", "x"], "there is no directory /nowhere/model"),
        (["generate", "demo", "x", "--top-p", "7"], "top_p is 7; it must be above 0 and at most 1"),
        (["generate", "demo", "x", "--isa", "avx9"], "no instruction set 'avx9'"),
        (["generate", "demo", "x", "--context", "many"], "context is 'many'; write a number"),
        (["generate", "demo", "x", "--memory", "1M"], "the budget given by memory= is 1 MiB"),
        (["generate", "demo", "x", "--image", "/nowhere.png"], "/nowhere.png cannot be read"),
        (["inspect", str(tmp_path)], "config.json"),
        (["tokenize", str(tmp_path), "x"], "tokenizer"),
        (["demo", "--image-out", "/nowhere/x.png", "--seed", "1"], "/nowhere/x.png"),
    ):
        assert main(arguments) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("puna: ")
        assert message in lines[0]
    done = run("generate", "/nowhere/model", "x", expect=1)
    assert done.stderr.startswith("puna: [load] there is no directory /nowhere/model")
    assert done.stdout == ""


# --- generate ------------------------------------------------------------------------------------


def test_generate() -> None:
    options = ["--temperature", "0", "--max-tokens", "20"]
    with puna.load("demo", progress=False) as llm:
        expected = str(llm.generate("Once upon a time", temperature=0, max_tokens=20))
        story = str(llm.chat("Tell me a story about a fox.", temperature=0, max_tokens=20))
    done = run("generate", "demo", "Once upon a time", *options)
    assert done.stdout == expected + "\n"
    assert re.search(
        r"^puna: 5 prompt tokens at [\d.]+/s, 20 generated at [\d.]+/s, "
        r"peak memory \d+ MiB, seed \d+$",
        done.stderr,
        re.MULTILINE,
    )
    assert "cut after 20 tokens: --max-tokens allows no more" in done.stderr
    assert run("generate", "demo", *options, stdin="Once upon a time\n").stdout == done.stdout
    chat = run("generate", "demo", "Tell me a story about a fox.", "--chat", *options)
    assert chat.stdout == story + "\n"


def test_generate_json() -> None:
    options = ["--max-tokens", "5", "--seed", "3", "--json", "--logprobs", "2"]
    result = json.loads(run("generate", "demo", "Once upon a time", *options).stdout)
    assert result["finish_reason"] == "length"
    assert result["seed"] == 3
    assert result["usage"]["completion"] == 5 == len(result["tokens"])
    assert result["timings"]["decode_tps"] > 0
    assert [len(item["top"]) for item in result["logprobs"]] == [2] * 5
    raw = b"".join(bytes(item["chosen"]["bytes"]) for item in result["logprobs"])
    assert raw.decode() == result["text"]
    several = json.loads(run("generate", "demo", "Once", "--n", "2", *options).stdout)
    assert [item["seed"] for item in several] == [3, 4]


def test_generate_from_a_picture(scene_file: tuple[Path, str]) -> None:
    path, caption = scene_file
    done = run(
        *("generate", "demo", "What is in this picture?", "--chat"),
        *("--image", path, "--temperature", "0"),
    )
    assert done.stdout == caption + "\n"


def test_sampling_flags_reach_the_model() -> None:
    flags = [
        *("--temperature", "0.9", "--top-p", "0.8", "--top-k", "30", "--min-p", "0.01"),
        *("--seed", "5", "--stop", "fox", "--stop", "xyzzy", "--repetition-penalty", "1.1"),
        *("--presence-penalty", "0.1", "--frequency-penalty", "0.2", "--min-tokens", "3"),
        *("--logit-bias", "300=-1e9", "--logit-bias", "301=2.5"),
        *("--ignore-eos", "--timeout", "60", "--max-tokens", "40", "--threads", "1"),
        *("--context", "2k", "--kv", "fp32", "--no-vision", "--device", "cpu", "--isa", "scalar"),
    ]
    with puna.load(
        "demo", progress=False, context=2048, kv="fp32", vision=False, isa="scalar"
    ) as llm:
        expected = llm.generate(
            "Once upon a time",
            temperature=0.9,
            top_p=0.8,
            top_k=30,
            min_p=0.01,
            seed=5,
            stop=["fox", "xyzzy"],
            repetition_penalty=1.1,
            presence_penalty=0.1,
            frequency_penalty=0.2,
            min_tokens=3,
            logit_bias={300: -1e9, 301: 2.5},
            ignore_eos=True,
            max_tokens=40,
        )
    assert run("generate", "demo", "Once upon a time", *flags).stdout == f"{expected}\n"


def test_a_context_that_is_larger_than_memory(tmp_path: Path) -> None:
    short = [*("generate", "demo", "Once upon a time", "--temperature", "0"), "--max-tokens", "20"]
    long = [*short, "--context", "1M", "--memory", "80M"]
    assert "memory=" in run(*long, expect=1).stderr
    offloaded = [*long, "--kv-offload", f"disk:{tmp_path}", "--kv-disk", "1G"]
    assert run(*offloaded).stdout == run(*short).stdout


def test_a_reader_that_goes_away() -> None:
    for arguments in (
        ["generate", "demo", "Once", "--max-tokens", "100000", "--ignore-eos"],
        ["generate", "demo", "Once", "--max-tokens", "5", "--json"],
        ["inspect", "demo", "--tensors"],
        ["doctor"],
    ):
        process = subprocess.Popen(
            [*PUNA, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stderr is not None
        if "generate" in arguments and "--json" not in arguments:
            process.stdout.read(1)
        process.stdout.close()
        stderr = process.stderr.read().decode()
        assert process.wait(timeout=60) == 0, stderr
        assert "Traceback" not in stderr
        assert "BrokenPipe" not in stderr
        process.stderr.close()


def test_flags_may_stand_before_the_text() -> None:
    assert run("tokenize", "demo", "--count", "Once").stdout == "1\n"
    few = ["--max-tokens", "2", "--temperature", "0"]
    expected = run("generate", "demo", "Once", *few).stdout
    assert run("generate", "demo", *few, "Once").stdout == expected
    assert "nowhere" in run("chat", "--seed", "1", "nowhere", expect=1).stderr
    for too_many in (("tokenize", "demo", "--count", "a", "b"), ("chat", "demo", "a", "b")):
        unknown = " ".join(word for word in too_many if word in "ab")
        assert f"unrecognized arguments: {unknown}" in run(*too_many, expect=2).stderr
    assert "unrecognized arguments: a" in run("chat", "demo", "a", expect=2).stderr


def test_closed_standard_streams() -> None:
    for closed, expected in (("<&-", " joy"), (">&-", ""), ("2>&-", " joy"), ("<&- >&- 2>&-", "")):
        command = shlex.join([*PUNA, "generate", "demo", "--max-tokens", "1", "--temperature", "0"])
        if "<&-" not in closed:
            command += " < /dev/null"
        done = subprocess.run(
            f"{command} {closed}", shell=True, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout.rstrip("\n")) == (0, expected), done.stderr
        assert "Traceback" not in done.stderr


def test_ctrl_c_is_130() -> None:
    process = subprocess.Popen(
        [*PUNA, "generate", "demo", "Once", "--max-tokens", "100000", "--ignore-eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - start < 5
    assert process.returncode == 130
    assert stderr.decode().splitlines()[-1] == "puna: interrupted"


def test_text_that_is_not_utf8() -> None:
    # Whether stdin is decoded strictly or with escapes depends on the locale; the answer does not.
    for encoding in ("utf-8:strict", "utf-8:surrogateescape"):
        done = subprocess.run(
            [*PUNA, "generate", "demo", "--max-tokens", "1"],
            input=b"caf\xe9",
            capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": encoding},
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr.startswith(b"puna: the text is not valid Unicode: ")


# --- chat ----------------------------------------------------------------------------------------


def test_chat(scene_file: tuple[Path, str]) -> None:
    path, caption = scene_file
    question = "What is in this picture?"
    script = [
        "Tell me a story about a fox.",
        "/reset",
        f"/image {path}",
        question,
        "/help",
        "",
        "/exit",
        "Never read.",
    ]
    done = run("chat", "--temperature", "0", "--max-tokens", "40", stdin="\n".join(script))
    with puna.load("demo", progress=False) as llm:
        story = llm.session().chat(script[0], temperature=0, max_tokens=40)
    assert done.stdout == f"{story}\n{caption}\n"
    assert "this is the demo model" in done.stderr
    assert done.stderr.count("Commands: /image FILE") == 2


def test_chat_keeps_the_session_and_its_system_message() -> None:
    questions = ["Tell me a story about a fox.", "Tell me a story about a cat."]
    options = ["--seed", "4", "--max-tokens", "30", "--system", "You tell stories."]
    done = run("chat", "demo", *options, stdin="\n".join(questions))
    with puna.load("demo", progress=False) as llm:
        session = llm.session()
        session.messages.append({"role": "system", "content": "You tell stories."})
        answers = [session.chat(q, seed=4, max_tokens=30).text for q in questions]
    assert done.stdout == "".join(f"{answer}\n" for answer in answers)


def test_chat_goes_on_after_a_bad_turn_and_reports_it() -> None:
    script = "/image /nowhere.png\nTell me a story about a fox.\n"
    done = run("chat", "--temperature", "0", "--max-tokens", "10", stdin=script, expect=1)
    assert "puna: there is no file /nowhere.png" in done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert run("chat", stdin="").stdout == ""


# --- the others ----------------------------------------------------------------------------------


def test_inspect(checkpoint: MakeCheckpoint) -> None:
    done = run("inspect", "demo")
    assert done.stderr == ""
    with puna.load("demo", progress=False) as llm:
        assert f"{llm.info.parameters:,} ({llm.info.active_parameters:,} active" in done.stdout
    assert re.search(r"memory +[\d.]+ .iB with [\d,]+ tokens of context", done.stdout)
    report = json.loads(run("inspect", "demo", "--json").stdout)
    assert report["layers"] == 4
    assert "tensors" not in report
    tiny = checkpoint("scout_like")
    listed = json.loads(run("inspect", tiny.path, "--tensors", "--json").stdout)["tensors"]
    assert {name: tuple(shape) for name, _, shape in listed} == {
        name: array.shape for name, array in tiny.tensors.items()
    }
    lines = run("inspect", tiny.path, "--tensors").stdout.splitlines()
    assert sum("lm_head.weight" in line for line in lines) == 1


def test_tokenize() -> None:
    with puna.load("demo", progress=False) as llm:
        tokenizer = llm.tokenizer
    text = "Once upon a time<|eot|>"
    ids = tokenizer.encode(text).tolist()
    assert json.loads(run("tokenize", "demo", text, "--json").stdout) == ids
    assert json.loads(run("tokenize", "demo", "--json", stdin=text).stdout) == ids
    assert run("tokenize", "demo", text, "--count").stdout == f"{len(ids)}\n"
    special = json.loads(run("tokenize", "demo", text, "--special", "--json").stdout)
    assert special == tokenizer.encode(text, allowed_special="all").tolist()
    assert special[-1] == tokenizer.special_tokens["<|eot|>"]
    table = run("tokenize", "demo", "Once").stdout.splitlines()
    assert len(table) == len(tokenizer.encode("Once"))
    assert table[0].split()[0] == str(tokenizer.encode("Once")[0])


def test_demo() -> None:
    done = run("demo", "--seed", "3")
    assert done.stderr == ""
    assert run("demo", "--seed", "3").stdout.split("Speed:")[0] == done.stdout.split("Speed:")[0]
    assert run("demo", "--seed", "4").stdout.split("Speed:")[0] != done.stdout.split("Speed:")[0]


def test_doctor() -> None:
    report = json.loads(run("doctor", "--json").stdout)
    assert report["puna"] == puna.__version__
    assert report["isas"] == puna.isas()
    assert report["backends"] == puna.backends()
    assert report["threads"] >= 1
    assert 0 < report["memory_available"] <= report["memory_total"]
    assert report["gpu"]["devices"] or report["gpu"]["why"]
    text = run("doctor").stdout
    chosen = next(isa["name"] for isa in puna.isas() if isa["available"])
    for line in (
        rf"puna +{re.escape(puna.__version__)} on Python {sys.version.split()[0]}",
        r"packages +numpy [\d.]+, jinja2 [\d.]+, pillow [\d.]+, tqdm [\d.]+",
        rf"processor +.+, {report['threads']} compute threads",
        rf"isa +{chosen} \(also built: .*scalar",
        r"memory +[\d.]+ .iB free of [\d.]+ .iB",
        r"gpu +(none found; .+|.*NVIDIA.*)",
        r"backend +cpu: yes, ",
    ):
        assert re.search(rf"^{line}", text, re.MULTILINE), (line, text)


def test_bench_passes_its_arguments_on() -> None:
    assert "puna-bench" in run("bench", "--help").stdout
    assert run("bench", "nonsense", expect=2).stdout == ""
    # Its own tokens would not fit the page in which they are compared.
    many = run("bench", "kv-decode", "--tokens", "256", "--rounds", "254", expect=1)
    assert "--rounds 254 of 1 numbers of rows would add 256 tokens; at most 255" in many.stderr
