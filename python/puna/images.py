"""Pictures in any form to RGB pixels."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import stat
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from puna.errors import ImageError

# The limits of csrc/image/tiling.h, held here before a picture is decoded.
MAX_PIXELS = (256 << 20) // 3
MAX_SIDE = 65_535
# Of an encoded file: more than the largest picture takes without compression, at 8 bytes a pixel.
MAX_FILE_BYTES = 1 << 30

# What Pillow decodes by itself. Its other formats are rare, and some of them run other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")


def to_rgb(image: Any) -> NDArray[np.uint8]:
    """Decodes a picture.

    Args:
        image: A path; a PIL image; an encoded file (PNG, JPEG, WebP, ...) as bytes; base64 or a
            data: URL as a string; or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8 or
            floating point in [0, 1].

    Returns:
        uint8 [H, W, 3]. Transparent pixels are laid over white; 16-bit greys keep their top 8 bits.
        Encoded pictures are turned upright if their EXIF data say how (as transformers does when it
        loads one); PIL images and arrays are taken as they are.

    Raises:
        ImageError: The picture is missing, damaged, empty, too large, or of an unknown form.
    """
    if isinstance(image, Image.Image):
        return _from_pil(image, "the PIL image")
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, bytes | bytearray | memoryview):
        encoded = bytes(image)
        return _from_encoded(encoded, f"the picture of {len(encoded)} bytes")
    if isinstance(image, os.PathLike):
        return _from_path(Path(image))
    if isinstance(image, str):
        return _from_string(image)
    raise ImageError(
        f"an image is of type {type(image).__name__}; "
        "give a path, a PIL image, bytes, base64 or a NumPy array"
    )


def _from_string(text: str) -> NDArray[np.uint8]:
    scheme = text[:8].lower()
    if scheme.startswith(("http://", "https://")):
        raise ImageError(
            f"{_short(text)} is an address: download it, and give the file or its bytes"
        )
    if scheme.startswith("data:"):
        header, _, payload = text.partition(",")
        if not header.lower().endswith(";base64"):
            raise ImageError(f"{_short(text)} is not a data: URL in base64")
        return _from_base64(unquote(payload), "the data: URL")
    if scheme.startswith("file://"):
        try:
            path = unquote(urlsplit(text).path)
        except ValueError as error:
            raise ImageError(f"{_short(text)} is not a valid file: URL: {error}") from error
        return _from_path(Path(path))
    # Base64 may look like a path ("/9j/4AAQ" begins every JPEG), so a file that exists goes first.
    if _looks_like_base64(text) and not _exists(text):
        return _from_base64(text, f"{_short(text)}, which is no file either,")
    return _from_path(Path(text))


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a name, or with null characters
        return False


def _looks_like_base64(text: str) -> bool:
    # Shorter strings are file names: the smallest encoded pictures have more bytes.
    text = text.strip()
    return len(text) >= 40 and re.fullmatch(r"[A-Za-z0-9+/\s]+=*", text) is not None


def _from_base64(text: str, name: str) -> NDArray[np.uint8]:
    try:
        encoded = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{name} is not valid base64: {error}") from error
    return _from_encoded(encoded, name)


def _from_path(path: Path) -> NDArray[np.uint8]:
    # Room for the paths that people have; a text mistaken for one may have megabytes.
    name = _short(str(path), at_most=500)
    try:
        with open(path.expanduser(), "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):  # a device may have no end
                raise ImageError(f"the picture {name} is a pipe or a device: give a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise ImageError(
                    f"the picture {name} has {status.st_size:,} bytes; at most "
                    f"{MAX_FILE_BYTES:,} are accepted: make it smaller"
                )
            encoded = file.read()
    except ImageError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ImageError(f"the picture {name} cannot be read: {reason}") from error
    return _from_encoded(encoded, str(path))


def _without_waiting(path: str, flags: int) -> int:
    """For open(), which would wait for somebody who writes to a named pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _from_encoded(encoded: bytes, name: str) -> NDArray[np.uint8]:
    if not encoded:
        raise ImageError(f"{name} is empty")
    Image.init()
    formats = [known for known in _FORMATS if known in Image.OPEN]  # a build may lack some
    try:
        picture = Image.open(io.BytesIO(encoded), formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} is too large: {error}") from error
    except UnidentifiedImageError as error:
        listed = ", ".join(formats)
        raise ImageError(f"{name} is not a picture in a known format ({listed})") from error
    except Exception as error:  # decoders raise many types on damaged files
        raise ImageError(f"{name} cannot be decoded: {error}") from error
    with picture:
        rgb = _from_pil(picture, name)
        return np.ascontiguousarray(_upright(rgb, _orientation(picture)))


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data do not damage the picture
        return 1


def _upright(rgb: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undoes an EXIF orientation, 1 to 8: transposes from 5 on, then flips sides."""
    if orientation in (5, 6, 7, 8):
        rgb = rgb.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    return rgb


def _from_pil(picture: Image.Image, name: str) -> NDArray[np.uint8]:
    width, height = picture.size
    _check_size(height, width, name)
    try:
        picture.load()
        # The header of an ICO file may say another size than the picture in it has.
        _check_size(picture.height, picture.width, name)
        if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
            # Pillow would clip at 255 instead. (Its older versions read such a PNG as 32-bit.)
            return _grey(np.clip(np.asarray(picture, np.int64), 0, 65_535) >> 8)
        if picture.mode == "La":
            picture = picture.convert("LA")
        if picture.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in picture.info:
            layer = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        return np.array(picture.convert("RGB"), dtype=np.uint8)
    except ImageError:
        raise
    except Exception as error:  # opening reads the header only; the decoder may still fail
        raise ImageError(f"{name} cannot be decoded: {error}") from error


def _from_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    channels = (1, 3, 4)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in channels):
        message = f"an image array has shape {array.shape}; it must be (H, W) or (H, W, 1, 3 or 4)"
        if array.ndim == 3 and array.shape[0] in channels:
            message += ": if its channels come first, give array.transpose(1, 2, 0)"
        raise ImageError(message)
    _check_size(array.shape[0], array.shape[1], f"the array {array.shape}")
    if np.issubdtype(array.dtype, np.floating):
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):  # also where one of them is not a number
            raise ImageError(
                f"an image array of floats lies in [{low}, {high}]; it must lie in [0, 1]"
            )
        array = np.rint(array.astype(np.float64) * 255)
    elif array.dtype == np.bool_:
        array = array * np.uint8(255)
    elif array.dtype != np.uint8:
        raise ImageError(f"an image array is {array.dtype}; it must be uint8, or floats in [0, 1]")
    array = array.astype(np.uint8)
    if array.ndim == 2:
        return _grey(array)
    if array.shape[2] == 1:
        return _grey(array[:, :, 0])
    if array.shape[2] == 4:
        return _from_pil(Image.fromarray(np.ascontiguousarray(array)), "the array")
    return np.ascontiguousarray(array)


def _grey(levels: NDArray[Any]) -> NDArray[np.uint8]:
    return np.repeat(levels.astype(np.uint8)[:, :, None], 3, axis=2)


def _check_size(height: int, width: int, name: str) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"{name} is {width} x {height} pixels; it needs at least 1 x 1")
    if height > MAX_SIDE or width > MAX_SIDE or height * width > MAX_PIXELS:
        raise ImageError(
            f"{name} is {width} x {height} pixels; at most {MAX_PIXELS:,} in all and "
            f"{MAX_SIDE:,} a side are accepted: make it smaller"
        )


def _short(text: str, at_most: int = 60) -> str:
    return text if len(text) <= at_most else f"{text[: at_most - 3]}..."
