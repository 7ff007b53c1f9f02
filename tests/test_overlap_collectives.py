"""overlap_collectives on simulated ranks: the same numbers, no more on its way than allowed, no mutant that passes the checker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import EXAMPLES, GPT
from random_graphs import Graph, graphs
from test_checker import Mutant, survivors
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from training_oracle import Case, fresh

import autoshard
from autoshard import runtime
from autoshard.checker import check
from autoshard.conversions import COMMUNICATES, CONVERSIONS, STARTS
from autoshard.costs import CostModel
from autoshard.errors import PlacementError
from autoshard.hardware import hardware_of
from autoshard.passes import EmitPrograms, OverlapCollectives
from autoshard.placements import I, P, R, S
from autoshard.program import Program, asked_of, facts, is_wait, row_of, set_facts
from autoshard.runner import run_passes

OVERLAP = autoshard.Options(overlap=True)
PLANS = [
    ("dp=2", {"template": "ddp"}),
    ("dp=2", {"template": "fsdp"}),
    ("dp=2,tp=2", {"template": "fsdp"}),
    ("dp=2,tp=2", {"template": "megatron"}),
    ("dp=2,tp=2", {"template": "megatron_sp"}),
    ("a=2", {"seed": 1}),
    ("a=2,b=2", {"seed": 2}),
]
IDS = pytest.mark.parametrize(("mesh", "asked"), PLANS, ids=str)


@cache
def made(mesh: str, asked: tuple, overlap: bool, example: str) -> autoshard.Plan:
    given = dict(asked)
    options = autoshard.Options(seed=given.pop("seed", None), overlap=overlap)
    args, kwargs = EXAMPLES[example].batch(0)
    return autoshard.plan(EXAMPLES[example].model(), mesh, args, kwargs, options=options, hardware="h100", **given)


def planned(mesh: str, asked: dict[str, Any], overlap: bool = True, example: str = "gpt") -> autoshard.Plan:
    """A plan whose program may be changed."""
    plan = made(mesh, tuple(asked.items()), overlap, example)
    copy = fresh(plan.program, plan.mesh)
    return replace(plan, program=replace(copy, passes=list(plan.program.passes), stats=dict(plan.program.stats)))


def gradients(plan: autoshard.Plan, model: nn.Module, args: Any, kwargs: Any) -> dict[str, Tensor | None]:
    simulation = autoshard.simulate(plan, model, args, kwargs)
    simulation.backward()
    return {name: simulation.gradient(name) for name, _ in model.named_parameters()}


# ------------------------------------------------------------------------------------------------------- the numbers


@IDS
def test_gradients_are_those_without_overlap_bit_for_bit(mesh: str, asked: dict[str, Any]) -> None:
    model, (args, kwargs) = EXAMPLES["gpt"].model(), EXAMPLES["gpt"].batch(0)
    plans = [planned(mesh, asked, overlap) for overlap in (False, True)]
    assert not list(plans[0].program.nodes("start"))
    assert len(list(plans[1].program.nodes("start"))) > 3
    blocking, overlapped = (gradients(plan, model, args, kwargs) for plan in plans)
    for name, expected in blocking.items():
        assert expected is not None
        assert torch.equal(overlapped[name], expected), name  # type: ignore[arg-type]


def overlapped(program: Program, ahead_bytes: float | None) -> Program:
    return run_passes((OverlapCollectives(hardware_of("h100"), True, ahead_bytes), EmitPrograms("Drawn")), program)


@settings(max_examples=max(settings().max_examples // 8, 1))
@given(
    graphs(8), st.sampled_from(("a=2", "a=3", "a=2,b=2")), st.integers(0, 9999), st.booleans(), st.sampled_from((None, 0.0, 512.0, 1e12))
)
def test_random_plans_train_as_one_device(graph: Graph, mesh: str, seed: int, is_scattered: bool, ahead_bytes: float | None) -> None:
    case = Case.of(graph.model(), graph.arguments())
    program = overlapped(case.plan(mesh, seed, is_scattered=is_scattered), ahead_bytes)
    case.prove(program, is_text=seed % 2 == 0)


# ------------------------------------------------------------------------------------------------------ what is moved


@IDS
def test_what_is_on_its_way_keeps_the_limit(mesh: str, asked: dict[str, Any]) -> None:
    """Walk the program with a set of started gathers: together they never hold more than `ahead_bytes`."""
    for limit in (0.0, 3000.0, 9000.0):
        plan = planned(mesh, asked, overlap=False)
        program, costs = overlapped(plan.program, limit), CostModel(plan.mesh, plan.hardware)
        held, most = 0.0, 0.0
        for node in program.nodes("start", "conversion"):
            wait = next(iter(node.users)) if facts(node).role == "start" else node
            if row_of(node).forward not in COMMUNICATES or not is_wait(wait):
                continue
            size = costs.local_bytes(facts(wait).value, facts(wait).layout)
            held += size if facts(node).role == "start" else -size
            most = max(most, held)
        assert held == 0.0
        assert most <= limit


def test_every_pair_has_compute_in_between_and_starts_in_the_order_of_need() -> None:
    program = planned("dp=2", {"template": "fsdp"}).program
    order = list(program.graph.nodes)
    starts = [node for node in order if facts(node).role == "start"]
    waits = [next(iter(node.users)) for node in starts]
    for start, wait in zip(starts, waits, strict=True):
        between = order[order.index(start) + 1 : order.index(wait)]
        assert any(facts(node).role == "op" for node in between), start
    assert waits == sorted(waits, key=order.index)


def test_data_parallel_gradients_are_waited_for_at_the_end_of_backward() -> None:
    program = planned("dp=2", {"template": "ddp"}).program
    order = list(program.graph.nodes)
    starts = [node for node in order if facts(node).role == "start"]
    first_op = next(k for k, node in enumerate(order) if facts(node).role == "op" and not facts(node).is_constant)
    assert {node.target for node in starts} == {runtime.start_vary}
    assert max(map(order.index, starts)) < first_op + 2
    assert all(next(iter(start.users)).users for start in starts)


def test_a_weight_larger_than_the_limit_is_gathered_where_it_is_used() -> None:
    plan = planned("dp=2", {"template": "fsdp"}, overlap=False)
    program = overlapped(plan.program, 0.0)
    assert all(row_of(node).forward not in COMMUNICATES for node in program.nodes("start"))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x.square().mean()


def test_checkpointed_regions_are_left_alone() -> None:
    model, x = Checkpointed().double(), torch.randn(4, 8, dtype=torch.float64)
    plan = autoshard.plan(model, "dp=2", (x,), template="fsdp", hardware="h100", options=OVERLAP)
    inside = [node for node in plan.program.nodes("conversion") if facts(node).recompute is not None]
    assert inside
    assert not any(is_wait(node) for node in inside)
    assert autoshard.verify(model, plan, (x,)).is_equal


# ------------------------------------------------------------------------------------------------ text, file, picture


def test_the_program_reads_well(golden: Callable[[str, str], None]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64))
    plan = autoshard.plan(model, "dp=2,tp=2", (torch.zeros(16, 64),), template="fsdp", hardware="h100", options=OVERLAP)
    golden("mlp_fsdp_overlap_dp2_tp2.py", plan.source())


@pytest.mark.parametrize(("mesh", "asked"), [PLANS[1], PLANS[3], PLANS[5]], ids=str)
def test_a_saved_plan_is_the_same_and_a_picture_shows_one_node_per_pair(mesh: str, asked: dict[str, Any], tmp_path: Path) -> None:
    blocking, plan = (planned(mesh, asked, overlap) for overlap in (False, True))
    plan.save(tmp_path / "plan.json")
    loaded = autoshard.Plan.load(tmp_path / "plan.json")
    assert loaded.source() == plan.source()
    assert "wait(" in plan.source()
    assert plan.stats["wire_bytes_per_step"] == blocking.stats["wire_bytes_per_step"]
    if "template" in asked:
        assert plan.graph("modules").source == blocking.graph("modules").source


# ------------------------------------------------------------------------------------------------------------ mutants


def mutants_of(program: Program, start: fx.Node) -> Iterator[Mutant]:
    """Changes to one pair, given as its start."""

    def wait_of(node: fx.Node) -> fx.Node:
        return next(user for user in node.users if is_wait(user))

    def read_early(node: fx.Node, _: Program) -> None:
        wait = wait_of(node)
        wait.replace_all_uses_with(node)
        wait.graph.erase_node(wait)

    def never_started(node: fx.Node, _: Program) -> None:
        wait_of(node).args = (node.args[0],)
        node.graph.erase_node(node)

    def waited_twice(node: fx.Node, _: Program) -> None:
        wait = wait_of(node)
        with node.graph.inserting_after(wait):
            again = node.graph.node_copy(wait)
        set_facts(again, replace(facts(wait)))
        next(iter(set(wait.users) - {again})).replace_input_with(wait, again)

    def skipped(node: fx.Node, _: Program) -> None:
        wait = wait_of(node)
        wait.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        node.graph.erase_node(wait)
        node.graph.erase_node(node)

    def not_waited_for(node: fx.Node, _: Program) -> None:
        wait = wait_of(node)
        wait.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        node.graph.erase_node(wait)

    def also_read(node: fx.Node, program: Program) -> None:
        reader = next(iter(wait_of(node).users))
        reader.replace_input_with(wait_of(node), node)

    def another_wait(node: fx.Node, program: Program) -> None:
        other = next((n for n in program.nodes("start") if n is not node), None)
        wait_of(node).args = (other,) if other is not None else ()

    yield "read early", read_early
    yield "never started", never_started
    yield "waited for twice", waited_twice
    yield "skipped", skipped
    yield "not waited for", not_waited_for
    yield "also read", also_read
    yield "waits for another", another_wait
    yield "wait of a conversion", lambda node, _: setattr(node, "target", getattr(runtime, row_of(node).name))
    for name in STARTS:
        if name != start.target.__name__:  # type: ignore[union-attr]
            yield f"{name}", lambda node, _, name=name: setattr(node, "target", getattr(runtime, name))
    for row in CONVERSIONS:
        yield f"wait is {row.name}", lambda node, _, row=row: setattr(wait_of(node), "target", getattr(runtime, row.name))
    for axis in program.mesh.axes:
        if axis != start.args[1]:
            yield "another axis", lambda node, _, axis=axis: node.update_arg(1, axis)
    if len(start.args) > 2:
        yield "another dim", lambda node, _: node.update_arg(2, int(node.args[2]) + 1)  # type: ignore[arg-type]
        yield "no dim", lambda node, _: setattr(node, "args", node.args[:2])
    yield "no arguments", lambda node, _: setattr(node, "args", ())
    yield "one more dim", lambda node, _: setattr(node, "args", (*node.args, 0))
    yield "a size", lambda node, _: setattr(node, "kwargs", {"size": 3})
    yield "called constant", lambda node, _: setattr(facts(node), "is_constant", True)
    yield "in a region", lambda node, _: setattr(facts(node), "recompute", 1)
    yield "wait in a region", lambda node, _: setattr(facts(wait_of(node)), "recompute", 1)
    known = facts(start)
    for placement in (P, R, I, S(0), S(1)):
        for which in (lambda node: node, wait_of):
            at = program.mesh.index(str(start.args[1]))
            if placement != facts(which(start)).layout[at] and (known.needs_grad or not placement.is_whole):
                layout = (*facts(which(start)).layout[:at], placement, *facts(which(start)).layout[at + 1 :])
                yield f"recorded {placement}", lambda node, _, which=which, layout=layout: setattr(facts(which(node)), "layouts", (layout,))


@IDS
def test_every_change_to_a_pair_is_refused(mesh: str, asked: dict[str, Any]) -> None:
    program = planned(mesh, asked).program
    check(program)
    tried: Counter[str] = Counter()
    starts = {(node.target, node.args[1:], len(facts(node).value.shape)): node for node in program.nodes("start")}.values()
    passed = [text for start in starts for text in survivors(program, start, mutants_of(program, start), tried)]
    assert not passed, f"{len(passed)} of {tried.total()} mutants pass: {passed[:10]}"
    assert tried.total() > 40, tried


def test_the_text_says_what_is_wrong_with_a_pair() -> None:
    program = planned("dp=2", {"template": "fsdp"}).program
    start = next(iter(program.nodes("start")))
    wait = next(iter(start.users))
    next(iter(wait.users)).replace_input_with(wait, start)
    with pytest.raises(
        PlacementError, match=r"is waited for 1 times and read by 2 nodes; one wait has to end it[\s\S]*was started and not"
    ):
        check(program)
    assert asked_of(wait) is start


# ------------------------------------------------------------------------------------------------- one process, no axis


def test_an_axis_of_one_rank_passes_values_on() -> None:
    axis = runtime.Axis("a", 1, 0, "none")
    x = torch.randn(3, requires_grad=True)
    started = runtime.start_all_reduce(x, axis)
    assert runtime.wait(started) is x


def test_every_row_that_communicates_can_be_started() -> None:
    assert {row.name for row in STARTS.values()} == {
        "all_gather",
        "all_gather_invariant",
        "all_reduce",
        "all_reduce_invariant",
        "all_to_all",
        "reduce_scatter",
        "slice_invariant",
        "vary",
    }
    assert all(getattr(runtime, name).__name__ == name for name in STARTS)


def test_models_with_other_structure_train() -> None:
    for example, mesh, asked in (("conv_net", "dp=2", {"template": "fsdp"}), ("encoder", "a=2", {"seed": 5})):
        model, (args, kwargs) = EXAMPLES[example].model(), EXAMPLES[example].batch(0)
        plan = planned(mesh, asked, example=example)
        assert autoshard.verify(model, plan, args, kwargs).is_equal


def test_dropout_draws_as_without_overlap() -> None:
    (args, kwargs), drawn = EXAMPLES["gpt"].batch(0), []
    for overlap in (False, True):
        torch.manual_seed(0)
        model = GPT(dropout=0.3)
        options = autoshard.Options(overlap=overlap)
        plan = autoshard.plan(model, "dp=2", args, kwargs, template="fsdp", hardware="h100", options=options)
        drawn.append(gradients(plan, model, args, kwargs))
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])  # type: ignore[arg-type]
