"""README's table of measurements, from what is committed in results/.

    python bench/measured.py            prints it
    python bench/measured.py --write    puts it in README.md between its marks

Results: `llama_cpp_MODEL_TYPE*.json` of compare_llama_cpp.py, `model_*.json` of
`puna-bench model --json`, `vision.json` of compare_vision.py, `tokenizer.json` of tokenizer.py,
`kv_decode_<tokens>_*.json` of `puna-bench kv-decode --json`, `ledger_*.json` of
`ledger.py --json`, and `cuda_*.json` of `gpu_run.sh`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- measured -->\n", "\n<!-- /measured -->"
PEERS = {"llama_cpp": "llama.cpp", "ik_llama_cpp": "ik_llama.cpp"}


def table() -> str:
    """All committed rows as Markdown, lost ones too."""
    parts = ["\n".join(_comparison(results)) for results in _comparisons()]
    models = sorted(RESULTS.glob("model_*.json"))
    if models:
        parts.append("\n".join(_unquantised(models)))
    vision = RESULTS / "vision.json"
    if vision.exists():
        parts.append("\n".join(_vision(vision)))
    parts += ["\n".join(_cuda(path)) for path in sorted(RESULTS.glob("cuda_*.json"))]
    tokenizer = RESULTS / "tokenizer.json"
    if tokenizer.exists():
        parts.append("\n".join(_tokenizer(tokenizer)))
    decodes = sorted(RESULTS.glob("kv_decode_[0-9]*.json"))
    if decodes:
        parts.append("\n".join(_kv_decode(decodes)))
    ledgers = sorted(RESULTS.glob("ledger_*.json"))
    if ledgers:
        parts.append("\n".join(_ledger(ledgers)))
    return "\n\n".join(parts)


def _comparisons() -> list[list[dict[str, Any]]]:
    """The results of compare_llama_cpp.py, those of one file and one kind of processor together."""
    files: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("llama_cpp_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        first = result["rows"][0]
        key = (first["model"], first["type"], first.get("puna_quant", ""))
        files.setdefault((*key, _instructions(result["machine"])), []).append(result)
    return list(files.values())


def _instructions(machine: dict[str, Any]) -> str:
    """What products of int8 are made of there."""
    names = {"avx512_vnni": "AVX-512 VNNI", "avx512f": "AVX-512", "avx2": "AVX2"}
    return next((names[name] for name in names if name in machine["instructions"]), "")


def _comparison(results: list[dict[str, Any]]) -> Iterator[str]:
    rows = [row for result in results for row in result["rows"]]
    first, kinds = rows[0], ["prefill", "decode", "load"]
    rounds = sorted({result["rounds"] for result in results})
    weights = first["type"]
    if "puna_quant" in first:
        weights = f"the peers in {weights}, puna in {first['puna_quant']}"
    yield (
        f"Llama 4 {first['model'].capitalize()}, {first['layers']} layers, {weights}, "
        f"{_instructions(results[0]['machine'])}, "
        f"{' or '.join(map(str, rounds))} rounds ({max(result['date'] for result in results)}); "
        "tokens/s, seconds for loading:"
    )
    yield ""
    yield (
        "| | threads | puna | " + " | ".join(PEERS.values()) + " | ratio to the better | ceiling |"
    )
    yield "|---|---|---|" + "---|" * len(PEERS) + "---|---|"
    rows.sort(key=lambda row: (kinds.index(row["kind"]), -row["threads"], row["depth"]))
    for row in rows:
        if row["kind"] == "load":
            what = f"load, {row['state']}"
        elif row["kind"] == "prefill":
            what = f"prefill {row['tokens']}" + (f" at {row['depth']}" if row["depth"] else "")
        else:
            what = f"decode at {row['depth']}"
        cells = [what, str(row["threads"])]
        cells += [_number(row.get(name)) for name in ("puna", *PEERS)]
        cells += [f"{row['ratio_best_peer']:.2f}" if "ratio_best_peer" in row else "-", _share(row)]
        yield "| " + " | ".join(cells) + " |"


def _vision(path: Path) -> Iterator[str]:
    result = json.loads(path.read_text(encoding="utf-8"))
    machine = result["machine"]
    yield (
        f"The vision tower in its true size, random weights, {machine['processor']}, beside "
        f"transformers {machine['transformers']} with torch {machine['torch']} in the faster of "
        "bfloat16 and float32; seconds:"
    )
    yield ""
    yield "| tiles | threads | puna | transformers | ratio | share of bf16 peak |"
    yield "|---|---|---|---|---|---|"
    for row in result["rows"]:
        yield (
            f"| {row['tiles']} | {row['threads']} | {row['puna_seconds']:.2f} "
            f"| {row['transformers_seconds']:.2f} | {row['ratio']:.2f} "
            f"| {100 * row['share_of_bf16_peak']:.0f} % |"
        )


# What the steps of gpu_run.sh with these endings do otherwise than those without.
NOTES = {
    "-warpgroups": ", by warpgroups",
    "-host-experts": ", experts of the host by the CPU",
    "-sent-experts-0": ", experts of the host by the CPU",
    "-sent-experts-1": ", experts of the host sent to the GPU",
}


def _note(step: str) -> str:
    return next((note for ending, note in NOTES.items() if step.endswith(ending)), "")


def _cuda(path: Path) -> Iterator[str]:
    result = json.loads(path.read_text(encoding="utf-8"))
    facts = result["products"]["facts"]
    yield (
        f"On a GPU ({facts['device']}: reads {facts['read GB/s'] / 1000:.2f} TB/s, "
        f"{facts['int8 TOP/s']:.0f} TOP/s of int8 and {facts['bf16 TFLOP/s']:.0f} TFLOP/s of "
        f"bf16 by the instructions used, measured beside it), {result.get('date', '')}:"
    )
    yield ""
    yield "| models of the true shapes, random weights | | tokens/s | share of the ceiling |"
    yield "|---|---|---|---|"
    for name, model in result.items():
        for row in model.get("rows", []) if isinstance(model, dict) else []:
            if "phase" not in row or "tokens/s" not in row:
                continue
            what = f"{row['phase']} {row['tokens']} at {row['depth']}"
            if row["phase"] == "decode":
                share = f"{row['% of read']:.0f} % of read bandwidth"
                what += f", {row['sequences']} sequences" if row["sequences"] > 1 else ""
            elif "-sequences" in name:
                continue
            else:
                share = f"{row['% of bf16 peak']:.0f} % of bf16 peak"
            yield (
                f"| {model['facts']['shape']}, {model['facts']['layers made']} layers, "
                f"{model['facts'].get('experts made', 'dense')}{_note(name)} | {what} "
                f"| {row['tokens/s']:,.0f} | {share} |"
            )
    for step in ("vision", "vision-warpgroups"):
        for row in result.get(step, {}).get("rows", []):
            yield (
                f"| vision tower, bfloat16{_note(step)} | {row['tiles']} tiles "
                f"| {row['tiles/s']:,.0f} tiles/s | {row['% of bf16 peak']:.0f} % of bf16 peak |"
            )
    yield ""
    yield "| operation | rows | us | | share of the nearer ceiling |"
    yield "|---|---|---|---|---|"
    for step in ("products", "products-warpgroups", "attention", "choice"):
        for row in result.get(step, {}).get("rows", []):
            if row["% of read"] >= row["% of int8"]:
                rate = f"{row['GB/s']:,.0f} GB/s | {row['% of read']:.0f} % of read bandwidth"
            else:
                rate = f"{row['TOP/s']:.0f} TOP/s | {row['% of int8']:.0f} % of int8"
            yield f"| {row['operation']}{_note(step)} | {row['rows']} | {row['us']:,.1f} | {rate} |"


def _kv_decode(paths: list[Path]) -> Iterator[str]:
    yield (
        "Attention of one decoded token over a long cache, one layer of Scout with full attention, "
        "by `puna-bench kv-decode`:"
    )
    yield ""
    yield (
        "| tokens | KV cache | kernels | ms | GB/s | share of what reading alone takes "
        "| peak memory |"
    )
    yield "|---|---|---|---|---|---|---|"
    # By length, then by instruction set, the widest of each first.
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    results.sort(
        key=lambda result: (
            result["facts"]["tokens"],
            result["facts"]["isa"],
            -result["facts"]["cache GB"],
        )
    )
    for result in results:
        facts, row = result["facts"], result["rows"][0]
        disk = row.get("% of disk read")
        share = row["% of read"] if disk is None else disk
        yield (
            f"| {facts['tokens']:,} | {facts['kv']}, {facts['cache GB']:.2f} GB, "
            f"{'memory' if disk is None else 'memory and disk'} "
            f"| {facts['isa']} | {row['ms a step']:,.0f} "
            f"| {row['cache GB/s']:.1f} | {share:.0f} % | {facts['peak resident GiB']:.2f} GiB |"
        )


def _ledger(paths: list[Path]) -> Iterator[str]:
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    machine = results[0]["machine"]
    yield (
        f"Look-ups in a long context, by `bench/ledger.py` ({machine['cores']} cores of "
        f"{machine['processor'].split(',')[0]}, {results[0]['date']}):"
    )
    yield ""
    yield "| tokens | KV cache | memory allowed | right | seconds | tokens/s read | peak memory |"
    yield "|---|---|---|---|---|---|---|"
    for result in results:
        place = "memory and disk" if result["disk"] else "memory"
        size = result["tokens"] * result["kv_bytes_per_token"] / 1e9
        yield (
            f"| {result['tokens']:,} | {result['kv']}, {size:.2f} GB, {place} "
            f"| {result['ram'] or 'any'} | {result['right']:,} of {result['queries']:,} "
            f"| {result['seconds']:.0f} | {result['prefill_tokens_per_second']:,.0f} "
            f"| {result['peak_rss'] / 1e9:.2f} GB |"
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _share(row: dict[str, Any]) -> str:
    if "puna" not in row.get("share_of_ceiling", {}):
        return "-"
    of = "read bandwidth" if row["kind"] == "decode" else "int8 peak"
    return f"{100 * row['share_of_ceiling']['puna']:.0f} % of {of}"


def _unquantised(paths: list[Path]) -> Iterator[str]:
    yield "Unquantised layers of the true shapes, by `puna-bench model`:"
    yield ""
    yield "| | layers | | tokens/s | | share of the ceiling measured beside it |"
    yield "|---|---|---|---|---|---|"
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        facts = result["facts"]
        for row in result["rows"]:
            if row["phase"] == "decode":
                rate = f"{row['GB/s']:.1f} GB/s | {row['% of read']:.0f} % of read bandwidth"
            else:
                rate = f"{row['GFLOP/s']:.0f} GFLOP/s | {row['% of bf16 peak']:.0f} % of bf16 peak"
            yield (
                f"| {facts['shape']} | {facts['layers made']} | {row['phase']} {row['tokens']} "
                f"at {row['depth']} | {row['tokens/s']:.1f} | {rate} |"
            )


def _tokenizer(path: Path) -> Iterator[str]:
    result = json.loads(path.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    names = ["puna", "puna_stream", *result["versions"]]
    heads = ["puna", "puna, 1 KB at a time", *result["versions"]]
    yield (
        f"Tokenizers, Llama 4's vocabulary, {result['processor']} ({result['date']}; {versions}), "
        f"load average {result['load_average']}. "
        "MB/s of UTF-8 encoded by one thread in one cold pass; `*`: wrong ids:"
    )
    yield ""
    yield "| | " + " | ".join(heads) + " |"
    yield "|---|" + "---|" * len(heads)
    for row in result["rows"]:
        cells = []
        for name in names:
            wrong = "*" if name in row["differs"] else ""
            fails = "fails" if name in row["failed"] else "-"
            speed = row["MB/s"].get(name)
            cells.append(fails if speed is None else _number(speed) + wrong)
        yield f"| {row['text']}, {row['bytes'] / 1e6:.1f} MB | " + " | ".join(cells) + " |"
    if "loads" in result:
        yield ""
        yield "Loading that vocabulary, ms of CPU time, files in memory:"
        yield ""
        yield "| " + " | ".join(result["loads"]) + " |"
        yield "|---" * len(result["loads"]) + "|"
        yield "| " + " | ".join(_number(1e3 * s) for s in result["loads"].values()) + " |"


def main() -> None:
    """Prints or writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--write", action="store_true", help="into README.md")
    if not parser.parse_args().write:
        print(table())
        return
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
