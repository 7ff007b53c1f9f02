"""The code blocks and commands of every page run, each page in a process of its own; pages that take long are marked slow."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / ".ci"))

from run_code_blocks import run_page, script_of  # noqa: E402

# More than some ten seconds of one core, most of it in processes that the page starts; the others take about five, of which torch's import
# is three.
SLOW = {
    "docs/how-to/checkpoints.md",
    "docs/how-to/fit-a-budget.md",
    "docs/reading-a-plan.md",
    "docs/tutorials/cluster.md",
    "docs/tutorials/first-model.md",
    "docs/tutorials/hugging-face.md",
    "docs/tutorials/pipelines.md",
}
FOUND = ["README.md", "CONTRIBUTING.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
PAGES = [name for name in FOUND if script_of((ROOT / name).read_text(), name)]


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PAGES])
def test_what_a_page_shows_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run_page(str(ROOT / name)), capsys.readouterr().out


def test_pages_called_slow_are_there() -> None:
    assert set(PAGES) >= SLOW
