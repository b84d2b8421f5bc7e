"""`puna plan` and `llm.plan`: the bytes of models of the true size, and what load() makes of them.

The checkpoints are those of test_inspect: true headers before holes.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import puna
from oracle.ledger import Ledger
from puna.cli import main
from test_inspect import GIB, GUARD, SCOUT, write_sparse

TOKENS = 10_485_760
GLOBAL, LOCAL = 12, 36
PAGE = 256
# Of one page of one layer: 8 heads of 128 channels. Sealed: codes, and 4 bytes of scale and zero
# point for each channel of the keys and each token's values.
OPEN = 8 * 2 * PAGE * 128 * 2
SEALED = {"int8": 8 * (2 * PAGE * 128 + (128 + PAGE) * 4)}
SEALED["int4"] = SEALED["int8"] - 8 * PAGE * 128
RING = LOCAL * 8192 // PAGE * OPEN


@pytest.fixture(scope="module")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparse") / "scout"
    write_sparse(path, SCOUT)
    return path


@pytest.mark.parametrize("kv", ["bf16", "int8", "int4"])
def test_kv_cache_of_scout(scout: Path, kv: str) -> None:
    plan = puna.plan(scout, context="10M", kv=kv, memory="4T")
    assert (plan.context, plan.max_context, plan.kv) == (TOKENS, TOKENS, kv)
    page = SEALED.get(kv, OPEN)
    assert page % 4096 == 0
    assert plan.kv_sealed_bytes == GLOBAL * TOKENS // PAGE * page
    assert plan.kv_bytes_per_token == GLOBAL * page // PAGE
    assert plan.kv_local_bytes == RING
    # A pass of 1024 tokens that begins anywhere in a page; unsealed pages are counted above.
    assert plan.kv_open_bytes == (0 if kv == "bf16" else GLOBAL * 5 * OPEN)
    cache = plan.kv_sealed_bytes + plan.kv_open_bytes + plan.kv_local_bytes
    assert plan.kv_memory_bytes == cache
    # The ring of an opened session's pages: 64 MiB in places for reads of a MiB or more.
    place = -(-(1 << 20) // page) * page
    ahead = (64 << 20) // place * place
    assert plan.memory_needed == plan.weight_bytes + plan.scratch_bytes + cache + ahead
    assert plan.fits and plan.disk_needed == 0 and plan.remedies == ()
    assert plan.largest_context == TOKENS
    # Nothing but the weights of one token (17 billion parameters, without the embedding) and the
    # cache is read.
    weights = plan.step_memory_bytes - cache
    assert weights == pytest.approx(2 * (17_172_894_720 - 1_034_485_760), rel=0.005)


def test_weights_by_format_and_without_vision(scout: Path) -> None:
    options: dict[str, Any] = {"context": "128k", "memory": "1T"}
    stored = puna.plan(scout, **options)
    assert stored.vision_bytes > GIB
    text = puna.plan(scout, vision=False, **options)
    assert text.weight_bytes == stored.weight_bytes - stored.vision_bytes
    assert text.vision_bytes == 0
    small = puna.plan(scout, quant="int4", vision=False, **options)
    assert small.weight_bytes < 0.3 * text.weight_bytes
    cache = text.kv_memory_bytes
    assert small.step_memory_bytes - cache < 0.4 * (text.step_memory_bytes - cache)
    assert small.scratch_bytes == text.scratch_bytes < GIB
    # What is kept of pictures.
    assert stored.scratch_bytes == text.scratch_bytes + (256 << 20)


def test_the_largest_context_is_the_largest(scout: Path) -> None:
    options: dict[str, Any] = {"quant": "int4", "kv": "int8", "memory": "80G"}
    plan = puna.plan(scout, **options)
    assert plan.fits and plan.context == plan.largest_context < TOKENS
    assert puna.plan(scout, context=plan.context, **options) == plan
    more = puna.plan(scout, context=plan.context + 2 * PAGE, **options)
    assert not more.fits
    assert more.largest_context == plan.context
    assert more.memory_needed > more.memory_bytes >= plan.memory_needed


def test_a_disk_holds_what_memory_does_not(scout: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"context": "10M", "quant": "int4", "kv": "int4", "memory": "80G"}
    assert not puna.plan(scout, **options).fits
    plan = puna.plan(scout, disk="200G", **options)
    assert plan.fits
    assert plan.kv_sealed_bytes <= plan.disk_needed <= plan.disk_bytes == 200 * GIB
    assert plan.memory_needed <= plan.memory_bytes == 80 * GIB
    cache = plan.kv_sealed_bytes + plan.kv_open_bytes + plan.kv_local_bytes
    assert plan.kv_memory_bytes + plan.step_disk_bytes == cache
    assert plan.weight_bytes + plan.scratch_bytes + plan.kv_memory_bytes <= 80 * GIB
    assert not puna.plan(scout, disk="100G", **options).fits
    # What is on its way from the disk is counted, too.
    assert plan.memory_needed > plan.weight_bytes + plan.scratch_bytes + plan.kv_local_bytes
    with pytest.raises(puna.OutOfMemory, match="the largest context that fits is"):
        puna.load("demo", context=1024, memory="15M", kv_offload=f"disk:{tmp_path}", progress=False)
    # Where all fits into memory there is no use for it.
    assert puna.plan(scout, disk="200G", **options | {"memory": "1T"}).disk_needed == 0


def test_remedies_work(scout: Path) -> None:
    """Each is a set of keywords with which it fits, in the bytes that were said."""
    cases: list[dict[str, Any]] = [
        {"context": "1M", "memory": "230G"},  # weights fit
        {"context": "10M", "memory": "230G", "kv": "int4"},
        {"context": "1M", "memory": "120G"},  # they do not
        {"context": "10M", "memory": "24G", "kv": "int4", "disk": "200G"},  # in no format
    ]
    for options in cases:
        plan = puna.plan(scout, **options)
        assert not plan.fits
        assert len(plan.remedies) == 3, options
        for remedy in plan.remedies:
            changed = dict(options)
            for part in remedy.change.split(", "):
                name, _, text = part.partition("=")
                value = ast.literal_eval(text)
                if name == "kv_offload":
                    assert value == "disk:DIR"
                    changed["disk"] = remedy.disk_bytes
                else:
                    changed[name] = value
            better = puna.plan(scout, **changed)
            assert better.fits, (options, remedy)
            assert better.memory_needed == remedy.memory_bytes
            assert better.disk_needed == remedy.disk_bytes
            assert f"{remedy.memory_bytes / GIB:.1f} GiB" in str(remedy)
    shorter, fewer_bits, files = puna.plan(scout, **cases[0]).remedies
    assert shorter.change.startswith("context=") and fewer_bits.change == "kv='int8'"
    assert files.change == "kv_offload='disk:DIR'" and files.disk_bytes > 0


def test_speed(scout: Path) -> None:
    options: dict[str, Any] = {"context": "1M", "quant": "int4", "kv": "int8", "disk": "100G"}
    plan = puna.plan(scout, memory="66G", memory_bandwidth=100 * 10**9, disk_bandwidth=10**9,
                     **options)  # fmt: skip
    assert plan.step_disk_bytes > 0
    slower = max(plan.step_memory_bytes / 100e9, plan.step_disk_bytes / 1e9)
    assert plan.tokens_per_second == pytest.approx(1 / slower)
    assert "100 GB/s (given)" in str(plan) and "1 GB/s (given)" in str(plan)
    measured = puna.plan(scout, memory="66G", **options)
    assert 0 < measured.tokens_per_second < 1000
    assert "GB/s (measured)" in str(measured) and "GB/s (a guess)" in str(measured)


GPU: dict[str, Any] = {"device": "cuda", "quant": "int4", "vision": False, "host_memory": "96G"}


def test_experts_that_a_gpu_does_not_hold(scout: Path) -> None:
    """Those of as many layers as fit beside the context."""
    whole = puna.plan(scout, memory="80G", context="128k", **GPU)
    assert whole.fits and whole.on_gpu
    assert (whole.expert_layers, whole.host_layers) == (48, 0)
    assert whole.host_needed == whole.host_bytes == whole.step_host_bytes == 0
    layers, needed = 0, whole.memory_needed
    for memory in (60, 40, 24, 20):
        plan = puna.plan(scout, memory=f"{memory}G", context="128k", **GPU)
        assert plan.fits and plan.host_layers >= layers
        layers, each = plan.host_layers, plan.host_expert_bytes // max(plan.host_layers, 1)
        window = plan.expert_window_bytes
        assert plan.memory_needed == needed - plan.host_expert_bytes + window <= memory * GIB
        # Two matrices of gate and up, which are two thirds of an expert.
        assert window == (2 * each // 16 * 2 // 3 if layers else 0)
        assert layers == 0 or plan.memory_needed + each > memory * GIB
        assert plan.host_bytes == (96 * GIB if layers else 0)
        assert plan.host_expert_bytes <= plan.host_needed <= plan.host_bytes or layers == 0
        assert plan.step_host_bytes * 16 == plan.host_expert_bytes
        assert plan.step_memory_bytes + plan.step_host_bytes == whole.step_memory_bytes
        assert plan.weight_bytes == whole.weight_bytes
    assert 24 < layers <= 48
    # The bytes of 48 layers' experts, 4.5 bits a weight with their scales.
    assert each == pytest.approx(16 * 3 * 5120 * 8192 * 4.5 / 8, rel=0.01)
    longer = puna.plan(scout, memory="24G", context="256k", kv="int8", **GPU)
    shorter = puna.plan(scout, memory="24G", context="32k", kv="int8", **GPU)
    assert longer.host_layers > shorter.host_layers
    # No context is asked for: some of it comes before experts.
    free = puna.plan(scout, memory="24G", **GPU)
    assert free.fits and free.context == free.largest_context >= 8192
    assert free.host_layers == puna.plan(scout, memory="24G", context=8192, **GPU).host_layers


def test_where_experts_are_may_be_said(scout: Path) -> None:
    options: dict[str, Any] = GPU | {"memory": "24G", "context": "128k"}
    auto = puna.plan(scout, **options)
    there = auto.expert_layers - auto.host_layers
    assert puna.plan(scout, experts=there, **options) == auto
    none = puna.plan(scout, experts="cpu", **options)
    assert none.fits and none.host_layers == 48
    assert none == puna.plan(scout, experts=0, **options)
    for experts in (there + 1, "gpu"):
        plan = puna.plan(scout, experts=experts, **options)
        assert not plan.fits and plan.memory_needed > 24 * GIB
        assert "experts='auto'" in [remedy.change for remedy in plan.remedies]
    with pytest.raises(puna.InvalidRequest, match="experts=49 layers were asked for, the model"):
        puna.plan(scout, experts=49, **options)
    # What the host does not hold does not fit either.
    short = puna.plan(scout, **options | {"host_memory": auto.host_needed - 1})
    assert not short.fits and short.memory_needed == auto.memory_needed
    for remedy in short.remedies:
        assert "memory=" not in remedy.change
    # Nor does a GPU without room for what is no expert.
    assert not puna.plan(scout, **options | {"memory": "4G"}).fits


def test_the_host_bounds_the_speed(scout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = GPU | {"memory": "24G", "context": "128k", "host_bandwidth": 10**11}
    plan = puna.plan(scout, **options)
    assert plan.tokens_per_second == pytest.approx(1e11 / plan.step_host_bytes)
    assert "GB/s (given), beside what the GPU takes; memory_bandwidth=" in str(plan)
    both = puna.plan(scout, memory_bandwidth=10**12, **options)
    time = both.step_memory_bytes / 1e12 + both.step_host_bytes / 1e11
    assert both.tokens_per_second == pytest.approx(1 / time)
    arguments = ["plan", str(scout), "--device", "cuda", "--memory", "24G", "--context", "128k"]
    arguments += ["--quant", "int4", "--no-vision", "--host-memory", "96G", "--host-bandwidth"]
    assert main([*arguments, "100000000000"]) == 0
    text = capsys.readouterr().out
    left = plan.host_layers
    assert f"experts      those of {48 - left} of 48 layers on the GPU; of {left} (" in text
    assert "in the host's memory, computed by the CPU" in text
    assert "of 96.0 GiB for them" in text
    assert main([*arguments, "1T", "--experts", "gpu", "--memory", "80G"]) == 0
    assert "those of all 48 layers on the GPU" in capsys.readouterr().out


def test_keys_and_values_that_a_gpu_does_not_hold(
    scout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What its memory has no room for goes to the host's, and behind that to a disk."""
    options: dict[str, Any] = GPU | {"memory": "80G", "context": "2M", "kv": "int8"}
    alone = puna.plan(scout, experts="gpu", **options)
    assert not alone.fits and not alone.kv_offloads
    assert "kv_offload='host'" in [remedy.change for remedy in alone.remedies]
    plan = puna.plan(scout, kv_offload="host", **options)
    assert plan.fits and plan.kv_offloads and plan.host_layers == 0
    cache = plan.kv_sealed_bytes + plan.kv_open_bytes + plan.kv_local_bytes
    chunk = GLOBAL * 8192 // PAGE * SEALED["int8"]
    assert plan.kv_memory_bytes + plan.kv_host_bytes == cache
    assert plan.step_link_bytes == plan.kv_host_bytes and plan.step_disk_bytes == 0
    assert plan.weight_bytes + plan.scratch_bytes + plan.kv_memory_bytes <= 80 * GIB
    # Of a GPU's room all but the window is used, and of the host's little more than is needed.
    assert plan.kv_memory_bytes > 80 * GIB - plan.weight_bytes - plan.scratch_bytes - GIB
    assert 0 < plan.host_needed - plan.kv_host_bytes < chunk + GIB // 8
    assert plan.disk_needed == 0
    # The largest context is the largest.
    most = puna.plan(scout, kv_offload="host", **options | {"context": None})
    assert most.fits and most.context == most.largest_context > plan.context
    longer = options | {"context": most.context + 8192}
    assert not puna.plan(scout, kv_offload="host", **longer).fits
    # With a disk, of which all but what is at hand may be needed.
    files = puna.plan(scout, disk="60G", **options | {"host_memory": "4G"})
    assert files.fits and files.disk_needed > files.kv_sealed_bytes
    assert files.kv_host_bytes < 4 * GIB
    assert files.kv_memory_bytes + files.kv_host_bytes + files.step_disk_bytes == cache
    assert files.step_link_bytes == files.kv_host_bytes + files.step_disk_bytes
    # Where all fits the GPU, nothing is elsewhere.
    short = puna.plan(scout, kv_offload="host", **options | {"context": "128k"})
    assert short.fits and short.kv_host_bytes == short.step_link_bytes == 0
    # The link bounds the speed.
    assert plan.tokens_per_second == pytest.approx(55e9 / plan.step_link_bytes)
    both = puna.plan(scout, kv_offload="host", memory_bandwidth=4 * 10**12,
                     link_bandwidth=25 * 10**9, **options)  # fmt: skip
    seconds = both.step_memory_bytes / 4e12 + both.step_link_bytes / 25e9
    assert both.tokens_per_second == pytest.approx(1 / seconds)
    arguments = ["plan", str(scout), "--device", "cuda", "--memory", "80G", "--context", "2M"]
    arguments += ["--kv", "int8", "--quant", "int4", "--no-vision", "--kv-offload", "host"]
    assert main([*arguments, "--host-memory", "96G", "--link-bandwidth", "25G"]) == 0
    text = capsys.readouterr().out
    assert "of keys and values a token over the GPU's link at 26.8 GB/s (given)" in text
    assert "of the KV cache there" in text
    with pytest.raises(puna.InvalidRequest, match="a plan has disk="):
        puna.plan(scout, kv_offload="disk:x", **options)


