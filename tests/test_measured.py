"""The committed measurements: README's table is made of them and holds every row."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_readme_shows_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import measured

    text = measured.README.read_text(encoding="utf-8")
    shown = text.split(measured.BEGIN)[1].split(measured.END)[0]
    assert shown == measured.table()


def test_every_step_of_a_gpu_run_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import measured

    gpu = {"device": "cuda:0", "read GB/s": 4000.0, "int8 TOP/s": 1200.0, "bf16 TFLOP/s": 600.0}
    operation = {"rows": 1, "us": 2.0, "GB/s": 10.0, "% of read": 1.0, "TOP/s": 3.0, "% of int8": 4}
    phase = {"tokens": 8, "depth": 0, "sequences": 1, "tokens/s": 99.0}
    decode = phase | {"phase": "decode", "% of read": 50.0}
    model = {"facts": {"shape": "scout", "layers made": 48}, "rows": [decode]}
    tower = {"tiles": 17, "tiles/s": 500.0, "% of bf16 peak": 60.0}
    steps = {
        "products": {"facts": gpu, "rows": [operation | {"operation": "head"}]},
        "products-warpgroups": {"rows": [operation | {"operation": "head"}]},
        "attention": {"rows": [operation | {"operation": "attention", "% of read": 9.0}]},
        "choice": {"rows": [operation | {"operation": "argmax"}]},
        "scout": model,
        "scout-sent-experts-1": model,
        "profile": {"facts": {}, "rows": [{"phase": "decode", "kernel": "norm", "calls": 1}]},
        "vision": {"facts": {}, "rows": [tower]},
        "vision-warpgroups": {"facts": {}, "rows": [tower]},
    }
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    (tmp_path / "cuda_gpu.json").write_text(json.dumps(steps | {"failed": 0, "steps": []}))
    shown = measured.table().splitlines()
    assert [line.split("|")[1].strip() for line in shown if line.startswith("| ")] == [
        "models of the true shapes, random weights",
        "scout, 48 layers, dense",
        "scout, 48 layers, dense, experts of the host sent to the GPU",
        "vision tower, bfloat16",
        "vision tower, bfloat16, by warpgroups",
        "operation",
        "head",
        "head, by warpgroups",
        "attention",
        "argmax",
    ]
    assert "| head | 1 | 2.0 | 3 TOP/s | 4 % of int8 |" in shown
    assert "| attention | 1 | 2.0 | 10 GB/s | 9 % of read bandwidth |" in shown
