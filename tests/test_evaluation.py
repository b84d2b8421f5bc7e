"""`puna eval`: perplexity and distance to a reference, against the plain formulas."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

import puna
from conftest import MakeCheckpoint, MakeEngine, greedy
from oracle.make_checkpoint import Stored, write_safetensors
from oracle.make_gguf import Type, write_gguf
from puna.cli import main

TEXT = "One day a fox went to the old mill. There she found a red ball, and took it home. " * 3


@pytest.fixture(scope="module")
def llm(engine: MakeEngine) -> puna.Engine:
    return engine("scout_like", tokenizer=True)


@pytest.fixture(scope="module")
def coarse(engine: MakeEngine) -> puna.Engine:
    return engine("scout_like", tokenizer=True, quant="int4_32")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.longdouble)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def windows_of(ids: list[int], bos: int, context: int) -> list[list[int]]:
    step = context - 1
    return [[bos, *ids[i : i + step]] for i in range(0, len(ids), step)]


@pytest.mark.parametrize("context", [2, 17, 40, 10_000])
def test_against_the_formulas(llm: puna.Engine, coarse: puna.Engine, context: int) -> None:
    ids = llm.tokenizer.encode(TEXT).tolist()
    bos = llm.info.bos_token
    assert bos is not None
    nll, other_nll, kl, agree = [], [], [], []
    windows = windows_of(ids, bos, min(context, 4000))
    for window in windows:
        q, p = (log_softmax(one.logits(window)[:-1]) for one in (coarse, llm))
        for row, token in enumerate(window[1:]):
            nll.append(-q[row, token])
            other_nll.append(-p[row, token])
            kl.append(float((np.exp(p[row]) * (p[row] - q[row])).sum()))
            agree.append(p[row].argmax() == q[row].argmax())
    found = puna.evaluate(coarse, TEXT, reference=llm, context=min(context, 4000), progress=False)
    assert (found.tokens, found.windows) == (len(ids), len(windows))
    # Float64 of sums of 320 terms of about 1, and of logarithms of them.
    close = {"rel": 1e-12, "abs": 1e-14}
    assert found.cross_entropy == pytest.approx(float(np.mean(nll)), **close)
    assert found.perplexity == pytest.approx(math.exp(np.mean(nll)), **close)
    comparison = found.comparison
    assert comparison is not None
    assert comparison.reference_perplexity == pytest.approx(math.exp(np.mean(other_nll)), **close)
    assert comparison.perplexity_ratio == pytest.approx(
        math.exp(np.mean(nll) - np.mean(other_nll)), **close
    )
    assert comparison.kl_mean == pytest.approx(np.mean(kl), **close)
    assert comparison.kl_error == pytest.approx(np.std(kl) / len(kl) ** 0.5, **close)
    assert comparison.kl_p99 == pytest.approx(np.percentile(kl, 99), **close)
    assert comparison.kl_max == pytest.approx(max(kl), **close)
    assert comparison.top1_agreement == np.mean(agree)
    assert comparison.kl_mean > 1e-4  # there is something to measure


def test_windows_of_one_text(llm: puna.Engine) -> None:
    """A text within one window is what score() says; max_tokens cuts it; ids are text too."""
    score = llm.score(TEXT)
    found = puna.evaluate(llm, TEXT, context=len(score.tokens), progress=False)
    assert found.windows == 1
    assert found.perplexity == pytest.approx(score.perplexity, rel=1e-12)
    assert found.comparison is None
    assert puna.evaluate(llm, score.tokens, context=len(score.tokens), progress=False) == found
    few = puna.evaluate(llm, TEXT, context=8, max_tokens=20, progress=False)
    assert (few.tokens, few.windows) == (20, 3)
    assert few == puna.evaluate(llm, score.tokens[:21], context=8, progress=False)
    # 300 rows: more than one pass holds, over many chunks of 16.
    long = [*score.tokens, *score.tokens]
    assert puna.evaluate(llm, long, context=4000, progress=False).cross_entropy == pytest.approx(
        -np.mean(llm.score(long).logprobs[1:]), rel=1e-12
    )


def test_special_tokens_in_a_text(llm: puna.Engine) -> None:
    plain = puna.evaluate(llm, "a<|eot|>b", progress=False)
    special = puna.evaluate(llm, "a<|eot|>b", allow_special=True, progress=False)
    assert (plain.tokens, special.tokens) == (9, 3)


def test_a_model_is_no_distance_from_itself(llm: puna.Engine) -> None:
    comparison = puna.evaluate(llm, TEXT, reference=llm, progress=False).comparison
    assert comparison is not None
    assert comparison.kl_mean == comparison.kl_max == comparison.kl_error == 0
    assert comparison.perplexity_ratio == comparison.top1_agreement == 1


def test_without_a_begin_of_text_token(
    checkpoint: MakeCheckpoint, llm: puna.Engine, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("scout_like", tokenizer=True).path, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["bos_token_id"] = None
    (folder / "config.json").write_text(json.dumps(config))
    ids = list(range(1, 12))
    with puna.load(folder, progress=False) as other:
        assert other.info.bos_token is None
        found = puna.evaluate(other, ids, context=4, progress=False)
        nll = [
            -log_softmax(other.logits(ids[i : i + 4]))[row, ids[i + row + 1]]
            for i, rows in ((0, 3), (4, 3), (8, 2))
            for row in range(rows)
        ]
        assert found.tokens == 8
        assert found.cross_entropy == pytest.approx(float(np.mean(nll)), rel=1e-12)
        with pytest.raises(puna.InvalidRequest, match="bos_token is None and the reference's is"):
            puna.evaluate(other, ids, reference=llm, progress=False)
        with pytest.raises(puna.InvalidRequest, match="none of which can be scored in windows of"):
            puna.evaluate(other, ids, context=1, progress=False)


def test_rows_of_a_session(llm: puna.Engine) -> None:
    """The core hands out rows as a prompt is computed, and nothing twice."""
    tokens = [int(token) for token in llm.score(TEXT * 2).tokens]
    assert len(tokens) > 300
    session = llm._core.session()
    session.prompt(tokens, [])
    pieces = []
    for most in (1, 5, 1 << 40, *[100] * 100):
        rows = session.logits(most)
        assert len(rows) <= min(most, 256)
        pieces.append(rows)
    assert len(pieces[-1]) == 0
    assert np.array_equal(np.concatenate(pieces), llm.logits(tokens))
    with pytest.raises(puna.InvalidRequest, match="0 rows"):
        session.logits(0)
    session.begin(greedy(max_tokens=4))
    with pytest.raises(puna.InvalidRequest, match="give it a prompt again"):
        llm._core.step([session])
    session.prompt(tokens, [])  # keeps all but the last, whose logits choose the next
    session.begin(greedy(max_tokens=4))
    assert llm._core.step([session])[0].token == llm.logits(tokens)[-1].argmax()


# --- refusals ------------------------------------------------------------------------------------


def test_texts_without_tokens(llm: puna.Engine) -> None:
    with pytest.raises(puna.InvalidRequest, match="the text has 0 tokens, none of which"):
        puna.evaluate(llm, "", progress=False)
    with pytest.raises(puna.InvalidRequest, match="context is -1; it must be a whole number"):
        puna.evaluate(llm, TEXT, context=-1, progress=False)
    with pytest.raises(puna.InvalidRequest, match=r"max_tokens is 1\.5"):
        puna.evaluate(llm, TEXT, max_tokens=1.5, progress=False)  # type: ignore[arg-type]
    with pytest.raises(puna.InvalidRequest, match="ids 0 to 319"):
        puna.evaluate(llm, [320], progress=False)


def test_windows_beyond_the_context(checkpoint: MakeCheckpoint, llm: puna.Engine) -> None:
    path = checkpoint("scout_like", tokenizer=True).path
    with puna.load(path, context=16, progress=False) as short:
        for model, reference in ((short, llm), (llm, short)):
            with pytest.raises(puna.ContextOverflow, match=r"context holds 16 .*load with context"):
                puna.evaluate(model, TEXT, reference=reference, context=24, progress=False)
        assert puna.evaluate(short, TEXT, reference=llm, context=16, progress=False).windows > 1


def test_other_tokenizers(
    checkpoint: MakeCheckpoint, llm: puna.Engine, engine: MakeEngine, tmp_path: Path
) -> None:
    with pytest.raises(puna.InvalidRequest, match="vocab_size is 301 and the reference's is 320"):
        puna.evaluate(engine("ragged", tokenizer=True), TEXT, reference=llm, progress=False)
    folder = Path(shutil.copytree(checkpoint("scout_like", tokenizer=True).path, tmp_path / "m"))
    document = json.loads((folder / "tokenizer.json").read_text())
    ids = document["model"]["vocab"]
    ids["x"], ids["y"] = ids["y"], ids["x"]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    words = r"is b'[xy]' to the model and b'[xy]' to the reference"
    with (
        puna.load(folder, progress=False) as other,
        pytest.raises(puna.InvalidRequest, match=words),
    ):
        puna.evaluate(other, "no such letters", reference=llm, progress=False)
    with pytest.raises(puna.UnsupportedError, match=r"neither tokenizer\.json nor"):
        puna.evaluate(engine("scout_like"), TEXT, reference=llm, progress=False)
    bare = puna.evaluate(engine("scout_like"), [1, 2, 3], reference=llm, progress=False)
    assert bare.comparison is not None
    assert bare.comparison.kl_max == 0


def test_a_gguf_file_beside_its_source(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The same tokens, though a file names those that the vocabulary only pads."""
    made = checkpoint("scout_like", dtype="bfloat16", tokenizer=True)
    write_gguf(
        tmp_path / "model.gguf",
        made.config,
        made.tensors,
        type_of=lambda _: Type.BF16,
        tokenizer=made.path,
    )
    options = {"kv": "fp32", "progress": False}
    with (
        puna.load(made.path, **options) as source,
        puna.load(tmp_path / "model.gguf", **options) as file,
    ):
        found = puna.evaluate(file, TEXT, reference=source, progress=False)
    assert found.comparison is not None
    assert found.comparison.kl_max < 1e-10


