"""The committed measurements: README's table is made of them and holds every row."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_readme_shows_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import measured

    text = measured.README.read_text(encoding="utf-8")
    shown = text.split(measured.BEGIN)[1].split(measured.END)[0]
    assert shown == measured.table()
