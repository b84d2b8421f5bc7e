"""What a model needs, and whether this machine has it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from puna import _core

# Of a disk, where nothing is given: a solid-state one behind SATA, or a small share of a fast one.
_ASSUMED_DISK = 0.5e9
# Of the link between a GPU and its host: PCIe 5 x16, of whose 63 GB/s copies get so much.
_ASSUMED_LINK = 55e9


def size(count: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


@dataclass(frozen=True, slots=True)
class Remedy:
    """Keywords of `load` with which a model would fit, and the bytes it needs then."""

    change: str
    memory_bytes: int
    disk_bytes: int = 0

    def __str__(self) -> str:
        disk = f" and {size(self.disk_bytes)} of disk" if self.disk_bytes else ""
        return f"{self.change}: {size(self.memory_bytes)} of memory{disk}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a model occupies, how far its context reaches, and how fast it can be at best.

    `str(plan)` is a table of it.

    Attributes:
        context: Tokens that a session may hold: as asked, or the largest number that fits.
        largest_context: The largest number that fits.
        max_context: Tokens that the model was made for.
        kv: Format of the KV cache: "bf16", "fp32", "int8" or "int4".
        weight_bytes: Packed weights in memory, the vision tower among them.
        vision_bytes: Of them, the vision tower.
        scratch_bytes: Activations of one forward pass, and what is kept of pictures.
        kv_sealed_bytes: Full pages of the layers that attend to everything, at `context` tokens.
        kv_open_bytes: Their pages that are being written.
        kv_local_bytes: Layers that keep the current chunk only.
        kv_bytes_per_token: Growth of the KV cache per token.
        kv_memory_bytes: Of the KV cache, in memory.
        kv_offloads: Whether what of it a GPU's memory does not hold may go to its host.
        kv_host_bytes: Of the KV cache, in the memory of a GPU's host.
        kv_disk_bytes: Of the KV cache, in files.
        memory_needed: Weights, activations and what of the KV cache must be in memory, with what
            reads it ahead from files (up to 64 MiB; of a GPU's host, in `host_needed`).
        memory_bytes: Memory there is: the budget given, or what the system had free.
        memory_given: Which of the two.
        disk_needed: Bytes of files.
        disk_bytes: Disk that may be used; 0 is none.
        fits: Whether what is needed is there.
        step_memory_bytes: What is read from memory for a token after a full context: the weights it
            uses and the keys and values that are there.
        step_disk_bytes: The keys and values that are read from files for it.
        step_host_bytes: The experts that are read from the host's memory for it; not among
            `step_memory_bytes`.
        step_link_bytes: The keys and values that go to a GPU over its link for it: those that its
            memory does not hold.
        on_gpu: Whether memory is that of a GPU.
        expert_layers: Layers with routed experts.
        host_layers: Of them, the first ones, whose experts a GPU leaves to the host's memory, where
            the CPU computes them.
        host_expert_bytes: Of the weights, those experts.
        expert_window_bytes: Of the GPU's memory, for what is sent of them where a prompt has many
            tokens; the GPU then computes them. 0 if the CPU computes all.
        host_needed: Bytes of the host's memory for them, for computing them, and for what of the KV
            cache must be there.
        host_bytes: The host's memory there is for all that; 0 if nothing is left to the host.
        memory_bandwidth: Bytes a second, as given; 0 means that it is measured when it is needed,
            or, of a GPU, that it is not known.
        disk_bandwidth: Bytes a second, as given; 0 means a guess.
        host_bandwidth: Bytes a second of a GPU's host, as given; 0 means that it is measured.
        link_bandwidth: Bytes a second between a GPU and its host, as given; 0 means a guess.
        remedies: Up to three ways to make it fit if it does not.
        device: The device and how it computes, of a loaded model; or the GPU that it is planned
            for.
        warnings: What looked odd in the checkpoint, of a loaded model.
    """

    context: int
    largest_context: int
    max_context: int
    kv: str
    weight_bytes: int
    vision_bytes: int
    scratch_bytes: int
    kv_sealed_bytes: int
    kv_open_bytes: int
    kv_local_bytes: int
    kv_bytes_per_token: int
    kv_memory_bytes: int
    kv_disk_bytes: int
    memory_needed: int
    memory_bytes: int
    memory_given: bool
    disk_needed: int
    disk_bytes: int
    fits: bool
    step_memory_bytes: int
    step_disk_bytes: int
    step_host_bytes: int
    on_gpu: bool
    expert_layers: int
    host_layers: int
    host_expert_bytes: int
    expert_window_bytes: int
    host_needed: int
    host_bytes: int
    kv_offloads: bool
    kv_host_bytes: int
    step_link_bytes: int
    memory_bandwidth: float = 0.0
    disk_bandwidth: float = 0.0
    host_bandwidth: float = 0.0
    link_bandwidth: float = 0.0
    remedies: tuple[Remedy, ...] = ()
    device: str = ""
    warnings: tuple[str, ...] = ()

    @staticmethod
    def of(raw: Mapping[str, Any], **more: Any) -> Plan:
        """From what the core says, and fields that it does not know."""
        remedies = tuple(Remedy(*remedy) for remedy in raw["remedies"])
        return Plan(**{**raw, "remedies": remedies, **more})

    @property
    def tokens_per_second(self) -> float:
        """The most tokens a second after a full context, if nothing but reading took time.

        By the bandwidths given, or that of the memory as measured now, once in a process. Of a GPU
        whose bandwidth was not given only the shares of the host, its link and the disk count; NaN
        if there are none.
        """
        host = self.step_link_bytes / (self.link_bandwidth or _ASSUMED_LINK)
        if self.step_host_bytes:
            host += self.step_host_bytes / (self.host_bandwidth or _core.memory_bandwidth())
        disk = self.step_disk_bytes / (self.disk_bandwidth or _ASSUMED_DISK)
        if self._of_unknown_speed:
            return 1 / max(host, disk) if host or disk else math.nan
        memory = self.step_memory_bytes / (self.memory_bandwidth or _core.memory_bandwidth())
        # The disk is read at the same time; a layer's experts, and its pages from the host, wait
        # for what is before them.
        return 1 / max(memory + host, disk, 1e-12)

    def __str__(self) -> str:
        given = "given" if self.memory_given else "free"
        rows = [
            (
                "context",
                f"{self.context:,} tokens of {self.max_context:,}; {self.kv} keys and values,"
                f" {self.kv_bytes_per_token:,} bytes a token",
            ),
            ("weights", size(self.weight_bytes) + self._part(self.vision_bytes, "vision tower")),
            (
                "KV cache",
                f"{size(self.kv_sealed_bytes)} of full pages, {size(self.kv_open_bytes)} of open"
                f" ones, {size(self.kv_local_bytes)} for the current chunk",
            ),
            ("activations", size(self.scratch_bytes)),
            ("memory", f"{size(self.memory_needed)} of {size(self.memory_bytes)} {given}"),
        ]
        if self.on_gpu and self.expert_layers:
            rows.append(("experts", self._experts()))
        if self.host_layers or self.kv_offloads:
            host = f"{size(self.host_needed)} of {size(self.host_bytes)} for them"
            if self.kv_offloads:
                host = (
                    f"{size(self.host_needed)} of {size(self.host_bytes)} needed;"
                    f" {size(self.kv_host_bytes)} of the KV cache there"
                )
            rows.append(("host memory", host))
        if self.disk_bytes:
            where = f"; {size(self.kv_memory_bytes)} of the KV cache stay in memory"
            rows.append(("disk", f"{size(self.disk_needed)} of {size(self.disk_bytes)}{where}"))
        rows.append(("speed", self._speed()))
        lines = [f"{name:<12} {text}" for name, text in rows]
        if self.fits:
            lines.append("It fits.")
        else:
            lines.append("It does not fit. It would with")
            lines += [f"  {remedy}" for remedy in self.remedies]
        return "\n".join(lines)

    @staticmethod
    def _part(count: int, name: str) -> str:
        return f", {size(count)} of them the {name}" if count else ""

    @property
    def _of_unknown_speed(self) -> bool:
        return self.on_gpu and not self.memory_bandwidth

    def _experts(self) -> str:
        if not self.host_layers:
            return f"those of all {self.expert_layers} layers on the GPU"
        there = self.expert_layers - self.host_layers
        window = ""
        if self.expert_window_bytes:
            window = (
                f", of long prompts by the GPU ({size(self.expert_window_bytes)} of its memory)"
            )
        return (
            f"those of {there} of {self.expert_layers} layers on the GPU; of {self.host_layers}"
            f" ({size(self.host_expert_bytes)}) in the host's memory, computed by the CPU{window}"
        )

    def _elsewhere_speed(self) -> str:
        """What a token reads that is not in the memory of what computes."""
        parts = []
        if self.step_disk_bytes:
            disk = self.disk_bandwidth or _ASSUMED_DISK
            source = "given" if self.disk_bandwidth else "a guess"
            parts.append(
                f"{size(self.step_disk_bytes)} from disk at {disk / 1e9:.3g} GB/s ({source})"
            )
        if self.step_link_bytes:
            link = self.link_bandwidth or _ASSUMED_LINK
            source = "given" if self.link_bandwidth else "a guess"
            parts.append(
                f"{size(self.step_link_bytes)} of keys and values a token over the GPU's link at"
                f" {link / 1e9:.3g} GB/s ({source})"
            )
        if self.step_host_bytes:
            bandwidth = self.host_bandwidth or _core.memory_bandwidth()
            source = "given" if self.host_bandwidth else "measured"
            parts.append(
                f"{size(self.step_host_bytes)} of experts a token from the host's memory at"
                f" {bandwidth / 1e9:.3g} GB/s ({source})"
            )
        return ", and ".join(parts)

    def _speed(self) -> str:
        if self._of_unknown_speed:
            unknown = f"memory_bandwidth= is for that of {self.device}"
            elsewhere = self._elsewhere_speed()
            if not elsewhere:
                return f"unknown; {unknown}"
            most = f"at most {self.tokens_per_second:.3g} tokens/s: {elsewhere}"
            return f"{most}, beside what the GPU takes; {unknown}"
        bandwidth = self.memory_bandwidth or _core.memory_bandwidth()
        source = "given" if self.memory_bandwidth else "measured"
        text = (
            f"at most {self.tokens_per_second:.3g} tokens/s after a full context:"
            f" {size(self.step_memory_bytes)} a token at {bandwidth / 1e9:.3g} GB/s ({source})"
        )
        elsewhere = self._elsewhere_speed()
        return f"{text}, and {elsewhere}" if elsewhere else text
