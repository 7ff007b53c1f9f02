"""The size budget: files that fit a sitting, functions that fit a screen. Exemptions are named, with their reason."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    [
        *ROOT.glob("autoshard/*.py"),
        *ROOT.glob("autoshard/cli/*.py"),
        *ROOT.glob("autoshard/ops/*.py"),
        *ROOT.glob("autoshard/pictures/*.py"),
        *ROOT.glob("autoshard/report/*.py"),
        *ROOT.glob("autoshard/runtime/*.py"),
        *ROOT.glob("passes/*.py"),
        *ROOT.glob("examples/*.py"),
    ]
)
LONGEST_FILE, LONGEST_FUNCTION = 500, 60
EXEMPT: dict[str, str] = {}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_size(path: Path) -> None:
    text = path.read_text()
    lines = len(text.splitlines())
    assert lines <= LONGEST_FILE or path.name in EXEMPT, f"{path.name} has {lines} lines; is it one thing?"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{path.name}: {node.name} has {length} lines"


def test_public_names_have_docstrings() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path.name} has no docstring"
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and "examples" not in str(path):
                undocumented = not ast.get_docstring(node) and (isinstance(node, ast.ClassDef) or node.end_lineno - node.lineno > 8)  # type: ignore[operator]
                assert not undocumented, f"{path.name}: {node.name} has no docstring"


def test_every_pass_has_its_file() -> None:
    from autoshard.passes import PASSES
    from autoshard.runner import pass_name

    for cls in PASSES:
        assert (ROOT / "passes" / f"{pass_name(cls.__new__(cls))}.py").exists()
