"""Run the ```python and ```console blocks of Markdown files: those of one file in order, in one process, in a folder of its own.

A Python block under the comment `<!-- name.py -->` is written to that file instead of being run. In a console block, lines after `$ ` are
commands, and what follows is what they print on stdout: `...` stands for anything, blanks count as one; `# exits with 2` names a status
other than 0. A block under `<!-- not run: why -->` is compiled but not run, and a page that says `<!-- commands run by ... -->` has its
commands run elsewhere. Line numbers in a traceback are the file's own.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 600


@dataclass(frozen=True)
class Block:
    """A fenced block. line: of its first line of text, from 0. note: the HTML comment right above it."""

    language: str
    line: int
    lines: tuple[str, ...]
    note: str

    @property
    def file(self) -> str:
        named = re.fullmatch(r"<!-- (\S+\.py) -->", self.note)
        return named[1] if named else ""


def blocks_of(text: str) -> Iterator[Block]:
    """Fenced blocks in order."""
    lines = text.splitlines()
    fences = [k for k, line in enumerate(lines) if line.startswith("```")]
    for start, end in zip(fences[::2], fences[1::2], strict=True):
        above = next((line for line in reversed(lines[:start]) if line.strip()), "")
        yield Block(lines[start][3:].strip(), start + 1, tuple(lines[start + 1 : end]), above if above.startswith("<!--") else "")


def commands_of(block: Block) -> Iterator[tuple[int, str, str]]:
    """Line, command and what it prints."""
    starts = [k for k, line in enumerate(block.lines) if line.startswith("$ ")]
    for start, end in zip(starts, [*starts[1:], len(block.lines)], strict=True):
        yield block.line + start, block.lines[start][2:], "\n".join(block.lines[start + 1 : end])


def script_of(text: str, name: str) -> str:
    """One Python program that does what the page does, every line where it stands there; "" where nothing is to be run."""
    script = [""] * len(text.splitlines())
    is_console_run = "<!-- commands run by " not in text
    for block in blocks_of(text):
        is_run = not block.note.startswith("<!-- not run:")
        if block.language == "python":
            compile("\n" * block.line + "\n".join(block.lines), name, "exec")
            if block.file:
                script[block.line] = f"write_file({block.file!r}, {list(block.lines)!r})"
            elif is_run:
                script[block.line : block.line + len(block.lines)] = block.lines
        elif block.language == "console" and is_run and is_console_run:
            for line, command, printed in commands_of(block):
                script[line] = f"run_command({command!r}, {printed!r})"
    code = "\n".join(script)
    return code if re.search(r"^(?!write_file\().*\S", code, re.M) else ""


def write_file(name: str, lines: list[str]) -> None:
    """Called by a page's script: keep a block as a file."""
    Path(name).write_text("\n".join([*lines, ""]))


def run_command(command: str, printed: str) -> None:
    """Called by a page's script: run a shell command; AssertionError unless it ends and prints as the page says."""
    expected = re.search(r"# exits with (\d+)", command)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "140"}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == (int(expected[1]) if expected else 0), (
        f"$ {command}\nended with {done.returncode}\n{done.stdout}{done.stderr}"
    )
    pattern = ".*".join(re.escape(part) for part in " ".join(printed.split()).split("..."))
    assert not printed or re.fullmatch(pattern, " ".join(done.stdout.split())), f"$ {command}\nprinted\n{done.stdout}"


def run_page(name: str) -> bool | None:
    """Whether the page does what it says, None where it has nothing to run; what it printed is shown where it fails."""
    path = Path(name).resolve()
    code = script_of(path.read_text(), name)
    if not code:
        return None
    start = time.perf_counter()
    launch = (
        f"import sys; sys.path.append({str(Path(__file__).parent)!r}); from run_code_blocks import run_command, write_file; "
        f"exec(compile({code!r}, {str(path)!r}, 'exec'), "
        "{'__name__': '__main__', 'run_command': run_command, 'write_file': write_file})"
    )
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-"], input=launch, capture_output=True, text=True, cwd=folder, timeout=LIMIT_S, check=False)
    if done.returncode:
        print(done.stdout + done.stderr)
    print(f"{'FAILED' if done.returncode else 'ok':6} {name} ({time.perf_counter() - start:.1f} s)", flush=True)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the code blocks of Markdown files.")
    parser.add_argument("--jobs", type=int, default=1, help="pages that run at once")
    parser.add_argument("pages", nargs="+")
    asked = parser.parse_args()
    with ThreadPoolExecutor(asked.jobs) as pool:
        failed = [name for name, is_fine in zip(asked.pages, pool.map(run_page, asked.pages), strict=True) if is_fine is False]
    if failed:
        raise SystemExit(f"code blocks failed in: {', '.join(failed)}")


if __name__ == "__main__":
    main()
