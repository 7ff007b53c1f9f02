"""Memory of pipelines: predicted bytes against the allocator's on processes, and what the engine keeps against what the timeline says."""

from __future__ import annotations

import functools
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from allocation_tracker import measure_step
from hypothesis import given
from hypothesis import strategies as st
from pipeline_models import CASES
from processes import run_on_ranks
from test_properties import share
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import autoshard
from autoshard import Pipelining
from autoshard.errors import PlanError
from autoshard.list_scheduling import list_schedule
from autoshard.memory import KINDS
from autoshard.pipeline_timeline import StageCosts, order_of, simulate
from autoshard.placements import local_shape
from autoshard.program import facts
from autoshard.rehearsal import OPTIMIZERS
from autoshard.runtime.actions import Schedule
from autoshard.runtime.pipeline_stage import EngineStage, Stage, Step, Values
from autoshard.schedules import NAMES, V_SHAPED, make_schedule, ranks_of
from autoshard.stage_rehearsal import EngineAlone, StageAlone
from autoshard.text import human_bytes

AT_REST = ("parameters", "optimizer state", "buffers", "inputs")


@functools.cache
def plan_of(schedule: str = "1f1b", mesh: str = "pp=2", case: str = "gpt", microbatches: int = 4, **options: Any) -> autoshard.Plan:
    args, kwargs = CASES[case].batch(0)
    return autoshard.plan(CASES[case].model(), mesh, args, kwargs, pipeline=Pipelining(microbatches, schedule), **options)


# ------------------------------------------------------------------------------------------------------ on processes


def measured(cases: list[tuple[str, str, str]], shape: tuple[int, ...], names: tuple[str, ...]) -> list[tuple]:
    """What this rank takes beside what is predicted for it: of every case the bytes at rest and at the peak."""
    found, mesh = [], init_device_mesh("cpu", shape, mesh_dim_names=names)
    for case, schedule, optimizer in cases:
        args, kwargs = CASES[case].batch(0)
        model = autoshard.compile(CASES[case].model(), mesh, example_inputs=args, example_kwargs=kwargs, pipeline=Pipelining(4, schedule))
        real = measure_step(model, args, kwargs, OPTIMIZERS[optimizer])
        memory = model.plan.memory(optimizer, rank=dist.get_rank())
        found.append((sum(memory.at_peak[kind] for kind in AT_REST), real.rest_bytes, memory.peak_bytes, real.peak_bytes))
    return found


