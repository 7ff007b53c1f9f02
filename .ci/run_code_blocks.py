"""Run the ```python blocks of Markdown files, those of one file in order and in one process.

A block under the comment `<!-- not run: why -->` is compiled but not run. Line numbers in a traceback are the file's own.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_S = 600


def extract_code(path: Path) -> tuple[str, str]:
    """The file with every line blank that is not Python to run, and the same with the blocks that are not run too."""
    run: list[str] = []
    everything: list[str] = []
    inside = skip = other = False
    previous = ""
    for line in path.read_text().splitlines():
        fence = line.startswith("```")
        if fence and inside:
            inside = False
        elif fence and other:
            other = False
        elif fence:
            inside = line[3:].strip() == "python"
            other, skip = not inside, previous.startswith("<!-- not run:")
        code = line if inside and not fence else ""
        run.append("" if skip else code)
        everything.append(code)
        previous = line if line.strip() else previous
    return "\n".join(run), "\n".join(everything)


def main() -> None:
    failed = []
    for name in sys.argv[1:]:
        path = Path(name).resolve()
        code, everything = extract_code(path)
        compile(everything, name, "exec")
        if not code.strip():
            continue
        start = time.perf_counter()
        launch = f"exec(compile({code!r}, {str(path)!r}, 'exec'), {{'__name__': '__main__'}})"
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([sys.executable, "-"], input=launch, text=True, cwd=folder, timeout=LIMIT_S, check=False)
        print(f"{'ok' if done.returncode == 0 else 'FAILED':6} {name} ({time.perf_counter() - start:.1f} s)", flush=True)
        if done.returncode:
            failed.append(name)
    if failed:
        raise SystemExit(f"code blocks failed in: {', '.join(failed)}")


if __name__ == "__main__":
    main()
