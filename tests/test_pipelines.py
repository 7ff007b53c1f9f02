"""Pipelines in simulation: all stages of a plan, microbatch after microbatch, compute what the model does on the whole batch.

Every model of pipeline_models on one mesh each, all of them on every mesh marked slow. What is each microbatch's own (statistics of
a BatchNorm, sums over the batch that are not used linearly) is compared with the model run on every microbatch.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import event, given, note
from pipeline_models import BATCH, CASES, WIDTH, Case, Deep, Mixing, MoE, numbers, sequences, vectors
from random_graphs import Graph, graphs
from test_properties import share
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import autoshard
from autoshard import Pipelining, Plan
from autoshard.errors import AutoshardError, ConstraintError, InputError, PlanError
from autoshard.program import facts
from autoshard.schedules import NAMES
from autoshard.stage_simulator import parameters_of

WAYS = [
    ("pp=2", 4, "auto"),
    ("pp=4", 2, "auto"),
    ("pp=2,dp=2", 2, "ddp"),
    ("tp=2,pp=2", 4, "auto"),
    ("pp=2,dp=2", 4, "fsdp"),
    ("pp=2,tp=2", 2, "megatron"),
    ("pp=4", 4, "auto"),
    ("pp=2", 1, "auto"),
]
EXACT = [name for name in CASES if name != "MoE"]


def plan_of(case: Case, mesh: str, microbatches: int | None = 2, template: Any = "auto", **asked: Any) -> Plan:
    args, kwargs = case.batch(0)
    pipeline = Pipelining(microbatches=microbatches, **asked)
    return autoshard.plan(case.model(), mesh, args, kwargs, template=template, pipeline=pipeline)


def check(name: str, mesh: str, microbatches: int, template: str, **asked: Any) -> Plan:
    case = CASES[name]
    if name == "BatchSecondGiven":
        asked["batch"] = {"x": 1, "target": 1}
    plan = plan_of(case, mesh, microbatches, template, **asked)
    assert not any("estimate" in said for said in plan.program.notes)
    args, kwargs = case.batch(7)
    found = autoshard.verify(case.model(3), plan, args, kwargs, tolerance=case.tolerance)
    assert found.is_equal, f"{name} on {mesh}, {microbatches} microbatches, {template}: {found}"
    return plan


@pytest.mark.parametrize("name", EXACT)
def test_stages_compute_what_the_model_does(name: str) -> None:
    plan = check(name, *WAYS[EXACT.index(name) % len(WAYS)])
    pipeline = plan.program.pipeline
    assert pipeline is not None
    assert len(plan.program.stages) == len(pipeline.stage_ranks) >= pipeline.mesh.stages
    assert all(list(stage.nodes("op")) for stage in plan.program.stages)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_stages_compute_what_the_model_does_on_every_mesh(name: str, way: tuple[str, int, str]) -> None:
    check(name, *way)


@pytest.mark.parametrize("schedule", [*NAMES, "list"])
def test_every_schedule(schedule: str) -> None:
    plan = check("two_terms", "pp=2", 4, "auto", schedule=schedule)
    assert plan.program.pipeline is not None
    assert plan.program.pipeline.name == schedule
    per_rank = 1 if schedule in ("gpipe", "1f1b", "list") else 2
    assert len(plan.program.stages) == 2 * per_rank


def test_more_stages_on_a_rank_than_are_tried_by_default() -> None:
    assert len(check("two_terms", "pp=2", 4, "auto", stages_per_rank=3).program.stages) == 6
    assert len(check("two_terms", "pp=2", 4, "auto", stages_per_rank=1).program.stages) == 2


# --------------------------------------------------------------------------------------------------- where stages start


def modules_of(plan: Plan) -> list[set[str]]:
    """By stage the modules whose weights it holds."""
    return [{facts(node).name.rpartition(".")[0] for node in stage.nodes("parameter")} for stage in plan.program.stages]


def test_stages_start_where_they_are_told() -> None:
    plan = check("gpt", "pp=2", 2, "auto", schedule="1f1b", starts=("blocks.1",))
    first, second = modules_of(plan)
    assert {name for name in first if name.startswith("blocks")} == {f"blocks.0.{name}" for name in PARTS}
    assert {name for name in second if name.startswith("blocks")} == {f"blocks.{k}.{name}" for k in (1, 2, 3) for name in PARTS}


PARTS = ("norm1", "norm2", "attn.qkv", "attn.proj", "up", "down")


def test_modules_that_stay_together() -> None:
    plan = check("gpt", "pp=2", 2, "auto", schedule="1f1b", together=("blocks.1", "blocks.2"))
    for module in ("blocks.1.", "blocks.2."):
        assert sum(any(name.startswith(module) for name in held) for held in modules_of(plan)) == 1
    plan = check("gpt", "pp=2", 2, "auto", schedule="1f1b", together=("blocks",))
    assert sum(any(name.startswith("blocks.") for name in held) for held in modules_of(plan)) == 1


def test_a_tied_weight_is_held_by_the_stages_that_read_it() -> None:
    plan = check("gpt", "pp=2", 2, "auto", schedule="1f1b", starts=("blocks.2",))
    name = plan.program.aliases.get("tok.weight", "tok.weight")
    assert parameters_of(plan.program)[name] == (0, 1)
    assert parameters_of(plan.program)["pos.weight"] == (0,)


def test_a_value_read_later_passes_through_all_stages_between() -> None:
    plan = plan_of(CASES["ValuesManyRead"], "pp=4", schedule="1f1b", starts=("layers.1", "layers.2", "layers.3"))
    passed = [{facts(node).source.module for node in stage.nodes("received")} for stage in plan.program.stages]
    assert [len(list(stage.nodes("received"))) for stage in plan.program.stages] == [0, 1, 2, 2], passed


# -------------------------------------------------------------------------------------- what is each microbatch's own


def mean_over_microbatches(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], count: int) -> list[Tensor]:
    """The mean of the model's results on every microbatch by itself; its gradient is left in the model's parameters."""
    flat, spec = pytree.tree_flatten((args, dict(kwargs)))
    parts = [leaf.chunk(count) for leaf in flat]
    results = []
    for number in range(count):
        own_args, own_kwargs = pytree.tree_unflatten([part[number] for part in parts], spec)
        found = [leaf for leaf in pytree.tree_leaves(model(*own_args, **own_kwargs)) if isinstance(leaf, Tensor)]
        (found[0] / count).backward()
        results.append([value.detach() for value in found])
    return [torch.stack(values).mean(0) if not values[0].dim() else torch.cat(values) for values in zip(*results, strict=True)]


def check_microbatches(make: Callable[[], nn.Module], batch: tuple[tuple, dict], mesh: str, count: int, template: Any = "auto") -> Plan:
    """The first result is the loss. Gradients, results and buffers are those of the model run on each microbatch."""
    torch.manual_seed(0)
    model = make().double()
    args, kwargs = batch
    plan = autoshard.plan(model, mesh, args, kwargs, template=template, pipeline=Pipelining(microbatches=count))
    simulation = autoshard.simulate(plan, copy.deepcopy(model), args, kwargs)
    alone = copy.deepcopy(model)
    expected = mean_over_microbatches(alone, args, kwargs, count)
    simulation.backward([torch.ones((), dtype=torch.float64), *[None] * (len(expected) - 1)])
    for found, value in zip(simulation.outputs, expected, strict=True):
        torch.testing.assert_close(found.values[0].detach(), value, rtol=1e-10, atol=1e-12)
    held = {facts(node).name: node for node in plan.program.nodes("parameter", "buffer")}
    for name, parameter in alone.named_parameters():
        found = [leaf.grad for leaf in simulation.leaves[name].values]
        for piece, wanted in zip(found, pieces_of(parameter.grad, held[name], plan), strict=True):
            torch.testing.assert_close(piece, wanted, rtol=1e-10, atol=1e-12)
    for name, buffer in alone.named_buffers():
        for piece, wanted in zip(simulation.leaves[name].values, pieces_of(buffer, held[name], plan), strict=True):
            torch.testing.assert_close(piece, wanted, rtol=1e-10, atol=1e-12)
    return plan


def pieces_of(whole: Tensor, node: Any, plan: Plan) -> list[Tensor]:
    return [autoshard.placements.shard(whole, facts(node).layout, plan.mesh, at) for at in plan.mesh.coordinates()]


class WithBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH, momentum=0.3), nn.BatchNorm1d(WIDTH, affine=False)])

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.tanh(norm(layer(x)))
        return F.mse_loss(x, y), x


@pytest.mark.parametrize(("mesh", "count", "template"), [("pp=2", 4, "auto"), ("pp=2", 1, "auto"), ("pp=2,dp=2", 2, "ddp")])
def test_batch_norm_takes_statistics_of_each_microbatch(mesh: str, count: int, template: str) -> None:
    batch = (numbers(0, BATCH, WIDTH), numbers(1, BATCH, WIDTH)), {}
    plan = check_microbatches(WithBatchNorm, batch, mesh, count, template)
    said = "\n".join(plan.program.notes)
    assert ("takes statistics of each microbatch by itself" in said) == (count > 1)
    assert ("running statistics are updated once per microbatch" in said) == (count > 1)


@pytest.mark.parametrize(("mesh", "count", "template"), [("pp=2", 4, "auto"), ("pp=4", 2, "auto"), ("pp=2,tp=2", 2, "megatron")])
def test_the_balance_of_experts_is_estimated_per_microbatch(mesh: str, count: int, template: str) -> None:
    plan = check_microbatches(MoE, sequences(0), mesh, count, template)
    said = "each microbatch takes an estimate of it from its own rows, and the results are averaged"
    assert any(said in text for text in plan.program.notes)


def test_experts_are_exact_in_one_microbatch_and_without_balance() -> None:
    check("MoE", "pp=2", 1, "auto")
    args, kwargs = sequences(0)
    model = MoE(weight=0.0).double()
    check_microbatches(lambda: MoE(weight=0.0), (args, kwargs), "pp=2", 4)
    plan = autoshard.plan(model, "pp=2", args, kwargs, pipeline=Pipelining(microbatches=4))
    assert autoshard.verify(model, plan, args, kwargs).gradients["enter.weight"] < 1e-12


def test_a_batch_norm_of_fixed_statistics_is_exact() -> None:
    args = numbers(0, BATCH, WIDTH), numbers(1, BATCH, WIDTH)
    torch.manual_seed(0)
    model = WithBatchNorm().double()
    model(*args)
    for norm in model.norms:
        norm.eval()
    plan = autoshard.plan(model, "pp=2", args, pipeline=Pipelining(microbatches=4))
    assert not any("statistics" in said for said in plan.program.notes)


# -------------------------------------------------------------------------------------------------------------- dropout


class Dropped(nn.Module):
    """Two dropouts of ones, before and after a linear layer, both returned: what is kept is not 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(WIDTH * 8)), nn.Parameter(torch.ones(WIDTH * 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = F.dropout(x * self.first, 0.5, self.training)
        b = F.dropout(x * self.second + a * 0, 0.5, self.training)
        return (a + b).sum(), a, b


def test_dropout_draws_anew_for_every_microbatch_and_stage() -> None:
    x = torch.ones(BATCH, WIDTH * 8, dtype=torch.float64)
    model = Dropped().double()
    plan = autoshard.plan(model, "pp=2", (x,), pipeline=Pipelining(microbatches=4, schedule="1f1b"))
    assert autoshard.verify(model, plan, (x,)).is_random_off
    assert autoshard.verify(model, plan, (x,)).is_equal
    drawn = []
    for seed in (5, 5, 6):
        simulation = autoshard.simulate(plan, copy.deepcopy(model), (x,), seed=seed)
        simulation.backward([torch.ones((), dtype=torch.float64), None, None])
        _, a, b = (output.values[0].detach() for output in simulation.outputs)
        drawn.append((a, b))
        assert 0.4 < float((a == 0).double().mean()) < 0.6
        assert set(a.unique().tolist()) == {0.0, 2.0}
        for name, masked in (("first", a), ("second", b)):  # the backward of each microbatch used its own mask
            torch.testing.assert_close(simulation.leaves[name].values[0].grad, masked.sum(0))
    (a, b), again, other = drawn
    assert torch.equal(a, again[0])
    assert torch.equal(b, again[1])
    assert not torch.equal(a, other[0])
    assert not torch.equal(a, b)
    for mask in (a, b):
        parts = mask.chunk(4)
        assert not any(torch.equal(parts[i], parts[j]) for i in range(4) for j in range(i))


def test_dropout_whose_value_does_not_depend_on_the_batch() -> None:
    """A mask drawn for weights alone is drawn once per microbatch, in one stage, and works in backward."""

    class DropConnect(Deep):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x = F.linear(x, F.dropout(self.layers[0].weight, 0.5, self.training))
            return F.cross_entropy(self.head(torch.tanh(x)), y)

    torch.manual_seed(0)
    model, (args, kwargs) = DropConnect().double(), vectors(0)
    plan = autoshard.plan(model, "pp=2", args, kwargs, pipeline=Pipelining(microbatches=4))
    assert autoshard.verify(model, plan, args, kwargs).is_equal


# ----------------------------------------------------------------------------------------------------- what is refused


def test_a_batch_along_which_nothing_is_exact_is_refused() -> None:
    """Where the usual dims are; estimates that no dims avoid stay, and dims that are as good are taken."""
    args, kwargs = CASES["mse"].batch(0)
    with pytest.raises(
        InputError, match=r"^batch=\{'x': 1, 'y': None\} cuts .* cut along dim 0 of x, dim 0 of y they are exact: leave out"
    ):
        autoshard.plan(CASES["mse"].model(), "pp=2", args, kwargs, pipeline=Pipelining(2, batch={"x": 1, "y": None}))
    args, kwargs = sequences(0)
    for dims in ({}, {"x": 0, "target": 0}):
        plan = autoshard.plan(CASES["MoE"].model(), "pp=2", args, kwargs, pipeline=Pipelining(2, batch=dims))
        assert any("estimate" in said for said in plan.notes)


MIXED: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.roll(1, 0),
    lambda x: x.flip(0),
    lambda x: x.cumsum(0),
    lambda x: x.softmax(0),
    lambda x: x[2:],
]


@pytest.mark.parametrize("how", MIXED)
def test_rows_that_mix_are_refused(how: Callable[[Tensor], Tensor]) -> None:
    args, kwargs = vectors(0)
    with pytest.raises(PlanError, match=r"^aten\.\S* \(.*\) cannot be computed of one microbatch: .*is dim 0 of x, dim 0 of y\. If"):
        autoshard.plan(Mixing(how).double(), "pp=2", args, kwargs, pipeline=Pipelining(microbatches=2))


def test_a_contrastive_loss_is_refused() -> None:
    """All pairs of rows: no microbatch knows them."""

    class Pairs(Deep):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            a, b = F.normalize(self.hidden(x), dim=-1), F.normalize(self.layers[0](x), dim=-1)
            return F.cross_entropy(a @ b.t() * 5, torch.arange(x.shape[0]))

    args, kwargs = vectors(0)
    with pytest.raises(PlanError, match="cannot be computed of one microbatch"):
        autoshard.plan(Pairs().double(), "pp=2", args, kwargs, pipeline=Pipelining(microbatches=2))


REQUESTS: list[tuple[dict[str, Any], type[AutoshardError], str]] = [
    ({"microbatches": 3}, InputError, "x has length 8 along its batch dim 0, which does not divide in 3 microbatches; use a batch of 6"),
    ({"microbatches": 0}, InputError, "microbatches=0 is no number of them: give an int of 1 or more, or None to have it chosen"),
    ({"microbatches": 2.0}, InputError, "microbatches=2.0 is no number of them: give an int of 1 or more"),
    ({"stages_per_rank": -1}, InputError, "stages_per_rank=-1 is no number of them"),
    ({"starts": "layers.1"}, InputError, "starts lists modules: write starts=('layers.1',)"),
    ({"together": "layers.1"}, InputError, "together lists modules: write together=('layers.1',)"),
    ({"batch": {"z": 0}}, InputError, "batch names 'z', which is no tensor argument; there are x, y"),
    ({"batch": {"x": 2}}, InputError, "batch says dim 2 of x, which is (8, 8): count its dims from 0"),
    ({"batch": {"x": -1}}, InputError, "batch says dim -1 of x, which is (8, 8): count its dims from 0"),
    ({"batch": {"x": None, "y": None}}, PlanError, "nothing that the model computes depends on a batch that microbatches cut"),
    ({"schedule": "pipedream"}, PlanError, "there is no schedule 'pipedream'; there are gpipe, 1f1b, "),
    ({"schedule": "1f1b", "stages_per_rank": 3}, PlanError, "1f1b runs 1 stage per rank, not 3: use interleaved_1f1b, or cut"),
    ({"schedule": "zbv", "stages_per_rank": 3}, PlanError, "zbv runs exactly 2 stages per rank, not 3: cut 4 stages, or"),
    ({"schedule": "dualpipev"}, PlanError, "dualpipev needs a microbatch for each of its 4 stages, not 2: use zbv"),
    ({"starts": ("layers.9",)}, ConstraintError, "starts names 'layers.9', in which nothing is computed; name a module by its path: "),
    ({"together": ("layer",)}, ConstraintError, "together names 'layer', in which nothing is computed; name a module by its path: "),
    ({"schedule": "1f1b", "starts": ("layers.1", "layers.2")}, ConstraintError, "starts_at asks for 3 stages of 2; drop 1 of its"),
]


@pytest.mark.parametrize(("asked", "error", "text"), REQUESTS, ids=lambda value: str(value)[:40])
def test_requests_that_cannot_be_met(asked: dict[str, Any], error: type[AutoshardError], text: str) -> None:
    args, kwargs = vectors(0)
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        autoshard.plan(CASES["cross_entropy"].model(), "pp=2", args, kwargs, pipeline=Pipelining(**{"microbatches": 2, **asked}))


def test_more_stages_than_ops() -> None:
    with pytest.raises(ConstraintError, match=r"^64 stages need 63 places to cut at, and only \d+ are allowed; use fewer stages$"):
        plan_of(CASES["mse"], "pp=64")


def test_learned_rows_through_many_layers_are_cut_in_time() -> None:
    """What is made of weights alone for every row, deep and residual, before the batch comes in: each value is looked at once."""

    class Queries(Deep):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.layers = nn.Parameter(torch.randn(1, WIDTH)), nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(40)])

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.head(torch.tanh(self.hidden(self.query.expand(x.shape[0], -1)) * x)), y)

    torch.manual_seed(0)
    model, (args, kwargs) = Queries().double(), vectors(0)
    plan = autoshard.plan(model, "pp=2", args, kwargs, pipeline=Pipelining(microbatches=2, schedule="1f1b"))
    assert autoshard.verify(model, plan, args, kwargs).is_equal


