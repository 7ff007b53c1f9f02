"""Lowerings on simulated axes, factors split on several axes at once: values, gradients and what goes over the wire.

tests/test_rules.py proves the same functions op by op; here the plan is fixed, and collectives are counted.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import Buffer

from autoshard.mesh import MeshSpec
from autoshard.placements import I, P, R, S
from autoshard.testing import OpCase, Run, check_rule, difference, dual

aten = torch.ops.aten
MESH = MeshSpec.of("a=2,b=2")


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + math.prod(shape)))


def ints(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(high))


def run(case: OpCase, *factors: str) -> tuple[Run, tuple]:
    """The use with `factors` split, one per axis; asserts that values, gradients and written operands are the op's own."""
    candidate = next(c for c in case.candidates({}) if tuple(s.factor for s in c.strategies) == factors)
    found = case.run(candidate)
    for pieces, layout, expected in zip(found.outputs, candidate.outputs, case.outputs, strict=True):
        assert difference(pieces, layout, expected, case.mesh) == ""
    for pieces, layout, after, gradient in zip(found.operands, candidate.inputs, case.written, case.gradients, strict=True):
        assert difference(pieces, layout, after, case.mesh) == ""
        if gradient is not None:
            assert difference([piece.grad for piece in pieces], dual(layout), gradient, case.mesh) == ""
    return found, candidate.outputs[0]


@pytest.mark.parametrize("padding_idx", [-1, 0, 5, 11])
def test_embedding_rows_on_two_axes(padding_idx: int, wire: list) -> None:
    """Rows of four ranks; the padding row, wherever it lies, is read and gets no gradient; nothing is communicated."""
    case = OpCase(aten.embedding.default, (x(12, 6), torch.arange(12).repeat(2).view(4, 6), padding_idx), {}, MESH)
    found, layout = run(case, "v", "v")
    assert layout == (P, P)
    assert wire == []
    gradients = torch.cat([piece.grad for piece in found.operands[0]])
    empty = [row for row in range(12) if not gradients[row].any()]
    assert empty == ([padding_idx] if padding_idx >= 0 else [])


def test_embedding_rows_and_tokens() -> None:
    case = OpCase(aten.embedding.default, (x(12, 6), ints(12, 4, 8), 3), {}, MESH)
    assert run(case, "v", "b.1")[1] == (P, S(0))
    assert run(case, "b.0", "v")[1] == (S(1), P)


OPTIONS = list(itertools.product([False, True], [0, 1, 2], [-100, 3], [0.0, 0.3]))


@pytest.mark.parametrize(("is_weighted", "reduction", "ignore_index", "label_smoothing"), OPTIONS)
def test_cross_entropy_of_split_classes_and_samples(
    is_weighted: bool, reduction: int, ignore_index: int, label_smoothing: float, wire: list
) -> None:
    """Every option; each collective carries at most one number per sample, so the logits are never gathered."""
    target = ints(12, 8, 2)
    target[::3, 0] = ignore_index
    weight = Buffer(x(12).abs() + 0.1) if is_weighted else None
    case = OpCase(aten.cross_entropy_loss.default, (50 * x(8, 12, 2), target, weight, reduction, ignore_index, label_smoothing), {}, MESH)
    for factors, samples in ((("c", "b"), 8), (("b", "c"), 8), (("c", "c"), 16), (("c", "s.0"), 8)):
        wire.clear()
        _, layout = run(case, *factors)
        split = {"b": S(0), "s.0": S(1), "c": I} if reduction == 0 else {"b": P, "s.0": P, "c": I}
        assert layout == tuple(split[factor] for factor in factors)
        assert wire
        assert {name for name, _ in wire} <= {"maximum", "all_reduce"}
        assert max(count for _, count in wire) <= samples


def test_cross_entropy_backward_is_silent(wire: list) -> None:
    """What the ranks sum in the forward pass is invariant: its gradient needs no communication."""
    case = OpCase(aten.cross_entropy_loss.default, (x(8, 12), ints(12, 8)), {}, MESH)
    run(case, "c", "c")
    assert [name for name, _ in wire] == ["maximum", "maximum", *["all_reduce"] * 4]


def test_cross_entropy_of_large_logits_is_finite() -> None:
    logits = torch.zeros(4, 8, dtype=torch.float64)
    logits[:, 5] = 1e4
    run(OpCase(aten.cross_entropy_loss.default, (logits, torch.tensor([5, 5, 0, 7])), {}, MESH), "c", "c")


def test_cross_entropy_of_ignored_samples_is_nan() -> None:
    case = OpCase(aten.cross_entropy_loss.default, (x(4, 8), torch.full((4,), -100)), {}, MESH)
    assert case.outputs[0].isnan()
    run(case, "b", "c")


@pytest.mark.parametrize("is_affine", [True, False])
@pytest.mark.parametrize("is_tracked", [True, False])
@pytest.mark.parametrize("factors", [("b", "b"), ("b", "s.1"), ("s.0", "b")])
def test_batch_norm_of_the_whole_batch(is_affine: bool, is_tracked: bool, factors: tuple[str, str], wire: list) -> None:
    """Two statistics per channel cross the axes; running statistics are those of the single device, on every rank."""
    weight, bias = (x(3), x(3, seed=1)) if is_affine else (None, None)
    mean, var = (Buffer(x(3, seed=2)), Buffer(x(3, seed=3).abs())) if is_tracked else (None, None)
    case = OpCase(aten.batch_norm.default, (3 + x(8, 3, 2, 4), weight, bias, mean, var, True, 0.3, 1e-5, False), {}, MESH)
    run(case, *factors)
    assert {count for _, count in wire} == {3}
    if is_tracked:
        assert not torch.equal(case.written[-1], case.operands[-1])


def test_batch_norm_in_evaluation_is_local(wire: list) -> None:
    case = OpCase(aten.batch_norm.default, (x(8, 4), x(4), x(4), Buffer(x(4)), Buffer(x(4).abs()), False, 0.1, 1e-5, False), {}, MESH)
    assert run(case, "b", "c")[1] == (S(0), S(1))
    assert wire == []


@pytest.mark.parametrize("keepdim", [True, False])
def test_mean_over_two_split_dims(keepdim: bool, wire: list) -> None:
    case = OpCase(aten.mean.dim, (x(4, 6, 8), [0, -1], keepdim), {}, MESH)
    for factors in (("d0", "d2"), ("d2", "d2"), ("d0", "d0")):
        assert run(case, *factors)[1] == (P, P)
    assert run(case, "k1", "d0")[1] == (S(1 if keepdim else 0), P)
    assert wire == []


def test_mean_of_terms() -> None:
    """Terms on one axis, split on the other."""
    proved = check_rule(aten.mean.default, x(4, 6), mesh=MESH)
    assert any(a.inputs == (P,) and b.factor == "d0" for a, b in proved)
    assert any(a.inputs == (R,) and b.factor == "d0" for a, b in proved)
