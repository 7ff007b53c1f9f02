"""The search over meshes: every mesh is planned as autoshard.plan plans it, bounds are below what is found, bad input is told."""

from __future__ import annotations

import math

import pytest
import torch
from test_never_worse import EAGER
from torch import nn
from torch.nn import functional as F

import autoshard
from autoshard import mesh_search
from autoshard.costs import CostModel
from autoshard.errors import BudgetError, ConstraintError, InputError
from autoshard.hardware import hardware_of
from autoshard.mesh import MeshSpec
from autoshard.mesh_search import factorisations, meshes_of
from autoshard.traffic import seconds_by_term, traffic

X = torch.zeros(16, 64)


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.down(F.gelu(self.up(x)))).square().mean()


def test_factorisations_are_all_and_ordered() -> None:
    assert list(factorisations(8, 1)) == [(8,)]
    assert list(factorisations(8, 2)) == [(2, 4), (4, 2)]
    assert set(factorisations(12, 3)) == {(2, 2, 3), (2, 3, 2), (3, 2, 2)}
    assert list(factorisations(7, 2)) == []
    assert list(factorisations(1, 1)) == [(1,)]


def test_orders_differ_only_where_links_do() -> None:
    """Eight devices share the fast link of an h100 node: dp=2,tp=4 and dp=4,tp=2 lie on it alike; 32 devices do not."""
    assert [str(mesh) for mesh in meshes_of(8, hardware_of("h100"))] == ["dp=8", "dp=2,tp=4", "dp=2,cp=2,tp=2"]
    many = [str(mesh) for mesh in meshes_of(32, hardware_of("h100"), 2)]
    assert many == ["dp=32", "dp=2,tp=16", "dp=4,tp=8", "dp=8,tp=4", "dp=16,tp=2"]
    assert all(mesh.size == 32 for mesh in meshes_of(32, hardware_of("h100")))


def test_every_mesh_is_planned_as_plan_does_it() -> None:
    found = autoshard.search(Block(), (X,), devices=8, cluster=EAGER, max_axes=3)
    assert found.ranking[0].mesh == found.best.mesh
    predicted = [row.predicted_step_s for row in found.ranking if row.status == "planned"]
    assert predicted == sorted(predicted)
    assert len(predicted) >= 2
    for row in found.ranking:
        if row.status == "planned":
            alone = autoshard.plan(Block(), row.mesh, (X,), hardware=EAGER)
            assert row.predicted_step_s == pytest.approx(alone.stats["objective_s"], rel=1e-9)
            assert row.wire_bytes == pytest.approx(traffic(alone.program, CostModel(row.mesh, EAGER)))
            assert row.memory_bytes == alone.stats["kept_bytes"]
            assert 0.9 * row.predicted_step_s <= sum(row.seconds.values()) <= row.predicted_step_s * (1 + 1e-9)


def test_the_best_plan_runs() -> None:
    torch.manual_seed(0)
    model, x = Block(16).double(), torch.randn(8, 16, dtype=torch.float64)
    found = autoshard.search(model, (x,), devices=4, cluster=EAGER)
    assert autoshard.verify(model, found.best, (x,)).is_equal
    assert "class Rank" in found.best.source()


