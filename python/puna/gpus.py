"""NVIDIA GPUs of this machine: their names, memory and driver, found without starting any of them.

By NVML through the optional package cuda-python (`pip install "puna[cuda]"`); without it, or where
it finds no driver, by what the driver tells in /proc, which is not how much memory there is.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.errors import DeviceError, InvalidRequest

_PROC = Path("/proc/driver/nvidia")


@dataclass(frozen=True)
class Gpu:
    """A GPU; bytes of memory are None where they are not known.

    NVML counts GPUs in the order of their slots, and all of them; CUDA, and with it "cuda:1", those
    of CUDA_VISIBLE_DEVICES, in an order of its own unless CUDA_DEVICE_ORDER is PCI_BUS_ID.
    """

    index: int
    name: str
    memory_total: int | None = None
    memory_free: int | None = None


@dataclass(frozen=True)
class Gpus:
    """What was found, and by what: "nvml" or "proc".

    Attributes:
        devices: The GPUs.
        driver: The driver's version, or None if there is none.
        source: What told.
        why: Why there are none, or why nothing is known of their memory; "" if all is known.
    """

    devices: tuple[Gpu, ...]
    driver: str | None
    source: str
    why: str = ""


def find_gpus() -> Gpus:
    """The GPUs of this machine; never raises."""
    try:
        system = importlib.import_module("cuda.core.system")
    except ImportError:
        return _by_proc("cuda-python is not installed (pip install 'puna[cuda]')")
    try:
        return _by_nvml(system)
    except Exception as error:  # NVML and the search for it have dozens of classes of errors
        return _by_proc(f"cuda-python: {error}")


def is_gpu(device: str) -> bool:
    """Whether it is "cuda" or "cuda:N", and not "cpu".

    Raises:
        InvalidRequest: It is neither.
    """
    if device == "cpu":
        return False
    kind, _, number = device.partition(":")
    if kind != "cuda" or not (device == "cuda" or number.isdecimal()):
        raise InvalidRequest(
            f"device is {device!r:.80}; it must be 'cpu', 'cuda' or 'cuda:N'", param="device"
        )
    return True


def gpu_of(device: str) -> Gpu:
    """The GPU of "cuda" or "cuda:N", whose memory is known.

    Raises:
        DeviceError: There is no such GPU, or nothing tells how much memory it has.
    """
    found, index = find_gpus(), int(device.partition(":")[2] or 0)
    if index >= len(found.devices):
        why = found.why or f"there are {len(found.devices)}"
        raise DeviceError(f"there is no GPU {device} to plan for: {why}; memory= plans without one")
    if found.devices[index].memory_free is None:
        raise DeviceError(f"the memory of {device} is not known: {found.why}")
    return found.devices[index]


def _by_nvml(system: Any) -> Gpus:
    devices = []
    for index, device in enumerate(system.Device.get_all_devices()):
        memory = device.memory_info
        devices.append(Gpu(index, str(device.name), int(memory.total), int(memory.free)))
    version = system.get_kernel_mode_driver_version()
    driver = version if isinstance(version, str) else ".".join(str(part) for part in version)
    return Gpus(tuple(devices), driver, "nvml", "" if devices else "the driver knows of no GPU")


def _by_proc(why: str) -> Gpus:
    version = _PROC / "version"
    driver = version.read_text(errors="replace").splitlines()[0] if version.is_file() else None
    devices = []
    for index, information in enumerate(sorted(_PROC.glob("gpus/*/information"))):
        fields = dict(
            line.split(":", 1)
            for line in information.read_text(errors="replace").splitlines()
            if ":" in line
        )
        devices.append(Gpu(index, fields.get("Model", "unknown").strip()))
    return Gpus(tuple(devices), driver, "proc", why)
