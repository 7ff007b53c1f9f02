"""The timeline: bounds that hold for any step, the search's objective where nothing overlaps, and what the trace says."""

from __future__ import annotations

import itertools
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import EXAMPLES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autoshard
from autoshard.costs import CostModel
from autoshard.program import facts
from autoshard.timeline import COMPUTE, Task, schedule, tasks_of, work_of

AXES = ("dp", "tp")
SLACK = 1e-9  # relative: sums of the same numbers in another order


# ------------------------------------------------------------------------------------------------------ any schedule

seconds = st.floats(0.0, 10.0, allow_subnormal=False)


@st.composite
def steps(draw: st.DrawFn) -> list[Task]:
    """A step: work on the compute stream, and collectives that are launched and waited for later, in any order."""
    tasks: list[Task] = []
    open_: list[Task] = []
    for number in range(draw(st.integers(0, 20))):
        verb = draw(st.sampled_from(("run", "launch", "wait")))
        if verb == "run":
            tasks.append(Task("run", COMPUTE, f"op{number}", draw(seconds)))
        elif verb == "launch":
            open_.append(Task("launch", draw(st.sampled_from(AXES)), f"collective{number}", draw(seconds)))
            tasks.append(open_[-1])
        elif open_:
            tasks.append(wait_for(open_.pop(draw(st.integers(0, len(open_) - 1)))))
    return [*tasks, *map(wait_for, open_)]


def wait_for(launch: Task) -> Task:
    return Task("wait", launch.stream, launch.name)


def blocking(tasks: list[Task]) -> list[Task]:
    """The same step with every collective waited for at once, where it was waited for."""
    launches = {task.name: task for task in tasks if task.verb == "launch"}
    return [new for task in tasks if task.verb != "launch" for new in ([launches[task.name], task] if task.verb == "wait" else [task])]


def total(tasks: list[Task]) -> float:
    return sum(task.seconds for task in tasks)


@given(steps())
def test_no_step_beats_its_busiest_stream_or_exceeds_the_sum(tasks: list[Task]) -> None:
    found = schedule(tasks, AXES)
    assert found.total_s >= max(found.busy_s.values()) * (1 - SLACK)
    assert found.total_s <= total(tasks) * (1 + SLACK)
    assert math.isclose(found.total_s, found.compute_s + sum(found.exposed_s.values()), rel_tol=SLACK, abs_tol=1e-12)
    assert math.isclose(schedule(blocking(tasks), AXES).total_s, total(tasks), rel_tol=SLACK)


@given(steps())
def test_a_stream_does_one_thing_at_a_time_in_the_order_of_launch(tasks: list[Task]) -> None:
    found = schedule(tasks, AXES)
    for stream in (COMPUTE, *AXES):
        own = [event for event in found.events if event.stream == stream]
        assert [event.name for event in own] == [t.name for t in tasks if t.stream == stream and t.verb != "wait" and t.seconds]
        assert all(a.end_s <= b.start_s * (1 + SLACK) + 1e-12 for a, b in itertools.pairwise(own))


@given(steps(), st.data())
def test_more_overlap_is_never_slower(tasks: list[Task], data: st.DataObject) -> None:
    """A launch moved before the compute in front of it, or a wait behind the compute that follows: collectives keep their order."""
    movable = [k for k in range(1, len(tasks)) if {tasks[k - 1].verb, tasks[k].verb} in ({"run", "launch"}, {"wait", "run"})]
    better = [k for k in movable if (tasks[k].verb, tasks[k - 1].verb) in (("launch", "run"), ("run", "wait"))]
    if better:
        k = data.draw(st.sampled_from(better))
        moved = [*tasks[: k - 1], tasks[k], tasks[k - 1], *tasks[k + 1 :]]
        assert schedule(moved, AXES).total_s <= schedule(tasks, AXES).total_s * (1 + SLACK)


@given(steps(), st.floats(0.1, 1.0))
def test_faster_collectives_are_never_slower(tasks: list[Task], factor: float) -> None:
    faster = [Task(t.verb, t.stream, t.name, t.seconds * (factor if t.verb == "launch" else 1.0)) for t in tasks]
    assert schedule(faster, AXES).total_s <= schedule(tasks, AXES).total_s * (1 + SLACK)


def test_a_wait_blocks_compute_and_a_stream_is_free_for_others() -> None:
    launch, other = Task("launch", "dp", "gather", 3.0), Task("launch", "tp", "reduce", 2.0)
    work = [Task("run", COMPUTE, "a", 1.0), Task("run", COMPUTE, "b", 1.0)]
    found = schedule([launch, work[0], other, work[1], wait_for(other), wait_for(launch)], AXES)
    assert [(e.name, e.start_s, e.end_s) for e in found.events] == [("gather", 0, 3), ("a", 0, 1), ("reduce", 1, 3), ("b", 1, 2)]
    assert (found.total_s, found.exposed_s, found.compute_s) == (3.0, {"dp": 0.0, "tp": 1.0}, 2.0)


# --------------------------------------------------------------------------------------------------------- programs