def test_bounds_are_below_what_is_found_and_prune_what_cannot_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same search without bounds finds the same best mesh, and nothing on a pruned one that would beat it."""
    asked = {"devices": 16, "cluster": EAGER, "max_axes": 2}
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    pruned = autoshard.search(model, (X,), **asked)
    monkeypatch.setattr(mesh_search._Search, "bound_s", lambda self, mesh, apart=(): 0.0)
    full = autoshard.search(model, (X,), **asked)
    assert pruned.ranking[0].mesh == full.ranking[0].mesh
    skipped = [row for row in pruned.ranking if row.status == "pruned"]
    assert skipped, "nothing was pruned: nothing is proved"
    found = {row.mesh: row.predicted_step_s for row in full.ranking}
    assert all(full.ranking[0].predicted_step_s <= row.bound_s <= found[row.mesh] * (1 + 1e-9) for row in skipped)
    assert f"{len(skipped)} pruned" in str(pruned).replace("\n", " ")


def test_groups_of_axes_bound_three_axes() -> None:
    from torch import fx

    from autoshard.planner import Request, Settings, passes_for
    from autoshard.program import Program
    from autoshard.runner import run_passes

    mesh = MeshSpec.of("dp=2,cp=2,tp=2")
    request = Request(Block(), (X,), {}, mesh, Settings(EAGER))
    finder = mesh_search._Search(request, run_passes(passes_for(request)[:4], Program(fx.Graph(), mesh)))
    single, pairs = finder.bound_s(mesh), [finder.bound_s(mesh, (axis,)) for axis in range(3)]
    found = finder.row(mesh).predicted_step_s
    assert single > 0
    assert max(single, *pairs) <= found * (1 + 1e-9)


def test_the_runner_up_is_explained() -> None:
    found = autoshard.search(Block(256), (torch.zeros(4096, 256),), devices=32, cluster="h100")
    second = next(row for row in found.ranking[1:] if row.status == "planned")
    assert second.reason
    text = str(found)
    assert text.count("\n") > len(found.ranking)
    assert str(found.best.mesh) in text
    terms = seconds_by_term(found.best.program, CostModel(found.best.mesh, found.best.hardware))
    assert "compute" in terms


@pytest.mark.parametrize(("devices", "meshes"), [(1, ["dp=1"]), (7, ["dp=7"])])
def test_one_device_and_prime_numbers_have_one_mesh(devices: int, meshes: list[str]) -> None:
    found = autoshard.search(Block(), (X,), devices=devices, max_axes=3)
    assert [str(row.mesh) for row in found.ranking] == meshes


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Sine(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin().sum(0)


@pytest.mark.parametrize("model", [Nothing(), Sine()])
def test_models_without_work_or_parameters_are_planned(model: nn.Module) -> None:
    found = autoshard.search(model, (torch.ones(4, 3),), devices=4)
    assert math.isfinite(found.ranking[0].predicted_step_s)
    assert str(found)


def test_more_devices_than_anything_can_be_split_in() -> None:
    found = autoshard.search(nn.Linear(3, 5), (torch.ones(7, 3),), devices=4096, max_axes=1)
    assert math.isfinite(found.ranking[0].predicted_step_s)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"devices": 0}, "devices is a whole number, 1 or more; got 0"),
        ({"devices": 2.0}, "devices is a whole number"),
        ({"devices": 4, "max_axes": 4}, "max_axes is a whole number, 1 to 3; got 4"),
        ({"devices": 4, "cluster": "h1000"}, "no hardware preset 'h1000'"),
    ],
)
def test_bad_input_is_told(options: dict, text: str) -> None:
    with pytest.raises(autoshard.AutoshardError, match=text):
        autoshard.search(Block(), (X,), **options)
    with pytest.raises(InputError, match="example inputs are a tuple"):
        autoshard.search(Block(), X, devices=2)


def test_a_budget_that_no_mesh_keeps_is_one_error() -> None:
    with pytest.raises(BudgetError, match=r"none of the 2 meshes has a plan.*least reachable"):
        autoshard.search(Block(), (X,), devices=4, memory_budget_bytes=100)


def test_meshes_that_constraints_exclude_are_listed() -> None:
    """The constraint names axis tp, which meshes of one axis do not have."""
    found = autoshard.search(Block(), (X,), devices=4, constraints={"up.weight": "S(0)@tp"})
    assert {row.status for row in found.ranking if row.mesh.ndim == 1} == {"refused"}
    assert "the mesh has dp" in next(row.reason for row in found.ranking if row.mesh.ndim == 1)
    assert str(found.best.parameter_layouts["up.weight"][1]) == "S(0)"
    with pytest.raises(ConstraintError, match="none of the 2 meshes has a plan"):
        autoshard.search(Block(), (X,), devices=4, constraints={"up.weight": "S(0)@ep"})
