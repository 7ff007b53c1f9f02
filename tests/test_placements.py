"""Placements and layouts: cutting and joining, shapes, text, and agreement with DTensor's own Shard and _StridedShard."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import Shard

from autoshard.candidates import is_storable, leaving_layout
from autoshard.dtensors import torch_placements
from autoshard.errors import PlacementError
from autoshard.mesh import MeshSpec
from autoshard.ops.row import TensorInfo
from autoshard.placements import I, Layout, P, Placement, R, S, format_layout, local_shape, parse_layout, shard, unshard

MESHES = [
    MeshSpec(axes, shape)
    for axes, shape in ((("a",), (2,)), (("a",), (3,)), (("a", "b"), (2, 3)), (("a", "b"), (3, 2)), (("a", "b", "c"), (2, 2, 2)))
]


@st.composite
def placements(draw: st.DrawFn, shape: tuple[int, ...]) -> Placement:
    if draw(st.integers(0, 2)) == 0:
        return draw(st.sampled_from((R, I, P)))
    dim = draw(st.integers(0, len(shape) - 1))
    count = draw(st.sampled_from((1, 1, 2, 3, 4, 6)))
    if count == 1 or shape[dim] % count:
        return S(dim)
    equal = (shape[dim] // count,) * count
    return S(dim, (equal[0] + 2, *equal[1:-1], equal[-1] - 2) if draw(st.integers(0, 3)) == 0 and equal[0] > 2 else equal)


@st.composite
def laid_out(draw: st.DrawFn) -> tuple[MeshSpec, tuple[int, ...], Layout]:
    mesh = draw(st.sampled_from(MESHES))
    shape = tuple(draw(st.lists(st.sampled_from((12, 24, 6, 4, 1)), min_size=1, max_size=3)))
    return mesh, shape, tuple(draw(placements(shape)) for _ in mesh.axes)


def number(shape: tuple[int, ...]) -> Tensor:
    """Every element another number."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)


@given(laid_out())
def test_unshard_inverts_shard(case: tuple[MeshSpec, tuple[int, ...], Layout]) -> None:
    mesh, shape, layout = case
    local = local_shape(shape, layout, mesh.shape)
    assume(local is not None)
    pieces = [shard(number(shape), layout, mesh, at) for at in mesh.coordinates()]
    assert all(tuple(piece.shape) == local for piece in pieces)
    assert torch.equal(unshard(pieces, layout, mesh), number(shape))


