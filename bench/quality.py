"""What each weight format costs in quality, beside llama.cpp's quantiser on the same weights.

Two models are measured, in bfloat16 and then in every format that puna quantises to:

- `random`: weights with the heavy tails and the outlier channels of trained networks (see
  `random_checkpoint`), Scout's layers in small: 16 experts, which hold 94 % of the weights. Its
  text is drawn from itself, so that its perplexity is that of its own choices.
- `demo`: the bundled model, on held-out stories of its small world.

"calibrated" is the same with another text of the same kind as calibration text. Perplexity and
KL(bfloat16 || format) come from `puna.evaluate`. With --llama-cpp-python PYTHON, an
interpreter that has llama-cpp-python, its quantiser makes Q8_0 to Q4_0 of the same weights, and
puna reads those files: one engine computes all, so that only the weights differ. Rows of the demo
model are no multiples of 256, which K-quants need; llama.cpp gives those to larger types.

    python bench/quality.py --llama-cpp-python PYTHON     measures and writes results/quality.json
    python bench/quality.py --table                       prints the tables of that file

needs `gguf` beside puna, and a checkout of puna's repository.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

import puna
from puna import _core
from puna.demo.stories import random_story, story_request

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT), str(ROOT / "tests")]

from tools.demo_model.packed import unpack  # noqa: E402

from oracle.make_checkpoint import Stored, tensor_shapes, write_safetensors  # noqa: E402
from oracle.make_gguf import Type, write_gguf  # noqa: E402
from oracle.tiny import LLAMA3_ROPE  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "quality.json"
QUANTISER = ROOT / "bench" / "workers" / "llama_cpp_quantize.py"
FINER_ATTENTION = "table4_64, attention and head table4_32"
# What is quantised a second time, with a calibration text.
CALIBRATED = ("int4", "int4 with table4_32", "table4_32", "table4_64", FINER_ATTENTION)
# Besides the formats: the recipe, and the recipe with other formats for the feed-forwards.
RECIPES: dict[str, str | dict[str, str]] = {"int4": "int4"} | {
    f"int4 with {name}": {"default": "int4"}
    | {f"layers.*.{part}.*": name for part in ("experts", "shared_expert", "mlp")}
    for name in ("table4_32", "table4_64")
}
RECIPES[FINER_ATTENTION] = {
    "default": "table4_64",
    "layers.*.attention.*": "table4_32",
    "lm_head": "table4_32",
}
PEER_RECIPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")
# Keys and values in fp32 for all, whatever the weights are: they are not what is measured.
LOADING: dict[str, Any] = {"kv": "fp32", "vision": False, "progress": False}


@dataclass(frozen=True)
class Subject:
    """A model in bfloat16, the same as GGUF, and the text it is judged by."""

    name: str
    directory: Path
    gguf: Path
    tokens: list[int]
    calibration: list[int]  # another text of the same kind
    context: int
    experts: int


# --- the random model ---------------------------------------------------------------------------

RANDOM_TEXT: dict[str, Any] = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 768,
    "intermediate_size_mlp": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 1,
    "num_local_experts": 16,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 128,
    "attn_temperature_tuning": True,
    "floor_scale": 128,
    "attn_scale": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "rope_parameters": LLAMA3_ROPE | {"original_max_position_embeddings": 128},
}
SEED = 11
SEQUENCES, CONTEXT = 16, 256


def random_tensors(config: Mapping[str, Any], seed: int) -> dict[str, NDArray[np.float32]]:
    """Weights as training leaves them, where it matters to quantising.

    Weights are drawn from Student's t distribution with 5 degrees of freedom, whose largest values
    are some ten times the usual. One in a hundred channels of the residual stream is an outlier:
    eight times as large in the embedding, and met by columns twice as large. One in a hundred
    inputs of the output and down projections has columns three times as large.
    """
    rng = np.random.Generator(np.random.SFC64(seed))
    hidden = config["hidden_size"]
    outliers = rng.choice(hidden, hidden // 100, replace=False)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1:  # gains of norms
            gains = np.exp(0.3 * rng.standard_normal(shape))
            gains[outliers] *= 0.5
            tensors[name] = gains.astype(np.float32)
            continue
        if "router" in name:
            # Rows longer than 1, for choices that are clear more often than not.
            values = rng.standard_normal(shape, np.float32) * np.float32(4 / hidden**0.5)
            tensors[name] = values
            continue
        values = rng.standard_t(5, shape).astype(np.float32) * np.float32((3 / 5) ** 0.5)
        stored_by_inputs = "experts." in name  # [experts, in, out]
        inputs = shape[-2] if stored_by_inputs else shape[-1]
        columns = values.swapaxes(-1, -2) if stored_by_inputs else values
        if "embed_tokens" in name:
            columns[:, outliers] *= 8
            scale = 1.0
        elif "o_proj" in name or "down_proj" in name:
            columns[..., rng.choice(inputs, inputs // 100, replace=False)] *= 3
            scale = 0.5 / inputs**0.5  # each layer changes the residual stream, none replaces it
        else:
            columns[..., outliers] *= 2
            scale = (2.8 if "lm_head" in name else 1.0) / inputs**0.5
        tensors[name] = values * np.float32(scale)
    return tensors


def random_subject(folder: Path) -> Subject:
    """The random model, and a text that it wrote."""
    directory = folder / "random"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(RANDOM_TEXT))
    stored = {
        name: Stored.of(values, "bfloat16")
        for name, values in random_tensors(RANDOM_TEXT, SEED).items()
    }
    write_safetensors(directory / "model.safetensors", stored)
    path = folder / "random.gguf"
    values = {name: tensor.values() for name, tensor in stored.items()}
    write_gguf(path, RANDOM_TEXT, values, type_of=lambda _: Type.BF16)
    texts = []
    with puna.load(directory, **LOADING) as llm:
        for seed in (SEED, SEED + SEQUENCES):
            written = llm.generate(
                [RANDOM_TEXT["bos_token_id"]],
                n=SEQUENCES,
                max_tokens=CONTEXT - 1,
                temperature=1,
                top_p=1,
                top_k=0,
                seed=seed,
                ignore_eos=True,
            )
            # Every sequence has a seed of its own, and fills one window.
            assert isinstance(written, list)
            texts.append([token for completion in written for token in completion.tokens])
    experts = RANDOM_TEXT["num_local_experts"]
    return Subject("random", directory, path, *texts, CONTEXT, experts)


# --- the demo model -----------------------------------------------------------------------------

# Training drew from generators seeded near 0.
STORIES, STORY_SEED = 80, 888_000_001


def demo_text(seed: int) -> str:
    """Held-out stories, as the demo model's chats are written."""
    rng = random.Random(seed)
    turns = []
    for _ in range(STORIES):
        story = random_story(rng)
        turns += [("user", story_request(story.animal)), ("assistant", story.text())]
    return "".join(
        f"<|header_start|>{role}<|header_end|>\n\n{words}<|eot|>" for role, words in turns
    )


