"""The runner of the documentation's code blocks: what it runs, what it writes, and that it notices a page that is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).parent.parent / ".ci" / "run_code_blocks.py"


def page(*blocks: str) -> str:
    return "\n\n".join(["# A page", *blocks, ""])


def block(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def run(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "page.md").write_text(text)
    return subprocess.run([sys.executable, RUNNER, tmp_path / "page.md"], capture_output=True, text=True, check=False)


GREET = "<!-- greet.py -->\n" + block("python", "import sys", "print('hello  ', sys.argv[1])")


@pytest.mark.parametrize(
    "text",
    [
        page(block("python", "x = 1"), block("text", "x = 2"), block("python", "assert x == 1")),
        page(GREET, block("console", "$ python greet.py you", "hello ...", "$ python greet.py you > said", "$ cat said", "hello you")),
        page(block("console", "$ exit 3  # exits with 3")),
        page(GREET, block("python", "import sys; sys.argv = ['', 'me']", "import greet")),
        page("<!-- not run: needs a cluster -->\n" + block("python", "raise SystemExit(1)"), block("python", "x = 1")),
        page("<!-- commands run by others -->", block("console", "$ false"), block("python", "x = 1")),
    ],
    ids=["in order", "files and commands", "a status", "files are modules", "not run", "elsewhere"],
)
def test_pages_that_are_right(tmp_path: Path, text: str) -> None:
    done = run(tmp_path, text)
    assert done.returncode == 0, done
    assert done.stdout.startswith("ok")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (page(block("python", "x = 1"), block("python", "assert x == 2")), "line 8"),
        (page(GREET, block("console", "$ python greet.py you", "hello me")), "hello   you"),
        (page(block("console", "$ false")), "ended with 1"),
        (page(block("console", "$ true  # exits with 1")), "ended with 0"),
        (page("<!-- not run: needs a cluster -->\n" + block("python", "x = = 1")), "SyntaxError"),
    ],
    ids=["an assertion", "another output", "a failure", "no failure", "a syntax error"],
)
def test_pages_that_are_wrong(tmp_path: Path, text: str, said: str) -> None:
    done = run(tmp_path, text)
    assert done.returncode != 0
    assert said in done.stdout + done.stderr
