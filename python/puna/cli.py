"""The `puna` command. Answers go to stdout, progress and remarks to stderr."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import puna
from puna import _core
from puna.arguments import place
from puna.loading import demo_directory
from puna.planning import size

_KV_FORMATS = ("auto", "bf16", "fp32", "int8", "int4")
_COMPUTING = ("kv", "threads", "device", "experts", "isa")
_INTERRUPTED = 130  # the shell's convention: 128 + SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit status: 0, 1 (failed), 2 (usage) or 130 (Ctrl-C)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parsed(arguments[:1] if arguments[:1] == ["bench"] else arguments)
    options.rest = arguments[1:]
    _open_missing()
    try:
        status: int = options.run(options)
        sys.stdout.flush()  # here, where a reader that went away can still be told from a fault
        return status
    except KeyboardInterrupt:
        print("puna: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader went away (| head): leave without a traceback when stdout is flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UnicodeError as error:
        print(f"puna: the text is not valid Unicode: {error}", file=sys.stderr)
        return 1
    except (puna.Error, TypeError, OSError, MemoryError) as error:
        print(f"puna: {error}", file=sys.stderr)
        return 1


# The argument of a command that may be left out.
_LAST = {"generate": "prompt", "chat": "model", "tokenize": "text"}


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Also where flags stand before an argument that may be left out.

    Before Python 3.13, argparse takes it for left out when it meets the first flag.
    """
    parser = _parser()
    options, extra = parser.parse_known_args(arguments)
    name = _LAST.get(options.command, "")
    left_out = name and getattr(options, name) is None
    if left_out and len(extra) == 1 and not extra[0].startswith("-"):
        setattr(options, name, extra.pop())
    if extra:
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if options.command == "chat" and options.model is None:
        options.model = "demo"
    return options