PLANS = [
    ("gpt", "dp=2", "auto"),
    ("gpt", "dp=2,tp=2", "ddp"),
    ("gpt", "dp=2,tp=2", "fsdp"),
    ("gpt", "dp=2,tp=2", "megatron_sp"),
    ("hf_llama", "tp=2", "megatron"),
    ("encoder", "dp=2,tp=2", "auto"),
    ("conv_net", "dp=2", "fsdp"),
]
IDS = pytest.mark.parametrize(("example", "mesh", "template"), PLANS)


@cache
def planned(example: str, mesh: str, template: Any, overlap: bool) -> autoshard.Plan:
    args, kwargs = EXAMPLES[example].batch(0)
    options = autoshard.Options(overlap=overlap)
    return autoshard.plan(EXAMPLES[example].model(), mesh, args, kwargs, template=template, hardware="h100", options=options)


@IDS
def test_without_overlap_the_step_takes_what_the_search_minimised(example: str, mesh: str, template: str) -> None:
    """But for what depends on inputs alone, which templates decide before the search, and conversions that the program found to share."""
    plan = planned(example, mesh, template, False)
    costs, program, total_s, objective_s = (
        CostModel(plan.mesh, plan.hardware),
        plan.program,
        plan.timeline().total_s,
        plan.stats["objective_s"],
    )
    alone = [node for node in program.nodes("op", "conversion", "mask") if not facts(node).needs_grad and not facts(node).is_constant]
    alone_s = sum(task.seconds for node in alone for task in work_of(program, node, costs).forward)
    assert total_s <= (objective_s + alone_s) * (1 + 1e-6)
    if template == "auto":
        assert math.isclose(total_s, objective_s, rel_tol=1e-9)
    elif example != "hf_llama":  # the search charges readers of one normalised value there for their conversions one by one
        assert total_s >= objective_s * (1 - 1e-6)
    assert plan.stats["predicted_s"] == total_s
    assert math.isclose(total_s, sum(task.seconds for task in tasks_of(program, costs)), rel_tol=1e-9)


@IDS
def test_with_overlap_the_same_work_takes_no_longer(example: str, mesh: str, template: str) -> None:
    alone, overlapped = (planned(example, mesh, template, overlap).timeline() for overlap in (False, True))
    for stream, busy in alone.busy_s.items():
        assert math.isclose(overlapped.busy_s[stream], busy, rel_tol=1e-9, abs_tol=1e-12)
    assert overlapped.total_s <= alone.total_s * (1 + 1e-9)
    assert overlapped.total_s >= max(overlapped.busy_s.values()) * (1 - 1e-9)
    if template in ("ddp", "fsdp"):
        assert overlapped.total_s < 0.9 * alone.total_s
        assert sum(overlapped.exposed_s.values()) < sum(alone.exposed_s.values())


def test_backward_mirrors_forward() -> None:
    events = planned("gpt", "dp=2,tp=2", "fsdp", True).timeline().events
    kinds = [event.kind for event in sorted(events, key=lambda event: event.start_s) if event.stream == COMPUTE]
    assert kinds == sorted(kinds, key=["forward", "backward", "optimizer"].index)
    names = {kind: [e.name for e in events if e.stream == COMPUTE and e.kind == kind] for kind in ("forward", "backward")}
    shared = set(names["backward"])
    assert [name for name in names["forward"] if name in shared] == names["backward"][::-1]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x.square().mean()


def test_a_checkpointed_region_runs_again_before_its_backward() -> None:
    plan = autoshard.plan(Checkpointed(), "dp=2", (torch.randn(4, 8),), template="fsdp", hardware="h100")
    inside = {node.name: facts(node).recompute for node in plan.program.nodes() if facts(node).recompute is not None}
    events = [event for event in plan.timeline().events if event.name in inside]
    runs = [kind for event in events for kind in [(event.kind, inside[event.name])]]
    order = list(dict.fromkeys(runs))
    assert order == [("forward", 1), ("forward", 2), ("recompute", 2), ("backward", 2), ("recompute", 1), ("backward", 1)]
    again = {event.name for event in events if event.kind == "recompute"}
    assert again == {event.name for event in events if event.kind == "forward"}
    assert {event.stream for event in events if event.kind == "recompute"} == {COMPUTE, "dp"}  # collectives too


def test_the_chrome_trace_has_a_row_per_stream(tmp_path: Path) -> None:
    found = planned("gpt", "dp=2,tp=2", "fsdp", True).timeline()
    path = found.to_chrome_trace(tmp_path / "step.json")
    events = json.loads(path.read_text())["traceEvents"]
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["compute", "collectives @dp", "collectives @tp"]
    shown = [e for e in events if e["ph"] == "X"]
    assert len(shown) == len(found.events)
    assert math.isclose(max(e["ts"] + e["dur"] for e in shown), found.total_s * 1e6, rel_tol=1e-9)
    assert {e["tid"] for e in shown} == {0, 1, 2}
    assert "ms exposed @tp" in repr(found)