# ----------------------------------------------------------------------------------------------------- random models


REFUSALS = (
    "cannot be computed of one microbatch",
    "which does not divide in 2 microbatches",
    "places to cut at, and only",
    "depends on a batch that microbatches cut",
    "writes a buffer with what the whole batch makes",
    "interleaves rows of microbatches",
)


@share(25)
@given(graphs(8))
def test_random_models(graph: Graph) -> None:
    """Cut in stages any model is equal; in microbatches too it is equal, or refused by name, or says what it estimates."""
    for microbatches in (1, 2):
        model, arguments = graph.model(), graph.arguments()
        try:
            plan = autoshard.plan(model, "pp=2", (), arguments, pipeline=Pipelining(microbatches=microbatches))
        except (PlanError, ConstraintError, InputError) as error:
            event(f"{microbatches} microbatches: refused")
            note(str(error))
            assert any(text in str(error) for text in REFUSALS), error  # noqa: PT017
            continue
        said = "\n".join(plan.program.notes)
        if "takes an estimate" in said or "statistics of each microbatch" in said:
            assert microbatches > 1
            event(f"{microbatches} microbatches: estimated")
            continue
        event(f"{microbatches} microbatches: equal")
        found = autoshard.verify(model, plan, (), arguments)
        assert found.is_equal, f"{microbatches} microbatches: {found}"