def demo_subject(folder: Path) -> Subject:
    """The bundled model; windows of 384 tokens, as it was trained with."""
    with puna.load("demo", **LOADING) as llm:
        texts = [
            llm.tokenizer.encode(demo_text(seed), allowed_special="all").tolist()
            for seed in (STORY_SEED, STORY_SEED + 1)
        ]
        bundled = Path(llm.info.path)
    # The bundled file is quantised; what it holds, rounded to bfloat16, is the model that is
    # measured.
    directory, path = folder / "demo", folder / "demo.gguf"
    unpack(bundled, directory)
    config = json.loads((directory / "config.json").read_text()) | {"dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {
        name: _core.read_tensor(str(directory), name).reshape(shape)
        for name, shape in tensor_shapes(config).items()
    }
    stored = {name: Stored.of(value, "bfloat16") for name, value in tensors.items()}
    write_safetensors(directory / "model.safetensors", stored)
    write_gguf(path, config, tensors, type_of=lambda _: Type.BF16)
    experts = config["text_config"]["num_local_experts"]
    return Subject("demo", directory, path, *texts, 384, experts)


# --- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """Quantised weights on disk, and what the matrices take that are quantised."""

    by: str
    quant: str
    path: Path
    weights: int
    bits: float
    bits_per_token: float  # of the weights that a decoded token reads: of experts, one


def counted(
    by: str, quant: str, path: Path, matrices: list[tuple[bool, int, float]], experts: int
) -> Candidate:
    """A candidate from (whether it is an expert's, weights, bits) of its matrices."""
    weights = sum(count for _, count, _ in matrices)
    bits = sum(bits for _, _, bits in matrices)
    per_token = sum(bits / experts if routed else bits for routed, _, bits in matrices)
    return Candidate(by, quant, path, weights, bits, per_token)


def packed(subject: Subject, quant: str, calibrated: bool, folder: Path) -> Candidate:
    """The model in puna's packed form."""
    name = f"{quant} calibrated" if calibrated else quant
    out = folder / f"{subject.name} {name}"
    puna.quantize(
        subject.directory,
        out,
        quant=RECIPES.get(quant, quant),
        calibration=subject.calibration if calibrated else None,
        progress=False,
    )
    with (out / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    matrices = json.loads(header["__metadata__"]["puna"])["matrices"]
    bits_of = {form["name"]: form["bits_per_weight"] for form in _core.weight_formats()}
    found = []
    for matrix_name, matrix in matrices.items():
        if matrix_name.startswith("vision.") or matrix_name.endswith(".router"):
            continue
        count = matrix["rows"] * matrix["cols"]
        found.append((".experts." in matrix_name, count, count * bits_of[matrix["format"]]))
    return counted("puna", name, out, found, subject.experts)


def quantised_by_peer(subject: Subject, recipe: str, python: str, folder: Path) -> Candidate:
    """The model as llama.cpp's quantiser makes it."""
    out = folder / f"{subject.name}-{recipe}.gguf"
    command = [python, str(QUANTISER), str(subject.gguf), str(out), recipe]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"llama.cpp's quantiser failed with {recipe}:\n{done.stderr[-2000:]}")
    found = [
        ("_exps" in tensor.name, int(tensor.n_elements), 8.0 * int(tensor.n_bytes))
        for tensor in gguf.GGUFReader(out).tensors
        if len(tensor.shape) > 1
        and tensor.name != "token_embd.weight"
        and "ffn_gate_inp" not in tensor.name
    ]
    return counted("llama.cpp", recipe, out, found, subject.experts)


