"""Pictures: every form of input to RGB, and RGB to tiles as the reference makes them."""

from __future__ import annotations

import ast
import base64
import io
import math
import os
import shutil
import struct
from collections import defaultdict
from collections.abc import Callable
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image, ImageOps

import puna
from conftest import skip_or_fail
from puna import _core, images
from puna.images import to_rgb
from puna.loading import demo_directory

TILE = 336
MAX_TILES = 16
IDS = {
    "image_start": 80,
    "image_end": 81,
    "tile_x_separator": 84,
    "tile_y_separator": 85,
    "image": 90,
    "patch": 92,
}


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (height, width, channels), dtype=np.uint8)


def encode(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


RGB = noise(6, 9)
PNG = encode(Image.fromarray(RGB))


# --- any input to RGB ----------------------------------------------------------------------------


def test_forms_of_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a picture.png"
    path.write_bytes(PNG)
    text = base64.b64encode(PNG).decode()
    monkeypatch.chdir(tmp_path)
    forms = [
        Image.open(io.BytesIO(PNG)),
        Image.fromarray(RGB),
        path,
        str(path),
        "a picture.png",
        f"file://{quote(str(path))}",
        PNG,
        bytearray(PNG),
        memoryview(PNG),
        text,
        "\n".join(text[i : i + 76] for i in range(0, len(text), 76)) + "\n",
        f"data:image/png;base64,{text}",
        f"data:;base64,{quote(text)}",
        RGB,
        RGB.astype(np.float64) / 255,
        (RGB / 255).astype(np.float32),
        np.asfortranarray(RGB),
        RGB[::-1][::-1],
        np.dstack([RGB, np.full((6, 9), 255, np.uint8)]),
    ]
    for form in forms:
        rgb = to_rgb(form)
        assert rgb.dtype == np.uint8
        assert rgb.flags.c_contiguous
        np.testing.assert_array_equal(rgb, RGB)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "TIFF", "WEBP", "PPM", "ICO", "JPEG2000"])
def test_encoded_formats(kind: str) -> None:
    even = np.full((16, 16, 3), (200, 30, 90), np.uint8)
    rgb = to_rgb(encode(Image.fromarray(even), kind))
    assert rgb.shape == even.shape
    assert np.abs(rgb.astype(int) - even).max() <= 8  # some of them are lossy


def test_base64_that_looks_like_a_path() -> None:
    text = base64.b64encode(encode(Image.fromarray(RGB), "JPEG")).decode()
    assert text.startswith("/9j/")
    assert to_rgb(text).shape == RGB.shape


def test_transparent_pixels_lie_over_white() -> None:
    rgba = np.zeros((1, 4, 4), np.uint8)
    rgba[0, :, 0] = 100
    rgba[0, :, 3] = (0, 51, 128, 255)
    # 100 over 255 with these alphas, rounded.
    red = [255, 255 - 31, round(255 - 155 * 128 / 255), 100]
    for form in (rgba, Image.fromarray(rgba), encode(Image.fromarray(rgba))):
        rgb = to_rgb(form)
        assert rgb[0, 0].tolist() == [255, 255, 255]
        assert rgb[0, :, 0].tolist() == red
        assert rgb[0, 3].tolist() == [100, 0, 0]


