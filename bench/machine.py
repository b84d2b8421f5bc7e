"""What a result was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Processor, memory and system, as Linux tells them."""
    cpu = dict(
        (part.strip() for part in line.split(":", 1))
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if ":" in line
    )
    meminfo = Path("/proc/meminfo").read_text().split()
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    wanted = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    return {
        "processor": f"{cpu.get('model name', platform.machine())}, "
        f"family {cpu.get('cpu family')}, model {cpu.get('model')}",
        "cores": len(os.sched_getaffinity(0)),
        "instructions": [flag for flag in wanted if flag in cpu.get("flags", "").split()],
        "memory_gib": round(int(meminfo[1]) / (1 << 20), 1),
        "huge_pages": huge.read_text().strip() if huge.exists() else "none",
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
    }
