"""Hooks of mkdocs. In the nav, a folder (`Decisions: decisions/`) stands for all of its pages, so that a new page needs no entry."""

import re
from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Called by mkdocs once the configuration is read."""
    config.nav = [_expanded(entry, Path(config.docs_dir)) for entry in config.nav]
    return config


def _expanded(entry: Any, docs: Path) -> Any:
    """An entry of the nav, with folders below it listed. `README.md` comes first."""
    if not isinstance(entry, dict):
        return entry
    ((title, target),) = entry.items()
    if isinstance(target, list):
        return {title: [_expanded(each, docs) for each in target]}
    if not target.endswith("/"):
        return entry
    pages = sorted((docs / target).glob("*.md"), key=lambda page: (page.name != "README.md", page.name))
    return {title: [page.relative_to(docs).as_posix() for page in pages]}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page: a block that is a file (see run_code_blocks.py) shows its name, a picture opens in full."""
    markdown = re.sub(r"^<!-- (\S+\.py) -->\n+```python$", r'```python title="\1"', markdown, flags=re.M)
    return re.sub(r"!\[([^\]]*)\]\(([^)]*images/[^)]+)\)", r"[![\1](\2)](\2)", markdown)
