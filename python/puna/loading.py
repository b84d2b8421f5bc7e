"""Planning, loading and quantising checkpoints."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from puna import _core
from puna.arguments import amount, is_ids, place, quant_recipe, token_ids, truth, whole
from puna.chat_template import find_template
from puna.engine import Engine
from puna.errors import InvalidRequest, StorageError, UnsupportedError
from puna.gpus import gpu_of, is_gpu
from puna.options import LOAD_NAMES, unknown_keyword
from puna.planning import Plan, size
from puna.progress import ProgressBar
from puna.streams import StreamLike, stream_handle

_DEMO_NAME = "demo"
_LOGGER = logging.getLogger("puna")


def load(
    model: str | os.PathLike[str],
    *,
    quant: str | Mapping[str, str] | None = None,
    context: int | str | None = None,
    kv: str = "auto",
    kv_offload: str = "auto",
    kv_disk: int | str | None = None,
    device: str = "auto",
    stream: StreamLike | None = None,
    experts: str | int = "auto",
    memory: int | str | None = None,
    host_memory: int | str | None = None,
    threads: int | None = None,
    vision: bool = True,
    mmproj: str | os.PathLike[str] | None = None,
    isa: str | None = None,
    progress: bool = True,
    **unknown: Any,
) -> Engine:
    """Loads a Llama 4 checkpoint.

    Args:
        model: A Hugging Face directory (config.json, safetensors, tokenizer.json or
            tokenizer.model), a GGUF file (any part of one that was split), or "demo" for the small
            model that comes with puna. Files of weights are mapped: while the model is in use, put
            others in their places by renaming, and cut none short, which would end the process.
        quant: Weight format: None keeps weights as they are stored; "int4" packs experts in 4 bits
            and attention and head in 8; "int8" packs all in 8; "fp8" packs all as float8 with a
            scale for each row; or a format's name. A mapping of patterns to formats overrides
            matrices, its key "default" being the recipe (see docs/formats.md); each must match one.
            Routers and the vision tower are never quantised.
        context: Tokens a session may hold, as a number or like "128k" or "1M" (powers of 1024);
            None is the largest that fits.
        kv: Format of the KV cache: "auto" (as the weights), "bf16", "fp32", or "int8" or "int4",
            in which the layers that attend to everything keep full pages.
        kv_offload: Where the KV cache may live besides memory: "auto" and "none" are nowhere;
            "host" is the host's memory, for what a GPU's does not hold; "disk:PATH" is files in
            that directory, which are gone when the process ends, behind the host's memory if a GPU
            computes. What fits into memory stays there; attention reads the rest each time, at the
            speed of the GPU's link or of the disk. Results are the same, bit for bit.
        kv_disk: Bytes that those files may take, as a number or like "200G"; None is what the disk
            has free.
        device: "cpu", "cuda" (or "cuda:1", of several GPUs), or "ref": the slow double-precision
            reference. "auto" is the GPU if there is one whose memory, and what `kv_offload="host"`
            adds to it, holds the model and its context, and neither `isa` nor a disk is given;
            otherwise the CPU. `attention` can be other than exact on the CPU alone. Threads that
            call the engine have its GPU as CUDA's current device afterwards.
        stream: With device="cuda", a stream of that GPU on which the engine asks for its work, as
            `cuda.core.Device().create_stream()` makes them: whatever has `__cuda_stream__()`, but
            no default stream. It is kept until the engine is closed, and must not be captured into
            a graph meanwhile. None is a stream of the engine's own.
        experts: Where routed experts live if the device is a GPU. "auto" is its memory, and with
            device="cuda", for as many layers as it does not hold beside the context (None: 8,192
            tokens, or more if all fit), the host's, where the CPU computes them; `llm.plan` tells
            how many. "gpu" and "cpu" are one of the two for all layers; a number is that of the
            layers, the last ones, whose experts the GPU has. Results are the same, with quantised
            experts bit for bit.
        memory: Bytes for weights and KV cache together, as a number or like "24G", of the GPU's
            memory if it computes; None is what is free.
        host_memory: Bytes of the host's memory for what a GPU leaves to it, experts and KV cache,
            likewise; None is what is free.
        threads: Compute threads; None is the physical cores this process may use.
        vision: False leaves the vision tower on disk.
        mmproj: The GGUF file of the vision tower that goes with a GGUF file; None takes the one
            beside it (*mmproj*.gguf) that fits.
        isa: Instruction set, e.g. "avx2"; None is the best the processor supports.
        progress: Show a progress bar on stderr when loading, or reading a long prompt, takes more
            than a moment.

    Raises:
        ModelNotFound: There is no checkpoint at `model`.
        ModelFormatError: A file is damaged, or a tensor is missing or misshapen.
        UnsupportedError: The checkpoint or an argument asks for what this version cannot do.
        OutOfMemory: Weights or context do not fit; nothing has been read.
        DeviceError: The device or instruction set is not available here.
        StorageError: The directory of `kv_offload` cannot be written to.
    """
    if unknown:
        raise unknown_keyword("load", next(iter(unknown)), LOAD_NAMES)
    shared = _shared_options(
        kv=kv, context=context, memory=memory, vision=vision, mmproj=mmproj, quant=quant
    )
    for name, value in (("device", device), ("isa", "" if isa is None else isa)):
        if not isinstance(value, str):
            raise InvalidRequest(f"{name} is {value!r:.80}; it must be a string", param=name)
    to_host, disk_path = _offload(kv_offload)
    device_experts = _device_experts(experts, device)
    handle = 0 if stream is None else stream_handle(stream)
    path = _path(model)
    template = find_template(path)  # a damaged one is told of before minutes of loading
    bar = ProgressBar(f"Loading {path.name}", "B") if progress else None
    try:
        core = _core.load(
            path=os.fspath(path),
            device=device,
            isa=isa or "",
            threads=whole("threads", threads, most=(1 << 31) - 1),
            kv_host=to_host,
            kv_disk=disk_path,
            kv_disk_bytes=amount("kv_disk", kv_disk),
            device_experts=device_experts,
            host_memory=amount("host_memory", host_memory),
            stream=stream,
            stream_handle=handle,
            progress=bar.update if bar else None,
            **shared,
        )
    except StorageError as error:
        if not disk_path:
            raise
        raise StorageError(
            f"kv_offload is {kv_offload!r:.200}, which cannot be used: {error}; "
            "give a folder that can be written to"
        ) from error
    finally:
        if bar:
            bar.close()
    if device == "auto" and not core.info()["device"].startswith("cuda"):
        _say_why_without_gpu()
    made = core.plan()
    if made["host_layers"]:
        _say_what_the_host_has(
            made["host_layers"], made["expert_layers"], made["host_expert_bytes"]
        )
    return Engine(core, path, template, progress)


@functools.cache
def _say_what_the_host_has(host_layers: int, layers: int, host_bytes: int) -> None:
    """Tells, once, that a GPU leaves experts to the CPU."""
    _LOGGER.warning(
        "the routed experts of %d of %d layers (%s) are in the host's memory, where the CPU"
        " computes them; llm.plan says how fast that can be",
        host_layers,
        layers,
        size(host_bytes),
    )


@functools.cache
def _say_why_without_gpu() -> None:
    """Tells, once, why "auto" is not a GPU."""
    cuda = next(backend for backend in _core.backends() if backend["name"] == "cuda")
    if cuda["available"]:
        _LOGGER.warning(
            "device='auto' is the CPU although there is a GPU (%s): its memory does not hold the"
            " model and its context, or a disk or isa is given; device='cuda' leaves experts"
            " that do not fit to the CPU, or says more",
            cuda["why"],
        )
    else:
        _LOGGER.info("device='auto' is the CPU: %s", cuda["why"])


def plan(
    model: str | os.PathLike[str],
    *,
    context: int | str | None = None,
    kv: str = "auto",
    quant: str | Mapping[str, str] | None = None,
    memory: int | str | None = None,
    disk: int | str | None = None,
    device: str = "cpu",
    experts: str | int = "auto",
    kv_offload: str = "auto",
    host_memory: int | str | None = None,
    vision: bool = True,
    mmproj: str | os.PathLike[str] | None = None,
    memory_bandwidth: int | str | None = None,
    disk_bandwidth: int | str | None = None,
    host_bandwidth: int | str | None = None,
    link_bandwidth: int | str | None = None,
) -> Plan:
    """What `load` would need with these arguments, without reading weights.

    Args:
        model: As for `load`.
        context: Tokens, as a number or like "10M"; None is the largest that fits.
        kv: As for `load`.
        quant: As for `load`.
        memory: Bytes, as a number or like "24G"; None is what the system has free.
        disk: Bytes of files for what of the KV cache does not fit into memory, that of a GPU's host
            included; None is none.
        device: "cpu", or "cuda" (or "cuda:1"): memory is then that of the GPU, as the driver tells
            it through cuda-python (`pip install "puna[cuda]"`), unless it is given, also for a GPU
            that is not there.
        experts: As for `load`.
        kv_offload: "host" is the host's memory, for what of the KV cache a GPU's does not hold;
            "auto" and "none" are nothing but `disk`.
        host_memory: Bytes for experts and KV cache that a GPU leaves to the host; None is what the
            system has free.
        vision: As for `load`.
        mmproj: As for `load`.
        memory_bandwidth: Bytes a second; None measures this machine's, and does not guess a GPU's.
        disk_bandwidth: Bytes a second; None assumes a slow disk.
        host_bandwidth: Bytes a second of the memory of a GPU's host; None measures this machine's.
        link_bandwidth: Bytes a second from a GPU's host to the GPU; None assumes PCIe 5 x16.

    Raises:
        ContextOverflow: The model does not allow such a context.
        ModelNotFound, ModelFormatError, UnsupportedError, InvalidRequest: As for `load`.
        DeviceError: There is no such GPU, or nothing tells how much memory it has.
    """
    if not isinstance(device, str):
        raise InvalidRequest(f"device is {device!r:.80}; it must be a string", param="device")
    to_host, disk_path = _offload(kv_offload)
    if disk_path:
        raise InvalidRequest(
            f"kv_offload is {kv_offload!r:.80}; a plan has disk= for the bytes on a disk",
            param="kv_offload",
        )
    gpu_memory: int | None = None
    name = ""
    if is_gpu(device):
        gpu_memory, name = 0, device
        if memory is None:
            gpu = gpu_of(device)
            gpu_memory, name = gpu.memory_free, f"{device} ({gpu.name})"
    raw = _core.plan(
        path=os.fspath(_path(model)),
        disk=amount("disk", disk),
        device_experts=_device_experts(experts, device),
        kv_host=to_host,
        host_memory=amount("host_memory", host_memory),
        gpu_memory=gpu_memory,
        **_shared_options(
            kv=kv, context=context, memory=memory, vision=vision, mmproj=mmproj, quant=quant
        ),
    )
    return Plan.of(
        raw,
        memory_bandwidth=float(amount("memory_bandwidth", memory_bandwidth)),
        disk_bandwidth=float(amount("disk_bandwidth", disk_bandwidth)),
        host_bandwidth=float(amount("host_bandwidth", host_bandwidth)),
        link_bandwidth=float(amount("link_bandwidth", link_bandwidth)),
        device=name,
    )


# Of how many layers, as the core takes it: -1 is as many as fit, -2 all.
_EXPERTS = {"auto": -1, "gpu": -2, "cpu": 0}


def _device_experts(experts: Any, device: str) -> int:
    """Of how many layers a GPU has the routed experts.

    Raises:
        InvalidRequest: It is no number and none of the words, or the device has no such memory.
        UnsupportedError: It is "disk".
    """
    if experts == "disk":
        raise UnsupportedError("experts='disk' is not available yet; use 'auto'")
    number: int | None = None
    if isinstance(experts, str):
        number = int(experts) if re.fullmatch(r"\d{1,9}", experts) else _EXPERTS.get(experts)
    elif hasattr(experts, "__index__") and not isinstance(experts, bool):
        number = experts.__index__() if 0 <= experts < 1 << 31 else None
    if number is None:
        raise InvalidRequest(
            f"experts is {experts!r:.80}; it must be 'auto', 'gpu', 'cpu' or a number of layers",
            param="experts",
        )
    if experts not in ("auto", "cpu") and not device.startswith("cuda"):
        raise InvalidRequest(
            f"experts is {experts!r:.80}, which is for device='cuda'; device is {device!r:.80}",
            param="experts",
        )
    return number


def _shared_options(
    *, kv: Any, context: Any, memory: Any, vision: Any, mmproj: Any, quant: Any
) -> dict[str, Any]:
    """The core's keywords that loading and planning share, checked."""
    if not isinstance(kv, str):
        raise InvalidRequest(f"kv is {kv!r:.80}; it must be a string", param="kv")
    recipe, overrides = quant_recipe(quant)
    return {
        "kv": kv,
        "context": amount("context", context),
        "memory": amount("memory", memory),
        "vision": truth("vision", vision),
        "mmproj": _file("mmproj", mmproj),
        "quant": recipe,
        "quant_overrides": overrides,
    }