def test_modes_of_pillow() -> None:
    levels = np.array([[0, 100, 255]], np.uint8)
    grey = Image.fromarray(levels)
    expected = [[0] * 3, [100] * 3, [255] * 3]
    for picture in (grey, grey.convert("LA"), grey.convert("RGB"), grey.convert("RGBA")):
        assert to_rgb(picture)[0].tolist() == expected
    assert to_rgb(grey.convert("RGBA").convert("RGBa"))[0].tolist() == expected
    assert to_rgb(grey.convert("LA").convert("La"))[0].tolist() == expected
    assert to_rgb(grey.convert("P"))[0].tolist() == expected
    assert to_rgb(Image.fromarray(levels > 50))[0].tolist() == [[0] * 3, [255] * 3, [255] * 3]
    assert to_rgb(Image.new("CMYK", (1, 1), (0, 255, 255, 0)))[0, 0].tolist() == [255, 0, 0]
    assert to_rgb(Image.new("HSV", (1, 1), (0, 0, 255)))[0, 0].tolist() == [255, 255, 255]
    assert to_rgb(Image.new("I", (1, 1), 77))[0, 0].tolist() == [77, 77, 77]

    # A palette, and plain colours, with one transparent colour.
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    transparent = to_rgb(encode(palette, transparency=1))
    assert transparent[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    plain = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    transparent = to_rgb(encode(plain, transparency=(4, 5, 6)))
    assert transparent[0].tolist() == [[1, 2, 3], [255, 255, 255]]


def test_sixteen_bits() -> None:
    levels = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    picture = Image.fromarray(levels)
    assert picture.mode == "I;16"
    for form in (picture, encode(picture), encode(picture, "TIFF")):
        assert to_rgb(form)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_arrays() -> None:
    grey = noise(3, 5, 1)
    expected = np.repeat(grey, 3, axis=2)
    np.testing.assert_array_equal(to_rgb(grey), expected)
    np.testing.assert_array_equal(to_rgb(grey[:, :, 0]), expected)
    np.testing.assert_array_equal(to_rgb(grey > 99), (expected > 99) * np.uint8(255))
    assert to_rgb(np.array([[0.0, 0.5, 1.0]], np.float16))[0, :, 0].tolist() == [0, 128, 255]
    original = RGB.copy()
    to_rgb(RGB)[:] = 0  # what comes back is the caller's own
    np.testing.assert_array_equal(RGB, original)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_encoded_pictures_are_turned_upright(kind: str, orientation: int) -> None:
    picture = Image.fromarray(np.kron(noise(2, 3), np.ones((8, 8, 1), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(picture, kind, exif=exif)
    opened = Image.open(io.BytesIO(encoded))
    upright = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    np.testing.assert_array_equal(to_rgb(encoded), upright)
    if kind == "JPEG":  # decoded already: taken as it is
        assert to_rgb(Image.open(io.BytesIO(encoded))).shape == (16, 24, 3)


def test_refused_forms(tmp_path: Path) -> None:
    empty = tmp_path / "empty.png"
    empty.touch()
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(encode(Image.fromarray(noise(64, 64)))[:-5000])
    refused: list[tuple[Any, str]] = [
        (tmp_path / "absent.png", "absent.png cannot be read: No such file"),
        (tmp_path / ("deep" * 30) / "absent.png", "absent.png cannot be read: No such file"),
        ("no path? " * 1000, r"^the picture .{497}\.\.\. cannot be read: File name too long"),
        (tmp_path, "cannot be read: Is a directory"),
        (empty, "empty.png is empty"),
        (b"", "picture of 0 bytes is empty"),
        (truncated, "truncated.png cannot be decoded"),
        (Image.open(io.BytesIO(truncated.read_bytes())), "the PIL image cannot be decoded"),
        (b"no picture at all", "17 bytes is not a picture in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture in a known format"),
        ("https://example.org/cat.png", "download it, and give the file"),
        ("data:image/png,abc", "not a data: URL in base64"),
        ("data:image/png;base64,!", "not valid base64"),
        ("A" * 45, "which is no file either, is not valid base64"),
        ("a\0b", "embedded null"),
        (None, "of type NoneType"),
        (7, "of type int; give a path"),
        ([[0, 1], [2, 3]], "of type list"),
        (Image.new("RGB", (0, 5)), "0 x 5 pixels; it needs at least 1 x 1"),
        (np.zeros((0, 4, 3), np.uint8), "4 x 0 pixels"),
        (np.zeros((3, 20, 30), np.uint8), r"give array.transpose\(1, 2, 0\)"),
        (np.zeros((20, 30, 2), np.uint8), r"shape \(20, 30, 2\)"),
        (np.zeros(4, np.uint8), r"shape \(4,\)"),
        (np.zeros((2, 2), np.int64), "int64; it must be uint8"),
        (np.full((2, 2), 1.5), r"lies in \[1.5, 1.5\]; it must lie in \[0, 1\]"),
        (np.full((2, 2), -0.5), r"lies in \[-0.5"),
        (np.full((2, 2), np.nan), r"lies in \[nan"),
        (np.zeros((1, images.MAX_SIDE + 1), np.uint8), "65536 x 1 pixels; at most 89,478,485"),
        (np.broadcast_to(np.uint8(0), (10_000, 10_000)), "10000 x 10000 pixels; at most"),
    ]
    for form, message in refused:
        with pytest.raises(puna.ImageError, match=message):
            to_rgb(form)


@pytest.mark.parametrize("form", [str, Path, "file://{}".format])
@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "pipe", "link"])
def test_what_is_no_regular_file(tmp_path: Path, name: str, form: Callable[[str], Any]) -> None:
    """It is refused at once: one has no end, the other waits for somebody who writes."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    path = str(tmp_path / name)
    with pytest.raises(puna.ImageError, match=f"{name} is a pipe or a device: give a regular"):
        to_rgb(form(path))


def test_files_that_are_too_long(tmp_path: Path) -> None:
    path = tmp_path / "long.png"
    with path.open("wb") as file:
        file.truncate((1 << 30) + 1)
    message = r"long.png has 1,073,741,825 bytes; at most 1,073,741,824 are accepted"
    with pytest.raises(puna.ImageError, match=message):
        to_rgb(path)


@pytest.mark.parametrize("url", ["file://[x/y", "file://[::1/y.png", "FILE://]/y.png"])
def test_damaged_file_urls(url: str) -> None:
    with pytest.raises(puna.ImageError, match="is not a valid file: URL"):
        to_rgb(url)


@pytest.mark.filterwarnings("ignore:Image was not the expected size")
def test_icons_with_a_larger_picture_than_they_say() -> None:
    held = encode(Image.new("1", (images.MAX_SIDE + 1, 2)))
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(held), 22)
    icon = struct.pack("<HHH", 0, 1, 1) + entry + held
    for form in (icon, Image.open(io.BytesIO(icon))):
        with pytest.raises(puna.ImageError, match="is 65536 x 2 pixels; at most"):
            to_rgb(form)


def test_pictures_that_grow_when_they_are_decoded() -> None:
    """As icons may: the size is looked at again."""

    class Growing(Image.Image):
        def load(self) -> Any:
            self.im = Image.new("RGB", (images.MAX_SIDE + 1, 2)).im
            self._size = self.im.size
            return super().load()

    picture = Growing()
    picture._mode, picture._size = "RGB", (16, 16)
    with pytest.raises(puna.ImageError, match="the PIL image is 65536 x 2 pixels; at most"):
        to_rgb(picture)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs() -> None:
    # A few kilobytes each, and 100 and 400 megapixels.
    for side in (10_000, 20_000):
        bomb = encode(Image.new("1", (side, side)))
        assert len(bomb) < 100_000
        with pytest.raises(puna.ImageError, match="the picture of"):
            to_rgb(bomb)


def test_damaged_files_raise_only_image_error() -> None:
    """200 damaged files of each format: each loads or raises ImageError with one line."""
    generator = np.random.default_rng(1)
    source = Image.fromarray(noise(24, 24))
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        encoded = np.frombuffer(encode(source, kind), np.uint8)
        for _ in range(200):
            damaged = encoded.copy()
            places = generator.integers(0, min(len(damaged), 400), 3)
            damaged[places] = generator.integers(0, 256, 3)
            data = damaged[: generator.integers(1, len(damaged) + 1)].tobytes()
            try:
                rgb = to_rgb(data)
            except puna.ImageError as error:
                assert "\n" not in str(error).strip()
            else:
                assert rgb.ndim == 3


# --- RGB to tiles --------------------------------------------------------------------------------


def reference_plan(height: int, width: int, tile: int, max_tiles: int) -> tuple[int, ...]:
    """Canvas and size of Meta's reference in NumPy: scales in fp32, sizes in double."""
    by_ratio: dict[float, list[tuple[int, int]]] = defaultdict(list)
    for count in range(max_tiles, 0, -1):
        for rows in range(1, count + 1):
            if count % rows == 0:
                by_ratio[rows * rows / count].append((rows, count // rows))
    canvases = np.array([canvas for group in by_ratio.values() for canvas in group])
    scales = (canvases * tile).astype(np.float32) / np.array([height, width], np.float32)
    scale = scales.min(axis=1)
    chosen = scale[scale >= 1].min() if (scale >= 1).any() else scale.max()
    equal = canvases[scale == chosen]
    rows, columns = (int(n) for n in equal[equal.prod(axis=1).argmin()])
    target_height = min(max(height, tile), rows * tile)
    target_width = min(max(width, tile), columns * tile)
    by_width, by_height = target_width / width, target_height / height
    if by_width < by_height:
        new = min(math.floor(height * by_width), target_height), target_width
    else:
        new = target_height, min(math.floor(width * by_height), target_width)
    return rows, columns, max(new[0], 1), max(new[1], 1)


def sizes(count: int) -> list[tuple[int, int, int, int]]:
    """Sizes of pictures, tiles and canvases: everyday, tiny, extreme, near and at tile borders."""
    generator = np.random.default_rng(4)
    made: list[tuple[int, int, int, int]] = []
    while len(made) < count:
        kind = len(made) % 5
        if kind == 0:
            pair = generator.integers(1, 5000, 2)
        elif kind == 1:
            pair = generator.integers(1, 400, 2)
        elif kind == 2:
            pair = np.exp(generator.uniform(0, math.log(images.MAX_SIDE), 2))
        elif kind == 3:
            pair = TILE * generator.integers(1, 18, 2) + generator.integers(-1, 2, 2)
        else:
            pair = generator.integers(1, 300) * generator.integers(1, 20, 2)
        height, width = int(pair[0]), int(pair[1])
        if height * width > images.MAX_PIXELS:
            continue
        other = len(made) % 3 == 0
        tile = int(generator.choice([28, 56, 448])) if other else TILE
        most = int(generator.integers(1, 20)) if other else MAX_TILES
        made.append((height, width, tile, most))
    return made


def test_canvas_of_12000_sizes() -> None:
    for size in sizes(12_000):
        assert _core.plan_tiles(*size) == reference_plan(*size), size


def test_canvas_equals_the_image_processor_of_transformers() -> None:
    """Against the library's functions, cut out of a file that only imports with torchvision."""
    spec = util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        skip_or_fail("transformers is not installed")
        return
    import torch

    folder = Path(spec.submodule_search_locations[0], "models", "llama4")
    tree = ast.parse((folder / "image_processing_llama4.py").read_text(encoding="utf-8"))
    wanted = {
        "get_factors",
        "get_max_res_without_distortion",
        "find_supported_resolutions",
        "get_best_fit",
    }
    tree.body = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted
    ]
    assert len(tree.body) == len(wanted)
    theirs: dict[str, Any] = {
        "math": math,
        "torch": torch,
        "defaultdict": defaultdict,
        "SizeDict": SimpleNamespace,
        "lru_cache": lambda **_: lambda function: function,
    }
    exec(compile(tree, "image_processing_llama4", "exec"), theirs)
    canvases: dict[tuple[int, int], Any] = {}
    for height, width, tile, most in sizes(10_000):
        if (tile, most) not in canvases:
            square = SimpleNamespace(height=tile, width=tile)
            canvases[tile, most] = torch.tensor(theirs["find_supported_resolutions"](most, square))
        canvas = theirs["get_best_fit"]((height, width), canvases[tile, most]).tolist()
        target = (
            min(max(height, tile), canvas[0]),
            min(max(width, tile), canvas[1]),
        )
        new = theirs["get_max_res_without_distortion"]((height, width), target)
        expected = (canvas[0] // tile, canvas[1] // tile, max(new[0], 1), max(new[1], 1))
        assert _core.plan_tiles(height, width, tile, most) == expected


def tiles_of(canvas: np.ndarray, tile: int) -> np.ndarray:
    """[H, W, 3] to normalised tiles [n, 3, tile, tile]."""
    rows, columns = canvas.shape[0] // tile, canvas.shape[1] // tile
    cut = canvas.reshape(rows, tile, columns, tile, 3).transpose(0, 2, 4, 1, 3)
    levels = cut.reshape(rows * columns, 3, tile, tile).astype(np.float32)
    return (levels / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


def reference_tiles(
    rgb: np.ndarray, tile: int, max_tiles: int, resize: Callable[[np.ndarray, int, int], np.ndarray]
) -> tuple[np.ndarray, int, int]:
    rows, columns, height, width = reference_plan(*rgb.shape[:2], tile, max_tiles)
    canvas = np.zeros((rows * tile, columns * tile, 3), np.uint8)
    canvas[:height, :width] = resize(rgb, height, width)
    tiles = tiles_of(canvas, tile)
    if rows * columns > 1:
        tiles = np.concatenate([tiles, tiles_of(resize(rgb, tile, tile), tile)])
    return tiles, rows, columns


def pillow(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    picture = Image.fromarray(rgb)
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def pillow_rows_first(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    return pillow(pillow(rgb, rgb.shape[0], width), height, width)


@pytest.mark.parametrize(
    ("height", "width"),
    [
        *[(1, 1), (5, 3), (56, 56), (57, 56), (56, 113), (200, 300)],
        *[(31, 700), (900, 20), (224, 224), (1, 2000), (481, 640), (333, 77)],
    ],
)
@pytest.mark.parametrize("smooth", [False, True])
def test_pixels_equal_pillows(height: int, width: int, smooth: bool) -> None:
    rgb = noise(height, width, seed=height)
    if smooth:
        rgb = (np.indices((height, width, 3)).sum(axis=0) % 256).astype(np.uint8)
    tile, most = 56, 16
    tiles, rows, columns = _core.prepare_image(rgb, tile, most)
    exact, *expected = reference_tiles(rgb, tile, most, pillow_rows_first)
    assert [rows, columns] == expected
    assert tiles.dtype == np.float32
    np.testing.assert_array_equal(tiles, exact)
    # Since version 13 Pillow may resize columns before rows, which moves levels by rounding.
    direct, *_ = reference_tiles(rgb, tile, most, pillow)
    assert np.abs(tiles - direct).max() * 127.5 <= 2.001


def test_a_whole_photograph_size() -> None:
    rgb = noise(1080, 1920)
    tiles, rows, columns = _core.prepare_image(rgb, TILE, MAX_TILES)
    assert (rows, columns) == (3, 5)
    expected, *_ = reference_tiles(rgb, TILE, MAX_TILES, pillow_rows_first)
    np.testing.assert_array_equal(tiles, expected)
    padding = tiles[2 * 5 : 3 * 5, :, 945 - 2 * TILE :]
    assert (padding == -1).all()


def test_token_layout() -> None:
    """The layout of the model card: counts, separators, the global tile last."""
    for rows, columns, count in ((1, 1, 147), (2, 2, 727), (4, 4, 2467)):
        ids = _core.image_token_layout(rows, columns, 144, IDS)
        assert len(ids) == count
    names = {number: name for name, number in IDS.items()}
    rng = np.random.default_rng(0)
    for _ in range(100):
        rows, columns, patches = (int(n) for n in rng.integers(1, 5, 3))
        expected = ["image_start"]
        if rows * columns > 1:
            for _ in range(rows):
                for column in range(columns):
                    expected += ["patch"] * patches
                    if column < columns - 1:
                        expected.append("tile_x_separator")
                expected.append("tile_y_separator")
        expected += ["image", *["patch"] * patches, "image_end"]
        ids = _core.image_token_layout(rows, columns, patches, IDS)
        assert [names[number] for number in ids] == expected


def test_the_core_refuses_impossible_pictures() -> None:
    for size in ((0, 5), (5, 0), (-1, 5), (1 << 40, 5), (images.MAX_SIDE, images.MAX_SIDE)):
        with pytest.raises(puna.ImageError, match=r"^\[image\] the picture is"):
            _core.plan_tiles(*size, TILE, MAX_TILES)
    with pytest.raises(puna.ImageError):
        _core.prepare_image(np.zeros((0, 5, 3), np.uint8), TILE, MAX_TILES)
    with pytest.raises(puna.ImageError):
        _core.prepare_image(np.zeros((5, 5), np.uint8), TILE, MAX_TILES)
    # Both sides state the same limits.
    side = images.MAX_SIDE
    assert _core.plan_tiles(1, side, TILE, MAX_TILES)
    assert _core.plan_tiles(images.MAX_PIXELS // side, side, TILE, MAX_TILES)
    with pytest.raises(puna.ImageError):
        _core.plan_tiles(images.MAX_PIXELS // side + 1, side, TILE, MAX_TILES)


def test_a_tokenizer_without_the_names_of_pictures(tmp_path: Path) -> None:
    """It is told of when the model is loaded; texts need no vision tower."""
    model = Path(shutil.copytree(demo_directory(), tmp_path / "model"))
    settings = model / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("<|tile_x_separator|>", "<|tile_x|>"))
    with pytest.raises(puna.ModelFormatError, match=r"no special token <\|tile_x_separator\|>"):
        puna.load(model, progress=False, threads=1, context=512)
    with puna.load(model, progress=False, threads=1, context=512, vision=False) as llm:
        assert llm.generate("Once", max_tokens=1)
