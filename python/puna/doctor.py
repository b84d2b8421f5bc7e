"""What puna finds on this machine: for bug reports and for choosing a model that fits."""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict
from importlib import metadata
from typing import Any

import puna
from puna import _core
from puna.gpus import find_gpus


def examine() -> dict[str, Any]:
    """Versions, processor, instruction sets, memory and backends, as plain data."""
    system = _core.system()
    return {
        "puna": puna.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _installed(name) for name in ("numpy", "jinja2", "pillow", "tqdm")},
        "processor": system["processor"],
        "threads": system["threads"],
        "memory_total": system["memory_total"],
        "memory_available": system["memory_available"],
        "isas": puna.isas(),
        "gpu": asdict(find_gpus()),
        "backends": puna.backends(),
    }


def explain(report: dict[str, Any]) -> str:
    """The report for people."""
    from puna.planning import size

    packages = ", ".join(f"{name} {version}" for name, version in report["packages"].items())
    chosen = next(isa["name"] for isa in report["isas"] if isa["available"])
    others = ", ".join(
        isa["name"] + ("" if isa["available"] else " (not here)")
        for isa in report["isas"]
        if isa["name"] != chosen
    )
    lines = [
        f"puna        {report['puna']} on Python {report['python']}, {report['platform']}",
        f"packages    {packages}",
        f"processor   {report['processor']}, {report['threads']} compute threads",
        f"isa         {chosen} (also built: {others})",
        f"memory      {size(report['memory_available'])} free of {size(report['memory_total'])}",
        f"gpu         {_gpu_in_words(report['gpu'])}",
    ]
    for backend in report["backends"]:
        state = "yes" if backend["available"] else "no"
        lines.append(f"{'backend':<11} {backend['name']}: {state}, {backend['why']}")
    return "\n".join(lines)


def _gpu_in_words(gpu: dict[str, Any]) -> str:
    if not gpu["devices"]:
        found = f"an NVIDIA driver ({gpu['driver']}), but no GPU" if gpu["driver"] else "none found"
        return f"{found}; {gpu['why']}"
    driver = gpu["driver"] or "of unknown version"
    return ", ".join(_one_gpu(one) for one in gpu["devices"]) + f"; driver {driver}"


def _one_gpu(gpu: dict[str, Any]) -> str:
    from puna.planning import size

    if gpu["memory_total"] is None:
        return f"{gpu['name']} (memory unknown without cuda-python)"
    return f"{gpu['name']}, {size(gpu['memory_free'])} free of {size(gpu['memory_total'])}"


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"
