"""The main proof: random models on random meshes under random sound plans train as they do on one device.

A case is a model, a mesh and a plan; training_oracle says what must agree. Plans come from the search with random prices,
and from drawing every node's strategy by itself.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import event, given, note, settings, target
from hypothesis import strategies as st
from random_graphs import Graph, graphs
from torch import nn
from torch.nn import functional as F
from training_oracle import Case

import autoshard
from autoshard import runtime
from autoshard.conversions import CONVERSIONS
from autoshard.mesh import MeshSpec
from autoshard.placements import I, Layout, R, S, local_shape
from autoshard.program import Program, facts

MESHES = {1: ("a=2", "a=3", "a=4"), 2: ("a=2,b=2", "a=2,b=3", "a=3,b=2", "a=2,b=1"), 3: ("a=2,b=2,c=2",)}
# -------------------------------------------------------------------------------------------------------- properties


@dataclass(frozen=True)
class Drawn:
    """How to plan one case. inputs: a number that draws how tensors are given, or None: whole; resting: another plan's seed.

    With `resting` the parameters already lie where that plan puts them, as for the second program of a compiled model.
    """

    mesh: str
    seed: int
    outputs: str
    inputs: int | None = None
    resting: int | None = None
    is_text: bool = False
    is_scattered: bool = False


def drawn_plans(meshes: Sequence[str], is_scattered: st.SearchStrategy[bool]) -> st.SearchStrategy[Drawn]:
    seeds = st.integers(0, 9999)
    given_split = st.one_of(st.none(), st.none(), seeds)
    sometimes = st.integers(0, 2).map(lambda k: k == 2)
    return st.builds(
        Drawn, st.sampled_from(meshes), seeds, st.sampled_from(("whole", "dtensor")), given_split, given_split, sometimes, is_scattered
    )


def plan_case(case: Case, drawn: Drawn) -> Program:
    mesh, options = MeshSpec.of(drawn.mesh), {}
    if drawn.resting is not None and not drawn.is_scattered:
        other = case.plan(drawn.mesh, drawn.resting)
        options["fixed_parameters"] = {name: facts(node).layout for name, node in other.parameters().items()}
    entries = {} if drawn.inputs is None else entry_layouts(case.traced, mesh, random.Random(drawn.inputs))
    return case.plan(drawn.mesh, drawn.seed, drawn.outputs, entries, drawn.is_scattered, **options)


def entry_layouts(program: Program, mesh: MeshSpec, chance: random.Random) -> dict[str, Layout]:
    """Each input given whole or split, at random."""
    found = {}
    for node in program.nodes("input"):
        value = facts(node).value
        whole = I if value.needs_grad else R
        options = [[whole, *(S(dim) for dim in range(len(value.shape)))] for _ in mesh.axes]
        fitting = [x for x in itertools.product(*options) if local_shape(value.shape, x, mesh.shape) is not None]
        found[facts(node).name] = chance.choice(fitting)
    return found


def prove_graph(graph: Graph, plans: Sequence[Drawn]) -> None:
    case = Case.of(graph.model(), graph.arguments())
    reached: set[str] = set()
    for drawn in plans:
        note(str(drawn))
        program = plan_case(case, drawn)
        reached |= conversions_of(program)
        case.prove(program, drawn.is_text)
    for name in reached:
        event(f"conversion {name}")
    target(float(len(reached)), label="kinds of conversions")


def conversions_of(program: Program) -> set[str]:
    return {node.target.__name__ for node in program.nodes("conversion")}  # type: ignore[union-attr]


def share(percent: int) -> settings:
    """A part of the profile's examples."""
    return settings(max_examples=max(settings().max_examples * percent // 100, 1))


def few(meshes: Sequence[str], most: int, is_scattered: st.SearchStrategy[bool] | None = None) -> st.SearchStrategy[list[Drawn]]:
    return st.lists(drawn_plans(meshes, st.booleans() if is_scattered is None else is_scattered), min_size=2, max_size=most)


@share(100)
@given(graphs(10), few(MESHES[1], 6))
def test_plans_on_one_axis_train_as_one_device(graph: Graph, plans: list[Drawn]) -> None:
    prove_graph(graph, plans)


@share(80)
@given(graphs(8), few(MESHES[2], 5))
def test_plans_on_two_axes_train_as_one_device(graph: Graph, plans: list[Drawn]) -> None:
    prove_graph(graph, plans)


@share(30)
@given(graphs(5), few(MESHES[3], 4, st.just(True)))
def test_plans_on_three_axes_train_as_one_device(graph: Graph, plans: list[Drawn]) -> None:
    prove_graph(graph, plans)


# ------------------------------------------------------------------------------------------------------- fixed models


class Written(nn.Module):
    """One small model that a function writes: weight w (6, 6), vector u (6), buffer n (6), counter c."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(1)
        self.w = nn.Parameter(torch.randn(6, 6, dtype=torch.float64, generator=generator))
        self.u = nn.Parameter(torch.randn(6, dtype=torch.float64, generator=generator))
        self.register_buffer("n", torch.zeros(6, dtype=torch.float64))
        self.register_buffer("c", torch.ones((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def rows(needs_grad: bool = False) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_(needs_grad)}


class Block(nn.Module):
    """A transformer block and loss: what plans differ most on."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(12, 12), nn.LayerNorm(12)
        self.qkv, self.proj, self.up, self.down = nn.Linear(12, 36), nn.Linear(12, 12, bias=False), nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        q, k, v = self.qkv(self.norm(x)).view(4, 4, 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(x)))
        return F.cross_entropy((x @ self.table.weight.t()).flatten(0, 1), labels.flatten())


def block_case() -> Case:
    torch.manual_seed(0)
    return Case.of(Block().double(), {"ids": torch.randint(12, (4, 4)), "labels": torch.randint(12, (4, 4))})


def test_every_conversion_is_reached_and_proved() -> None:
    """Plans of one block, seed by seed, until all rows of the table have stood in a program that trains right."""
    case, missing = block_case(), {row.name for row in CONVERSIONS}
    for seed in range(60):
        program = case.plan("a=2" if seed % 2 else "a=2,b=2", seed, is_scattered=seed % 3 == 0)
        if missing & conversions_of(program):
            case.prove(program)
            missing -= conversions_of(program)
        if not missing:
            return
    pytest.fail(f"no plan used {sorted(missing)}")


@pytest.mark.parametrize("row", CONVERSIONS, ids=lambda row: row.name)
def test_the_oracle_notices_a_conversion_that_does_something_else(row: Any) -> None:
    """A conversion in a plan that needs it, replaced by one that fits the same shapes, or with its dims exchanged."""
    case = block_case()
    for seed in range(40):
        program = case.plan("a=2", seed, is_scattered=seed % 2 == 0)
        for node in [n for n in program.nodes("conversion") if n.target.__name__ == row.name and facts(n).needs_grad]:  # type: ignore[union-attr]
            has_dim = row.forward not in ("all_reduce", "identity", "keep_first")
            other = next(
                r
                for r in CONVERSIONS
                if r != row and (r.forward not in ("all_reduce", "identity", "keep_first")) == has_dim and r.name != "all_to_all"
            )
            node.target = getattr(runtime, other.name)
            node.args = node.args[:3] if row.name == "all_to_all" else node.args
            with pytest.raises((AssertionError, RuntimeError, IndexError)):
                case.prove(program)
            return
    pytest.fail("no plan used it")


def test_public_functions_agree_with_the_oracle() -> None:
    case = block_case()
    for seed in (None, 3, 4):
        plan = autoshard.plan(case.model, "a=2,b=2", (), case.arguments, options=autoshard.Options(seed=seed))
        case.prove(plan.program)
        assert autoshard.verify(case.model, plan, (), case.arguments).is_equal


def test_verify_compares_every_rank() -> None:
    """A result that only the first rank has right: `keep_first` in place of the `unvary` that leads to the output."""
    case = Case.of(Written(lambda m, x: x @ m.w), rows())
    for seed in range(60):
        plan = autoshard.plan(case.model, "a=2", (), case.arguments, options=autoshard.Options(seed=seed))
        node = plan.program.output.args[0][0]  # type: ignore[index]
        if node.target is runtime.unvary:
            assert autoshard.verify(case.model, plan, (), case.arguments).is_equal
            node.target = runtime.keep_first
            assert not autoshard.verify(case.model, plan, (), case.arguments).is_equal
            return
    pytest.fail("no plan ends in unvary")


def a_parameter_leaves(m, x):
    return m.w, x, m.n, x @ m.w


def one_value_leaves_twice(m, x):
    y = x @ m.w
    return y, y, {"again": [y]}


def a_parameter_is_only_read_detached(m, x):
    return x @ m.w + m.u.detach()


def a_value_feeds_both_sides(m, x):
    y = x @ m.w
    return y @ y.t(), torch.outer(m.u, m.u), torch.einsum("bi,ij,bj->b", x, m.w, x)


def inputs_decide_nothing(m, x):
    return m.w.sum() + m.u.prod()


def whole_numbers_leave(m, x):
    y = x @ m.w
    return (y > 0).sum(), y.argmax(), torch.arange(3), y.mean()


def many_ops_have_no_rule(m, x):
    y = x @ m.w
    return y.sort(1).values, y.max(1).values, y.logsumexp(-1), y.repeat(2, 1), y.norm(), F.one_hot(torch.arange(4), 6).double() @ m.w


def losses_of_torch(m, x):
    y = x @ m.w
    return (
        F.mse_loss(y, x),
        F.kl_div(y.log_softmax(-1), x.softmax(-1), reduction="batchmean"),
        F.binary_cross_entropy_with_logits(y, (x > 0).double()),
    )


PLAIN = (
    a_parameter_leaves,
    one_value_leaves_twice,
    a_parameter_is_only_read_detached,
    a_value_feeds_both_sides,
    inputs_decide_nothing,
    whole_numbers_leave,
    many_ops_have_no_rule,
    losses_of_torch,
)


@pytest.mark.parametrize("function", PLAIN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("needs_grad", [False, True], ids=["plain", "input_gradients"])
def test_small_models(function: Any, needs_grad: bool) -> None:
    case = Case.of(Written(function), rows(needs_grad))
    for seed, mesh in enumerate(("a=2", "a=2,b=2", "a=3", "a=2,b=3")):
        case.prove(case.plan(mesh, seed, ("whole", "dtensor")[seed % 2], is_scattered=seed > 1), is_text=seed % 2 == 0)
