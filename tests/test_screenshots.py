"""The pictures of the documentation: which there are, how large, and what their script says where it cannot draw them."""

from __future__ import annotations

import re
import shutil
import struct
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / ".ci" / "make_screenshots.py"
IMAGES = ROOT / "docs" / "images"
sys.path.append(str(SCRIPT.parent))

import make_screenshots  # noqa: E402


def shown() -> dict[str, str]:
    """By the name of a picture in docs/images, a page that shows it."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    return {name: page.name for page in pages for name in re.findall(r"images/(\w+\.(?:svg|png))", page.read_text())}


def test_every_picture_is_shown_and_every_one_shown_is_there() -> None:
    assert set(shown()) == {path.name for path in IMAGES.iterdir()}


def test_pictures_are_small_and_as_large_as_asked() -> None:
    assert all(0 < path.stat().st_size < make_screenshots.MOST_BYTES for path in IMAGES.iterdir())
    for shot in make_screenshots.SHOTS:
        assert struct.unpack(">II", (IMAGES / shot.name).read_bytes()[16:24]) == (shot.width, shot.height)


def test_missing_programs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out", str(tmp_path / "images")])
    with pytest.raises(SystemExit, match=r"dot \(apt-get install graphviz\), chromium \(apt-get install chromium\)"):
        make_screenshots.main()
    assert not (tmp_path / "images").exists()


@pytest.mark.skipif(not shutil.which("dot"), reason="needs Graphviz's dot")
def test_the_script_makes_all_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are drawn here; of reports, which take longer, the names are compared."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    make_screenshots.draw_graphs(tmp_path)
    graphs = {path.name for path in tmp_path.iterdir()}
    assert graphs | {shot.name for shot in make_screenshots.SHOTS} == {path.name for path in IMAGES.iterdir()}
    stages = (tmp_path / "unet_pp2_dp2.svg").read_text()
    assert "stage 1" in stages
    assert "sent to stage 1" in stages


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_report_is_taken(tmp_path: Path) -> None:
    (tmp_path / "tiny.html").write_text("<html><style></style><section id='a'>one</section><section id='b'>two</section></html>")
    make_screenshots.take(make_screenshots.Shot("tiny.png", "tiny", 300, 200, sections=("b",)), tmp_path, tmp_path)
    assert struct.unpack(">II", (tmp_path / "tiny.png").read_bytes()[16:24]) == (300, 200)
    assert "section:not(#b) { display: none; }" in (tmp_path / "tiny.png.html").read_text()