def _offload(kv_offload: Any) -> tuple[bool, str]:
    """Whether the KV cache may go to a GPU's host; the directory of "disk:PATH", "" for none."""
    if kv_offload in ("auto", "none", "host"):
        return kv_offload == "host", ""
    if isinstance(kv_offload, str) and kv_offload.startswith("disk:") and kv_offload != "disk:":
        return False, os.fspath(place("kv_offload", kv_offload.removeprefix("disk:")))
    raise InvalidRequest(
        f"kv_offload is {kv_offload!r:.80}; it must be 'auto', 'none', 'host' or 'disk:PATH'",
        param="kv_offload",
    )


def quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    quant: str | Mapping[str, str] | None = None,
    mmproj: str | os.PathLike[str] | None = None,
    calibration: str | Sequence[int] | None = None,
    allow_special: bool = False,
    threads: int | None = None,
    progress: bool = True,
) -> tuple[str, ...]:
    """Writes a checkpoint in puna's packed form, which loads by mapping it.

    Needs memory for one matrix at a time; with a calibration text, first for the whole model. The
    output is a checkpoint directory of about the bytes that `load(model, quant=quant)` would hold.

    Args:
        model: A Hugging Face directory, a GGUF file (any part of one that was split), or "demo".
        out: A directory that holds no model yet; made if it is not there.
        quant: As for `load`. None is for GGUF files alone: their weights as they are, which give
            the same results as the file.
        mmproj: As for `load`.
        calibration: A text, or its token ids, that is run through the model as it is stored. Errors
            of a weight then count by the mean square of what the weight is multiplied with there,
            instead of all the same. Some ten thousand tokens of the kind that the model is for.
        allow_special: Read special tokens written in that text, such as "<|eot|>", as such.
        threads: Compute threads; None is the physical cores this process may use.
        progress: Show a progress bar on stderr.

    Returns:
        What looked odd in the checkpoint, a sentence each.

    Raises:
        OutOfMemory: The model as it is stored does not fit, and there is a calibration text.
        ModelNotFound, ModelFormatError, UnsupportedError: As for `load`.
        InvalidRequest: The output is in use, or no matrix matches a pattern of `quant`; nothing has
            been written.
        StorageError: The disk has no room, or refuses a write; nothing is left of what was written.
    """
    recipe, overrides = quant_recipe(quant)
    path, folder = _path(model), place("out", out)
    made = [part for part in (folder, *folder.parents) if not os.path.lexists(part)]
    ids = _calibration_ids(path, calibration, truth("allow_special", allow_special))
    first = ProgressBar(f"Calibrating {path.name}", " tokens") if progress else None
    bar = ProgressBar(f"Quantising {path.name}", "B") if progress else None
    try:
        odd = _core.quantize(
            path=os.fspath(path),
            mmproj=_file("mmproj", mmproj),
            out=os.fspath(folder),
            quant=recipe,
            quant_overrides=overrides,
            threads=whole("threads", threads, most=(1 << 31) - 1),
            calibration=ids,
            progress=bar.update if bar else None,
            calibration_progress=first.update if first else None,
        )
    except BaseException:
        with contextlib.suppress(OSError):  # that holds files of others, or is not there
            for part in made:
                part.rmdir()
        raise
    finally:
        for shown in (first, bar):
            if shown:
                shown.close()
    return tuple(odd)


def _calibration_ids(
    path: Path, calibration: str | Sequence[int] | None, allow_special: bool
) -> list[int]:
    if calibration is None:
        return []
    if isinstance(calibration, str):
        tokenizer = _core.Tokenizer.from_file(os.fspath(path))
        special = "all" if allow_special else "none"
        ids: list[int] = tokenizer.encode(calibration, allowed_special=special).tolist()
    elif is_ids(calibration):
        ids = token_ids(calibration, 1 << 31, "calibration")
    elif isinstance(calibration, Sequence) and not calibration:
        ids = []
    else:
        raise InvalidRequest(
            f"calibration is {calibration!r:.80}; it must be a text or its token ids",
            param="calibration",
        )
    if not ids:
        raise InvalidRequest("the calibration text has no tokens", param="calibration")
    return ids


def _file(name: str, path: str | os.PathLike[str] | None) -> str:
    """As the core takes a file that need not be given."""
    return "" if path is None else os.fspath(place(name, path))


def _path(model: str | os.PathLike[str]) -> Path:
    return demo_directory() if os.fspath(model) == _DEMO_NAME else place("model", model)


def demo_directory() -> Path:
    """Where the bundled demo checkpoint lies."""
    return Path(__file__).parent / "demo"