def check(cases: list[tuple[str, str, str]], shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    """What is at rest is exact; the peak is within 5 %, the bar of the median of plans without stages."""
    ranks = run_on_ranks(int(torch.tensor(shape).prod()), measured, cases, shape, names)
    for rank in ranks:
        for case, (rest, real_rest, peak, real_peak) in zip(cases, rank, strict=True):
            assert rest == real_rest, case
            assert peak == pytest.approx(real_peak, rel=0.05), case


def test_the_peak_of_every_rank_is_its_allocators() -> None:
    check([("UNet", "1f1b", "adamw")], (2,), ("pp",))


@pytest.mark.slow
def test_the_peak_of_every_rank_is_its_allocators_by_every_schedule() -> None:
    check(
        [(case, schedule, "adamw") for case in ("gpt", "UNet") for schedule in (*NAMES, "list") if schedule != "dualpipev"], (2,), ("pp",)
    )


@pytest.mark.slow
@pytest.mark.parametrize("names", [("pp", "dp"), ("tp", "pp")], ids=str)
def test_the_peak_of_every_rank_is_its_allocators_beside_other_axes(names: tuple[str, ...]) -> None:
    check([("gpt", "1f1b", "adamw"), ("UNet", "gpipe", "sgd"), ("MoE", "1f1b", "adamw")], (2, 2), names)


# ------------------------------------------------------------------------------------------------------ what is said


def test_a_rank_holds_what_its_stages_read() -> None:
    plan = plan_of(mesh="pp=2,tp=2", template="megatron")
    pipeline = plan.program.pipeline
    assert pipeline is not None
    for rank, place in enumerate((0, 0, 1, 1)):
        memory = plan.memory("sgd", rank=rank)
        nodes = {
            facts(n).name: facts(n)
            for k, at in enumerate(pipeline.stage_ranks)
            if at == place
            for n in plan.program.stages[k].nodes("parameter")
        }
        pieces = [local_shape(known.value.shape, known.layout, plan.mesh.shape) for known in nodes.values()]
        assert memory.stage_rank == place
        assert memory.at_peak["parameters"] == 8 * sum(torch.Size(piece or ()).numel() for piece in pieces)
        assert memory.at_peak["inputs"] == 2 * 8 * 8 * 8  # two of i64[8, 8], whole on every rank


def test_the_rank_that_needs_most_is_told() -> None:
    plan = plan_of("1f1b")
    each = [plan.memory(rank=rank) for rank in range(2)]
    most = plan.memory()
    assert most.peak_bytes == max(memory.peak_bytes for memory in each)
    assert each[most.stage_rank or 0] == most
    assert f"at pp={most.stage_rank}" in str(most.table().title)
    with pytest.raises(PlanError, match="rank 2 is not on mesh pp=2, which has ranks 0 to 1"):
        plan.memory(rank=2)
    alone = autoshard.plan(CASES["gpt"].model(), "tp=2", CASES["gpt"].batch(0)[0])
    assert alone.memory(rank=1) == alone.memory()
    with pytest.raises(PlanError, match="rank -1 is not on mesh tp=2"):
        alone.memory(rank=-1)


def test_the_curve_goes_through_the_actions() -> None:
    plan = plan_of("1f1b")
    pipeline = plan.program.pipeline
    assert pipeline is not None
    for rank in range(2):
        memory = plan.memory("sgd", rank=rank)
        actions = list(dict.fromkeys(point.action for point in memory.curve if point.action))
        assert actions == [str(action) for action in pipeline.schedule[rank]]
        for point in memory.curve:
            assert point.phase == ("forward" if "F" in point.action else "backward") or not point.action
        assert memory.curve[-1].phase == "optimizer"
        assert memory.peak_bytes == max(point.total_bytes for point in memory.curve) == sum(memory.at_peak.values())
        assert {kind: sum(kinds.get(kind, 0) for kinds in memory.at_peak_by_module.values()) for kind in KINDS} == memory.at_peak


def test_gpipe_keeps_more_and_inference_nothing() -> None:
    kept = [max(p.kinds()["activations"] for p in plan_of(s).memory("sgd", rank=0).curve) for s in ("gpipe", "1f1b")]
    assert kept[0] > 1.8 * kept[1]
    plan = plan_of("1f1b")
    inference = plan.memory(None)
    assert {point.phase for point in inference.curve} == {"forward"}
    assert inference.at_peak["gradients"] == inference.at_peak["optimizer state"] == 0
    assert inference.peak_bytes < 0.6 * plan.memory("sgd").peak_bytes


def test_weights_are_gathered_once_per_step() -> None:
    """The gathered weights of ZeRO stay for the whole step, as do their gradients, which are reduced once."""
    for microbatches in (2, 4):
        memory = plan_of("gpipe", "pp=2,dp=2", template="fsdp", microbatches=microbatches).memory("sgd", rank=0)
        gathered = [point.kinds()["gathered weights"] for point in memory.curve if point.action]
        assert min(gathered) > 0
        assert gathered[0] == gathered[-1]
        reduced = [
            point for point in memory.curve if point.phase == "backward" and not point.action and point.kinds()["collective buffers"]
        ]
        assert reduced


def test_the_report_shows_every_rank(tmp_path: Path) -> None:
    plan = plan_of("1f1b", hardware="h100", memory_budget_bytes=1e9)
    text = plan.report(tmp_path / "report.html", memory=True).read_text()
    assert text.count("Memory of a rank over one step") == 2
    assert "A rank at pp=0" in text
    assert "A rank at pp=1" in text
    most = plan.memory()
    assert f"At most {human_bytes(most.peak_bytes)} at once at pp={most.stage_rank}" in text
    assert f"That is {most.reserved_bytes / 1e9:.1%} of the budget" in text


# ------------------------------------------------------------------------------------------------------ kept in flight


class _Kept(torch.autograd.Function):
    """`x * weight`; the gradient of the weight needs what is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, saved: Tensor) -> Tensor:
        ctx.save_for_backward(saved)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad * 1, grad * ctx.saved_tensors[0], None


class _Counting(StageAlone):
    """Counts after every action for how many microbatches this rank's stages keep what autograd saved."""

    def __init__(self, *args: Any, alive: list[weakref.ref[Tensor]], counts: list[int]) -> None:
        super().__init__(*args)
        self.alive, self.counts = alive, counts

    def _count(self) -> None:
        self.counts.append(sum(value() is not None for value in self.alive))

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Values:
        result = super().forward_one_chunk(*args, **kwargs)
        self._count()
        return result

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(*args, **kwargs)
        self._count()

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        super().backward_weight_one_chunk(*args, **kwargs)
        self._count()


def own_stages(schedule: Schedule, rank: int, alive: list[weakref.ref[Tensor]]) -> list[EngineStage]:
    """Stages of one weight each; what they save for backward of a microbatch is noted in `alive`."""
    stage_ranks, weight = ranks_of(schedule), torch.ones(2, requires_grad=True)
    value = torch.empty(2, device="meta", requires_grad=True)

    def stage(number: int) -> EngineStage:
        is_last = number == len(stage_ranks) - 1

        def forward(values: Values, microbatch: int) -> Values:
            saved = torch.full((2,), float(microbatch))
            alive.append(weakref.ref(saved))
            y = _Kept.apply(values[0] if values else torch.ones(2), weight, saved)
            return (y.sum() if is_last else y,)

        sent = torch.empty(() if is_last else (2,), device="meta", requires_grad=True)
        return EngineStage(number, forward, (value,) if number else (), (sent,))

    return [stage(number) for number, at in enumerate(stage_ranks) if at == rank]


def kept_by_engine(schedule: Schedule, microbatches: int, rank: int) -> list[int]:
    """By action of a rank, how many microbatches its stages keep when the action has ended."""
    alive, counts = list[weakref.ref[Tensor]](), list[int]()
    stages, stage_ranks = own_stages(schedule, rank, alive), ranks_of(schedule)

    def make(stage: EngineStage, step: Step) -> Stage:
        return _Counting(stage, stage_ranks, step, torch.device("cpu"), alive=alive, counts=counts)

    gc.disable()  # what is let go must be so at once
    try:
        EngineAlone(stages, stage_ranks, microbatches, torch.device("cpu"), make).train(schedule, 0)
    finally:
        gc.enable()
    return counts


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Schedule, int]:
    """A schedule by name or a list made for uneven stages, and its number of microbatches."""
    name, ranks = draw(st.sampled_from([*NAMES, "list"])), draw(st.integers(1, 4))
    per_rank = 1 if name in ("gpipe", "1f1b") else 2 if name in V_SHAPED else draw(st.integers(2, 3))
    microbatches = draw(st.integers(2 * ranks, 2 * ranks + 3) if name == "dualpipev" else st.integers(1, 6))
    if name != "list":
        return make_schedule(name, ranks, microbatches, per_rank), microbatches  # type: ignore[arg-type]
    lies = tuple(range(ranks)) * per_rank
    costs = [StageCosts(draw(st.integers(1, 9)), draw(st.integers(1, 9)), kept_bytes=1) for _ in lies]
    return list_schedule(costs, lies, microbatches), microbatches