@given(laid_out())
def test_pieces_partition_the_value(case: tuple[MeshSpec, tuple[int, ...], Layout]) -> None:
    """Ranks that differ on split axes hold different elements; each element is on exactly the others."""
    mesh, shape, layout = case
    assume(local_shape(shape, layout, mesh.shape) is not None and P not in layout)
    held = torch.cat([shard(number(shape), layout, mesh, at).flatten() for at in mesh.coordinates()]).long()
    copies = mesh.size // torch.Size([n for p, n in zip(layout, mesh.shape, strict=True) if p.is_split]).numel()
    assert held.bincount().tolist() == [copies] * torch.Size(shape).numel()


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("segments", [(12, 12), (6, 6, 6, 6), (6, 12, 6), (18, 6)], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_a_segmented_split_gives_each_rank_its_part_of_every_segment(n: int, segments: tuple[int, ...], dim: int) -> None:
    whole = number((24, 24))
    for rank in range(n):
        parts = [segment.chunk(n, dim)[rank] for segment in whole.split(list(segments), dim)]
        assert torch.equal(shard(whole, (S(dim, segments),), MeshSpec(("a",), (n,)), (rank,)), torch.cat(parts, dim))


@given(laid_out())
def test_dtensor_cuts_storable_layouts_alike(case: tuple[MeshSpec, tuple[int, ...], Layout]) -> None:
    """DTensor cuts mesh dims left to right, each by its placement's own _split_tensor."""
    mesh, shape, layout = case
    assume(is_storable(layout) and P not in layout and local_shape(shape, layout, mesh.shape) is not None)
    for at in mesh.coordinates():
        piece = number(shape)
        for placement, n, rank in zip(torch_placements(layout), mesh.shape, at, strict=True):
            if isinstance(placement, Shard) or hasattr(placement, "split_factor"):
                piece = placement._split_tensor(piece, n, with_padding=False, contiguous=True)[0][rank]
        assert torch.equal(piece, shard(number(shape), layout, mesh, at)), (layout, at)


@given(laid_out())
def test_text_round_trip(case: tuple[MeshSpec, tuple[int, ...], Layout]) -> None:
    mesh, _, layout = case
    assert parse_layout(format_layout(layout, mesh), mesh) == layout
    assert all(Placement.parse(str(placement)) == placement for placement in layout)


@pytest.mark.parametrize("text", ["S", "S()", "S(-1)", "S(0:)", "S(0:3)", "S(0:3x)", "s(0)", "S(0) ", "S(0:1+)", "RR", ""])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(PlacementError, match="cannot read placement"):
        Placement.parse(text)


def test_a_layout_names_every_axis_in_order() -> None:
    mesh = MeshSpec(("dp", "tp"), (2, 2))
    for text in ("S(0)@dp", "S(0)@tp R@dp", "S(0)@dp R@dp", "S(0) R"):
        with pytest.raises(PlacementError, match="does not name the axes dp, tp of the mesh, in order"):
            parse_layout(text, mesh)


@pytest.mark.parametrize(
    ("shape", "layout", "sizes", "wanted"),
    [
        ((12,), (S(0),), (5,), None),
        ((12,), (S(0), S(0)), (2, 3), (2,)),
        ((12,), (S(0), S(0)), (4, 2), None),
        ((12,), (S(1),), (2,), None),
        ((0,), (S(0),), (2,), None),
        ((), (S(0),), (2,), None),
        ((12,), (S(0, (8, 4)),), (4,), (3,)),
        ((12,), (S(0, (9, 3)),), (2,), None),
        ((12,), (S(0, (4, 4)),), (2,), None),  # segments that are not the whole dim
        ((12, 4), (S(0, (6, 6)), S(1)), (3, 2), (4, 2)),
        ((24,), (S(0), S(0, (6, 6, 6, 6))), (2, 3), (4,)),  # the outer half holds two whole segments
        ((24,), (S(0), S(0, (12, 12))), (4, 3), None),  # the outer quarter holds half a segment
        ((24,), (S(0, (12, 12)), S(0, (12, 12))), (2, 3), (4,)),
        ((24,), (S(0, (12, 12)), S(0)), (2, 2), (6,)),
        ((4, 4), (P, I), (2, 2), (4, 4)),
    ],
)
def test_local_shape(shape: tuple, layout: Layout, sizes: tuple, wanted: tuple | None) -> None:
    assert local_shape(shape, layout, sizes) == wanted


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        ((S(0), I), (S(0), I)),
        ((S(0), S(0)), (S(0), S(0))),
        ((S(0, (12, 12)), P), (S(0, (12, 12)), I)),
        ((S(0, (16, 8)), R), (I, I)),  # DTensor knows equal segments alone
        ((S(0), S(0, (12, 12))), (S(0), I)),  # and none of a dim that another axis splits
        ((S(0, (12, 12)), S(0, (12, 12))), (I, I)),
        ((S(0, (12, 12)), S(1)), (S(0, (12, 12)), S(1))),
    ],
)
def test_what_leaves_is_what_dtensor_can_say(made: Layout, wanted: Layout) -> None:
    value = TensorInfo((24, 4), torch.float32, True)
    assert leaving_layout(made, value, wants_whole=False) == wanted
    assert is_storable(wanted)
    assert leaving_layout(made, value, wants_whole=True) == (I, I)


def test_a_single_segment_is_a_plain_split() -> None:
    assert S(0, (12,)) == S(0)


def test_partial_keeps_the_value_on_the_first_rank() -> None:
    mesh = MeshSpec(("a", "b"), (2, 2))
    for at in itertools.product(range(2), repeat=2):
        assert torch.equal(shard(number((4,)), (P, S(0)), mesh, at), number((4,)).chunk(2)[at[1]] * (at[0] == 0))
