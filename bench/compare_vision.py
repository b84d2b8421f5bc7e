"""puna's vision tower beside that of transformers, in turns in one run.

It installs nothing; torch and transformers must be there besides puna, whose puna-bench it runs:

    python bench/compare_vision.py --json bench/results/vision.json

Both have a tower of the true size (34 layers of 1408, 16 heads, tiles of 336 pixels in patches of
14, pixel shuffle, adapter, projector to 5120) with random weights of their own, puna's in bfloat16.
transformers runs Llama4VisionModel and Llama4MultiModalProjector with torch, in bfloat16 or in
float32, whichever a tower of one layer finds faster on this machine. Every round measures every row
once in each engine; medians over the rounds are compared. `--layers` takes a part of the tower
where the whole takes too long; all layers are alike. `--lock FILE` holds a lock while something is
measured.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Llama4Config
from transformers.models.llama4.modeling_llama4 import (
    Llama4MultiModalProjector,
    Llama4VisionModel,
)

Encode = Callable[[int], None]
LAYERS = 34


def tower(layers: int, dtype: torch.dtype) -> Encode:
    """A function that encodes so many tiles with transformers."""
    vision = dict(
        hidden_size=1408,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        pixel_shuffle_ratio=0.5,
        projector_input_dim=4096,
        projector_output_dim=4096,
        vision_output_dim=4096,
    )
    text = dict(hidden_size=5120, num_hidden_layers=1, vocab_size=8)
    text |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = Llama4Config(vision_config=vision, text_config=text)
    config.vision_config._attn_implementation = "sdpa"
    model = Llama4VisionModel(config.vision_config).eval()
    projector = Llama4MultiModalProjector(config).eval()
    if dtype == torch.bfloat16:  # not .to(), which would make the complex angles of RoPE real
        model, projector = model.bfloat16(), projector.bfloat16()

    def encode(tiles: int) -> None:
        pixels = torch.full((tiles, 3, 336, 336), 0.25, dtype=dtype)
        with torch.inference_mode():
            features = model(pixels).last_hidden_state
            out = projector(features.reshape(-1, features.shape[-1]))
        assert out.shape == (tiles * 144, 5120)

    return encode


def seconds_of(run: Callable[[], None]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def fastest_type(threads: int) -> tuple[torch.dtype, dict[str, float]]:
    """Of bfloat16 and float32, by a tower of one layer: the second of two runs counts."""
    torch.set_num_threads(threads)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        encode = tower(1, dtype)
        encode(1)
        found[dtype] = seconds_of(lambda encode=encode: encode(1))
    names = {str(dtype).removeprefix("torch."): round(s, 4) for dtype, s in found.items()}
    return min(found, key=found.__getitem__), names


@contextlib.contextmanager
def locked(path: Path | None) -> Iterator[None]:
    """Holds the lock, if there is one."""
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_puna(command: str, tiles: int, threads: int, layers: int) -> dict[str, Any]:
    """Facts and the row of one run of puna-bench."""
    options = {"tiles": tiles, "threads": threads, "layers": layers, "rounds": 1}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(
        [command, "vision", "--json", *arguments], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def save(path: Path, facts: dict[str, Any], row: dict[str, Any]) -> None:
    """Adds a row to the results, a line each."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    machine = {
        "processor": facts["processor"],
        "isa": facts["isa"],
        "memory_gib": round(facts["memory GiB"], 1),
        "system": platform.platform(terse=True),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n    ".join(json.dumps(one) for one in [*rows, row])
    path.write_text(f'{{"machine": {json.dumps(machine)},\n  "rows": [\n    {text}\n  ]}}\n')


def main() -> None:
    """Measures, prints a line for each row, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--puna-bench", default=shutil.which("puna-bench"), help="the program")
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lock", type=Path, help="file to lock while something is measured")
    parser.add_argument("--json", type=Path, help="where to write the results; rows are added")
    options = parser.parse_args()
    if not options.puna_bench:
        parser.error("puna-bench is not on the path; give --puna-bench")

    for threads in options.threads:
        with locked(options.lock):
            dtype, trials = fastest_type(threads)
        encode = tower(options.layers, dtype)
        encode(1)
        for tiles in options.tiles:
            puna, peer, peaks = [], [], []
            for _ in range(options.rounds):
                with locked(options.lock):
                    report = run_puna(options.puna_bench, tiles, threads, options.layers)
                    peer.append(seconds_of(lambda encode=encode, tiles=tiles: encode(tiles)))
                puna.append(report["rows"][0])
                peaks.append(report["facts"]["bf16 peak GFLOP/s"])
                facts = report["facts"]
            seconds = statistics.median(row["seconds"] for row in puna)
            rate = statistics.median(row["GFLOP/s"] for row in puna)
            row = {
                "tiles": tiles,
                "threads": threads,
                "layers": options.layers,
                "rounds": options.rounds,
                "puna_seconds": round(seconds, 4),
                "puna_tiles_per_second": round(tiles / seconds, 4),
                "puna_gflops": round(rate, 1),
                "share_of_bf16_peak": round(rate / statistics.median(peaks), 3),
                "transformers_seconds": round(statistics.median(peer), 4),
                "transformers_dtype": str(dtype).removeprefix("torch."),
                "one_layer_trials_seconds": trials,
                "ratio": round(statistics.median(peer) / seconds, 3),
                # With nothing but this at work it is about the number of threads.
                "load_average": round(os.getloadavg()[0], 1),
            }
            print(json.dumps(row), flush=True)
            if options.json:
                save(options.json, facts, row)


if __name__ == "__main__":
    main()