def test_damaged_weights(checkpoint: MakeCheckpoint, llm: puna.Engine, tmp_path: Path) -> None:
    made = checkpoint("scout_like", tokenizer=True)
    folder = Path(shutil.copytree(made.path, tmp_path / "m"))
    name = "language_model.lm_head.weight"
    bad = {key: values.copy() for key, values in made.tensors.items()}
    bad[name][7, 3] = np.inf
    write_safetensors(
        folder / "model.safetensors",
        {key: Stored.of(values, "float32") for key, values in bad.items()},
    )
    with puna.load(folder, progress=False) as damaged:
        for model, reference, which in ((damaged, llm, "model"), (llm, damaged, "reference")):
            with pytest.raises(puna.InvalidRequest, match=f"the {which}'s logits are not finite"):
                puna.evaluate(model, TEXT, reference=reference, progress=False)


def test_closed_engines(checkpoint: MakeCheckpoint, llm: puna.Engine) -> None:
    closed = puna.load(checkpoint("scout_like", tokenizer=True).path, progress=False)
    closed.close()
    for model, reference in ((closed, llm), (llm, closed)):
        with pytest.raises(puna.EngineClosed):
            puna.evaluate(model, TEXT, reference=reference, progress=False)


# --- the command ---------------------------------------------------------------------------------