def test_guard_has_no_chunks(tmp_path: Path) -> None:
    write_sparse(tmp_path / "guard", GUARD)
    plan = puna.plan(tmp_path / "guard", memory="64G")
    assert plan.context == 8192
    assert plan.kv_local_bytes == 0
    assert plan.kv_sealed_bytes == 48 * 8192 // PAGE * OPEN


def test_errors(scout: Path, tmp_path: Path) -> None:
    with pytest.raises(puna.ContextOverflow):
        puna.plan(scout, context="20M")
    with pytest.raises(puna.InvalidRequest, match="kv is 'int3'"):
        puna.plan(scout, kv="int3")
    with pytest.raises(puna.InvalidRequest, match="disk"):
        puna.plan(scout, disk="much")
    with pytest.raises(puna.ModelNotFound):
        puna.plan(tmp_path / "nothing")


def test_command_line(scout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(scout), "--context", "10M", "--kv", "int4", "--memory", "24G"]
    assert main([*arguments, "--disk", "200G"]) == 1
    text = capsys.readouterr().out
    for part in ("10,485,760 tokens", "of 24.0 GiB given", "of 200.0 GiB", "It does not fit"):
        assert part in text
    assert text.count(" of memory") == 3
    assert main([*arguments[:-1], "1T", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] and report["context"] == TOKENS
    assert report["tokens_per_second"] > 0
    assert main(["plan", "demo"]) == 0
    assert "It fits" in capsys.readouterr().out


@pytest.mark.parametrize("kv", ["fp32", "bf16"])
def test_loading_goes_by_the_plan(tmp_path: Path, kv: str) -> None:
    path = Ledger().write(tmp_path, "bfloat16")
    options: dict[str, Any] = {"context": 4096, "kv": kv}
    plan = puna.plan(path, memory="1G", **options)
    with pytest.raises(puna.OutOfMemory) as caught:
        puna.load(path, memory=plan.memory_needed - 1, progress=False, **options)
    assert caught.value.needed == plan.memory_needed
    assert caught.value.available == plan.memory_needed - 1
    with puna.load(path, memory=plan.memory_needed, progress=False, **options) as llm:
        assert (llm.plan.kv, llm.plan.context) == (kv, 4096)
        assert llm.plan.memory_needed == llm.plan.memory_bytes == plan.memory_needed
        assert llm.plan.weight_bytes == plan.weight_bytes
        tokens = Ledger().records(1365).ravel()
        llm.generate(tokens, max_tokens=1)  # up to the last page
