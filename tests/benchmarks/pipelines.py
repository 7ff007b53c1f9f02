"""Pipelines: predicted against measured steps, bubbles, and the cut that is chosen beside even ones; writes docs/benchmarks/pipelines.md.

python tests/benchmarks/pipelines.py             some minutes, on 2 and 4 gloo processes; needs no GPU
python tests/benchmarks/pipelines.py --repeats 1 --sizes 2 --models gpt unet
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "examples")]
from gpt import GPT, GPTConfig  # noqa: E402
from page import OUT, heading, table, write  # noqa: E402
from pipeline_cuts import MODELS, cut_table  # noqa: E402
from processes import run_on_ranks  # noqa: E402

import autoshard  # noqa: E402
from autoshard.list_scheduling import list_schedule  # noqa: E402
from autoshard.pipeline_timeline import PipelineEvent, StageCosts, simulate  # noqa: E402
from autoshard.runtime.pipeline_engine import EngineStage, PipelineEngine  # noqa: E402
from autoshard.schedules import SPLITS_BACKWARD, Schedule, ScheduleName, make_schedule, ranks_of, stage_ranks  # noqa: E402
from autoshard.text import human_seconds  # noqa: E402

MICROBATCHES = 8
FORWARD_S = 0.1  # of a microbatch on a rank whose stages are even; its backward takes twice as long
STAGES_PER_RANK: dict[str, int] = {
    "1f1b": 1, "gpipe": 1, "list": 1, "interleaved_1f1b": 2, "looped_bfs": 2, "zbv": 2, "interleaved_zero_bubble": 2,
}  # fmt: skip
PROFILES = ("even", "slow last", "ramp")
SECTIONS = ("asleep", "gpt", "bubbles", "cuts")


# --------------------------------------------------------------------------------------------------- stages that sleep


class Sleep(torch.autograd.Function):
    """Identity; takes forward_s, and its backward backward_s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_s: float, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.backward_s)
        return grads[0], None, None


class SleepStage:
    """Takes the seconds that `costs` say: forward, backward of the inputs, and backward of its weight."""

    def __init__(self, costs: StageCosts, is_last: bool) -> None:
        self.costs, self.is_last = costs, is_last
        self.start, self.weight = (torch.ones(64, requires_grad=True) for _ in range(2))

    def __call__(self, values: tuple[Tensor, ...], number: int) -> tuple[Tensor, ...]:
        inputs_s = self.costs.backward_input_s
        x = Sleep.apply(values[0] if values else self.start, self.costs.forward_s, inputs_s)
        x = x * Sleep.apply(self.weight, 0.0, self.costs.backward_s - inputs_s)
        return (x.sum(),) if self.is_last else (x,)


@dataclass(frozen=True)
class Step:
    """A measured step. replayed_s: simulated with the mean seconds that the actions of each stage and kind took in it."""

    total_s: float
    bubble: float
    replayed_s: float
    costs: tuple[StageCosts, ...]


def step_of(events: Sequence[PipelineEvent], schedule: Schedule, latency_s: float = 0.0) -> Step:
    lies, taken = ranks_of(schedule), dict[tuple[int, str], list[float]]()
    for event in events:
        taken.setdefault((event.stage, event.kind), []).append(event.end_s - event.start_s)
    mean = {key: statistics.fmean(seconds) for key, seconds in taken.items()}
    costs = []
    for stage in range(len(lies)):
        forward_s, whole_s, inputs_s, weights_s = (mean.get((stage, kind), 0.0) for kind in "FBIW")
        costs.append(StageCosts(forward_s, whole_s or inputs_s + weights_s, inputs_s))
    total_s, busy_s = max(event.end_s for event in events), sum(map(sum, taken.values()))
    replayed_s = simulate(schedule, costs, lies, latency_s).total_s
    return Step(total_s, 1 - busy_s / (total_s * len(schedule)), replayed_s, tuple(costs))


@dataclass
class Case:
    """One schedule of stages with known seconds, and its fastest step of those that were measured."""

    ranks: int
    profile: str
    name: str
    schedule: Schedule
    costs: tuple[StageCosts, ...]
    measured: Step | None = None


def costs_of(profile: str, stages: int, per_rank: int) -> tuple[StageCosts, ...]:
    """Of stages that are even, of which the last takes twice as long, or from half to one and a half times as long as the mean."""
    shares = {
        "even": [1.0] * stages,
        "slow last": [1.0] * (stages - 1) + [2.0],
        "ramp": [0.5 + number / max(stages - 1, 1) for number in range(stages)],
    }[profile]
    return tuple(StageCosts(share * FORWARD_S / per_rank, 2 * share * FORWARD_S / per_rank) for share in shares)


