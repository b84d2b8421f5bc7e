"""Writes tests/cpp/resize_golden.inc: pictures that Pillow resized, for the C++ tests.

    python tests/golden/make_resize_golden.py

The source pictures are noise that the C++ test computes as well.
"""

from pathlib import Path

import numpy as np
from PIL import Image

# height, width, new height, new width: down, up, both, one side only, to a line, to a point.
CASES = (
    (9, 11, 4, 5),
    (3, 4, 7, 6),
    (12, 3, 5, 8),
    (6, 9, 6, 4),
    (10, 5, 3, 5),
    (37, 53, 1, 7),
    (64, 48, 1, 1),
    (1, 1, 3, 3),
    (200, 7, 6, 3),
)
TARGET = Path(__file__).parent.parent / "cpp" / "resize_golden.inc"


def noise(height: int, width: int) -> np.ndarray:
    """The top bytes of a linear congruential generator (Numerical Recipes' constants)."""
    state, values = height * 65536 + width, []
    for _ in range(height * width * 3):
        state = (state * 1664525 + 1013904223) % (1 << 32)
        values.append(state >> 24)
    return np.array(values, np.uint8).reshape(height, width, 3)


def resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Rows before columns: the order that Pillow always had until version 13."""
    rows = Image.fromarray(picture).resize((width, picture.shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(rows.resize((width, height), Image.Resampling.BILINEAR))


def main() -> None:
    """Writes the file."""
    lines = ["// Made by tests/golden/make_resize_golden.py."]
    for height, width, new_height, new_width in CASES:
        levels = resize(noise(height, width), new_height, new_width).ravel().tolist()
        lines.append(f"{{{height}, {width}, {new_height}, {new_width},")
        rows = [levels[i : i + 20] for i in range(0, len(levels), 20)]
        text = ",\n  ".join(", ".join(map(str, row)) for row in rows)
        lines.append(f" {{{text}}}}},")
    TARGET.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
