"""What the pages in docs/benchmarks share: heading with versions and date, tables, where they are written."""

from __future__ import annotations

import platform
import tomllib
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs/benchmarks"


def heading(title: str, script: str, is_of_bench: bool = True) -> list[str]:
    """is_of_bench: whether `make bench` runs the script."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    made = f"{date.today().isoformat()}; autoshard {version}, torch {torch.__version__}, Python {platform.python_version()}"
    by = f"`make bench` ({script})" if is_of_bench else f"`python {script}`"
    return [f"# {title}", "", f"{made}, {platform.machine()}.", f"Written by {by}.", ""]


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows]]


def write(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
