"""Lowerings of losses: what they send, ignored labels, half types."""

from collections import Counter

import pytest
import torch
from precision import check_precision
from test_lowerings import MESH, ints, run, x
from torch import Tensor
from torch.nn import Buffer

from autoshard.ops.loss import ROWS, pointwise_loss
from autoshard.placements import I, P, S
from autoshard.testing import OpCase

aten = torch.ops.aten


def operands(name: str) -> tuple[Tensor, ...]:
    """Operands of a pointwise loss that it is defined for."""
    first, second = x(8, 8).sigmoid(), x(8, 8, seed=1).sigmoid()
    signs = Buffer(torch.where(second > 0.5, 1.0, -1.0).double())
    if name == "margin_ranking_loss":
        return first, second, signs
    return (first, signs) if name in ("soft_margin_loss", "hinge_embedding_loss") else (first, second)


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("name", [op.split(".")[1] for op, rule in ROWS.items() if rule.equation is pointwise_loss])
def test_pointwise_losses_send_nothing(name: str, reduction: int, wire: list) -> None:
    """Each number's loss stays where it is; sums and means over split numbers are terms."""
    middle = {"poisson_nll_loss": (True, False, 1e-8), "hinge_embedding_loss": (1.0,), "margin_ranking_loss": (0.1,)}
    optional = {"binary_cross_entropy": (None,), "binary_cross_entropy_with_logits": (None, None)}
    args = (*operands(name), *middle.get(name, ()), *optional.get(name, ()), reduction)
    dims = ("m.1", "m.0") if reduction == 1 else ("p.1", "p.0")
    _, layout = run(OpCase(getattr(aten, name).default, args, {}, MESH), *dims)
    assert layout == ((S(0), S(1)) if reduction == 0 else (P, P))
    assert wire == []


@pytest.mark.parametrize("is_weighted", [True, False])
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_nll_of_split_classes_and_samples(is_weighted: bool, reduction: int, ignore_index: int, wire: list) -> None:
    target = ints(12, 8, 2)
    target[::3, 0] = ignore_index
    weight = Buffer(x(12).abs() + 0.1) if is_weighted else None
    case = OpCase(aten.nll_loss_nd.default, (x(8, 12, 2), target, weight, reduction, ignore_index), {}, MESH)
    for factors, samples in ((("c", "b"), 8), (("b", "c"), 8), (("c", "c"), 16), (("c", "s.0"), 8)):
        wire.clear()
        _, layout = run(case, *factors)
        split = {"b": S(0), "s.0": S(1), "c": I} if reduction == 0 else {"b": P, "s.0": P, "c": I}
        assert layout == tuple(split[factor] for factor in factors)
        assert {name for name, _ in wire} == {"all_reduce"}
        assert max(count for _, count in wire) <= samples


def test_samples_that_are_all_ignored() -> None:
    case = OpCase(aten.nll_loss_nd.default, (x(4, 8), torch.full((4,), -100)), {}, MESH)
    assert case.outputs[0].isnan()
    run(case, "b", "c")


@pytest.mark.parametrize("is_weighted", [True, False])
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_of_probabilities(is_weighted: bool, reduction: int, smoothing: float, wire: list) -> None:
    """Neither logits nor probabilities are gathered, and gradients reach both."""
    weight = Buffer(x(12).abs() + 0.1) if is_weighted else None
    case = OpCase(aten.cross_entropy_loss.default, (50 * x(8, 12, 2), x(8, 12, 2).softmax(1), weight, reduction, -100, smoothing), {}, MESH)
    for factors in (("c", "b"), ("b", "c"), ("c", "c"), ("c", "s.0")):
        wire.clear()
        run(case, *factors)
        assert max(count for _, count in wire) <= 16
    assert Counter(name for name, _ in wire) == {"maximum": 1, "all_reduce": 3}


PRECISE = {
    "cross_entropy": (aten.cross_entropy_loss.default, (4 * x(16, 256), ints(256, 16))),
    "probabilities": (aten.cross_entropy_loss.default, (4 * x(16, 256), x(16, 256).softmax(1))),
    "nll": (aten.nll_loss_nd.default, (x(16, 256), ints(256, 16))),
    "mse": (aten.mse_loss.default, (x(16, 256), x(16, 256, seed=1))),
    "logits": (aten.binary_cross_entropy_with_logits.default, (x(16, 256), x(16, 256).sigmoid())),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("op", "args"), PRECISE.values(), ids=PRECISE)
def test_half_types(op: torch._ops.OpOverload, args: tuple, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(check_precision(monkeypatch, op, dtype, *args)) == 2
