"""Predicted against measured step times on gloo processes of this machine; writes docs/benchmarks/prediction.md.

python tests/benchmarks/prediction.py              36 plans on 2 and 4 processes, some minutes
python tests/benchmarks/prediction.py --rounds 3 --models mlp
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from scipy.stats import kendalltau
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "examples")]
from gpt import GPT, GPTConfig  # noqa: E402
from page import OUT, heading, table, write  # noqa: E402
from processes import run_on_ranks  # noqa: E402

import autoshard  # noqa: E402
from autoshard.costs import CostModel  # noqa: E402
from autoshard.hardware import Hardware  # noqa: E402
from autoshard.profile_file import loads_profile  # noqa: E402
from autoshard.text import human_seconds  # noqa: E402
from autoshard.traffic import seconds_by_term  # noqa: E402

KINDS = ("auto", "ddp", "fsdp", "megatron", "random 0", "random 1")
MESHES = ("dp=2", "dp=2,tp=2")


class Mlp(nn.Module):
    """x: f32[batch, 512], y: i64[batch] -> loss."""

    def __init__(self) -> None:
        super().__init__()
        widths = (512, 2048, 2048, 512)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
        return F.cross_entropy(x, y)


class Pictures(nn.Module):
    """x: f32[batch, 3, 32, 32], y: i64[batch] -> loss."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 32), (32, 64), (64, 64)))
        self.head = nn.Linear(64 * 16, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.max_pool2d(F.relu(conv(x)), 2)
        return F.cross_entropy(self.head(x.flatten(1)), y)


def _mlp() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Mlp(), (torch.randn(256, 512), torch.randint(512, (256,)))


def _gpt() -> tuple[nn.Module, tuple[Tensor, ...]]:
    ids = torch.randint(512, (8, 65))
    return GPT(GPTConfig(layers=2, heads=4, width=256, block=64, vocab=512)), (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def _pictures() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Pictures(), (torch.randn(32, 3, 32, 32), torch.randint(16, (32,)))


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {"mlp": _mlp, "gpt": _gpt, "pictures": _pictures}


@dataclass
class Case:
    """One plan: what was predicted, where it is kept, and what was measured."""

    model: str
    mesh: str
    kind: str
    path: str
    predicted_s: float
    terms: dict[str, float]
    measured_s: float = 0.0
    spread: float = 0.0


def made(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return MODELS[name]()


def plan_all(names: list[str], measured: dict[str, Hardware], folder: str) -> list[Case]:
    """Plans of every kind, each for the hardware that was measured on its mesh."""
    cases = []
    for name in names:
        model, inputs = made(name)
        for mesh, hardware in measured.items():
            for kind in KINDS:
                seed = int(kind.split()[1]) if kind.startswith("random") else None
                template: Any = "auto" if seed is not None else kind
                plan = autoshard.plan(model, mesh, inputs, template=template, hardware=hardware, options=autoshard.Options(seed=seed))
                path = f"{folder}/{len(cases)}.json"
                plan.save(path)
                terms = seconds_by_term(plan.program, CostModel(plan.mesh, hardware))  # a random plan's objective is of random prices
                cases.append(Case(name, mesh, kind, path, sum(terms.values()), terms))
    return cases


# ------------------------------------------------------------------------------------------------------------- measuring


def device_mesh(text: str) -> DeviceMesh:
    spec = autoshard.MeshSpec.of(text)
    return init_device_mesh("cpu", spec.shape, mesh_dim_names=spec.axes)


def profile(mesh: str) -> str:
    """Runs on every rank: single ops and the collectives of each axis, measured; the same JSON on all."""
    return autoshard.profile(device_mesh(mesh), save=False).to_json()


def profile_all() -> dict[str, Hardware]:
    measured = {}
    for mesh in MESHES:
        found = loads_profile(run_on_ranks(autoshard.MeshSpec.of(mesh).size, profile, mesh)[0])
        measured[mesh] = found.hardware()
        print(f"{mesh}: profiled", *found.notes, sep="\n  ", flush=True)
    return measured


def measure(cases: list[Case], rounds: int) -> list[list[float]]:
    """Runs on every rank: seconds of each step of each plan, plans alternating; [case][round]. The first step of each is not timed."""
    mesh = device_mesh(cases[0].mesh)
    steps = []
    for case in cases:
        model, inputs = made(case.model)
        sharded = autoshard.Plan.load(case.path).apply(model, mesh)
        steps.append((sharded, inputs, torch.optim.AdamW(sharded.parameters(), 1e-3, fused=True)))
    seconds: list[list[float]] = [[] for _ in cases]
    for number in range(rounds + 1):
        for k, (model, inputs, optimizer) in enumerate(steps):
            torch.distributed.barrier()
            started = time.perf_counter()
            model(*inputs).backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.distributed.barrier()
            if number:
                seconds[k].append(time.perf_counter() - started)
    return seconds


def measure_all(cases: list[Case], rounds: int) -> None:
    """Fill in what is measured: the median over rounds of the slowest rank's time, mesh by mesh."""
    for mesh in dict.fromkeys(case.mesh for case in cases):
        own = [case for case in cases if case.mesh == mesh]
        size = autoshard.MeshSpec.of(mesh).size
        ranks = run_on_ranks(size, measure, own, rounds)
        for k, case in enumerate(own):
            slowest = [max(times) for times in zip(*(rank[k] for rank in ranks), strict=True)]
            case.measured_s = statistics.median(slowest)
            case.spread = (max(slowest) - min(slowest)) / case.measured_s
        print(f"{mesh}: {len(own)} plans measured", flush=True)


# --------------------------------------------------------------------------------------------------------------- report


def taus(cases: list[Case]) -> list[list[str]]:
    rows = []
    groups = {"all": cases}
    for mesh in dict.fromkeys(case.mesh for case in cases):
        for model in dict.fromkeys(case.model for case in cases):
            groups[f"{model} on {mesh}"] = [case for case in cases if (case.model, case.mesh) == (model, mesh)]
    for name, group in groups.items():
        ratios = [case.measured_s / case.predicted_s for case in group]
        tau = kendalltau([case.predicted_s for case in group], [case.measured_s for case in group]).statistic
        middle = statistics.median(ratios)
        off = statistics.median(abs(ratio / middle - 1) for ratio in ratios)
        rows.append([name, str(len(group)), f"{tau:.2f}", f"{middle:.2f}", f"{off:.0%}", _choice(group) if name != "all" else ""])
    return rows


def _choice(group: list[Case]) -> str:
    """How much slower than the fastest measured plan the one predicted fastest is."""
    chosen, fastest = min(group, key=lambda c: c.predicted_s), min(group, key=lambda c: c.measured_s)
    return f"{chosen.kind}: x{chosen.measured_s / fastest.measured_s:.2f} of {fastest.kind}"


def worst(cases: list[Case]) -> Case:
    middle = statistics.median(case.measured_s / case.predicted_s for case in cases)
    return max(cases, key=lambda case: max(case.measured_s / case.predicted_s / middle, middle * case.predicted_s / case.measured_s))


def _cells(case: Case) -> list[str]:
    ratio = f"{case.measured_s / case.predicted_s:.2f}"
    return [case.model, case.mesh, case.kind, human_seconds(case.predicted_s), human_seconds(case.measured_s), ratio, f"{case.spread:.0%}"]


def report(cases: list[Case], load: float, rounds: int) -> str:
    off = worst(cases)
    middle = statistics.median(case.measured_s / case.predicted_s for case in cases)
    terms = ", ".join(f"{name} {human_seconds(seconds)}" for name, seconds in sorted(off.terms.items(), key=lambda term: -term[1])[:4])
    side = "slower" if off.measured_s / off.predicted_s > middle else "faster"
    lines = [
        *heading("Predicted and measured step times", "tests/benchmarks/prediction.py"),
        f"{len(cases)} plans of {len({case.model for case in cases})} models on 2 and 4 gloo processes, float32, one thread each; a step",
        f"is forward, backward and a fused AdamW; {rounds} rounds",
        "in which the plans of a mesh take turns, medians of the slowest rank. Planned and predicted with what `autoshard.profile`",
        f"measured on the same processes just before. Load average of the machine {load:.0f} on {os.cpu_count()} cores while measuring.",
        "",
        "Kendall's tau is the agreement in order (1: the same, 0: none). `measured / predicted` is the median; `off` is the median",
        "distance from that median: what is wrong beyond one common factor. `choice`: the plan predicted fastest, and how much slower",
        "than the one measured fastest it is.",
        "",
        *table(["plans", "count", "Kendall's tau", "measured / predicted", "off", "choice"], taus(cases)),
        "",
        f"Worst: {off.model} on {off.mesh} under {off.kind}, predicted {human_seconds(off.predicted_s)}, measured "
        f"{human_seconds(off.measured_s)}, {side} than the others by the common factor of {middle:.2f}. Predicted are {terms}.",
        "",
        "## Every plan",
        "",
        *table(["model", "mesh", "plan", "predicted", "measured", "measured / predicted", "spread"], [*map(_cells, cases)]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted against measured step times, write docs/benchmarks/prediction.md.")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cases = plan_all(args.models, profile_all(), folder)
        print(f"{len(cases)} plans made", flush=True)
        measure_all(cases, args.rounds)
        load = os.getloadavg()[1]
    write(args.out, "prediction.md", report(cases, load, args.rounds))


if __name__ == "__main__":
    main()
