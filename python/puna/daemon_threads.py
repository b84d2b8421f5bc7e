"""What ends with Python: computations of daemon threads."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import weakref
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from puna.engine import Engine

# Engines, and the processes that loaded them: a fork has no threads that compute.
_LIVE: weakref.WeakKeyDictionary[Engine, int] = weakref.WeakKeyDictionary()
# Of a computation that was told to stop, in seconds; most take milliseconds.
_LONGEST_STEP = 5.0
_PACKAGE = str(Path(__file__).parent)


def close_at_exit(engine: Engine) -> None:
    """Closes an engine that is still open when Python ends, if daemon threads may be using it."""
    _LIVE[engine] = os.getpid()


@atexit.register
def _stop_daemon_threads() -> None:
    """Ends requests of daemon threads, which must not be within the core when Python ends.

    Before 3.14 it ends such a thread where it asks for the GIL, which C++ takes for a fault: the
    process would abort.
    """
    daemons = {thread.ident for thread in threading.enumerate() if thread.daemon}
    if not daemons:
        return
    for engine, process in list(_LIVE.items()):
        if process == os.getpid():
            engine.close()
    deadline = time.monotonic() + _LONGEST_STEP
    while time.monotonic() < deadline:
        frames = sys._current_frames()
        if not any(_is_ours(frame) for ident, frame in frames.items() if ident in daemons):
            return
        time.sleep(0.01)


def _is_ours(frame: FrameType | None) -> bool:
    """Whether a thread is in a function of this package, or of the core."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            return True
        frame = frame.f_back
    return False