@share(100)
@given(schedules())
def test_the_engine_keeps_as_many_microbatches_as_the_timeline_says(drawn: tuple[Schedule, int]) -> None:
    """After every action on every rank."""
    schedule, microbatches = drawn
    lies = ranks_of(schedule)
    timeline = simulate(schedule, [StageCosts(1, 1)] * len(lies), lies)
    for rank, (actions, (_, rows)) in enumerate(zip(schedule, order_of(schedule, lies).in_flight, strict=True)):
        during = rows[: len(actions)].sum(axis=1)
        after = [count - (action.kind in "BW") for action, count in zip(actions, during, strict=True)]
        assert kept_by_engine(schedule, microbatches, rank) == after
        assert timeline.in_flight[rank] == during.max()


@pytest.mark.parametrize("case", ["gpt", "UNet", "MoE"])
def test_what_the_timeline_counts_is_kept(case: str) -> None:
    """The rehearsal finds it, and no more than the buffers of messages and what forward takes of one microbatch beside it."""
    for schedule in ("1f1b", "interleaved_1f1b") if case == "gpt" else ("gpipe", "list"):
        plan = plan_of(schedule, case=case)
        pipeline, timeline = plan.program.pipeline, plan.timeline()
        assert pipeline is not None
        for rank in range(2):
            own = [plan.program.stages[k] for k, at in enumerate(pipeline.stage_ranks) if at == rank]
            passed = sum(facts(n).value.nbytes for part in own for n in (*part.nodes("received"), *part.output.all_input_nodes))
            kept, working = (max(p.kinds()["activations"] for p in plan.memory(how, rank=rank).curve) for how in ("sgd", None))
            counted = timeline.peak_bytes[rank]
            assert 0.98 * counted <= kept <= counted + passed * timeline.in_flight[rank] + working, (schedule, rank)
