"""Every row of the conversion table, on simulated ranks: what it gives, that its backward is its dual, what it sends.

The pairing of a value with its gradient is the sum over ranks of <value, gradient>, except that under I, where all ranks
hold the same value and the same gradient, it counts once. A conversion f and its backward f* are adjoint under it:
<f(x), y> = <x, f*(y)> for every value x in the placement that f takes and gradient y of what it gives.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from autoshard import runtime
from autoshard.conversions import (
    BY_KINDS,
    BY_NAME,
    COMMUNICATES,
    CONVERSIONS,
    WIRE,
    Conversion,
    Step,
    is_step_sound,
    replace_axis,
    routes,
    step_arguments,
    without_gradient,
)
from autoshard.mesh import MeshSpec
from autoshard.placements import I, Layout, P, Placement, R, S, local_shape
from autoshard.simulator import Ranks, SimulatedAxis
from autoshard.testing import difference, dual, spread

SHAPE = (12, 24)
PLACEMENT = {"P": P, "R": R, "I": I}
ROWS = pytest.mark.parametrize("row", CONVERSIONS, ids=lambda row: row.name)
SIZES = pytest.mark.parametrize("n", [2, 3, 4])


def ends(row: Conversion, segments: tuple[int, ...] = ()) -> tuple[Placement, Placement]:
    """The placements that a row is tried between; splits along dim 1, and dim 0 after an exchange."""
    src = S(1, segments) if row.src == "S" else PLACEMENT[row.src]
    return src, PLACEMENT[row.dst] if row.dst != "S" else S(0) if row.src == "S" else S(1, segments)


def value(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def convert(pieces: list[Tensor], steps: tuple[Step, ...], layout: Layout, mesh: MeshSpec) -> list[Tensor]:
    """Run conversion steps on one tensor per rank, as a program does."""
    x = Ranks(pieces)
    for step in steps:
        args = step_arguments(layout, step, SHAPE, mesh.shape)
        x = getattr(runtime, step.row.name)(x, SimulatedAxis(mesh, mesh.axes[step.axis]), *args)
        layout = replace_axis(layout, step.axis, step.dst)
    return x.values


def leaves(pieces: list[Tensor]) -> list[Tensor]:
    return [piece.clone().requires_grad_() for piece in pieces]


@ROWS
@SIZES
@pytest.mark.parametrize("segments", [(), (12, 12), (12, 12, 0)], ids=["plain", "segments", "empty_segment"])
def test_forward_and_backward(row: Conversion, n: int, segments: tuple[int, ...]) -> None:
    mesh, generator = MeshSpec(("a",), (n,)), torch.Generator().manual_seed(1)
    src, dst = ends(row, segments)
    before = leaves(spread(value(), (src,), mesh, generator))
    after = convert(before, (Step(0, src, dst),), (src,), mesh)
    assert difference(after, (dst,), value(), mesh) == ""
    torch.autograd.backward(after, spread(value(7), dual((dst,)), mesh, generator))
    assert difference([x.grad for x in before], dual((src,)), value(7), mesh) == ""


@ROWS
@SIZES
def test_backward_is_the_adjoint(row: Conversion, n: int) -> None:
    mesh, generator = MeshSpec(("a",), (n,)), torch.Generator().manual_seed(2)
    src, dst = ends(row)

    def pairing(placement: Placement, pieces: list[Tensor], gradients: list[Tensor]) -> float:
        total = sum(float((x.detach() * g).sum()) for x, g in zip(pieces, gradients, strict=True))
        return total / n if placement == I else total

    before = leaves(spread(value(), (src,), mesh, generator))
    after = convert(before, (Step(0, src, dst),), (src,), mesh)
    y = spread(value(3), dual((dst,)), mesh, generator)
    torch.autograd.backward(after, y)
    left, right = pairing(dst, after, y), pairing(src, before, [x.grad for x in before])
    assert math.isclose(left, right, rel_tol=1e-9), (left, right)


@ROWS
def test_backward_is_the_row_between_the_duals(row: Conversion) -> None:
    kinds = {"P": "R", "R": "P", "S": "S", "I": "I"}
    assert BY_KINDS[kinds[row.dst], kinds[row.src]].forward == row.backward
    assert BY_KINDS[kinds[row.dst], kinds[row.src]].backward == row.forward


def test_the_table_is_complete() -> None:
    assert len(CONVERSIONS) == len(BY_KINDS) == 13
    assert list(BY_NAME) == [*(row.name for row in CONVERSIONS), "all_gather_again", "all_gather_invariant_again"]
    assert set(BY_KINDS) == set(itertools.product("SPRI", repeat=2)) - {("P", "P"), ("R", "R"), ("I", "I")}


A, B, C, D = (torch.tensor([float(k)]) for k in (1, 2, 4, 8))


@pytest.mark.parametrize(
    ("name", "args", "given", "wanted"),
    [
        ("all_gather", (0,), ([A], [B]), ([A, B], [A, B])),
        ("all_gather_invariant", (0,), ([A], [B]), ([A, B], [A, B])),
        ("all_reduce", (), ([A], [B]), ([A + B], [A + B])),
        ("all_reduce_invariant", (), ([A], [B]), ([A + B], [A + B])),
        ("reduce_scatter", (0,), ([A, C], [B, D]), ([A + B], [C + D])),
        ("vary", (), ([A], [A]), ([A], [A])),
        ("slice_invariant", (0,), ([A, B], [A, B]), ([A], [B])),
        ("keep_first_invariant", (), ([A], [A]), ([A], [0 * A])),
        ("unvary", (), ([A], [A]), ([A], [A])),
        ("slice_varying", (0,), ([A, B], [A, B]), ([A], [B])),
        ("place", (0,), ([A], [B]), ([A, 0 * A], [0 * B, B])),
        ("keep_first", (), ([A], [A]), ([A], [0 * A])),
        ("all_gather", (0, (2, 2)), ([A, C], [B, D]), ([A, B, C, D], [A, B, C, D])),
        ("slice_varying", (0, (2, 2)), ([A, B, C, D], [A, B, C, D]), ([A, C], [B, D])),
    ],
)
def test_two_ranks_as_the_docstrings_draw_them(name: str, args: tuple, given: tuple, wanted: tuple) -> None:
    axis = SimulatedAxis(MeshSpec(("a",), (2,)), "a")
    result = getattr(runtime, name)(Ranks([torch.cat(x) for x in given]), axis, *args)
    assert [x.tolist() for x in result.values] == [torch.cat(x).tolist() for x in wanted]


def test_all_to_all_of_two_ranks() -> None:
    axis = SimulatedAxis(MeshSpec(("a",), (2,)), "a")
    whole = torch.arange(16.0).view(4, 4)
    result = runtime.all_to_all(Ranks(list(whole.chunk(2, 0))), axis, 0, (), 1, ())  # type: ignore[arg-type]
    assert [x.tolist() for x in result.values] == [x.tolist() for x in whole.chunk(2, 1)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("n", [2, 3, 8, 64])
def test_wire_bytes(n: int) -> None:
    assert math.isclose(WIRE["reduce_scatter"](n) + WIRE["all_gather"](n), WIRE["all_reduce"](n))
    assert {name for name in WIRE if WIRE[name](n) == 0.0} == {"slice", "place", "keep_first", "identity"}
    assert WIRE["all_to_all"](n) < WIRE["all_gather"](n)
    assert {"all_gather", "reduce_scatter", "all_reduce", "all_to_all", "rotate"} == COMMUNICATES
    assert all(WIRE[name](1) == 0.0 for name in WIRE)


# ------------------------------------------------------------------------------------------------------------ routes

MESHES = [
    MeshSpec(("a",), (2,)),
    MeshSpec(("a",), (3,)),
    MeshSpec(("a", "b"), (2, 2)),
    MeshSpec(("a", "b"), (3, 2)),
    MeshSpec(("a", "b", "c"), (2, 2, 2)),
]
SEGMENTS = [(), (), (), (12, 12), (6, 6, 6, 6), (12, 4, 8), (16, 8)]


def layouts(ndim: int) -> st.SearchStrategy[Layout]:
    split = st.one_of(st.just(S(0)), st.sampled_from(SEGMENTS).map(lambda segments: S(1, segments)), st.just(S(0, (6, 6))))
    return st.tuples(*[st.one_of(st.sampled_from((P, R, I)), split) for _ in range(ndim)])


@st.composite
def moves(draw: st.DrawFn) -> tuple[MeshSpec, Layout, Layout]:
    mesh = draw(st.sampled_from(MESHES))
    src, dst = draw(layouts(mesh.ndim)), draw(layouts(mesh.ndim))
    assume(local_shape(SHAPE, src, mesh.shape) is not None and local_shape(SHAPE, dst, mesh.shape) is not None)
    return mesh, src, dst


@given(moves())
def test_every_route_is_legal_and_keeps_value_and_gradient(move: tuple[MeshSpec, Layout, Layout]) -> None:
    mesh, src, dst = move
    found = routes(src, dst, SHAPE, mesh.shape, True)
    assert found, f"no way from {src} to {dst} on {mesh}"
    for route in found:
        layout = src
        for step in route:
            assert layout[step.axis] == step.src
            assert step.src != step.dst
            assert is_step_sound(layout, step)
            layout = replace_axis(layout, step.axis, step.dst)
            assert local_shape(SHAPE, layout, mesh.shape) is not None
        assert layout == dst
        generator = torch.Generator().manual_seed(4)
        before = leaves(spread(value(), src, mesh, generator))
        after = convert(before, route, src, mesh)
        assert difference(after, dst, value(), mesh) == "", route
        torch.autograd.backward(after, spread(value(5), dual(dst), mesh, generator))
        assert difference([x.grad for x in before], dual(src), value(5), mesh) == "", route


@given(moves())
def test_values_without_gradient_know_no_invariant(move: tuple[MeshSpec, Layout, Layout]) -> None:
    mesh, src, dst = move
    for route in routes(src, dst, SHAPE, mesh.shape, False):
        assert all(I not in (step.src, step.dst) for step in route)
        pieces = spread(value(), without_gradient(src), mesh, torch.Generator().manual_seed(6))
        assert difference(convert(pieces, route, without_gradient(src), mesh), without_gradient(dst), value(), mesh) == ""


def test_gathering_an_outer_axis_alone_would_interleave() -> None:
    nested: Layout = (S(0), S(0))
    assert not is_step_sound(nested, Step(0, S(0), R))
    assert is_step_sound(nested, Step(1, S(0), R))
    assert [step.axis for step in routes(nested, (I, S(0)), SHAPE, (2, 2), True)[0]][:2] == [1, 0]