def _open_missing() -> None:
    """Stands in for standard streams that were closed, which Python leaves at None."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="puna", description="Run Llama 4 - Scout, Maverick, Guard - on the machine you have."
    )
    parser.add_argument("--version", action="version", version=f"puna {puna.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue a text, or answer with --chat")
    _add_model(generate)
    generate.add_argument("prompt", nargs="?", help="the text; read from stdin if left out")
    generate.add_argument("--chat", action="store_true", help="answer it as a user's message")
    generate.add_argument(
        "--image", action="append", metavar="FILE", help="a picture; may be repeated"
    )
    generate.add_argument("--json", action="store_true", help="print the whole result as JSON")
    generate.add_argument("--n", type=int, help="completions, with --json")
    generate.add_argument(
        "--logprobs", type=int, metavar="K", help="of each token and the K likeliest, with --json"
    )
    _add_sampling(generate)
    _add_loading(generate)
    generate.set_defaults(run=_generate, parser=generate)

    chat = commands.add_parser("chat", help="talk to a model; without one, to the demo")
    chat.add_argument("model", nargs="?", help='a checkpoint; "demo" if left out')
    chat.add_argument("--system", help="a system message to begin with")
    _add_sampling(chat)
    _add_loading(chat)
    chat.set_defaults(run=_chat)

    inspect = commands.add_parser("inspect", help="show a checkpoint's configuration and size")
    _add_model(inspect)
    _add_mmproj(inspect)
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)

    plan = commands.add_parser("plan", help="show what a model needs, and how to make it fit")
    _add_model(plan)
    plan.add_argument("--context", help='tokens, or like "10M"; the largest that fits')
    plan.add_argument("--kv", default="auto", choices=_KV_FORMATS, help="format of the KV cache")
    plan.add_argument("--memory", help='bytes, or like "24G"; what is free')
    plan.add_argument("--disk", help="for what of the KV cache memory does not hold, in bytes")
    plan.add_argument("--device", default="cpu", help='"cuda" plans for the memory of the GPU')
    _add_experts(plan)
    plan.add_argument(
        "--kv-offload",
        default="auto",
        choices=("auto", "none", "host"),
        help='"host" has the memory of a GPU\'s host hold what of the KV cache the GPU does not',
    )
    plan.add_argument("--host-memory", help="for what a GPU leaves to the host, in bytes")
    plan.add_argument("--memory-bandwidth", help="bytes a second, measured if left out")
    plan.add_argument("--disk-bandwidth", help="bytes a second")
    plan.add_argument("--host-bandwidth", help="bytes a second, measured if left out")
    plan.add_argument("--link-bandwidth", help="bytes a second between a GPU and its host")
    _add_quant(plan)
    plan.add_argument("--no-vision", action="store_true", help="without the vision tower")
    _add_mmproj(plan)
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_plan)

    tokenize = commands.add_parser("tokenize", help="show the tokens of a text")
    _add_model(tokenize)
    tokenize.add_argument("text", nargs="?", help="the text; read from stdin if left out")
    tokenize.add_argument("--special", action="store_true", help="read special tokens in the text")
    tokenize.add_argument("--count", action="store_true", help="print only how many there are")
    tokenize.add_argument("--json", action="store_true", help="print JSON")
    tokenize.set_defaults(run=_tokenize)

    quantize = commands.add_parser("quantize", help="write a checkpoint in puna's packed form")
    _add_model(quantize)
    quantize.add_argument("out", help="the folder to write")
    _add_quant(quantize)
    _add_mmproj(quantize)
    quantize.add_argument(
        "--calibration", metavar="FILE", help="a text that shows which channels matter; - is stdin"
    )
    quantize.add_argument("--special", action="store_true", help="read special tokens in the text")
    quantize.add_argument("--threads", type=int)
    quantize.set_defaults(run=_quantize)

    evaluate = commands.add_parser("eval", help="perplexity of a text, and distance to a reference")
    _add_model(evaluate)
    evaluate.add_argument("--text", required=True, metavar="FILE", help="UTF-8; - is stdin")
    evaluate.add_argument("--reference", metavar="MODEL", help="compare its predictions with those")
    _add_quant(evaluate)
    evaluate.add_argument("--reference-quant", metavar="QUANT", help="weight format of that one")
    evaluate.add_argument("--context", type=int, default=512, help="tokens of a window (512)")
    evaluate.add_argument("--max-tokens", type=int, help="read only so many tokens of the text")
    evaluate.add_argument("--special", action="store_true", help="read special tokens in the text")
    evaluate.add_argument(
        "--json", nargs="?", const="-", metavar="OUT", help="write JSON to a file, or to stdout"
    )
    _add_computing(evaluate.add_argument_group("computing"))
    evaluate.set_defaults(run=_evaluate, parser=evaluate)

    # Its arguments are all puna-bench's, --help too: main() keeps them from this parser.
    bench = commands.add_parser("bench", help="measure speed (passes its arguments to puna-bench)")
    bench.set_defaults(run=_bench)

    demo = commands.add_parser("demo", help="show what the bundled model can do, offline")
    demo.add_argument("--seed", type=int, default=None, help="another story, another picture")
    demo.add_argument("--image-out", metavar="FILE", help="keep the picture that was drawn")
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser("doctor", help="show what puna found on this machine")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help='a checkpoint directory, a GGUF file, or "demo"')


def _add_mmproj(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--mmproj", metavar="FILE", help="vision tower that goes with a GGUF file")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int)
    group.add_argument("--temperature", type=float)
    group.add_argument("--top-p", type=float)
    group.add_argument("--top-k", type=int)
    group.add_argument("--min-p", type=float)
    group.add_argument("--seed", type=int)
    group.add_argument("--stop", action="append", metavar="TEXT", help="may be repeated")
    group.add_argument("--repetition-penalty", type=float)
    group.add_argument("--presence-penalty", type=float)
    group.add_argument("--frequency-penalty", type=float)
    group.add_argument(
        "--logit-bias",
        action="append",
        type=_bias,
        metavar="ID=NUMBER",
        help="added to the logit of a token; -1e9 bans it; may be repeated",
    )
    group.add_argument("--min-tokens", type=int)
    group.add_argument("--ignore-eos", action="store_true")
    group.add_argument("--timeout", type=float, metavar="SECONDS")


def _bias(text: str) -> tuple[int, float]:
    token, _, number = text.partition("=")
    try:
        return int(token), float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a token id, '=' and a number, as in 12=-1e9"
        ) from None


_SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "ignore_eos",
    "timeout",
)


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in _SAMPLING}
    given["logit_bias"] = dict(options.logit_bias) if options.logit_bias else None
    return given


def _add_loading(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("loading")
    group.add_argument("--context", help='tokens, or like "128k"')
    _add_quant(group)
    group.add_argument("--memory", help='bytes, or like "24G"')
    group.add_argument(
        "--kv-offload",
        default="auto",
        metavar="WHERE",
        help='what of the KV cache memory does not hold: "disk:FOLDER", or with a GPU "host"',
    )
    group.add_argument("--kv-disk", help="for files of the KV cache, in bytes; what is free")
    group.add_argument("--host-memory", help="for what a GPU leaves to the host, in bytes")
    _add_computing(group)
    group.add_argument("--no-vision", action="store_true", help="leave the vision tower on disk")
    _add_mmproj(group)


def _add_computing(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--kv", default="auto", choices=_KV_FORMATS)
    group.add_argument("--threads", type=int)
    group.add_argument("--device", default="auto")
    _add_experts(group)
    group.add_argument("--isa", help="instruction set, see puna doctor")


def _add_experts(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    group.add_argument(
        "--experts",
        default="auto",
        metavar="WHERE",
        help='routed experts with a GPU: as many as fit on it, "gpu", "cpu", or of N layers',
    )


def _add_quant(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    group.add_argument("--quant", help="weight format: int4, int8, fp8, ... (see docs/formats.md)")
    group.add_argument(
        "--quant-override",
        action="append",
        default=[],
        metavar="PATTERN=FORMAT",
        help="another format for the matrices whose name matches; may be repeated",
    )


def _quant(options: argparse.Namespace) -> dict[str, str] | str | None:
    quant: str | None = options.quant
    if not options.quant_override:
        return quant
    recipe = {} if quant is None else {"default": quant}
    for override in options.quant_override:
        pattern, equals, name = override.partition("=")
        if not equals:
            raise puna.InvalidRequest(
                f"--quant-override is {override!r}; write PATTERN=FORMAT", param="quant"
            )
        recipe[pattern] = name
    return recipe


def _load(options: argparse.Namespace) -> puna.Engine:
    llm = puna.load(
        options.model,
        context=options.context,
        quant=_quant(options),
        kv=options.kv,
        kv_offload=options.kv_offload,
        kv_disk=options.kv_disk,
        memory=options.memory,
        host_memory=options.host_memory,
        threads=options.threads,
        device=options.device,
        experts=options.experts,
        isa=options.isa,
        vision=not options.no_vision,
        mmproj=options.mmproj,
    )
    for warning in llm.plan.warnings:
        print(f"puna: {warning}", file=sys.stderr)
    return llm


def _text(given: str | None) -> str:
    if given is not None:
        return given
    if sys.stdin.isatty():
        print("puna: reading the text from stdin, end with Ctrl-D", file=sys.stderr)
    return sys.stdin.read()


def _generate(options: argparse.Namespace) -> int:
    if not options.json and (options.n is not None or options.logprobs is not None):
        options.parser.error("--n and --logprobs need --json")
    # The line break that ends piped input is no part of the prompt.
    prompt = _text(options.prompt)
    if options.prompt is None:
        prompt = prompt.removesuffix("\n")
    with _load(options) as llm:
        if options.json:
            call = llm.chat if options.chat else llm.generate
            result = call(
                prompt,
                images=options.image,
                n=options.n,
                logprobs=options.logprobs,
                **_sampling(options),
            )
            plain = [asdict(r) for r in result] if isinstance(result, list) else asdict(result)
            # Bytes as numbers, as in OpenAI's answers: a token may hold half of a character.
            print(json.dumps(plain, default=list))
            return 0
        stream = llm.stream(
            prompt, images=options.image, raw=not options.chat, **_sampling(options)
        )
        last = _print_stream(stream)
        _remark(last, llm.plan.context)
    return 0


def _print_stream(stream: Iterator[puna.Chunk]) -> puna.Chunk:
    """Prints the text as it comes; returns the last chunk."""
    for chunk in stream:
        print(chunk.text, end="", flush=True)
    print(flush=True)
    return chunk


def _remark(last: puna.Chunk, context: int) -> None:
    """Speeds, and why the text ended if it did not end by itself, on stderr."""
    usage, timings = last.usage, last.timings
    assert usage and timings
    print(
        f"puna: {usage.prompt} prompt tokens at {timings.prefill_tps:.1f}/s, "
        f"{usage.completion} generated at {timings.decode_tps:.1f}/s, "
        f"peak memory {timings.peak_bytes / 2**20:.0f} MiB, seed {last.seed}",
        file=sys.stderr,
    )
    _say_if_cut(last, context)


def _say_if_cut(last: puna.Chunk, context: int) -> None:
    usage = last.usage
    assert usage
    if last.finish_reason == "length":
        limit = (
            f"the context holds {context:,}"
            if usage.total >= context
            else "--max-tokens allows no more"
        )
        print(f"puna: cut after {usage.completion:,} tokens: {limit}", file=sys.stderr)
    elif last.finish_reason == "timeout":
        print(f"puna: cut after {usage.completion:,} tokens: --timeout is over", file=sys.stderr)


_CHAT_HELP = """Commands: /image FILE (adds a picture to your next message), /reset, /exit.
Ctrl-C stops an answer; Ctrl-D leaves."""


def _chat(options: argparse.Namespace) -> int:
    with _load(options) as llm:
        if options.model == "demo":
            print(
                "puna: this is the demo model: a few million parameters and a small world.\n"
                'Try "Tell me a story about a fox.", "What did they eat?", "What is 27 + 48?"',
                file=sys.stderr,
            )
        print(f"puna: {llm.info.path}\n{_CHAT_HELP}", file=sys.stderr)
        session = _new_conversation(llm, options.system)
        images: list[str] = []
        interactive = sys.stdin.isatty()
        status = 0  # a script that pipes its questions wants to know that one failed
        while True:
            try:
                line = input("> " if interactive else "")
            except EOFError:
                return status
            command, _, argument = line.strip().partition(" ")
            if command == "/exit":
                return status
            if command == "/reset":
                session, images = _new_conversation(llm, options.system), []
            elif command == "/image":
                path = Path(argument.strip()).expanduser()
                if path.is_file():
                    images.append(str(path))
                else:
                    print(f"puna: there is no file {path}", file=sys.stderr)
                    status = 0 if interactive else 1
            elif command.startswith("/"):
                print(_CHAT_HELP, file=sys.stderr)
            elif line.strip():
                try:
                    last = _print_stream(session.stream(line, images=images, **_sampling(options)))
                    _say_if_cut(last, llm.plan.context)
                except KeyboardInterrupt:
                    if not interactive:
                        raise
                    print(file=sys.stderr)
                except puna.Error as error:
                    print(f"puna: {error}", file=sys.stderr)
                    status = 0 if interactive else 1
                images = []


def _new_conversation(llm: puna.Engine, system: str | None) -> puna.Session:
    session = llm.session()
    if system:
        session.messages.append({"role": "system", "content": system})
    return session


def _inspect(options: argparse.Namespace) -> int:
    path = demo_directory() if options.model == "demo" else place("model", options.model)
    report = _core.inspect(str(path), options.mmproj or "")
    if options.json:
        if not options.tensors:
            report.pop("tensors")
        print(json.dumps(report, indent=2))
        return 0
    print(f"{report['path']}")
    for line in _describe(report):
        print(f"  {line}")
    for warning in report["warnings"]:
        print(f"  warning: {warning}")
    if options.tensors:
        for name, dtype, shape in report["tensors"]:
            print(f"  {name:<90} {dtype:<10} {tuple(shape)}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    """Exit status 1 says that it does not fit."""
    plan = puna.plan(
        options.model,
        context=options.context,
        kv=options.kv,
        quant=_quant(options),
        memory=options.memory,
        disk=options.disk,
        vision=not options.no_vision,
        mmproj=options.mmproj,
        memory_bandwidth=options.memory_bandwidth,
        disk_bandwidth=options.disk_bandwidth,
        host_bandwidth=options.host_bandwidth,
        device=options.device,
        experts=options.experts,
        host_memory=options.host_memory,
        kv_offload=options.kv_offload,
        link_bandwidth=options.link_bandwidth,
    )
    if options.json:
        speed = None if math.isnan(plan.tokens_per_second) else plan.tokens_per_second
        print(json.dumps(asdict(plan) | {"tokens_per_second": speed}, indent=2))
    else:
        print(plan)
    return 0 if plan.fits else 1


def _describe(report: Mapping[str, Any]) -> list[str]:
    moe = f"{report['moe_layers']} MoE ({report['experts']} experts, top {report['top_k']})"
    lines = [
        f"parameters   {report['parameters']:,} ({report['active_parameters']:,} active per token)",
        f"layers       {report['layers']}: {moe}, {report['chunked_layers']} chunked"
        + (f" by {report['chunk']}" if report["chunked_layers"] else ""),
        f"hidden       {report['hidden_size']}, {report['heads']} heads,"
        f" {report['kv_heads']} KV heads of {report['head_dim']},"
        f" vocabulary {report['vocab_size']:,}",
        f"context      {report['max_context']:,} tokens, {report['kv_bytes_per_token']:,} bytes of"
        f" KV per token and {size(report['kv_fixed_bytes'])} for the current chunk",
        f"weights      {size(report['weight_bytes'])} in {report['dtype']},"
        f" {len(report['tensors'])} tensors",
    ]
    if report["image_size"]:
        lines.append(
            f"vision       tiles of {report['image_size']} pixels,"
            f" {report['tokens_per_tile']} tokens each"
        )
    lines.append(f"tokenizer    {report['tokenizer'] or 'none'}")
    for context, needed in report["memory"]:
        lines.append(f"memory       {size(needed)} with {context:,} tokens of context")
    return lines


def _tokenize(options: argparse.Namespace) -> int:
    path = demo_directory() if options.model == "demo" else place("model", options.model)
    tokenizer = puna.Tokenizer.from_file(path)
    ids = tokenizer.encode(
        _text(options.text), allowed_special="all" if options.special else "none"
    )
    if options.count:
        print(len(ids))
    elif options.json:
        print(json.dumps(ids.tolist()))
    else:
        for token in ids:
            print(f"{token:>8}  {tokenizer.decode_bytes([token])!r}")
    return 0


def _quantize(options: argparse.Namespace) -> int:
    odd = puna.quantize(
        options.model,
        options.out,
        quant=_quant(options),
        mmproj=options.mmproj,
        calibration=None if options.calibration is None else _read_text(options.calibration),
        allow_special=options.special,
        threads=options.threads,
    )
    for warning in odd:
        print(f"puna: {warning}", file=sys.stderr)
    files = [path for path in Path(options.out).expanduser().iterdir() if path.is_file()]
    print(f"{options.out}  {size(sum(path.stat().st_size for path in files))}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    if options.reference_quant and not options.reference:
        options.parser.error("--reference-quant goes with --reference")
    text = _read_text(options.text)
    computing: dict[str, Any] = {name: getattr(options, name) for name in _COMPUTING}
    computing |= {"context": options.context, "vision": False}
    with contextlib.ExitStack() as opened:
        model = opened.enter_context(puna.load(options.model, quant=_quant(options), **computing))
        reference = None
        if options.reference:
            reference = opened.enter_context(
                puna.load(options.reference, quant=options.reference_quant, **computing)
            )
        result = puna.evaluate(
            model,
            text,
            reference=reference,
            context=options.context,
            max_tokens=options.max_tokens,
            allow_special=options.special,
        )
        report = {
            "model": model.info.path,
            "quant": _quant(options),
            "weight_bytes": model.plan.weight_bytes,
            "reference": reference and reference.info.path,
            "reference_quant": options.reference_quant,
            "text": options.text,
            **asdict(result),
        }
    if options.json == "-":
        print(json.dumps(report, indent=2))
        return 0
    if options.json:
        Path(options.json).expanduser().write_text(
            json.dumps(report, indent=2) + "\n", encoding="utf-8"
        )
    for line in _describe_evaluation(result):
        print(line)
    return 0


def _read_text(path: str) -> str:
    if path == "-":
        return _text(None)
    return Path(path).expanduser().read_text(encoding="utf-8")


def _describe_evaluation(result: puna.Evaluation) -> list[str]:
    lines = [
        f"tokens       {result.tokens:,} in {result.windows:,} windows of {result.context:,}",
        f"perplexity   {result.perplexity:.4f}",
    ]
    if (other := result.comparison) is not None:
        lines += [
            f"reference    {other.reference_perplexity:.4f}, ratio {other.perplexity_ratio:.5f}",
            f"KL           mean {other.kl_mean:.6f} +- {other.kl_error:.6f},"
            f" 99 % {other.kl_p99:.6f}, largest {other.kl_max:.6f} nats",
            f"top-1        {100 * other.top1_agreement:.2f} % agree",
        ]
    return lines


def _bench(options: argparse.Namespace) -> int:
    beside = Path(sys.executable).parent / "puna-bench"
    program = str(beside) if beside.exists() else shutil.which("puna-bench")
    if program is None:
        print("puna: puna-bench was not found beside python or on PATH", file=sys.stderr)
        return 1
    return subprocess.run([program, *_kernels_option(), *options.rest], check=False).returncode


def _kernels_option(package: Path = Path(puna.__file__).parent) -> list[str]:
    """Tells puna-bench, which lies elsewhere, where the CUDA kernels of the package are."""
    kernels = package / "libpuna_cuda.so"
    return ["--kernels", str(kernels)] if kernels.is_file() else []


def _demo(options: argparse.Namespace) -> int:
    from puna.demo_run import run_demo

    return run_demo(seed=options.seed, image_out=options.image_out)


def _doctor(options: argparse.Namespace) -> int:
    from puna.doctor import examine, explain

    report = examine()
    print(json.dumps(report, indent=2) if options.json else explain(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
