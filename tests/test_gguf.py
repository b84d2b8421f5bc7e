"""GGUF files against the Hugging Face checkpoints that they were made of."""

from __future__ import annotations

import importlib.resources
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import puna
from conftest import MakeCheckpoint, TinyCheckpoint, skip_or_fail
from oracle import tiny
from oracle.make_checkpoint import Stored, random_tensors, write_safetensors
from oracle.make_gguf import Type, text_tensors, write_gguf, write_mmproj
from test_quant import rewrite_metadata

VARIANTS = tuple(tiny.VARIANTS)
BLOCKED = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)
# Where the half-precision scales lie in a block, so that random blocks can have a fit magnitude.
SCALE_FIELDS = {
    **{name: (0,) for name in ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS")},
    **{name: (0, 2) for name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")},
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)},
}
# Every kind of layer, with widths of whole K blocks.
WIDE_TEXT = tiny.MIXED_TEXT | {
    "hidden_size": 256,
    "intermediate_size": 256,
    "intermediate_size_mlp": 512,
    "num_hidden_layers": 4,
    "head_dim": 64,
    "model_type": "llama4_text",
}


def load(path: Path, **options: Any) -> puna.Engine:
    return puna.load(path, **{"threads": 2, "progress": False, "kv": "fp32"} | options)


def write(folder: Path, made: TinyCheckpoint, **options: Any) -> Path:
    """The text model, and its vision tower beside it."""
    write_gguf(folder / "model.gguf", made.config, made.tensors, **options)
    if "vision_config" in made.config:
        kinds = {"type_of": options["type_of"]} if "type_of" in options else {}
        write_mmproj(folder / "mmproj-model.gguf", made.config, made.tensors, **kinds)
    return folder / "model.gguf"


def all_logits(llm: puna.Engine, variant: tiny.Variant) -> dict[str, np.ndarray]:
    return {
        prompt.name: llm.logits(variant.tokens(prompt), variant.pixels(prompt))
        for prompt in variant.prompts
    }


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_types(checkpoint: MakeCheckpoint, tmp_path: Path, name: str, kind: str) -> None:
    """The same logits as the directory with the same values, with tokenizer, images and all."""
    dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[kind]
    made = checkpoint(name, dtype=dtype, tokenizer=True)
    path = write(tmp_path, made, type_of=lambda _: Type[kind], tokenizer=made.path)
    variant = tiny.VARIANTS[name]
    # The divisors of RoPE are float32 in a file: where they are no powers of two, as in this one,
    # a bfloat16 activation may round the other way. The reference rounds none.
    device = "ref" if name == "ragged" else "cpu"
    with load(made.path, device=device) as wanted, load(path, device=device) as found:
        expected, got = all_logits(wanted, variant), all_logits(found, variant)
        for prompt, logits in expected.items():
            np.testing.assert_allclose(got[prompt], logits, rtol=0, atol=2e-5, err_msg=prompt)
        assert found.info.parameters == wanted.info.parameters
        assert found.plan.max_context == wanted.plan.max_context
        assert found.info.bos_token == wanted.info.bos_token
        assert set(found.info.eos_tokens) == set(wanted.info.eos_tokens)
        assert found.info.image_token == wanted.info.image_token or not variant.vision


