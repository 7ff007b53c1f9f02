"""Every row of the op table, proved by execution: each strategy of each use below is run and compared with the op itself.

A row of USES reads: what the rule may split (factors), `P` when it also passes terms on, then the op's arguments. Factors:
b.0, b.1, ... the dims of `b*` from the right; d0, d1, ... dims; f0, f1, ... pieces of reshaped dims; q0 a group of pieces split together.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import Buffer

from autoshard.errors import RuleError
from autoshard.mesh import MeshSpec
from autoshard.placements import P, R, shard, unshard
from autoshard.rules import RULES, Rule, catalogue, register_rule
from autoshard.testing import OpCase, UnsoundRuleError, check_rule

aten = torch.ops.aten


class Use(NamedTuple):
    splits: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def use(splits: str, *args: Any, **kwargs: Any) -> Use:
    return Use(splits, args, kwargs)


_generator = torch.Generator().manual_seed(0)


def x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=_generator)


def pos(*shape: int) -> Tensor:
    """Positive, away from zero."""
    return x(*shape).abs() + 0.5


def ints(high: int, *shape: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=_generator)


def bools(*shape: int) -> Tensor:
    return ints(2, *shape).bool()


def labels(classes: int, *shape: int) -> Tensor:
    """Class numbers of which some are -100."""
    found = ints(classes, *shape)
    return torch.where(ints(4, *shape) == 0, -100, found)


def causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


# fmt: off
USES: dict[str, list[Use]] = {
    "aten.__and__.Tensor": [use("p.1 p.0", bools(4, 6), bools(6))],
    "aten.__or__.Tensor": [use("p.1 p.0", bools(4, 6), bools(4, 1))],
    "aten._softmax.default": [use("d0", x(4, 6), -1, False), use("d0 d2", x(4, 6, 2), 1, False)],
    "aten._to_copy.default": [
        use("p.1 p.0 P", x(4, 6), dtype=torch.float32),
        use("p.1 p.0", x(4, 6), dtype=torch.int64),
        use("p.1 p.0", ints(5, 4, 6), dtype=torch.bool),
        use("p.1 p.0", bools(4, 6), dtype=torch.float64),
    ],
    "aten._unsafe_view.default": [use("f0 f1 f2 P", x(4, 6), [2, 2, 6]), use("f0 f1 P", x(4, 6), [24])],
    "aten.abs.default": [use("p.1 p.0", x(4, 6))],
    "aten.adaptive_avg_pool1d.default": [use("b.1 b.0", x(4, 6, 8), [2]), use("b.0", x(6, 8), [3])],
    "aten.adaptive_avg_pool2d.default": [use("b.1 b.0", x(4, 6, 4, 8), [2, 1]), use("b.0", x(6, 4, 4), [1, 1])],
    "aten.add.Scalar": [use("p.1 p.0", x(4, 6), 2.0)],
    "aten.add.Tensor": [
        use("p.1 p.0 P", x(4, 6), x(4, 6)),
        use("p.2 p.1 p.0 P", x(2, 4, 6), x(6), alpha=3),
        use("p.1 p.0 P", x(4, 1), x(1, 6)),
        use("p.1 p.0", x(4, 6), 1.5),
        use("p.0 P", ints(9, 4), ints(9, 4)),
        use("p.0", bools(4), bools(4)),
        use("p.0 P", x(4), x()),
    ],
    "aten.addmm.default": [
        use("n m k P", x(6), x(4, 12), x(12, 6)),
        use("m n k P", x(4, 6), x(4, 12), x(12, 6), beta=0.5, alpha=2),
        use("n m k P", x(1, 6), x(4, 12), x(12, 6)),
        use("m k n P", x(1), x(4, 12), x(12, 6)),
    ],
    "aten.alias.default": [use("p.1 p.0 P", x(4, 6))],
    "aten.amax.default": [use("k0", x(4, 6), [1]), use("k0", x(4, 6), [-1], True), use("", x(4, 6))],
    "aten.amin.default": [use("k1", x(4, 6, 2), [0, 2]), use("k1", x(4, 6), [0], True)],
    "aten.argmax.default": [use("d0", x(4, 6), -1), use("", x(4, 6)), use("d1", x(4, 6), 0, True), use("", x(6), 0)],
    "aten.avg_pool1d.default": [use("b.1 b.0", x(4, 6, 8), [2]), use("b.0", x(6, 8), [3], [1], [1])],
    "aten.avg_pool2d.default": [use("b.1 b.0", x(4, 6, 8, 8), [2, 2]), use("b.0", x(6, 4, 4), [2, 2], [1, 1])],
    "aten.batch_norm.default": [
        use("b s.1", x(4, 6, 2, 3), x(6), x(6), Buffer(x(6)), Buffer(pos(6)), True, 0.1, 1e-5, False),
        use("b c", x(12, 6), x(6), x(6), None, None, True, 0.1, 1e-5, False),
        use("b s.0", x(4, 6, 4), None, None, Buffer(x(6)), Buffer(pos(6)), True, 0.3, 1e-5, False),
        use("b s.0", x(4, 6, 4), x(6), None, Buffer(x(6)), Buffer(pos(6)), True, 0.3, 1e-5, False),
        use("b c s.0", x(4, 6, 4), None, None, None, None, True, 0.3, 1e-5, False),
        use("b c s.0", x(4, 6, 4), x(6), x(6), Buffer(x(6)), Buffer(pos(6)), False, 0.1, 1e-5, False),
        use("b c", x(4, 6), None, None, Buffer(x(6)), Buffer(pos(6)), False, 0.1, 1e-5, False),
    ],
    "aten.bitwise_and.Tensor": [use("p.1 p.0", ints(9, 4, 6), ints(9, 6))],
    "aten.bitwise_not.default": [use("p.1 p.0", ints(9, 4, 6)), use("p.0", bools(4))],
    "aten.bitwise_or.Tensor": [use("p.1 p.0", bools(4, 6), bools(4, 6))],
    "aten.bmm.default": [use("b m k n P", x(4, 2, 6), x(4, 6, 8))],
    "aten.cat.default": [
        use("d0 q0 P", [x(4, 6), x(4, 12)], 1),
        use("q0 d1 P", [x(2, 6), x(4, 6), x(6, 6)]),
        use("d0 P", [x(4, 1), x(4, 6)], -1),
        use("d0 q0 P", [x(4, 6)], 1),
        use("q0 d1", [bools(4, 6), bools(4, 6)]),
        use("q0 P", [ints(9, 4), ints(9, 2)]),
    ],
    "aten.ceil.default": [use("p.1 p.0", x(4, 6))],
    "aten.chunk.default": [
        use("d0 q0 P", x(4, 18), 3, -1),
        use("q0 d1 P", x(14, 6), 4),
        use("d1 P", x(12, 2), 5),
        use("d0 P", x(4, 6), 1, 1),
    ],
    "aten.clamp.default": [use("p.1 p.0", x(4, 6), -0.5, 0.5), use("p.1 p.0", x(4, 6), None, 0.5)],
    "aten.clamp_max.default": [use("p.1 p.0", x(4, 6), 0.5)],
    "aten.clamp_min.default": [use("p.1 p.0", x(4, 6), 0.5)],
    "aten.clone.default": [use("p.1 p.0 P", x(4, 6)), use("p.1 p.0", bools(4, 6)), use("p.0 P", ints(9, 6)), use("P", x())],
    "aten.contiguous.default": [use("p.1 p.0 P", x(4, 6))],
    "aten.conv1d.default": [
        use("b i o P", x(4, 6, 8), x(12, 6, 3), x(12)),
        use("b P", x(4, 6, 8), x(12, 3, 3), x(12), [1], [1], [1], 2),
        use("b P", x(4, 6, 9), x(6, 1, 2), None, [2], [0], [1], 6),
        use("i o P", x(6, 8), x(12, 6, 3)),
    ],
    "aten.conv1d.padding": [
        use("b i o P", x(4, 6, 8), x(12, 6, 3), x(12), [1], "same"),
        use("i o P", x(6, 8), x(12, 6, 3), None, [1], "valid"),
    ],
    "aten.conv2d.default": [
        use("b i o P", x(4, 6, 5, 4), x(12, 6, 3, 3), x(12), [1, 1], [1, 1]),
        use("b i o P", x(2, 6, 5, 4), x(4, 6, 1, 1)),
        use("b P", x(2, 6, 5, 4), x(4, 3, 3, 3), None, [2, 2], [1, 1], [1, 1], 2),
        use("i o P", x(6, 5, 4), x(4, 6, 3, 3), x(4)),
    ],
    "aten.conv2d.padding": [
        use("b i o P", x(2, 6, 5, 4), x(4, 6, 3, 3), None, [1, 1], "same"),
        use("b P", x(2, 6, 5, 4), x(6, 1, 3, 3), None, [1, 1], "same", [1, 1], 6),
    ],
    "aten.conv3d.default": [use("b i o P", x(2, 4, 3, 3, 3), x(6, 4, 2, 2, 2), x(6))],
    "aten.conv3d.padding": [use("b i o P", x(2, 4, 3, 3, 3), x(6, 4, 3, 3, 3), x(6), [1, 1, 1], "same")],
    "aten.cos.default": [use("p.1 p.0", x(4, 6))],
    "aten.cross_entropy_loss.default": [
        use("b c", x(12, 6), ints(6, 12)),
        use("b c", x(12, 6), labels(6, 12), Buffer(pos(6)), 0),
        use("b c", x(12, 12), labels(12, 12), Buffer(pos(12)), 1, -100, 0.2),
        use("b c", x(12, 6), labels(6, 12), None, 2, -100, 0.2),
        use("b c", x(12, 6), ints(6, 12), Buffer(pos(6)), 2, 3, 0.2),
        use("b c s.1", x(4, 6, 2, 3), labels(6, 4, 2, 3), Buffer(pos(6)), 1),
        use("b c s.0", x(4, 12, 4), labels(12, 4, 4), None, 0, -100, 0.1),
        use("c", x(6), ints(6)),
        use("c", x(6), ints(6), Buffer(pos(6)), 1, -100, 0.3),
        use("", x(12, 6), Buffer(pos(12, 6)), None, 1),
        use("", x(4, 6, 2), pos(4, 6, 2), Buffer(pos(6)), 0, -100, 0.1),
        use("", x(6), pos(6)),
    ],
    "aten.cumsum.default": [use("d0", x(4, 6), 1), use("d1", x(4, 6), -2)],
    "aten.detach.default": [use("p.1 p.0 P", x(4, 6))],
    "aten.diff.default": [
        use("d0 P", x(4, 6)),
        use("d1 P", x(4, 6), 2, 0),
        use("d0", x(4, 6), 1, -1, x(4, 1)),
        use("d0", x(4, 6), 1, 1, x(4, 1), x(4, 2)),
        use("d1", x(4, 6), 1, 0, None, x(1, 6)),
    ],
    "aten.div.Scalar": [use("p.1 p.0 P", x(4, 6), 3.0)],
    "aten.div.Tensor": [
        use("p.1 p.0 P", x(4, 6), pos(4, 6)),
        use("p.1 p.0 P", x(4, 6), pos(6)),
        use("p.0 p.1 P", x(6), pos(4, 6)),
        use("p.1 p.0 P", x(4, 6), 3.0),
        use("p.0 P", ints(9, 4), 2),
        use("p.0 p.1 P", x(1, 6), pos(4, 1)),
    ],
    "aten.dropout.default": [use("p.1 p.0 P", x(4, 6), 0.5, False), use("p.1 p.0 P", x(4, 6), 0.0, True)],
    "aten.elu.default": [use("p.1 p.0", x(4, 6))],
    "aten.embedding.default": [
        use("v h b.1 b.0 P", x(12, 6), ints(12, 4, 8)),
        use("v h b.1 b.0 P", x(12, 6), ints(12, 4, 6), 3),
        use("v h b.0 P", x(12, 6), ints(12, 4), 0),
        use("v h P", x(12, 6), ints(12)),
        use("h P", x(12, 6), ints(12, 24), -1, True),
        use("v h b.0 P", Buffer(x(12, 6)), ints(12, 4)),
    ],
    "aten.eq.Scalar": [use("p.1 p.0", ints(3, 4, 6), 1)],
    "aten.eq.Tensor": [use("p.1 p.0", ints(3, 4, 6), ints(3, 6))],
    "aten.erf.default": [use("p.1 p.0", x(4, 6))],
    "aten.exp.default": [use("p.1 p.0", x(4, 6))],
    "aten.expand.default": [
        use("d0 d2 d1 P", x(4, 1, 6), [4, 12, 6]),
        use("d2 d3 d0 P", x(4, 6), [2, 3, 4, 6]),
        use("d0 d1 P", x(4, 1), [-1, 6]),
        use("d0 d1 P", x(), [4, 6]),
        use("d1 d3 d0 d2 P", x(4, 1, 6), [2, -1, 8, -1]),
    ],
    "aten.expm1.default": [use("p.1 p.0", x(4, 6))],
    "aten.flatten.using_ints": [
        use("f0 f1 f2 P", x(4, 6, 2), 1),
        use("f0 f1 f2 P", x(4, 6, 2, 3), 1, -2),
        use("f0 f1 P", x(4, 6)),
        use("P", x()),
    ],
    "aten.flip.default": [use("d0 P", x(4, 6), [1]), use("d1 P", x(4, 6, 2), [0, -1])],
    "aten.floor.default": [use("p.1 p.0", x(4, 6))],
    "aten.floor_divide.default": [use("p.1 p.0", ints(9, 4, 6), ints(5, 6, low=1))],
    "aten.fmod.Scalar": [use("p.1 p.0", x(4, 6), 0.7)],
    "aten.ge.Scalar": [use("p.1 p.0", x(4, 6), 0.0)],
    "aten.ge.Tensor": [use("p.1 p.0", x(4, 6), x(4, 1))],
    "aten.gelu.default": [use("p.1 p.0", x(4, 6)), use("p.1 p.0", x(4, 6), approximate="tanh")],
    "aten.gt.Scalar": [use("p.1 p.0", x(4, 6), 0.0)],
    "aten.gt.Tensor": [use("p.1 p.0", x(4, 6), x(6))],
    "aten.hardsigmoid.default": [use("p.1 p.0", x(4, 6))],
    "aten.hardswish.default": [use("p.1 p.0", x(4, 6))],
    "aten.hardtanh.default": [use("p.1 p.0", x(4, 6))],
    "aten.isinf.default": [use("p.1 p.0", x(4, 6))],
    "aten.isnan.default": [use("p.1 p.0", x(4, 6))],
    "aten.layer_norm.default": [
        use("b.1 b.0", x(4, 2, 6), [6], x(6), x(6)),
        use("b.0", x(4, 2, 6), [2, 6], x(2, 6), x(2, 6)),
        use("b.0", x(4, 6), [6]),
        use("b.0", x(4, 6), [6], None, x(6)),
        use("", x(6), [6], x(6)),
    ],
    "aten.le.Scalar": [use("p.1 p.0", x(4, 6), 0.0)],
    "aten.le.Tensor": [use("p.1 p.0", x(4, 6), x(6))],
    "aten.leaky_relu.default": [use("p.1 p.0", x(4, 6), 0.1)],
    "aten.lift_fresh_copy.default": [use("p.1 p.0 P", x(4, 6))],
    "aten.linear.default": [
        use("b.1 b.0 i o P", x(4, 2, 6), x(12, 6), x(12)),
        use("b.0 i o P", x(4, 6), x(12, 6)),
        use("i o P", x(6), x(12, 6), x(12)),
        use("b.0 i o P", Buffer(x(4, 6)), x(12, 6), x(12)),
    ],
    "aten.log.default": [use("p.1 p.0", pos(4, 6))],
    "aten.log1p.default": [use("p.1 p.0", pos(4, 6))],
    "aten.log_softmax.int": [use("d0", x(4, 6), -1), use("", x(6), 0)],
    "aten.logical_and.default": [use("p.1 p.0", bools(4, 6), bools(6))],
    "aten.logical_not.default": [use("p.1 p.0", bools(4, 6))],
    "aten.logical_or.default": [use("p.1 p.0", bools(4, 6), bools(4, 6))],
    "aten.lt.Scalar": [use("p.1 p.0", x(4, 6), 0.0)],
    "aten.lt.Tensor": [use("p.0 p.1", ints(6, 1, 6), ints(6, 4, 1))],
    "aten.masked_fill.Scalar": [use("p.1 p.0", x(4, 6), bools(4, 6), -1.0), use("p.2 p.1 p.0", x(2, 4, 6), bools(4, 1), 0.0)],
    "aten.matmul.default": [
        use("m k n P", x(4, 6), x(6, 12)),
        use("b.0 m k n P", x(2, 4, 6), x(2, 6, 8)),
        use("b.1 m k n P", x(2, 1, 4, 6), x(3, 6, 2)),
        use("k P", x(6), x(6)),
        use("m k P", x(4, 6), x(6)),
        use("k n P", x(6), x(6, 4)),
        use("k b.0 n P", x(6), x(2, 6, 4)),
        use("b.0 m k P", x(2, 4, 6), x(6)),
        use("b.0 m k n P", x(2, 4, 6), x(6, 12)),
        use("m k b.0 n P", x(4, 6), x(2, 6, 12)),
    ],
    "aten.max_pool1d.default": [use("b.1 b.0", x(4, 6, 8), [2])],
    "aten.max_pool2d.default": [use("b.1 b.0", x(4, 6, 8, 8), [2, 2]), use("b.0", x(6, 4, 4), [2, 2])],
    "aten.maximum.default": [use("p.1 p.0", x(4, 6), x(6))],
    "aten.mean.default": [use("d0 d1 P", x(4, 6)), use("P", x())],
    "aten.mean.dim": [
        use("k0 d1 P", x(4, 6), [1]),
        use("d0 k1 d2 P", x(4, 6, 2), [0, -1], True),
        use("d0 d1 P", x(4, 6), []),
        use("d0 d1 P", x(4, 6), None),
        use("k1 P", x(1, 6), [0]),
    ],
    "aten.minimum.default": [use("p.1 p.0", x(4, 6), x(6))],
    "aten.mish.default": [use("p.1 p.0", x(4, 6))],
    "aten.mm.default": [use("m k n P", x(4, 6), x(6, 12))],
    "aten.mul.Scalar": [use("p.1 p.0 P", x(4, 6), 3.0)],
    "aten.mul.Tensor": [
        use("p.1 p.0 P", x(4, 6), x(4, 6)),
        use("p.2 p.1 p.0 P", x(2, 4, 6), x(4, 1)),
        use("p.1 p.0 P", x(4, 6), 3.0),
        use("p.1 p.0 P", x(4, 6), bools(4, 6)),
        use("p.1 p.0", bools(4, 6), bools(6)),
        use("p.1 p.0 P", x(4, 6), x()),
    ],
    "aten.native_layer_norm.default": [use("b.1 b.0", x(4, 2, 6), [6], x(6), x(6), 1e-5), use("b.0", x(4, 6), [6], None, None, 1e-5)],
    "aten.ne.Scalar": [use("p.1 p.0", ints(3, 4, 6), 1)],
    "aten.ne.Tensor": [use("p.1 p.0", ints(3, 4, 6), ints(3, 6))],
    "aten.neg.default": [use("p.1 p.0 P", x(4, 6))],
    "aten.numpy_T.default": [use("d0 d1 P", x(4, 6)), use("d0 P", x(6))],
    "aten.ones_like.default": [use("p.1 p.0", x(4, 6))],
    "aten.pad.default": [
        use("d0 d1", x(4, 6, 2), [1, 1]),
        use("d1", x(4, 6), [0, 0, 1, 0], "constant", 1.0),
        use("d0 d1", x(2, 4, 6), [2, 2], "reflect"),
        use("d0 d2", x(2, 4, 6), [0, 0, 1, -1]),
        use("d0", x(4, 6), [1, -1], "constant", 0.0),
        use("d0 d1", x(4, 6), [0, 0]),
    ],
    "aten.permute.default": [use("d0 d1 d2 P", x(4, 6, 2), [2, 0, 1]), use("d0 d1 P", x(4, 6), [-1, 0])],
    "aten.pow.Scalar": [use("p.1 p.0", 2.0, x(4, 6))],
    "aten.pow.Tensor_Scalar": [use("p.1 p.0", x(4, 6), 2)],
    "aten.pow.Tensor_Tensor": [use("p.1 p.0", pos(4, 6), x(6))],
    "aten.reciprocal.default": [use("p.1 p.0", pos(4, 6))],
    "aten.relu.default": [use("p.1 p.0", x(4, 6))],
    "aten.relu6.default": [use("p.1 p.0", x(4, 6))],
    "aten.remainder.Scalar": [use("p.1 p.0", x(4, 6), 0.7)],
    "aten.reshape.default": [
        use("f0 f1 P", x(4, 6), [24]),
        use("f0 f1 P", x(24), [4, -1]),
        use("f0 f1 f3 P", x(4, 2, 12), [4, 2, 3, 4]),
        use("f0 f1 f2 P", x(4, 6), [-1, 4, 3]),
        use("f0 f1 f2 P", x(4, 6), [2, 12]),
        use("f0 f1 f2 f3 P", x(2, 4, 2, 6), [8, 12]),
        use("P", x(6, 4), [4, 6]),
        use("f0 P", x(2, 6, 4), [2, 4, 6]),
        use("f0 f1 P", x(4, 1, 6), [1, 4, 6, 1]),
        use("P", x(1), []),
        use("P", x(), [1, 1]),
        use("f0 f1 f2 P", x(4, 4), [2, 8]),
        use("f0 f1 f2 P", x(4, 4, 4), [64]),
        use("f0 f1 f2 P", x(64), [4, 4, 4]),
        use("f0 f2 P", ints(9, 4, 6), [12, 2]),
        use("f0 f1", bools(4, 6), [24]),
        use("P", x(0, 4), [4, 0]),
    ],
    "aten.rms_norm.default": [use("b.1 b.0", x(4, 2, 6), [6], x(6)), use("b.0", x(4, 6), [6])],
    "aten.roll.default": [use("d0 P", x(4, 6), [1], [1]), use("P", x(4, 6), [2]), use("d1 P", x(4, 6, 2), [1, 1], [0, -1])],
    "aten.round.default": [use("p.1 p.0", x(4, 6))],
    "aten.rsqrt.default": [use("p.1 p.0", pos(4, 6))],
    "aten.rsub.Scalar": [use("p.1 p.0", x(4, 6), 1.0)],
    "aten.scaled_dot_product_attention.default": [
        use("b.1 b.0 q e P", x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4)),
        use("b.1 b.0 e P", x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), None, 0.0, True),
        use("b.1 b.0 q e P", x(2, 4, 6, 2), x(2, 4, 4, 2), x(2, 4, 4, 6), x(6, 4)),
        use("b.1 b.0 q e P", x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), causal(6)),
        use("b.1 b.0 q e P", x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 1, 1, 6)),
        use("b.1 b.0 q e P", x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 6), scale=0.3),
        use("b.0 g r q e P", x(2, 8, 6, 4), x(2, 2, 6, 4), x(2, 2, 6, 4), enable_gqa=True),
        use("b.0 g r e P", x(2, 8, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), None, 0.0, True, enable_gqa=True),
        use("b.0 g r q e P", x(2, 8, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), x(6, 6), enable_gqa=True),
        use("b.0 g r q e P", x(2, 8, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 1, 6, 6), enable_gqa=True),
        use("b.0 g r q e P", x(2, 8, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 8, 6, 6), enable_gqa=True),
        use("b.0 g r q e P", x(2, 8, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), x(8, 6, 6), enable_gqa=True),
        use("b.1 b.0 e P", x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), None, 0.0, True, enable_gqa=True),
        use("b.0 q e P", x(4, 6, 4), x(4, 6, 4), x(4, 6, 4)),
    ],
    "aten.select.int": [use("d0 P", x(4, 6), 1, 2), use("d0 d2 P", x(4, 6, 2), -2, -1)],
    "aten.sigmoid.default": [use("p.1 p.0", x(4, 6))],
    "aten.sign.default": [use("p.1 p.0", x(4, 6))],
    "aten.silu.default": [use("p.1 p.0", x(4, 6))],
    "aten.sin.default": [use("p.1 p.0", x(4, 6))],
    "aten.slice.Tensor": [
        use("d0 P", x(4, 6), 1, 1, 5),
        use("d0 d1 P", x(4, 6), 0),
        use("d0 d1 P", x(4, 6), 1, 0, 6),
        use("d0 d1 P", x(4, 6), -1, -6, 9223372036854775807),
        use("d0 P", x(4, 12), 1, 0, 12, 2),
        use("d0 d2 P", x(2, 1, 6), 1, 0, 1),
    ],
    "aten.softmax.int": [use("d0", x(4, 6), -1), use("d0 d2", x(4, 6, 2), 1)],
    "aten.softplus.default": [use("p.1 p.0", x(4, 6))],
    "aten.split.Tensor": [
        use("d0 q0 P", x(4, 12), 4, 1),
        use("q0 d1 P", x(6, 4), 4),
        use("d0 q0 P", x(4, 6), 4, -1),
        use("d0 P", x(4, 6), 8, 1),
    ],
    "aten.split_with_sizes.default": [
        use("d0 q0 P", x(4, 12), [6, 4, 2], -1),
        use("q0 d1 P", x(12, 4), [6, 6]),
        use("d0 P", x(4, 6), [6], 1),
        use("d0 P", x(4, 6), [5, 1], 1),
    ],
    "aten.sqrt.default": [use("p.1 p.0", pos(4, 6))],
    "aten.square.default": [use("p.1 p.0", x(4, 6))],
    "aten.squeeze.default": [use("P", x(4, 1, 6)), use("P", x(2, 1, 3)), use("P", x(4, 6))],
    "aten.squeeze.dim": [use("d0 d2 P", x(4, 1, 6), 1), use("P", x(2, 1, 3), 0), use("d1 P", x(1, 4), -2)],
    "aten.squeeze.dims": [use("d0 d2 P", x(4, 1, 6, 1), [1, 3]), use("P", x(2, 1, 3), [0, 1])],
    "aten.stack.default": [use("d1 d2 P", [x(4, 6), x(4, 6)]), use("d0 d1 P", [x(4, 6)] * 3, -1), use("P", [x(), x()])],
    "aten.std.correction": [use("k0", x(4, 6), [1]), use("k1", x(4, 6), [0], correction=0, keepdim=True), use("", x(4, 6))],
    "aten.sub.Scalar": [use("p.1 p.0", x(4, 6), 1.0)],
    "aten.sub.Tensor": [use("p.1 p.0 P", x(4, 6), x(4, 6)), use("p.1 p.0 P", x(4, 6), x(6), alpha=2), use("p.1 p.0", x(4, 6), 1.0)],
    "aten.sum.default": [use("d0 d1 P", x(4, 6)), use("d0 d1", bools(4, 6)), use("d0 d1 P", ints(9, 4, 6)), use("P", x())],
    "aten.sum.dim_IntList": [
        use("k0 d1 P", x(4, 6), [1]),
        use("d0 k1 d2 P", x(4, 6, 2), [0, -1], True),
        use("d0 d1 P", x(4, 6), []),
        use("d0 d1 P", x(4, 6), None),
        use("k0 d1", bools(4, 6), [1]),
        use("d0 k1", Buffer(x(4, 6)), [0], dtype=torch.int64),
    ],
    "aten.t.default": [use("d0 d1 P", x(4, 6)), use("d0 P", x(6))],
    "aten.tanh.default": [use("p.1 p.0", x(4, 6))],
    "aten.to.device": [use("p.1 p.0 P", x(4, 6), "cpu", torch.float32)],
    "aten.to.dtype": [
        use("p.1 p.0 P", x(4, 6), torch.float32),
        use("p.1 p.0", x(4, 6), torch.int32),
        use("p.0", ints(9, 4), torch.int8),
        use("p.0", ints(9, 4).to(torch.int8), torch.int64),
        use("p.1 p.0", bools(4, 6), torch.int64),
    ],
    "aten.to.dtype_layout": [use("p.1 p.0 P", x(4, 6), dtype=torch.float32)],
    "aten.to.other": [use("p.1 p.0 P", x(4, 6), x(2).float())],
    "aten.transpose.int": [use("P", x(), 0, -1), use("d0 d1 d2 P", x(4, 6, 2), 1, 2), use("d0 d1 d2 P", x(4, 6, 2), 0, -1)],
    "aten.type_as.default": [use("p.1 p.0 P", x(4, 6), x(2).float()), use("p.1 p.0", x(4, 6), ints(9, 4, 6))],
    "aten.unbind.int": [use("d0 d2 P", x(4, 3, 6), 1), use("d1 P", x(2, 6)), use("d0 P", x(4, 2), -1)],
    "aten.unflatten.int": [
        use("f0 f2 P", x(4, 12), 1, [3, 4]),
        use("f0 f1 f2 P", x(12, 6), 0, [-1, 2]),
        use("f0 f1 f2 f3 P", x(4, 2, 12), 2, [2, 6]),
        use("f0 f2 P", x(4, 12), -1, [3, 4]),
        use("f0 f1 f2 P", x(4, 2, 12), -2, [2, 1]),
    ],
    "aten.unsqueeze.default": [use("f0 f1 P", x(4, 6), 1), use("f0 f1 P", x(4, 6), -1), use("P", x(), 0)],
    "aten.var.correction": [use("k0", x(4, 6), [-1]), use("", x(4, 6)), use("k1", x(4, 6, 2), [0, 2], correction=0, keepdim=True)],
    "aten.view.default": [
        use("f0 f1 P", x(4, 6), [4, 2, 3]),
        use("f0 f1 P", x(4, 6), [-1]),
        use("f0 f2 f3 P", x(2, 3, 2, 6), [6, 12]),
        use("f0 f2 P", x(4, 18), [4, 3, 2, 3]),
    ],
    "aten.where.ScalarOther": [use("p.1 p.0", bools(4, 6), x(4, 6), 0.0), use("p.1 p.0 p.2", bools(6, 6), x(2, 6, 6), -1.0)],
    "aten.where.self": [
        use("p.1 p.0 P", bools(4, 6), x(4, 6), x(4, 6)),
        use("p.1 p.0 P", bools(4, 1), x(4, 6), x()),
        use("p.1 p.0", bools(4, 6), bools(4, 6), bools(6)),
    ],
    "aten.zeros_like.default": [use("p.1 p.0", x(4, 6))],
}
# fmt: on


def overload(name: str) -> torch._ops.OpOverload:
    _, base, variant = name.split(".")
    return getattr(getattr(aten, base), variant)


CASES = [pytest.param(name, row, id=f"{name.removeprefix('aten.')}-{k}") for name, rows in USES.items() for k, row in enumerate(rows)]


def test_every_row_is_proved_here() -> None:
    assert sorted(RULES) == list(USES), "every op of the table has uses here, in alphabetical order"


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
@pytest.mark.parametrize(("name", "row"), CASES)
def test_rule(name: str, row: Use) -> None:
    """On two ranks every promised factor is split; then three ranks, and two axes jointly."""
    proved = check_rule(overload(name), *row.args, **row.kwargs)
    split = [strategy.factor or "P" * any(placement.kind == "P" for placement in strategy.inputs) for (strategy,) in proved]
    assert " ".join(dict.fromkeys(factor for factor in split if factor)) == row.splits
    check_rule(overload(name), *row.args, mesh="a=3", **row.kwargs)
    check_rule(overload(name), *row.args, mesh="a=2,b=2", **row.kwargs)


@pytest.mark.parametrize("name", ["linear", "matmul", "cat", "reshape", "scaled_dot_product_attention", "cross_entropy_loss", "conv1d"])
def test_rule_on_unequal_axes(name: str) -> None:
    for row in USES[f"aten.{name}.default"]:
        check_rule(overload(f"aten.{name}.default"), *row.args, mesh="a=2,b=3", **row.kwargs)


# Uses whose dims are also cut in segments, as the dims of fused weights are, and a placement that must be among the strategies.
SEGMENTED = {
    "fused-weight": ("aten.linear.default", (x(4, 6), x(24, 6), x(24)), {24: [(8, 8, 8), (16, 8), (8, 16), (12, 12)]}, "S(0:3x8)"),
    "fused-weight-in": ("aten.linear.default", (x(4, 24), x(6, 24)), {24: [(8, 16)]}, "S(1:8+16)"),
    "split": ("aten.split_with_sizes.default", (x(4, 24), [16, 4, 4], -1), {24: [(12, 12)]}, "S(1:16+4+4)"),
    "chunk": ("aten.chunk.default", (x(4, 12), 3, 1), {4: [(2, 2)]}, "S(1:3x4)"),
    "cat": ("aten.cat.default", ([x(4, 8), x(4, 4)], 1), {}, "S(1)"),
    "heads": ("aten.view.default", (x(4, 24), [4, 3, 4, 2]), {4: [(2, 2)]}, "S(1:3x8)"),
    "add": ("aten.add.Tensor", (x(4, 12), x(12)), {12: [(4, 8), (6, 6)]}, "S(1:4+8)"),
    "embedding": ("aten.embedding.default", (x(12, 8), ints(12, 12)), {12: [(6, 6), (4, 8)], 8: [(4, 4)]}, "S(1:2x4)"),
    "cross-entropy": ("aten.cross_entropy_loss.default", (x(8, 12), ints(12, 8)), {12: [(6, 6), (4, 8)], 8: [(4, 4)]}, "S(0:2x4)"),
    "batch-norm": ("aten.batch_norm.default", (x(8, 4), x(4), x(4), None, None, True, 0.1, 1e-5, False), {8: [(4, 4)]}, "S(0:2x4)"),
    "mean": ("aten.mean.dim", (x(8, 4), [0]), {8: [(4, 4)]}, "S(0:2x4)"),
    "expand": ("aten.expand.default", (x(1, 4), [12, 4]), {12: [(4, 8)]}, "S(0:4+8)"),
}


@pytest.mark.parametrize(("name", "args", "segmentations", "wanted"), SEGMENTED.values(), ids=SEGMENTED)
@pytest.mark.parametrize("mesh", ["a=2", "a=2,b=2"])
def test_segmented_split(name: str, args: tuple, segmentations: dict, wanted: str, mesh: str) -> None:
    proved = check_rule(overload(name), *args, mesh=mesh, segmentations=segmentations)
    placements = {str(placement) for joint in proved for strategy in joint for placement in (*strategy.inputs, *strategy.outputs)}
    assert wanted in placements


@pytest.mark.parametrize("name", ["aten.embedding.default", "aten.cross_entropy_loss.default"])
def test_lowering_that_counts_positions_takes_no_segments(name: str) -> None:
    args = next(case[1] for case in SEGMENTED.values() if case[0] == name)
    proved = check_rule(overload(name), *args, segmentations={12: [(6, 6)]})
    assert not any(placement.segments for (strategy,) in proved if strategy.factor in ("v", "c") for placement in strategy.inputs)


# Dropout draws differently on each rank, so it is proved by what it must keep: its own scale, and one mask per value.
@pytest.mark.parametrize("mesh", ["a=2", "a=2,b=2"])
def test_dropout_draws_once_per_value(mesh: str) -> None:
    case = OpCase(aten.dropout.default, (torch.ones(8, 12, dtype=torch.float64), 0.5, True), {}, MeshSpec.of(mesh))
    quiet = OpCase(aten.dropout.default, (torch.ones(8, 12, dtype=torch.float64), 0.5, False), {}, MeshSpec.of(mesh))
    for candidate in quiet.candidates({}):
        run = case.run(candidate)
        ranks = case.mesh.coordinates()
        layout = tuple(R if placement == P else placement for placement in candidate.outputs[0])
        whole = unshard(run.outputs[0], candidate.outputs[0], case.mesh)
        for at, piece, taken in zip(ranks, run.outputs[0], run.operands[0], strict=True):
            if P not in candidate.outputs[0]:
                torch.testing.assert_close(piece.detach(), shard(whole.detach(), layout, case.mesh, at))
            mask = piece.detach() / taken.detach()
            assert set(mask.round(decimals=9).unique().tolist()) == {0.0, 2.0}
        masks = [(piece / taken).detach() for piece, taken in zip(run.outputs[0], run.operands[0], strict=True)]
        positions = [tuple(c for c, p in zip(at, candidate.outputs[0], strict=True) if p.is_split) for at in ranks]
        for i, j in itertools.combinations(range(len(ranks)), 2):
            assert torch.allclose(masks[i], masks[j]) == (positions[i] == positions[j])


@pytest.mark.parametrize("mesh", ["a=2", "a=2,b=2"])
def test_attention_dropout_draws_once_per_probability(mesh: str) -> None:
    """The values are unit matrices side by side, so that results are probabilities: a split of `e` must not change the draws."""
    query, key, value = x(4, 4, 6, 2), x(4, 4, 6, 2), torch.eye(6, dtype=torch.float64).repeat(4, 4, 1, 4)
    quiet = OpCase(aten.scaled_dot_product_attention.default, (query, key, value), {}, MeshSpec.of(mesh))
    case = OpCase(aten.scaled_dot_product_attention.default, (query, key, value, None, 0.5), {}, MeshSpec.of(mesh))
    for candidate in quiet.candidates({}):
        drawn = unshard(case.run(candidate).outputs[0], candidate.outputs[0], case.mesh)
        if P in candidate.outputs[0]:
            continue  # terms of the values: no unit matrices
        kept = (drawn / quiet.outputs[0]).detach().round(decimals=9)
        assert set(kept.unique().tolist()) == {0.0, 2.0}
        for part in kept.chunk(4, -1):
            torch.testing.assert_close(part, kept[..., :6])
        if any(strategy.factor in ("b.1", "b.0", "q") for strategy in candidate.strategies):
            for strategy, dim in ((s, s.outputs[0].dim) for s in candidate.strategies if s.factor in ("b.1", "b.0", "q")):
                first, second = kept.chunk(2, dim)
                assert not torch.equal(first, second), strategy


def test_random_call_is_not_compared() -> None:
    with pytest.raises(RuleError, match=r"this call of aten.dropout.default draws random numbers: prove it with the draws turned off"):
        check_rule(aten.dropout.default, x(4, 6), 0.5, True)


def test_op_without_a_row() -> None:
    with pytest.raises(RuleError, match=r"aten.erfinv.default has no rule: autoshard.register_rule adds one"):
        check_rule("aten::erfinv", x(4))
    with pytest.raises(RuleError, match=r"no op 'aten::no_such_op': import or define it first \(write it as 'namespace::name'\)"):
        check_rule("aten::no_such_op", x(4))


@pytest.fixture
def scale() -> Iterator[torch._ops.OpOverload]:
    """A custom op, x * w summed over the last dim, whose row is forgotten afterwards."""
    library = torch.library.Library("autoshard_test", "FRAGMENT")
    library.define("scale(Tensor x, Tensor w) -> Tensor")
    library.impl("scale", lambda x, w: (x.exp() * w).sum(-1), "CompositeImplicitAutograd")
    yield torch.ops.autoshard_test.scale.default
    RULES.pop("autoshard_test.scale.default", None)
    library._destroy()


def test_right_rule_of_a_custom_op(scale: torch._ops.OpOverload) -> None:
    register_rule("autoshard_test::scale", "b* i, ~i -> b*")
    assert len(check_rule("autoshard_test::scale", x(4, 6), x(6))) == 5
    check_rule(scale, x(4, 6), x(6), mesh="a=2,b=3")


def test_wrong_rule_of_a_custom_op(scale: torch._ops.OpOverload) -> None:
    register_rule("autoshard_test::scale", "~b* i, ~i -> b*")
    with pytest.raises(UnsoundRuleError) as caught:
        check_rule(scale, x(4, 6), x(6))
    text = re.sub(r"\d\.?\d*(e[+-]\d+)?$", "#", str(caught.value))
    assert text == (
        "the rule of autoshard_test.scale.default, '~b* i, ~i -> b*', is wrong for shapes [[4, 6], [6]] on mesh a=2: "
        "1 of 6 strategies fail\n"
        "  nothing split: x P, w R -> P: output differs by #"
    )
    register_rule("autoshard_test::scale", "b* i, i -> b* i")
    with pytest.raises(RuleError, match="does not fit shapes"):
        check_rule(scale, x(4, 6), x(6))


# A wrong row for an op, and what the report says.
REFUTED = {
    "max is no sum": ("amax.default", "b i -> b", (x(4, 6), [1]), "i split on a: self S(1) -> P: output differs by"),
    "softmax dim": ("softmax.int", "b i -> b i", (x(4, 6), 1), "i split on a: self S(1) -> S(1): output differs by"),
    "bias without its mark": ("linear.default", "b i, o i, o -> b o", (x(4, 6), x(2, 6), x(2)), "bias R -> P: output differs by"),
    "linear in each, not in both": ("mul.Tensor", "+p*, +p* -> p*", (x(4, 6), x(4, 6)), "self P, other P -> P: output differs by"),
    "affine": ("add.Scalar", "~p* -> p*", (x(4, 6), 1.0), "nothing split: self P -> P: output differs by"),
    "moved dim": ("flip.default", "a -> a", (x(4), [0]), "a split on a: self S(0) -> S(0): output differs by"),
    "shape that is an argument": ("view.default", "a b -> a b", (x(4, 6), [4, 6]), "raises RuntimeError: shape '[4, 6]' is invalid"),
    "statistics of a piece": ("batch_norm.default", "b c -> b c", (x(4, 6), *[None] * 4, True, 0.1, 1e-5, False), "b split on a"),
    "gradient alone": ("embedding.default", "v h, b -> b h", (x(4, 6), ints(4, 8), -1, True), "gradient of weight differs by"),
}


@pytest.mark.parametrize("case", REFUTED.values(), ids=REFUTED)
def test_wrong_rows_of_torch_ops_are_refuted(case: tuple[str, str, tuple, str], monkeypatch: pytest.MonkeyPatch) -> None:
    name, equation, args, text = case
    monkeypatch.setitem(RULES, f"aten.{name}", Rule(equation))
    with pytest.raises(UnsoundRuleError, match=re.escape(text)):
        check_rule(f"aten::{name}", *args)


def test_docs_list_every_row(request: pytest.FixtureRequest) -> None:
    written = Path(__file__).parent.parent / "docs" / "ops.md"
    if request.config.getoption("--update-golden"):
        written.write_text(catalogue())
    assert written.read_text() == catalogue(), "docs/ops.md is stale; its first lines say how to make it anew"
