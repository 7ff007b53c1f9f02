"""Ops that write into `out`, and in-place ops whose functional form has another name: what programs compute in their place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import autoshard
from autoshard.errors import TraceError
from autoshard.out_variants import functional_form
from autoshard.program import op_name

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("op", "functional"),
    [
        (aten.div.out, aten.div.Tensor),
        (aten.mul.out, aten.mul.Tensor),
        (aten.topk.values, aten.topk.default),
        (aten.amax.out, aten.amax.default),
        (aten.max.dim_max, aten.max.dim),
        (aten.__iand__.Tensor, aten.__and__.Tensor),
        (aten.__ilshift__.Scalar, aten.__lshift__.Scalar),
        (aten.pow_.Tensor, aten.pow.Tensor_Tensor),
        (aten.floor_divide_.Tensor, aten.floor_divide.default),
        (aten.add_.Tensor, None),  # add.Tensor is named as usual
        (aten.bernoulli_.float, None),  # draws random numbers
        (aten.add.Tensor, None),  # writes nothing
        (aten.copy_.default, None),
    ],
    ids=str,
)
def test_functional_form(op: torch._ops.OpOverload, functional: torch._ops.OpOverload | None) -> None:
    assert functional_form(op) is functional


def test_nearly_every_out_variant_has_one() -> None:
    """Of the ops with a row. These four take from `out` the dtype that the plain ops are told."""
    from autoshard.ops import RULES

    packets = {getattr(aten, name.split(".")[1]) for name in RULES if name.startswith("aten.")}
    variants = [getattr(packet, overload) for packet in packets for overload in packet.overloads()]
    variants = [op for op in variants if any(argument.is_out for argument in op._schema.arguments)]
    variants = [op for op in variants if "names" not in str(op) and torch.Tag.nondeterministic_seeded not in op.tags]
    without = sorted(str(op) for op in variants if functional_form(op) is None)
    assert len(variants) > 300
    assert without == [f"aten.{name}.out" for name in ("_to_copy", "full_like", "ones_like", "zeros_like")]


def divides(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    torch.div(x, 2.0, out=y)
    return y


def grows(x: Tensor) -> Tensor:
    y = torch.empty(0, dtype=x.dtype)
    torch.add(x, x, out=y)
    return y + y


def casts(x: Tensor) -> Tensor:
    y = torch.zeros(4, 6, dtype=torch.float64)
    torch.mul(x.float(), 3, out=y)
    return y


def writes_two(x: Tensor) -> Tensor:
    values, places = torch.empty(4, 3, dtype=x.dtype), torch.empty(4, 3, dtype=torch.int64)
    with torch.no_grad():
        torch.topk(x, 3, out=(values, places))
    return torch.cat([values, places * x[:, :3]], 1)


def writes_a_view(x: Tensor) -> Tensor:
    y = torch.ones(4, 12, dtype=x.dtype)
    row = y[1]
    torch.sin(x, out=y[:, 3:9])
    return y[:, 4:10] * row[2:8]


def writes_what_it_reads(x: Tensor) -> Tensor:
    y = x * 2
    torch.mul(y, y, out=y)
    y.zero_().add_(x)
    return y


def augments(x: Tensor) -> Tensor:
    mask, powers = x > 0, (x > 1).double() + 1
    mask &= x < 1
    mask |= x > 2
    y = x.abs() + 1
    y **= powers
    y //= powers
    return torch.where(mask, y, x)


class Uses(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.arange(1.0, 7.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) * self.weight


FUNCTIONS = [divides, grows, casts, writes_two, writes_a_view, writes_what_it_reads, augments]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_model_that_writes_so(function: Callable[[Tensor], Tensor]) -> None:
    model, given = Uses(function), (torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),)
    for seed in (None, 0, 1):
        plan = autoshard.plan(model, "a=2", given, options=autoshard.Options(seed=seed))
        assert autoshard.verify(model, plan, given).is_equal
    assert not any("_out" in op_name(node) or ".out" in op_name(node) for node in plan.program.nodes("op"))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(6, dtype=torch.float64))
        self.weight = nn.Parameter(torch.ones(6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        torch.add(self.seen, x.detach().sum(0), out=self.seen)
        return x * self.weight + self.seen


def test_a_buffer_that_is_written_so() -> None:
    given = (torch.randn(4, 6, dtype=torch.float64),)
    plan = autoshard.plan(Counts(), "a=2", given, template="ddp")
    found = autoshard.verify(Counts(), plan, given)
    assert found.is_equal
    assert found.buffers.keys() == {"seen"}


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_an_out_of_another_shape() -> None:
    def shrinks(x: Tensor) -> Tensor:
        return torch.mul(x, x, out=torch.zeros(4, dtype=x.dtype))

    with pytest.raises(TraceError, match=r"aten.mul.out changes the shape of zeros, \[4\], at .*; give it an out of shape \[4, 6\]"):
        autoshard.plan(Uses(shrinks), "a=2", (torch.randn(4, 6, dtype=torch.float64),))


def test_an_argument_that_is_written_so() -> None:
    def overwrites(x: Tensor) -> Tensor:
        return torch.mul(x, 2, out=x)

    with pytest.raises(TraceError, match="writes into the argument x"):
        autoshard.plan(Uses(overwrites), "a=2", (torch.randn(4, 6, dtype=torch.float64),))
