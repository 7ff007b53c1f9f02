"""Measure how fast plans are made and what they are predicted to cost; writes the pages of docs/benchmarks.

python tests/benchmarks/run.py             what `make bench` runs: planning.md, then the pages of plan_speed, plan_quality, prediction and
                                           pipelines by the scripts of these names; needs no GPU, about three quarters of an hour
python tests/benchmarks/run.py --repeats 1 --out FOLDER --pages planning
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "tests/benchmarks")]

from gpt import GPT, GPTConfig  # noqa: E402
from llama import Llama, LlamaConfig  # noqa: E402
from page import OUT, heading, table, write  # noqa: E402

import autoshard  # noqa: E402
from autoshard.text import human_bytes, human_seconds  # noqa: E402

TEMPLATES = ("auto", "ddp", "fsdp", "megatron", "megatron_sp")
PAGES = ("planning", "plan_speed", "plan_quality", "prediction", "pipelines")
PHASES = ("trace", "build", "solve", "emit")


class Case(NamedTuple):
    """A model on a mesh; ids of shape [batch, length] are inputs and labels."""

    name: str
    make: Callable[[], nn.Module]
    mesh: str
    batch: int
    length: int
    hardware: str


CASES = {
    "gpt": Case("GPT, 10.7 M (examples/gpt.py)", lambda: GPT(GPTConfig()), "dp=2,tp=2", 8, 128, "cpu"),
    "gpt2": Case(
        "GPT, sizes of GPT-2 small",
        lambda: GPT(GPTConfig(layers=12, heads=12, width=768, block=1024, vocab=50304)).bfloat16(),
        "dp=2,tp=4",
        16,
        1024,
        "h100",
    ),
    "llama": Case("Llama, 1.1 B (examples/llama.py)", lambda: Llama(LlamaConfig()).bfloat16(), "dp=2,tp=4", 8, 2048, "h100"),
}


def peak_rss_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def plan_once(case: Case, template: str) -> dict[str, Any]:
    """One plan, in this process. Its stats, with what the process held at most and parameters per rank."""
    with torch.device("meta"):
        model = case.make()
        ids = torch.zeros(case.batch, case.length, dtype=torch.long)
    plan = autoshard.plan(model, case.mesh, (ids,), {"labels": ids}, hardware=case.hardware, template=template)  # type: ignore[arg-type]
    return {**plan.stats, "peak_rss_bytes": peak_rss_bytes()}


def measure(key: str, template: str) -> dict[str, Any]:
    """plan_once in a process of its own, so that nothing is cached from another plan."""
    done = subprocess.run([sys.executable, __file__, "--once", key, template], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{key} under {template} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def speed_table(repeats: int) -> list[list[str]]:
    rows = []
    for key, case in CASES.items():
        runs = [measure(key, "auto") for _ in range(repeats)]
        phases = [f"{statistics.median(run[f'{phase}_s'] for run in runs):.2f}" for phase in PHASES]
        rss = human_bytes(statistics.median(run["peak_rss_bytes"] for run in runs))
        predicted = [human_seconds(runs[0][name]) for name in ("objective_s", "bound_s")]
        rows.append([case.name, case.mesh, str(runs[0]["nodes"]), *phases, rss, *predicted])
        print("  ".join(rows[-1]), flush=True)
    return rows


def quality_table(key: str) -> tuple[list[str], list[list[str]]]:
    """Every template beside auto: predicted step, what a rank keeps, and what it sends, by collective."""
    runs = {template: measure(key, template) for template in TEMPLATES}
    kinds = sorted({kind for run in runs.values() for kind in run["wire_bytes_per_step"]})
    best = runs["auto"]["objective_s"]
    rows = []
    for template, run in runs.items():
        sent = [human_bytes(run["wire_bytes_per_step"].get(kind, 0.0)) for kind in kinds]
        step_s = run["objective_s"]
        rows.append([template, human_seconds(step_s), f"{step_s / best:.3f}", human_bytes(run["kept_bytes"]), *sent])
        print(key, "  ".join(rows[-1]), flush=True)
    return ["", "predicted step", "against auto", "kept by a rank", *kinds], rows


def report(repeats: int) -> str:
    columns = ["model", "mesh", "nodes", *(f"{phase}, s" for phase in PHASES), "peak RSS", "objective", "bound"]
    lines = [
        *heading("Planning", "tests/benchmarks/run.py"),
        "## How long a plan takes",
        "",
        f"Template `auto`, models on the meta device, each plan in a fresh process; medians of {repeats}. `nodes` counts those of the",
        "emitted program. The objective is the predicted step; no plan can be predicted below the bound.",
        "",
        *table(columns, speed_table(repeats)),
        "",
        "## What plans are predicted to cost",
        "",
        "Predictions of the cost model, not measurements. A rank keeps parameters, gradients, optimizer state and activations for",
        "backward; the other columns are the bytes that it sends in a step.",
    ]
    for key, case in CASES.items():
        title = f"### {case.name}: {case.mesh}, {case.batch} x {case.length} tokens, {case.hardware}"
        lines += ["", title, "", *table(*quality_table(key))]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure planning, write the pages of docs/benchmarks.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pages", nargs="*", choices=PAGES, default=PAGES)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--once", nargs=2, metavar=("CASE", "TEMPLATE"), help="one plan, its stats as JSON")
    args = parser.parse_args()
    if args.once:
        print(json.dumps(plan_once(CASES[args.once[0]], args.once[1])))
        return
    for page in args.pages:
        if page == "planning":
            write(args.out, "planning.md", report(args.repeats))
        else:
            subprocess.run([sys.executable, str(Path(__file__).with_name(f"{page}.py")), "--out", str(args.out)], check=True)
        print(f"\nWritten to {args.out}/{page}.md", flush=True)


if __name__ == "__main__":
    main()
