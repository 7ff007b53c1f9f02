"""No template beats the search: for every model of the zoo that CI builds, on several meshes, with and without a memory budget.

What is compared is the predicted step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import pytest
from torch import fx
from zoo.models import ENTRIES, build, missing
from zoo.test_zoo import IN_CI

from autoshard import search_space
from autoshard.candidates import CandidateTable
from autoshard.constraints import template_constraints
from autoshard.costs import CostModel
from autoshard.hardware import Device, Hardware, Link, hardware_of
from autoshard.mesh import MeshSpec
from autoshard.passes import AnnotateShardings, DrawWhole, FoldConstants, NormalizeGraph, TraceModel, annotate_shardings
from autoshard.program import Program

pytestmark = pytest.mark.filterwarnings("ignore")

TEMPLATES = ("ddp", "fsdp", "megatron", "megatron_sp")
ONE_AXIS, TWO_AXES = ("a=2", "a=4"), ("a=2,b=2", "a=2,b=4")
LARGE = ("t5_decoder_ids", "linear_attention", "bert", "unet_plain", "vit", "nanogpt")  # seconds of CPU each on two axes
# Starting anything costs next to nothing and arithmetic much, so that models of a few thousand parameters are worth splitting.
EAGER = Hardware(
    "eager",
    Device("eager", {"float32": 1e9}, 1e12, 1e9, 1e-9, 0.6),
    (Link("pair", 2, 4e8, 0.0), Link("all", None, 1e8, 0.0)),
    collective_latency_s=1e-8,
)


def traced(name: str) -> Program:
    entry = ENTRIES[name]
    if missing(entry):
        pytest.skip(f"{missing(entry)} is not installed; make zoo installs it")
    model, args, kwargs = build(entry, entry.modes[0])
    program = Program(fx.Graph(), MeshSpec.of("a=2,b=2"))
    for a_pass in (TraceModel(model, args, kwargs), NormalizeGraph(), DrawWhole("per_rank"), FoldConstants()):
        program = a_pass(program)
    return program


def products(program: Program, mesh: MeshSpec) -> Iterator[tuple[str, dict[str, str]]]:
    """One template on each of two axes: ("fsdp x megatron", its constraints)."""
    if mesh.ndim != 2:
        return
    alone = [program.on_mesh(MeshSpec((axis,), (size,))) for axis, size in zip(mesh.axes, mesh.shape, strict=True)]
    for outer, inner in (("ddp", "fsdp"), ("fsdp", "megatron"), ("fsdp", "megatron_sp")):
        parts = [template_constraints(part, name) for part, name in zip(alone, (outer, inner), strict=True)]
        texts: dict[str, str] = {}
        for axis, part in zip(mesh.axes, parts, strict=True):
            for key, text in part.items():
                texts[key] = f"{texts.get(key, '')} {text if '@' in text else f'{text}@{axis}'}".strip()
        yield f"{outer} x {inner}", texts


@pytest.fixture
def one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of one model on one mesh share their candidates, which depend on neither template nor budget: four times as fast."""
    known: dict[object, CandidateTable] = {}

    def shared(program: Program, costs: CostModel) -> CandidateTable:
        key = (program.mesh, costs.hardware)
        if key not in known:
            known[key] = CandidateTable(program, costs)
        return known[key]

    monkeypatch.setattr(search_space, "CandidateTable", shared)


def stats_of(program: Program, mesh: str, hardware: Hardware, texts: dict[str, str] | None = None, **options) -> dict:
    """What a plan says of itself. texts: constraints in place of a template's, which give way where no size divides."""
    patched = mock.patch.object(annotate_shardings, "template_constraints", return_value=texts)
    with patched if texts is not None else contextlib.nullcontext():
        return AnnotateShardings(hardware, **options)(program.on_mesh(MeshSpec.of(mesh))).stats


def worse(program: Program, mesh: str, hardware: Hardware, has_budgets: bool = False) -> list[str]:
    """What beats the search on one mesh: templates and products of two; templates also when the search may keep no more than they do."""
    best = stats_of(program, mesh, hardware)
    rivals = {name: stats_of(program, mesh, hardware, template=name) for name in TEMPLATES}
    for name, texts in products(program, MeshSpec.of(mesh)):
        rivals[name] = stats_of(program, mesh, hardware, texts, template="megatron")
    found = [f"{mesh} {n}: {x['objective_s']:.6g} s, the search {best['objective_s']:.6g} s" for n, x in rivals.items() if beats(x, best)]
    for name in TEMPLATES if has_budgets else ():
        budget = rivals[name]["kept_bytes"]
        tight = stats_of(program, mesh, hardware, memory_budget_bytes=budget) if budget < best["kept_bytes"] else best
        assert tight["kept_bytes"] <= budget or tight is best
        if beats(rivals[name], tight):
            found.append(
                f"{mesh} {name} in {budget:.0f} bytes: {rivals[name]['objective_s']:.6g} s, the search {tight['objective_s']:.6g} s"
            )
    return found


def beats(rival: dict, plan: dict) -> bool:
    return rival["objective_s"] * (1 + 1e-9) < plan["objective_s"]


def test_the_comparison_notices_a_plan_that_is_worse() -> None:
    program = traced("mlp")
    best, rival = (stats_of(program, "a=2", EAGER, **options) for options in ({}, {"constraints": {"*": "I"}}))
    assert beats(best, rival)
    assert not beats(rival, best)


def _in_ci() -> list:
    quick = [pytest.param(name, mesh, id=f"{name}-{mesh}") for name in IN_CI for mesh in ONE_AXIS]
    marks = {name: (pytest.mark.slow,) if name in LARGE else () for name in IN_CI}
    return quick + [pytest.param(name, mesh, id=f"{name}-{mesh}", marks=marks[name]) for name in IN_CI for mesh in TWO_AXES]


@functools.cache
def traced_once(name: str) -> Program:
    return traced(name)


@pytest.mark.usefixtures("one_table")
@pytest.mark.parametrize(("name", "mesh"), _in_ci())
def test_no_template_beats_the_search(name: str, mesh: str) -> None:
    assert not worse(traced_once(name), mesh, EAGER)


@pytest.mark.usefixtures("one_table")
@pytest.mark.parametrize("name", ["mlp", "recommender"])
def test_no_template_beats_the_search_in_its_own_memory(name: str) -> None:
    """Where the budget leaves a gap, the templates' plans are candidates too."""
    assert not [line for mesh in ("a=2", "a=2,b=4") for line in worse(traced_once(name), mesh, hardware_of("h100"), has_budgets=True)]


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.usefixtures("one_table")
@pytest.mark.parametrize("name", ENTRIES)
def test_no_template_beats_the_search_anywhere(name: str) -> None:
    """Every model that is installed, on hardware as it is and on hardware that makes small models worth splitting, under budgets too."""
    program = traced(name)
    for hardware in (hardware_of("h100"), hardware_of("cpu"), EAGER):
        assert not [line for mesh in (*ONE_AXIS, *TWO_AXES) for line in worse(program, mesh, hardware, has_budgets=mesh != "a=2,b=4")]