def cases_of(ranks: int) -> Iterator[Case]:
    """Every schedule with every profile; schedules that split backward need torch 2.13."""
    splits = torch.torch_version.TorchVersion(torch.__version__) >= (2, 13)  # type: ignore[operator]
    for profile in PROFILES:
        for name, per_rank in STAGES_PER_RANK.items():
            if name in SPLITS_BACKWARD and not splits:
                continue
            costs = costs_of(profile, ranks * per_rank, per_rank)
            if name == "list":
                schedule = list_schedule(costs, stage_ranks("1f1b", ranks), MICROBATCHES)
            else:
                schedule = make_schedule(name, ranks, MICROBATCHES, per_rank)  # type: ignore[arg-type]
            yield Case(ranks, profile, name, schedule, costs)


def run_asleep(cases: Sequence[Case], repeats: int) -> list[Step]:
    """Runs on every rank: the fastest step of each case."""
    value, loss = torch.empty(64, device="meta", requires_grad=True), torch.empty((), device="meta", requires_grad=True)
    found = []
    for case in cases:
        lies, last = ranks_of(case.schedule), len(case.costs) - 1
        stages = [
            EngineStage(k, SleepStage(cost, k == last), (value,) if k else (), (loss,) if k == last else (value,))
            for k, cost in enumerate(case.costs)
            if lies[k] == dist.get_rank()
        ]
        group = dist.group.WORLD
        assert group is not None
        engine = PipelineEngine(stages, lies, MICROBATCHES, group, torch.device("cpu"))
        steps = [step_of(engine.measure(case.schedule, 0), case.schedule) for _ in range(repeats)]
        found.append(min(steps, key=lambda step: step.total_s))
    return found


def sleep_section(sizes: Sequence[int], repeats: int) -> list[str]:
    cases: list[Case] = []
    for ranks in sizes:
        own = list(cases_of(ranks))
        for case, measured in zip(own, run_on_ranks(ranks, run_asleep, own, repeats)[0], strict=True):
            case.measured = measured
        cases += own
        print(f"{len(own)} schedules measured on {ranks} processes", flush=True)
    rows, ratios, replays, off = [], [], [], []
    for case in cases:
        found, predicted = case.measured, simulate(case.schedule, case.costs, ranks_of(case.schedule))
        assert found is not None
        ratios.append(found.total_s / predicted.total_s)
        replays.append(found.total_s / found.replayed_s)
        off.append(abs(found.bubble - predicted.bubble))
        seconds = [f"{s:.3f}" for s in (predicted.total_s, found.total_s, ratios[-1], replays[-1])]
        rows.append([str(case.ranks), case.profile, case.name, *seconds, f"{predicted.bubble:.1%}", f"{found.bubble:.1%}"])
        print("  ".join(rows[-1]), flush=True)
    worst = max(range(len(cases)), key=lambda k: abs(ratios[k] - 1))
    columns = ["ranks", "stages", "schedule", "predicted, s", "measured, s", "measured / predicted", "measured / replayed"]
    return [
        "## Stages that sleep",
        "",
        f"The engine on gloo processes, with stages that sleep for known seconds: {human_seconds(FORWARD_S)} forward and twice that",
        f"backward for each of {MICROBATCHES} microbatches on a rank of even stages. With two stages on a rank each takes half as long.",
        "`slow last`: the last stage takes twice as long; `ramp`: from half to one and a half times. Predicted is the simulation of the",
        f"list that runs, without latency; measured is the fastest of {repeats} steps. A sleep on a busy machine ends late, so it is also",
        "replayed: simulated with the mean seconds that the actions of each stage took. The bubble is the share of the ranks' time in",
        "which they run no action.",
        "",
        f"Measured over predicted: median {statistics.median(ratios):.3f}, worst {ratios[worst]:.3f} ({cases[worst].name}, "
        f"{cases[worst].profile}, {cases[worst].ranks} ranks); over replayed: median {statistics.median(replays):.3f}, "
        f"worst {max(replays):.3f}. Bubbles differ by {statistics.median(off):.1%} of the step in the median, by {max(off):.1%} at most.",
        "",
        *table([*columns, "bubble predicted", "bubble measured"], rows),
    ]


# --------------------------------------------------------------------------------------------------------- real stages


def run_gpt(ways: Sequence[tuple[str, int]], repeats: int) -> list[tuple[float, float, Step, list[str]]]:
    """Runs on every rank: predicted seconds of a step and of its actions alone, the fastest step, and ratios by stage."""
    found = []
    for schedule, per_rank in ways:
        torch.manual_seed(0)
        ids = torch.randint(512, (16, 65))
        batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        model = GPT(GPTConfig(layers=4, heads=4, width=256, block=64, vocab=512))
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("pp",))
        pipeline = autoshard.Pipelining(MICROBATCHES, schedule, per_rank)
        compiled = autoshard.compile(model, mesh, hardware="cpu", pipeline=pipeline)
        compiled(*batch).backward()
        planned = compiled.plan.program.pipeline
        assert planned is not None
        steps = [step_of(compiled.measure(*batch), planned.schedule, planned.latency_s) for _ in range(repeats)]
        best = min(steps, key=lambda step: step.total_s)
        actions = [replace(cost, once_s=0.0, after_s=0.0) for cost in planned.costs]
        actions_s = simulate(planned.schedule, actions, planned.stage_ranks, planned.latency_s).total_s
        pairs = list(zip(best.costs, actions, strict=True))
        by_stage = [[a.forward_s / b.forward_s for a, b in pairs], [a.backward_s / b.backward_s for a, b in pairs]]
        ratios = [" ".join(f"{ratio:.2f}" for ratio in part) for part in by_stage]
        found.append((compiled.plan.timeline().total_s, actions_s, best, ratios))
    return found


