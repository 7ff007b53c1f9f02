"""Check and measure on this machine's GPU, in one call of under ten minutes; installs nothing, needs no network.

    python tests/gpu/run.py                      all parts, results in docs/benchmarks/gpu.md and gpu.json
    python tests/gpu/run.py --cpu --out out/gpu  the same parts with small sizes and gloo on a machine without a GPU
    python tests/gpu/run.py --only fake_group    one part

Each part is a process of its own with a time limit (tests/gpu/parts.py), so that one that fails or hangs does not lose the
others. Exits with 1 if any check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DEADLINE_S = 570  # of all parts together


class Part(NamedTuple):
    """One process. limit_s: it is stopped after that many seconds."""

    name: str
    limit_s: int
    what: str


PARTS = (
    Part("tests", 120, "the tests marked gpu"),
    Part("one_rank", 90, "a GPT through autoshard.compile on one rank (NCCL), beside the model itself"),
    Part("four_ranks", 150, "four ranks on one GPU (gloo), beside one process"),
    Part("fake_group", 180, "one rank of dp=2,tp=4 alone on a fake process group, beside what the plan predicted"),
    Part("memory", 120, "predicted peak memory of one rank of dp=2,tp=4, beside what the allocator counted"),
    Part("one_rank_compiled", 240, "as one_rank, both under torch.compile"),
)


def main() -> None:
    args = parse_arguments()
    device = "cpu" if args.cpu else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here, so nothing was checked. --cpu runs the CPU-sized path of every part.")
    out = args.out or (ROOT / "docs/benchmarks" if device == "cuda" else ROOT / "out/gpu")
    started = time.monotonic()
    results = {}
    for part in PARTS:
        if args.only and part.name not in args.only:
            continue
        limit_s = max(1.0, min(part.limit_s, DEADLINE_S - (time.monotonic() - started)))
        print(f"--- {part.name}: {part.what} (at most {limit_s:.0f} s)", flush=True)
        results[part.name] = run_part(part, device, limit_s)
    report = {"device": device_name(device), "date": date.today().isoformat(), "versions": versions(), "parts": results}
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    text = as_markdown(report)
    (out / "gpu.md").write_text(text)
    print(f"\n{text}\nWritten to {out}/gpu.md and gpu.json")
    failed = [f"{name}: {check}" for name, result in results.items() for check, is_good, _ in result["checks"] if not is_good]
    if failed:
        raise SystemExit("FAILED\n  " + "\n  ".join(failed))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check and measure on this machine's GPU.")
    parser.add_argument("--cpu", action="store_true", help="small sizes on the CPU, with gloo for NCCL")
    parser.add_argument("--out", type=Path, help="folder for gpu.md and gpu.json")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="run these parts alone")
    return parser.parse_args()


def run_part(part: Part, device: str, limit_s: float) -> dict[str, Any]:
    """Run one part to its end or its limit. Returns its checks [name, whether good, detail], tables and seconds."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        log = Path(folder, "log")
        with log.open("w") as stream:
            process = subprocess.Popen(
                command(part, device, result), cwd=ROOT, env=environment(), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                process.wait(limit_s)
                ended = f"exit code {process.returncode}"
            except subprocess.TimeoutExpired:
                ended = f"stopped after {limit_s:.0f} s"
            finally:
                stop(process)
        text = log.read_text(errors="replace")
        print("\n".join(text.strip().splitlines()[-40:]), flush=True)
        found = json.loads(result.read_text()) if result.exists() else {"checks": [], "tables": []}
    if part.name == "tests":
        found["checks"].append(["pytest", process.returncode == 0, last_line(text) or ended])
    elif process.returncode != 0:
        found["checks"].append(["runs to its end", False, f"{ended}; {last_line(text)}"])
    return {**found, "seconds": round(time.monotonic() - started, 1)}


def command(part: Part, device: str, result: Path) -> list[str]:
    if part.name != "tests":
        return [sys.executable, str(HERE / "parts.py"), part.name, device, str(result)]
    marked = "gpu" if device == "cuda" else "not gpu"
    # A newer driver or library may warn of something that no test is about: warnings are no errors here.
    return [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", "-m", marked, str(HERE / "test_gpu.py")]


def environment() -> dict[str, str]:
    """The current one with the checkout importable, as the library need not be installed."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


def stop(process: subprocess.Popen) -> None:
    """End the part's process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and "ProcessGroup" not in line]
    return re.sub(r"\x1b\[[0-9;]*m", "", lines[-1])[:200].strip("= ") if lines else ""


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()}), no GPU: sizes are small, times mean nothing"


def versions() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {"autoshard": project["version"], "torch": torch.__version__, "Python": platform.python_version()}
    if torch.cuda.is_available():
        found |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def as_markdown(report: dict[str, Any]) -> str:
    used = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = ["# On a GPU", "", f"{report['device']}, {report['date']}; {used}."]
    lines += ["Written by `make gpu` (tests/gpu/run.py). Times are medians of alternating runs.", "", "## Checks", ""]
    rows = []
    for name, part in report["parts"].items():
        rows += [[name, check, "yes" if is_good else "**NO**", detail] for check, is_good, detail in part["checks"]]
    lines += table(["part", "check", "holds", "detail"], rows)
    for part in report["parts"].values():
        for measured in part["tables"]:
            lines += ["", f"## {measured['title']}", "", *table(measured["columns"], measured["rows"])]
            lines += ["", measured["note"]] if measured.get("note") else []
    seconds = ", ".join(f"{name} {part['seconds']} s" for name, part in report["parts"].items())
    return "\n".join([*lines, "", f"Parts took: {seconds}."]) + "\n"


def table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [[str(cell).replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *cells]]


if __name__ == "__main__":
    main()
