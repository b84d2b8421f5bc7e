"""What puna finds on this machine: for bug reports and for choosing a model that fits."""

from __future__ import annotations

import ctypes.util
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import puna
from puna import _core


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
        "gpu": _gpu(),
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


def _gpu() -> dict[str, Any]:
    """Whether the NVIDIA driver and its devices are there; nothing of it is loaded or started."""
    proc = Path("/proc/driver/nvidia")
    version = proc / "version"
    driver = version.read_text(errors="replace").splitlines()[0] if version.is_file() else None
    names = []
    for information in sorted(proc.glob("gpus/*/information")):
        fields = dict(
            line.split(":", 1) for line in information.read_text().splitlines() if ":" in line
        )
        names.append(fields.get("Model", "unknown").strip())
    return {
        "driver": driver,
        "libcuda": ctypes.util.find_library("cuda"),
        "devices": names,
    }


def _gpu_in_words(gpu: dict[str, Any]) -> str:
    devices, driver = ", ".join(gpu["devices"]), gpu["driver"]
    if devices:
        return f"NVIDIA {devices} ({driver or 'driver of unknown version'})"
    if driver or gpu["libcuda"]:
        return f"an NVIDIA driver ({driver or gpu['libcuda']}), but no device"
    return "no NVIDIA driver or device"


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"
