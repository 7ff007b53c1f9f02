"""Stages of whole models: no slower than the usual cuts, within the memory budget, where constraints want them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import GPT, LENGTH, VOCAB
from torch import Tensor, nn

import autoshard
from autoshard import Pipelining, Plan
from autoshard.chain import Link
from autoshard.collectives import axis_links
from autoshard.costs import CostModel
from autoshard.cutting import Cut, evaluate_cut
from autoshard.errors import BudgetError, ConstraintError
from autoshard.hardware import Hardware
from autoshard.program import facts
from autoshard.stage_chain import PlacedChain, chain_of

BATCH = 16


class Widening(nn.Module):
    """Layers of which each takes more time than the one before, and the first holds most of the weights."""

    def __init__(self) -> None:
        super().__init__()
        widths = (8, 8, 16, 32, 64, 96)
        self.table = nn.Embedding(512, widths[0])
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return F.mse_loss(x, target)


class UNet(nn.Module):
    """Convolutions down and up again, with skips; no layers with numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 1)
        self.down, self.lower = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.raise_, self.up = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.ConvTranspose2d(16, 4, 2, stride=2)
        self.join = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        first = F.silu(self.enter(x))
        second = F.silu(self.down(first))
        y = self.raise_(F.silu(self.lower(second)))
        y = self.up(torch.cat([y, second], 1))
        return F.mse_loss(self.leave(F.silu(self.join(torch.cat([y, first], 1)))), target)


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, use_cache=False, decoder_start_token_id=0))


def ids(most: int = VOCAB) -> Tensor:
    return torch.randint(0, most, (BATCH, LENGTH))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[tuple, dict[str, Any]]]]] = {
    "gpt": (lambda: GPT(layers=4), lambda: ((ids(), ids()), {})),
    "widening": (Widening, lambda: ((ids(512), torch.randn(BATCH, LENGTH, 96)), {})),
    "unet": (UNet, lambda: ((torch.randn(BATCH, 3, 8, 8), torch.randn(BATCH, 3, 8, 8)), {})),
    "t5": (t5, lambda: ((), {"input_ids": ids(), "labels": ids()})),
}


# Slow at computing, so that small models are worth cutting, with links that take a part of the time.
SLOW = Hardware.uniform(
    "slow",
    flops_per_s=6e8,
    memory_bytes_per_s=1e9,
    memory_bytes=1e12,
    link_bytes_per_s=1e8,
    collective_latency_s=2e-6,
    kernel_latency_s=1e-9,
)


def plan_of(name: str, mesh: str, budget_bytes: float | None = None, **asked: Any) -> Plan:
    make, batch = MODELS[name]
    args, kwargs = batch()
    pipeline = Pipelining(**{"microbatches": 8, **asked})
    return autoshard.plan(make(), mesh, args, kwargs, hardware=SLOW, pipeline=pipeline, memory_budget_bytes=budget_bytes)


def stages_of(plan: Plan) -> tuple[PlacedChain, list[int]]:
    """The chain that was cut, built anew, and in which stage each of its places says it stands."""
    placed = chain_of(plan.program, CostModel(plan.program.mesh, SLOW))
    return placed, [facts(node).stage or 0 for node in placed.places]


def priced_again(plan: Plan) -> Cut:
    """The stages that the places of a plan say they stand in, by the same schedule."""
    pipeline = plan.program.pipeline
    assert pipeline is not None
    placed, stages = stages_of(plan)
    assert stages == sorted(stages)
    starts = [stages.index(stage) for stage in range(len(pipeline.stage_ranks))]
    links = axis_links(SLOW, pipeline.mesh.shape, pipeline.mesh.index("pp"))
    return evaluate_cut(placed.chain, starts, pipeline.schedule, pipeline.stage_ranks, Link(links.hop_latency_s, links.hop_bytes_per_s))


# ---------------------------------------------------------------------------------------------------------- never slower

WAYS = [
    ("gpt", "pp=2", "1f1b"),
    ("gpt", "pp=4", "gpipe"),
    ("gpt", "pp=2,tp=2", "interleaved_1f1b"),
    ("widening", "pp=4", "1f1b"),
    ("widening", "pp=2", "zbv"),
    ("widening", "pp=2,dp=2", "interleaved_zero_bubble"),
    ("widening", "pp=4", "list"),
    ("unet", "pp=4", "1f1b"),
    ("unet", "pp=4", "list"),
    ("widening", "pp=2", "looped_bfs"),
    ("t5", "pp=4", "1f1b"),
]


QUICK = WAYS[:1] + WAYS[3:5] + WAYS[8:9]