def test_golden(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Against transformers itself, so that both readers cannot be wrong in the same way."""
    made = checkpoint("scout_like", tokenizer=True)
    path = write(tmp_path, made, tokenizer=made.path)
    with load(path, device="ref") as llm:
        for prompt in made.golden.variant.prompts:
            found = llm.logits(made.golden.tokens(prompt), made.golden.variant.pixels(prompt))
            np.testing.assert_allclose(found, made.golden.logits(prompt), rtol=0, atol=5e-5)


def random_blocks(random: np.random.Generator, kind: Type, shape: tuple[int, ...]) -> np.ndarray:
    """Blocks of any bits, but with finite scales that make the weights about 1 / sqrt(columns)."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (int(np.prod(shape)) // elements, size), dtype=np.uint8)
    for field in SCALE_FIELDS[kind.name]:
        scales = random.uniform(0.5, 1, len(blocks)).astype(np.float16)
        blocks[:, field : field + 2] = scales.view(np.uint8).reshape(-1, 2)
    spread = gguf.quants.dequantize(blocks, kind).std() * shape[-1] ** 0.5
    for field in SCALE_FIELDS[kind.name]:
        scales = blocks[:, field : field + 2].copy().view(np.float16)
        blocks[:, field : field + 2] = (scales / np.float16(spread)).view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def quantised_pair(folder: Path, kind_of: Callable[[str], str]) -> tuple[Path, Path]:
    """A GGUF file of random blocks, and a float32 directory with what they mean."""
    random = np.random.default_rng(5)
    tensors = random_tensors(WIDE_TEXT, 3)
    encoded, meant = {}, {}
    for name, values in text_tensors(tensors).items():
        if values.ndim < 2 or name.endswith("ffn_gate_inp.weight"):
            continue
        kind = Type[kind_of(name)]
        blocks = random_blocks(random, kind, values.shape)
        encoded[name] = (blocks, kind)
        meant[name] = gguf.quants.dequantize(blocks, kind).reshape(values.shape)
    write_gguf(folder / "model.gguf", WIDE_TEXT, tensors, encoded=encoded)

    plain = {}
    for name, values in tensors.items():
        places = text_tensors({name: values})  # one, or gate and up
        parts = [meant.get(place, whole) for place, whole in places.items()]
        joined = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        transposed = joined.transpose(0, 2, 1) if ".experts." in name else joined
        plain[name] = Stored.of(np.ascontiguousarray(transposed), "float32")
    directory = folder / "float32"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(WIDE_TEXT))
    write_safetensors(directory / "model.safetensors", plain)
    return folder / "model.gguf", directory


def mixed_kinds(name: str) -> str:
    """The mixture of a Q4_K_M file: values and down projections in more bits."""
    if name.endswith(("attn_v.weight", "ffn_down_exps.weight", "output.weight")):
        return "Q6_K"
    return "Q5_0" if name == "token_embd.weight" else "Q4_K"


def test_gate_and_up_of_different_types(tmp_path: Path) -> None:
    """They are one matrix: packed in 8 bits, which adds little to 4."""
    path, directory = quantised_pair(tmp_path, lambda name: "Q6_K" if "_up" in name else "Q4_K")
    tokens = np.random.default_rng(1).integers(0, 280, 40)
    with load(directory, device="ref") as llm:
        expected = llm.logits(tokens)
    for device in ("ref", "cpu"):
        with load(path, device=device) as llm:
            error = np.abs(llm.logits(tokens) - expected).mean(axis=1) / expected.std()
            assert np.median(error) < 0.08


@pytest.mark.parametrize("kind", [*BLOCKED, "mixture"])
def test_quantised(tmp_path: Path, kind: str) -> None:
    """Blocks of every type mean what the `gguf` package says, in every place of the model."""
    path, directory = quantised_pair(tmp_path, mixed_kinds if kind == "mixture" else lambda _: kind)
    tokens = np.random.default_rng(1).integers(0, 280, 40)
    with load(directory, device="ref") as llm:
        expected = llm.logits(tokens)
    spread = expected.std()
    with load(path, device="ref") as llm:
        np.testing.assert_allclose(llm.logits(tokens), expected, rtol=0, atol=2e-5 * spread)
        assert llm.info.kv_dtype == "float32"
    with load(path, device="cpu") as llm:
        # Activations are rounded to 8 bits: half a step of 1/127 of the largest of 128 is about 1%
        # of a typical one, and each of the products of 4 layers adds its share. A row near
        # a tie of the router may take another expert, so that the median is what is judged.
        error = np.abs(llm.logits(tokens) - expected).mean(axis=1) / spread
        assert np.median(error) < 0.08


