"""What a saved session holds besides tokens, keys and values: its messages and tools."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from puna.errors import ImageError, SessionMismatch
from puna.images import to_rgb

_NAME = "conversation.json"
_VERSION = 3


@dataclass(frozen=True, slots=True)
class Notes:
    """The messages of a session and its tools; whether it holds a text; ids not computed yet.

    `pending` follow the first `computed` ids. A session that went on after it was saved, and ended
    without being saved again, has others there.
    """

    messages: list[dict[str, Any]]
    reads: bool = False
    computed: int = 0
    pending: list[int] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)


def write_notes(directory: Path, notes: Notes) -> None:
    """Puts them beside a saved session, at once or not at all."""
    content = {
        "messages": [_with_content(message, _encoded) for message in notes.messages],
        "reads": notes.reads,
        "computed": notes.computed,
        "pending": notes.pending,
        "tools": notes.tools,
    }
    path = directory / _NAME
    fresh = path.with_suffix(".new")
    with fresh.open("w", encoding="utf-8") as file:
        json.dump({"version": _VERSION, "sha256": _digest(content), "content": content}, file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    folder = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)


def read_notes(directory: Path) -> Notes:
    """What write_notes() put there; nothing if the session was never saved.

    Raises:
        SessionMismatch: The file is damaged or of another version.
    """
    path = directory / _NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["version"] != _VERSION:
            raise SessionMismatch(
                f"[session] {path} is of version {document['version']}, this puna reads {_VERSION};"
                " open the session with the puna that wrote it"
            )
        content = document["content"]
        if document["sha256"] != _digest(content):
            raise ValueError("its checksum is another")
        return Notes(
            [_with_content(message, _decoded) for message in content["messages"]],
            bool(content["reads"]),
            int(content["computed"]),
            [_token_id(token) for token in content["pending"]],
            [dict(tool) for tool in content["tools"]],
        )
    except FileNotFoundError:
        return Notes([])
    except (
        *(ValueError, KeyError, TypeError, ImageError),
        *(RecursionError, OverflowError),  # JSON nested very deep, and numbers like Infinity
    ) as error:
        if isinstance(error, SessionMismatch):
            raise
        raise SessionMismatch(
            f"[session] {path} is damaged ({error}); delete it to go on from the tokens alone"
        ) from error


def _token_id(value: Any) -> int:
    token = int(value)
    if not 0 <= token < 1 << 31:
        raise ValueError(f"{token} is no token id")
    return token


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _with_content(message: dict[str, Any], change: Any) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return message
    return {**message, "content": [change(part) for part in content]}


def _encoded(part: dict[str, Any]) -> dict[str, Any]:
    """Pictures as PNG, which gives their pixels back exactly."""
    if part["type"] != "image":
        return part
    file = io.BytesIO()
    Image.fromarray(np.asarray(part["image"])).save(file, "PNG")
    return {"type": "image", "image": base64.b64encode(file.getvalue()).decode("ascii")}


def _decoded(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    return {"type": "image", "image": to_rgb(base64.b64decode(part["image"]))}