@pytest.mark.parametrize(
    ("name", "mesh", "schedule"), [way if way in QUICK else pytest.param(*way, marks=pytest.mark.slow) for way in WAYS]
)
def test_stages_are_no_slower_than_even_ones(name: str, mesh: str, schedule: str) -> None:
    plan = plan_of(name, mesh, schedule=schedule)
    stats = plan.stats
    assert plan.program.pipeline is not None
    assert plan.program.pipeline.name == schedule
    assert ("even_layers_s" in stats) == (name != "unet")
    assert "even_parameters_s" in stats or name == "unet"
    for even in ("even_layers_s", "even_parameters_s"):
        assert stats["pipeline_s"] <= stats.get(even, stats["pipeline_s"]), even
    assert stats["pipeline_bound_s"] <= stats["pipeline_s"]
    assert plan.timeline().total_s == stats["pipeline_s"]
    again = priced_again(plan)
    assert (again.total_s, again.costs) == (stats["pipeline_s"], plan.program.pipeline.costs)
    assert max(again.peak_bytes) == stats["stage_bytes"]


@pytest.mark.parametrize("name", ["gpt", "widening"])
def test_the_chosen_schedule_is_no_slower_than_1f1b(name: str) -> None:
    """A list of actions is made for the stages that were found: its time is the list's, not that of 1F1B."""
    plain, chosen, listed = (plan_of(name, "pp=2", schedule=schedule) for schedule in ("1f1b", None, "list"))
    assert chosen.stats["pipeline_s"] <= plain.stats["pipeline_s"]
    assert listed.stats["pipeline_s"] <= plain.stats["pipeline_s"]
    assert listed.timeline().total_s == listed.stats["pipeline_s"]


# ---------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(("name", "mesh", "schedule"), [("gpt", "pp=2", "1f1b"), ("widening", "pp=4", "gpipe"), ("unet", "pp=2", "list")])
def test_a_memory_budget_is_kept_or_refused_with_one_that_works(name: str, mesh: str, schedule: str) -> None:
    free = priced_again(plan_of(name, mesh, schedule=schedule))
    with pytest.raises(BudgetError) as refused:
        plan_of(name, mesh, 1.0, schedule=schedule)
    found = re.search(r"a budget of (\d+) bytes", str(refused.value))
    assert found, refused.value
    least = int(found[1])
    assert least <= math.ceil(max(free.peak_bytes))
    for budget in (least, max(free.peak_bytes)):
        plan = plan_of(name, mesh, budget, schedule=schedule)
        assert max(priced_again(plan).peak_bytes) <= budget
        assert plan.stats["stage_bytes"] <= budget
        assert plan.timeline().total_s == plan.stats["pipeline_s"] >= free.total_s
    if "and no cut takes less;" in str(refused.value):
        with pytest.raises(BudgetError):
            plan_of(name, mesh, least - 1, schedule=schedule)


# ----------------------------------------------------------------------------------------------------------- constraints


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b"])
def test_stages_start_at_the_modules_that_were_named(schedule: str) -> None:
    plan = plan_of("gpt", "pp=2", schedule=schedule, starts=("blocks.1",))
    placed, stages = stages_of(plan)
    start = placed.starts_of("blocks.1")
    assert stages[start] == stages[start - 1] + 1
    assert all(stages[k] >= stages[start] for k in placed.of("blocks.1"))
    assert placed.of("blocks.0")[-1] < start
    assert plan.stats["pipeline_s"] >= plan_of("gpt", "pp=2", schedule=schedule).stats["pipeline_s"]


@pytest.mark.parametrize(("mesh", "together"), [("pp=2", ("blocks.1", "blocks.2")), ("pp=2", ("blocks",)), ("pp=4", ("blocks.0", "norm"))])
def test_no_stage_starts_inside_of_modules_that_stay_together(mesh: str, together: tuple[str, ...]) -> None:
    plan = plan_of("gpt", mesh, schedule="1f1b", together=together)
    placed, stages = stages_of(plan)
    for module in together:
        places = placed.of(module)
        assert len({stages[k] for k in range(places[0], places[-1] + 1)}) == 1, module
    assert set(stages) == set(range(int(mesh.removeprefix("pp="))))


def test_constraints_together() -> None:
    asked = {"schedule": "1f1b", "starts": ("blocks.1",), "together": ("blocks.0", "blocks.3")}
    placed, stages = stages_of(plan_of("gpt", "pp=4", **asked))
    start = placed.starts_of("blocks.1")
    assert stages[start] == stages[start - 1] + 1
    assert all(len({stages[k] for k in placed.of(module)}) == 1 for module in ("blocks.0", "blocks.3"))
    with pytest.raises(ConstraintError, match=r"starts names 'blocks\.9'"):
        plan_of("gpt", "pp=2", schedule="1f1b", starts=("blocks.9",))
