"""Predicted peak memory of every rank of a pipeline beside the measured one; writes docs/benchmarks/stage_memory.md.

    python tests/benchmarks/stage_memory.py [--models gpt UNet] [--sizes 2 4] [--out FOLDER]

Models of tests/pipeline_models.py train on 2 and 4 gloo processes through autoshard.compile, each under every schedule; each rank compares
`plan.memory(optimizer, rank=its own)` with what its allocator reports in a later step (tests/allocation_tracker.py). Some minutes; bytes
are deterministic but for the split backward of zero-bubble schedules, whose order torch leaves open; times do not matter.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from allocation_tracker import measure_step  # noqa: E402
from page import OUT, heading, table, write  # noqa: E402
from pipeline_models import CASES  # noqa: E402
from processes import run_on_ranks  # noqa: E402

import autoshard  # noqa: E402
from autoshard import Pipelining  # noqa: E402
from autoshard.rehearsal import OPTIMIZERS  # noqa: E402
from autoshard.schedules import NAMES  # noqa: E402
from autoshard.text import human_bytes  # noqa: E402

MICROBATCHES = 4
MODELS = ("gpt", "llama", "t5", "UNet", "MoE")
MESHES: dict[int, tuple[tuple[str, Any], ...]] = {2: (("pp=2", "auto"),), 4: (("pp=2,dp=2", "fsdp"), ("pp=2,tp=2", "megatron"))}


class Row(NamedTuple):
    """One rank of one plan."""

    model: str
    mesh: str
    schedule: str
    optimizer: str
    place: int  # along pp
    predicted_bytes: int
    measured_bytes: int
    where: str

    @property
    def error(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1


def compare(model: str, mesh: str, template: Any, schedule: str, optimizer: str) -> Row:
    """Measure and predict one step of this rank."""
    spec = autoshard.MeshSpec.of(mesh)
    (args, kwargs), device_mesh = CASES[model].batch(0), init_device_mesh("cpu", spec.shape, mesh_dim_names=spec.axes)
    pipeline = Pipelining(MICROBATCHES, schedule)
    compiled = autoshard.compile(
        CASES[model].model(), device_mesh, example_inputs=args, example_kwargs=kwargs, template=template, pipeline=pipeline
    )
    measured = measure_step(compiled, args, kwargs, OPTIMIZERS[optimizer])
    found = compiled.plan.memory(optimizer, rank=dist.get_rank())
    assert found.stage_rank is not None
    return Row(model, mesh, schedule, optimizer, found.stage_rank, found.peak_bytes, measured.peak_bytes, found.peak.where)


def compare_all(cases: Sequence[tuple]) -> list[Row]:
    torch.set_num_threads(1)
    return [compare(*case) for case in cases]


def cases_of(size: int, models: Sequence[str]) -> list[tuple]:
    """Every schedule on two processes; on four, where runs are longer, one schedule of each kind."""
    schedules = [name for name in (*NAMES, "list") if name != "dualpipev"] if size == 2 else ["gpipe", "1f1b", "interleaved_1f1b"]
    optimizers = ("adamw", "sgd") if size == 2 else ("adamw",)
    return [
        (model, mesh, template, schedule, optimizers[number % len(optimizers)])
        for model in models
        for mesh, template in MESHES[size]
        for number, schedule in enumerate(schedules)
    ]


def report(rows: Sequence[Row]) -> str:
    """The page."""
    errors = sorted(abs(row.error) for row in rows)
    exact = sum(row.predicted_bytes == row.measured_bytes for row in rows)
    cells = [
        [r.model, r.mesh, r.schedule, r.optimizer, f"pp={r.place}", human_bytes(r.predicted_bytes), human_bytes(r.measured_bytes)]
        + [f"{r.error:+.2%}", r.where]
        for r in rows
    ]
    lines = [
        *heading("Predicted and measured memory of pipelines", "tests/benchmarks/stage_memory.py", is_of_bench=False),
        f"Peak bytes of a rank in one training step of {MICROBATCHES} microbatches: `plan.memory(optimizer, rank=...)` against",
        "what torch's CPU allocator reports on gloo processes, each of which runs its own stages. Of ranks at one place along `pp` the",
        "first is shown.",
        "",
        f"{len(rows)} ranks of {len({row[:4] for row in rows})} plans: error {statistics.median(errors):.2%} in the median, "
        f"{errors[-1]:.2%} at most; {exact} are exact to the byte.",
        "",
        *table(["model", "mesh", "schedule", "optimizer", "rank at", "predicted", "measured", "error", "peak at"], cells),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare predicted with measured memory of pipelines.")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(CASES))
    parser.add_argument("--sizes", nargs="+", type=int, default=list(MESHES), choices=list(MESHES), help="numbers of processes")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    rows: list[Row] = []
    for size in args.sizes:
        for model in args.models:
            ranks = run_on_ranks(size, compare_all, cases_of(size, [model]))
            found = {(row[:5]): row for own in reversed(ranks) for row in own}
            rows += sorted(found.values(), key=lambda row: row[:5])
            for row in found.values():
                print(f"{row.model:8} {row.mesh:10} {row.schedule:24} pp={row.place} {row.error:+.2%} {row.where}", flush=True)
    write(args.out, "stage_memory.md", report(rows))
    print(f"\nWritten to {args.out}/stage_memory.md")


if __name__ == "__main__":
    main()