def test_the_command(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(checkpoint("scout_like", tokenizer=True).path)
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text(TEXT, encoding="utf-8")
    arguments = ["eval", path, "--text", str(text), "--context", "32", "--quant", "int8"]
    arguments += ["--reference", path]
    assert main([*arguments, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text(encoding="utf-8"))
    with puna.load(path) as llm, puna.load(path, quant="int8", vision=False) as coarse:
        found = puna.evaluate(coarse, TEXT, reference=llm, context=32)
        assert report["weight_bytes"] == coarse.plan.weight_bytes
    assert report["perplexity"] == found.perplexity
    assert found.comparison is not None
    assert report["comparison"]["kl_mean"] == found.comparison.kl_mean > 0
    assert (report["quant"], report["reference_quant"]) == ("int8", None)
    assert f"perplexity   {found.perplexity:.4f}" in printed
    assert f"mean {found.comparison.kl_mean:.6f}" in printed

    assert main([*arguments, "--reference-quant", "int8", "--json", "--max-tokens", "40"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tokens"] == 40
    assert report["comparison"]["kl_max"] == 0


def test_what_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    assert main(["eval", "demo", "--text", str(text)]) == 1
    assert "No such file" in capsys.readouterr().err
    text.write_bytes(b"caf\xe9 au lait")
    assert main(["eval", "demo", "--text", str(text)]) == 1
    assert "not valid Unicode" in capsys.readouterr().err
    text.write_text("")
    assert main(["eval", "demo", "--text", str(text)]) == 1
    assert "the text has 0 tokens" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "demo", "--text", str(text), "--reference-quant", "int8"])
    assert "--reference-quant goes with --reference" in capsys.readouterr().err


# --- the committed results -----------------------------------------------------------------------


def test_the_tables_of_the_benchmark_are_those_of_its_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = Path(__file__).parent.parent
    monkeypatch.syspath_prepend(str(root / "bench"))
    monkeypatch.syspath_prepend(str(root))
    import quality

    readme = (root / "bench" / "README.md").read_text(encoding="utf-8")
    shown = readme.split("<!-- quality -->\n")[1].split("\n<!-- /quality -->")[0]
    assert shown == quality.tables(json.loads(quality.RESULTS.read_text(encoding="utf-8")))