def gpt_section(repeats: int) -> list[str]:
    rows = []
    ways = (("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2))
    for (name, _), found in zip(ways, run_on_ranks(2, run_gpt, ways, repeats)[0], strict=True):
        predicted_s, actions_s, step, by_stage = found
        seconds = [human_seconds(s) for s in (predicted_s, actions_s, step.total_s)]
        ratios = [f"{step.total_s / actions_s:.2f}", f"{step.total_s / step.replayed_s:.2f}"]
        rows.append([name, *seconds, *ratios, *by_stage])
        print("  ".join(rows[-1]), flush=True)
    columns = ["schedule", "predicted step", "its actions", "measured", "measured / predicted", "measured / replayed"]
    return [
        "## Stages that compute",
        "",
        "A GPT of 4 layers, width 256, 16 x 64 tokens, on 2 gloo processes of one thread each, float32, through `autoshard.compile`",
        'with `hardware="cpu"`, a preset of round numbers that were not measured here;',
        f"{MICROBATCHES} microbatches, the fastest of {repeats} steps of `model.measure`. The optimizer is part of the predicted step, and",
        "actions are what is measured, so these are predicted by themselves. That ratio is of the preset to cores that other work shared",
        "and changes severalfold from run to run; it says nothing about another machine. Replayed is the schedule simulated with the",
        "mean seconds of each stage's actions as they were measured: what is left is waiting, sending, and noise from one action to the",
        "next. The last columns are measured over predicted seconds of each stage: where they are alike, the stages are as balanced as",
        "planned.",
        "",
        *table([*columns, "forward, by stage", "backward, by stage"], rows),
    ]


# ------------------------------------------------------------------------------------------------------------- bubbles


def bubble_of(name: ScheduleName, ranks: int, microbatches: int, per_rank: int) -> tuple[float, float]:
    """Simulated, of even stages without communication; and by the formula."""
    schedule = make_schedule(name, ranks, microbatches, per_rank)
    simulated = simulate(schedule, [StageCosts(1.0, 2.0)] * (ranks * per_rank), stage_ranks(name, ranks, per_rank)).bubble
    return simulated, (ranks - 1) / (per_rank * microbatches + ranks - 1)


def bubble_section() -> list[str]:
    kinds: tuple[tuple[ScheduleName, int], ...] = (("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 4))
    counts = [(ranks, rounds * ranks) for ranks in range(2, 17) for rounds in (1, 2, 3, 4, 8)]
    off = max(abs(a - b) for name, v in kinds for p, m in counts for a, b in [bubble_of(name, p, m, v)])
    rows = []
    for p, m in ((4, 8), (4, 32), (8, 8), (8, 32), (16, 64)):
        cells = [f"{a:.3%} / {b:.3%}" for name, v in kinds for a, b in [bubble_of(name, p, m, v)]]
        rows.append([str(p), str(m), *cells])
    return [
        "## Bubbles and their formulas",
        "",
        "Of p ranks with even stages, m microbatches, v stages on a rank and no communication, ranks stand idle for",
        "(p - 1) / (v m + p - 1) of the step (GPipe, arXiv:1811.06965; interleaved 1F1B, arXiv:2104.04473). Simulated / formula. Over",
        f"{len(counts) * len(kinds)} pipelines of 2 to 16 ranks and 1 to 8 rounds of p microbatches they differ by at most {off:.0e}.",
        "",
        *table(["p", "m", *(f"{name}, v={v}" for name, v in kinds)], rows),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Pipelines: predicted and measured, write docs/benchmarks/pipelines.md.")
    parser.add_argument("--sizes", nargs="*", type=int, default=[2, 4])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    load = f"Load average {os.getloadavg()[1]:.0f} on {os.cpu_count()} cores, which other work shared, when the measurements began."
    made: dict[str, Callable[[], list[str]]] = {
        "asleep": lambda: sleep_section(args.sizes, args.repeats),
        "gpt": lambda: gpt_section(4 * args.repeats),
        "bubbles": bubble_section,
        "cuts": lambda: cut_table(args.models),
    }
    lines = [*heading("Pipelines", "tests/benchmarks/pipelines.py"), load]
    for name in args.sections:
        lines += ["", *made[name]()]
    write(args.out, "pipelines.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
