"""docs/command-line.md: every command that it shows is run, and prints what the page says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from command_lines import Ran, run

PAGE = (Path(__file__).parent.parent / "docs" / "command-line.md").read_text()


def shown_commands() -> list[tuple[str, str]]:
    """Command lines of the page's console blocks, in order, each with the output that is shown."""
    blocks = re.findall(r"^```console\n(.*?)^```$", PAGE, re.M | re.S)
    parts = [part.partition("\n") for block in blocks for part in re.split(r"^\$ ", block, flags=re.M) if part]
    return [(line, output) for line, _, output in parts]


def check(line: str, output: str, ran: Ran) -> None:
    """Raise AssertionError unless `ran` is what the page shows: `...` stands for anything, blanks count as one."""
    status = re.search(r"# exits with (\d+)", line)
    assert ran.status == (int(status[1]) if status else 0), (line, ran)
    printed = " ".join((ran.err if output.startswith("error:") else ran.out).split())
    pattern = ".*".join(re.escape(part) for part in " ".join(output.split()).split("..."))
    assert re.fullmatch(pattern, printed), (line, pattern, printed)


def test_the_page_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    model = re.search(r"<!-- net.py -->\n```python\n(.*?)^```$", PAGE, re.M | re.S)
    assert model is not None
    Path("net.py").write_text(model[1])
    commands = shown_commands()
    assert len(commands) > 15
    for line, output in commands:
        name, words = line.partition(" #")[0].split(" ", 1)
        assert name == "autoshard"
        check(line, output, run(words))


def test_the_page_names_every_command() -> None:
    from autoshard.cli.command_line import COMMANDS

    missing = [command.name for command in COMMANDS if not re.search(rf"autoshard {command.name}|`{command.name}`", PAGE)]
    assert not missing


def test_another_output_would_be_found() -> None:
    check("plan x", "a  b\n...\nd ...\n", Ran(0, "a b\nc\nd 1\ne\n", ""))
    for wrong in (Ran(0, "a c\nd 1\n", ""), Ran(1, "a b\nc\nd 1\n", ""), Ran(0, "", "")):
        with pytest.raises(AssertionError):
            check("plan x", "a b\n...\nd ...\n", wrong)