def candidates(subject: Subject, python: str | None, folder: Path) -> Iterator[Candidate]:
    """Every format of puna, and of llama.cpp if its interpreter is given."""
    formats = [form["name"] for form in _core.weight_formats() if form["can_encode"]]
    for quant in (*RECIPES, *formats):
        yield packed(subject, quant, False, folder)
    for quant in CALIBRATED:
        yield packed(subject, quant, True, folder)
    for recipe in PEER_RECIPES if python else ():
        assert python is not None
        yield quantised_by_peer(subject, recipe, python, folder)


def measure(subject: Subject, python: str | None, folder: Path) -> dict[str, Any]:
    """All rows of a model, most bits first."""
    judged: dict[str, Any] = {"context": subject.context, "progress": False}
    rows = []
    with puna.load(subject.directory, **LOADING) as reference:
        with puna.load(subject.gguf, **LOADING) as same:
            found = puna.evaluate(same, subject.tokens, reference=reference, **judged)
            assert found.comparison is not None
            if found.comparison.kl_max > 1e-6:
                raise RuntimeError(f"{subject.gguf} is not the same model: {found}")
        for candidate in candidates(subject, python, folder):
            with puna.load(candidate.path, **LOADING) as llm:
                found = puna.evaluate(llm, subject.tokens, reference=reference, **judged)
            assert found.comparison is not None
            rows.append(
                {
                    "by": candidate.by,
                    "quant": candidate.quant,
                    "bits_per_weight": round(candidate.bits / candidate.weights, 3),
                    "matrix_bytes": round(candidate.bits / 8),
                    "matrix_bytes_per_token": round(candidate.bits_per_token / 8),
                    "perplexity": found.perplexity,
                    **asdict(found.comparison),
                }
            )
            print(_line(subject.name, rows[-1]), flush=True)
    rows.sort(key=lambda row: (-row["bits_per_weight"], row["kl_mean"]))
    return {
        "tokens": found.tokens,
        "context": subject.context,
        "weights": candidate.weights,
        "reference_perplexity": found.comparison.reference_perplexity,
        "rows": rows,
    }


def _line(name: str, row: Mapping[str, Any]) -> str:
    return (
        f"{name:8} {row['by']:10} {row['quant']:30} {row['bits_per_weight']:6.3f} bits"
        f"  KL {row['kl_mean']:.5f} +- {row['kl_error']:.5f}  99 % {row['kl_p99']:.4f}"
        f"  perplexity x {row['perplexity_ratio']:.5f}  top-1 {100 * row['top1_agreement']:.2f} %"
    )


# --- the tables ---------------------------------------------------------------------------------


def tables(results: Mapping[str, Any]) -> str:
    """Markdown, one table for each model."""
    parts = []
    for name, model in results["models"].items():
        lines = [
            f"`{name}`: {model['weights'] / 1e6:.1f} million weights in matrices, "
            f"{model['tokens']:,} tokens, perplexity {model['reference_perplexity']:.3f} in bf16",
            "",
            "| | bits | MB per token | KL, nats | KL 99 % | ppl | same top-1 |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in model["rows"]:
            title = f"{'llama.cpp ' if row['by'] != 'puna' else ''}{row['quant']}"
            lines.append(
                f"| {title} | {row['bits_per_weight']:.2f} "
                f"| {row['matrix_bytes_per_token'] / 1e6:.3g} "
                f"| {row['kl_mean']:.5f} ± {row['kl_error']:.5f} | {row['kl_p99']:.4f} "
                f"| {row['perplexity_ratio']:.4f} | {100 * row['top1_agreement']:.2f} % |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--llama-cpp-python", metavar="PYTHON", help="has llama-cpp-python")
    parser.add_argument("--model", choices=("random", "demo"), help="only this one")
    parser.add_argument("--json", type=Path, metavar="FILE", default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the tables of --json")
    options = parser.parse_args()
    if options.table:
        print(tables(json.loads(options.json.read_text())))
        return
    subjects = {"random": random_subject, "demo": demo_subject}
    models = {}
    if options.model and options.json.exists():  # the other one's rows stay
        models = json.loads(options.json.read_text())["models"]
    for name, make in subjects.items():
        if options.model in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                models[name] = measure(make(Path(folder)), options.llama_cpp_python, Path(folder))
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "isa": next(isa["name"] for isa in puna.isas() if isa["available"]),
        "models": models,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(tables(results))


if __name__ == "__main__":
    main()