@pytest.mark.parametrize("kind", BLOCKED)
def test_block_bits(tmp_path: Path, kind: str) -> None:
    """Any bytes are a block, and mean bit for bit what the `gguf` package says."""
    elements, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    blocks = np.random.default_rng(2).integers(0, 256, (500, size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "blocks.gguf", "llama4")
    writer.add_tensor("blocks", blocks, raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, Type[kind]).astype(np.float32).ravel()
    found = puna._core.read_tensor(str(tmp_path / "blocks.gguf"), "blocks")
    assert found.shape == expected.shape == (500 * elements,)
    same = found.view(np.uint32) == expected.view(np.uint32)
    assert np.all(same | (np.isnan(found) & np.isnan(expected)) | ((found == 0) & (expected == 0)))


def test_keys_of_converters_alone(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Without puna's keys a file means what llama.cpp builds in: chunks and floor of 8192."""
    made = checkpoint("scout_like", tokenizer=True)
    write_gguf(tmp_path / "m.gguf", made.config, made.tensors, own_keys=False)
    built_in = {"attention_chunk_size": 8192, "floor_scale": 8192}
    directory = tmp_path / "directory"
    text = {"text_config": made.config["text_config"] | built_in}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(made.config | text))
    (directory / "model.safetensors").symlink_to(made.path / "model.safetensors")
    tokens = made.golden.tokens(tiny.TEXT)
    with load(directory) as wanted, load(tmp_path / "m.gguf") as found:
        np.testing.assert_allclose(found.logits(tokens), wanted.logits(tokens), rtol=0, atol=1e-5)
    dense = checkpoint("guard_like")
    write_gguf(tmp_path / "dense.gguf", dense.config, dense.tensors, own_keys=False)
    with load(tmp_path / "dense.gguf") as llm:
        assert any("no_rope_interval" in warning for warning in llm.plan.warnings)


def test_split(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    made = checkpoint("text_only", tokenizer=True)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    write(whole, made, tokenizer=made.path)
    write(parts, made, tokenizer=made.path, split=40)
    names = sorted(parts.iterdir())
    assert len(names) > 2 and names[0].name.startswith("model-00001-of-0000")
    tokens = made.golden.tokens(tiny.TEXT)
    with load(whole / "model.gguf") as one:
        expected = one.logits(tokens)
    for path in (names[0], names[-1]):
        with load(path) as llm:
            assert np.array_equal(llm.logits(tokens), expected)
            assert llm.tokenizer.encode("the") == [
                puna.Tokenizer.from_file(str(made.path)).encode("the")[0]
            ]
    names[1].rename(tmp_path / "elsewhere")
    with pytest.raises(puna.ModelNotFound, match=r"absent: .*00002-of"):
        load(names[0])
    os.link(names[2], names[1])
    with pytest.raises(puna.ModelFormatError, match=r"split.no is 2, by its name it is part 1"):
        load(names[0])


TEXTS = (
    "the other thing and the one in it",
    " Hello  world's\n\n  tabs\tand 12345 numbers; naïve café — \U0001f999",
    "<|eot|> is text",
    "",
)


def test_tokenizer_and_template(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    made = checkpoint("scout_like", tokenizer=True)
    template = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}<|eot|>"
    path = write(tmp_path, made, tokenizer=made.path, template=template)
    wanted, found = puna.Tokenizer.from_file(str(made.path)), puna.Tokenizer.from_file(str(path))
    assert found.special_tokens == wanted.special_tokens
    for text in TEXTS:
        for allowed in ("none", "all"):
            ids = wanted.encode(text, allowed_special=allowed)
            assert np.array_equal(found.encode(text, allowed_special=allowed), ids)
        assert found.decode(ids) == text
    with load(path) as llm:
        special = llm.tokenizer.special_tokens
        prompt = llm._chat_prompt("hi", None, None)
        assert prompt.tokens[0] == special["<|begin_of_text|>"]
        assert prompt.tokens[-1] == special["<|eot|>"]
        assert llm.tokenizer.decode(prompt.tokens[1:-1]) == "[hi]"


def test_meta_tokenizer(tmp_path: Path) -> None:
    """Llama 4's own: its merges in metadata give the ids of tokenizer.model."""
    try:
        folder = importlib.resources.files("llama_models")
    except ModuleNotFoundError:
        skip_or_fail("llama-models is not installed: pip install --no-deps llama-models==0.3.0")
    model = Path(str(folder)) / "llama4" / "tokenizer.model"
    wanted = puna.Tokenizer.from_file(str(model))
    count = wanted.vocab_size - len(wanted.special_tokens)
    symbols = _byte_alphabet()
    pieces = [wanted.decode_bytes([i]) for i in range(count)]
    ranks = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for rank, piece in enumerate(pieces):
        if len(piece) < 2:
            continue
        cuts = [
            (ranks[piece[:i]], ranks[piece[i:]], i)
            for i in range(1, len(piece))
            if piece[:i] in ranks and piece[i:] in ranks
        ]
        for _, _, i in sorted(cuts):
            merges.append((rank, i))
    text = ["".join(symbols[b] for b in piece) for piece in pieces]
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama4")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama4")
    special = sorted(wanted.special_tokens, key=wanted.special_tokens.get)
    writer.add_token_list(text + special)
    writer.add_token_types([1] * count + [3] * len(special))
    writer.add_token_merges([f"{text[rank][:i]} {text[rank][i:]}" for rank, i in merges])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = puna.Tokenizer.from_file(str(tmp_path / "vocabulary.gguf"))
    assert found.special_tokens == wanted.special_tokens
    random = np.random.default_rng(7)
    samples = list(TEXTS)
    for _ in range(300):
        codes = random.choice([*range(32, 127), 10, 233, 0x4E2D, 0x1F999, 0x301], 60)
        samples.append("".join(map(chr, codes)))
    for sample in samples:
        assert np.array_equal(found.encode(sample), wanted.encode(sample)), sample


def _byte_alphabet() -> list[str]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def test_inspect(checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from puna.cli import main

    made = checkpoint("scout_like", tokenizer=True)
    path = write(tmp_path, made, tokenizer=made.path)
    reports = []
    for model in (made.path, path):
        assert main(["inspect", str(model), "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    directory, file = reports
    same = directory.keys() - {"path", "tokenizer", "warnings"}
    assert {k: file[k] for k in same} == {k: directory[k] for k in same}
    assert file["tokenizer"] == "in the file"


def test_vision_tower(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Both names of a norm; a tower given, found, of another model, or not wanted."""
    made = checkpoint("scout_like", tokenizer=True)
    prompt = tiny.THREE_TILES
    tokens, pixels = made.golden.tokens(prompt), made.golden.variant.pixels(prompt)
    path = tmp_path / "model.gguf"
    write_gguf(path, made.config, made.tensors, tokenizer=made.path)
    with load(path) as llm:
        assert llm.info.image_size == 0
    elsewhere = tmp_path / "towers"
    elsewhere.mkdir()
    write_mmproj(elsewhere / "other.gguf", made.config, made.tensors, post_norm="attn_post_norm")
    with load(path, mmproj=elsewhere / "other.gguf") as llm:
        np.testing.assert_allclose(
            llm.logits(tokens, pixels), made.golden.logits(prompt), rtol=0, atol=1e-4
        )
    with pytest.raises(puna.ModelFormatError, match="it is a vision tower, not a model"):
        load(elsewhere / "other.gguf")
    narrow = made.config | {"text_config": made.config["text_config"] | {"hidden_size": 32}}
    write_mmproj(tmp_path / "mmproj-a.gguf", narrow, made.tensors)
    (tmp_path / "mmproj-0.gguf").write_bytes(b"GGUF\3\0\0")
    with load(path) as llm:  # one that does not fit is another model's, as may be what is damaged
        assert llm.info.image_size == 0
        assert any("mmproj-0.gguf beside the model is not used" in w for w in llm.plan.warnings)
    with pytest.raises(puna.ModelFormatError, match=r"mmproj-0\.gguf"):
        load(path, mmproj=tmp_path / "mmproj-0.gguf")
    with pytest.raises(puna.ModelFormatError, match="vision tower of another model"):
        load(path, mmproj=tmp_path / "mmproj-a.gguf")
    with pytest.raises(puna.InvalidRequest, match="mmproj goes with a GGUF file"):
        load(made.path, mmproj=elsewhere / "other.gguf")
    write_mmproj(tmp_path / "mmproj-b.gguf", made.config, made.tensors)
    write_mmproj(tmp_path / "mmproj-c.gguf", made.config, made.tensors)
    with load(path) as llm:
        assert llm.info.image_size == 56
        assert any("mmproj-b.gguf is used" in warning for warning in llm.plan.warnings)


@pytest.mark.parametrize("kind", ["Q4_0", "mixture"])
def test_packed(tmp_path: Path, kind: str) -> None:
    """The packed form of a file has its bits, the token embedding's too."""
    path, _ = quantised_pair(tmp_path, mixed_kinds if kind == "mixture" else lambda _: kind)
    puna.quantize(path, tmp_path / "packed", progress=False)
    tokens = np.random.default_rng(1).integers(0, 280, 40)
    with load(path) as wanted, load(tmp_path / "packed") as found:
        assert np.array_equal(found.logits(tokens), wanted.logits(tokens))
        assert found.plan.weight_bytes == wanted.plan.weight_bytes
    rewrite_metadata(tmp_path / "packed", lambda form: form.update(embedding="Q9_0"))
    with pytest.raises(puna.UnsupportedError, match="token embedding has the type"):
        load(tmp_path / "packed")
    rewrite_metadata(tmp_path / "packed", lambda form: form.update(embedding="Q8_0"))
    with pytest.raises(puna.ModelFormatError, match=r"embed_tokens is uint8 .* the bytes of Q8_0"):
        load(tmp_path / "packed")


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_directory(checkpoint: MakeCheckpoint, tmp_path: Path, name: str) -> None:
    """It has all that the file has: every kind of layer, vision, tokenizer, template, sampling."""
    made, variant = checkpoint(name, tokenizer=True), tiny.VARIANTS[name]
    template = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}<|eot|>"
    path = write(tmp_path, made, tokenizer=made.path, template=template)
    packed = tmp_path / "packed"
    assert puna.quantize(path, packed, progress=False) == ()
    with load(path) as wanted, load(packed) as found:
        expected, got = all_logits(wanted, variant), all_logits(found, variant)
        for prompt, logits in expected.items():
            assert np.array_equal(got[prompt], logits), prompt
        for field in ("bos_token", "eos_tokens", "image_token", "parameters"):
            assert getattr(found.info, field) == getattr(wanted.info, field), field
        assert found.plan.max_context == wanted.plan.max_context
        assert found.tokenizer.special_tokens == wanted.tokenizer.special_tokens
        for text in TEXTS:
            for special in ("none", "all"):
                ids = wanted.tokenizer.encode(text, allowed_special=special)
                assert np.array_equal(found.tokenizer.encode(text, allowed_special=special), ids)
        prompts = [llm._chat_prompt("hi", None, None).tokens for llm in (wanted, found)]
        assert prompts[0] == prompts[1]
    with load(path, quant="int8") as wanted:
        puna.quantize(path, tmp_path / "int8", quant="int8", progress=False)
        with load(tmp_path / "int8") as found:
            tokens = made.golden.tokens(tiny.TEXT)
            assert np.array_equal(found.logits(tokens), wanted.logits(tokens))


def test_refusals(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    made = checkpoint("text_only", tokenizer=True)
    path = write(tmp_path, made, tokenizer=made.path)
    data = path.read_bytes()

    def refused(kind: type[puna.Error], words: str, changed: Path) -> None:
        with pytest.raises(kind, match=words):
            load(changed)

    refused(
        puna.UnsupportedError,
        "pre is llama3; Llama 4's is llama4",
        _with_text(data, tmp_path, "tokenizer.ggml.pre", "llama3"),
    )
    refused(
        puna.UnsupportedError,
        "architecture is llama3; puna runs llama4",
        _with_text(data, tmp_path, "general.architecture", "llama3"),
    )
    (tmp_path / "short.gguf").write_bytes(data[:-100])
    refused(puna.ModelFormatError, "truncated or damaged", tmp_path / "short.gguf")
    (tmp_path / "none.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    refused(puna.ModelFormatError, "does not begin with GGUF", tmp_path / "none.gguf")
    for version, words in ((1, "versions 2 and 3"), (3 << 24, "big-endian")):
        (tmp_path / "version.gguf").write_bytes(data[:4] + struct.pack("<I", version) + data[8:])
        refused(puna.UnsupportedError, words, tmp_path / "version.gguf")
    with pytest.raises(puna.ModelNotFound, match=r"there is no file .*modle.gguf.*model.gguf"):
        load(tmp_path / "modle.gguf")
    folder = tmp_path / "only"
    folder.mkdir()
    path.rename(folder / "model.gguf")
    with pytest.raises(puna.ModelNotFound, match=r"but a GGUF file; give .*model.gguf"):
        load(folder)


def _with_text(data: bytes, folder: Path, key: str, text: str) -> Path:
    """The value of a key, of the same length, replaced."""
    at = data.index(key.encode()) + len(key) + 4 + 8
    changed = folder / "changed.gguf"
    changed.write_bytes(data[:at] + text.encode() + data[at + len(text) :])
    return changed


def test_type_that_is_not_read(tmp_path: Path) -> None:
    name = "blk.3.ffn_up_exps.weight"
    elements, size = gguf.GGML_QUANT_SIZES[Type.IQ2_XXS]
    config = WIDE_TEXT
    blocks = np.zeros((4, 256, 256 // elements * size), np.uint8)
    write_gguf(
        tmp_path / "model.gguf",
        config,
        random_tensors(config, 3),
        encoded={name: (blocks, Type.IQ2_XXS)},
    )
    with pytest.raises(puna.UnsupportedError, match=f"tensor {name} has the type IQ2_XXS"):
        load(tmp_path / "model.gguf")
