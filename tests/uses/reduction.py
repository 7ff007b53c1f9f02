"""Uses of the ops of autoshard/ops/reduction.py: see tests/test_rules.py."""

import math

import torch
from torch import Tensor
from torch.nn import Buffer

from uses.arguments import Use, bools, ints, pos, use, x


def tied(*shape: int) -> Tensor:
    """Few different numbers, so that the largest is there several times."""
    return ints(3, *shape).double()


def zeros_among(*shape: int) -> Tensor:
    return torch.where(ints(3, *shape) == 0, 0.0, x(*shape))


def gaps(*shape: int) -> Tensor:
    """Some are no numbers."""
    return torch.where(ints(4, *shape) == 0, math.nan, x(*shape))


# fmt: off
USES: dict[str, list[Use]] = {
    "aten._is_all_true.default": [use("d0 d1", bools(4, 6)), use("d0", torch.ones(12, dtype=torch.bool))],
    "aten._is_any_true.default": [use("d0 d1", bools(4, 6)), use("d0", torch.zeros(12, dtype=torch.bool))],
    "aten._log_softmax.default": [use("k0 d1", x(4, 6), -1, False), use("k0 d1", x(4, 6).bfloat16(), 1, False)],
    "aten._safe_softmax.default": [use("k0", x(4, 6), -1)],
    "aten._softmax.default": [use("k0 d1", x(4, 6), -1, False), use("k0 d1 k2", x(4, 6, 2), 1, False)],
    "aten.all.default": [use("d0 d1", bools(4, 6)), use("d0", ints(9, 12).to(torch.uint8))],
    "aten.all.dim": [use("k0 d1", ints(9, 4, 6), 1), use("d0 k1", bools(4, 6), 0, True)],
    "aten.all.dims": [use("d0 d2", bools(2, 3, 4), [0, -1]), use("d0 d1", bools(4, 6)), use("", bools(4, 6), [])],
    "aten.amax.default": [
        use("k0 d1", x(4, 6), [1]),
        use("k0 d1", tied(4, 12), [-1], True),
        use("d0 d1", x(4, 6)),
        use("d0 d1", tied(4, 12), [0, 1]),
        use("d0 k1", ints(9, 12, 4), [0]),
        use("d0 k1", bools(4, 6), [0]),
        use("", x()),
    ],
    "aten.amin.default": [
        use("d0 k1 d2", x(4, 6, 2), [0, 2]),
        use("d0 k1", tied(12, 6), [0], True),
        use("d0 k1", ints(9, 12, 4).to(torch.uint8), [0]),
    ],
    "aten.aminmax.default": [use("d0 d1", tied(4, 6)), use("k0 d1", tied(4, 12), dim=1), use("k0 d1", x(4, 6), dim=-1, keepdim=True)],
    "aten.any.default": [use("d0 d1", bools(4, 6)), use("d0", Buffer(tied(12)))],
    "aten.any.dim": [use("k0 d1", bools(4, 6), 1), use("d0 k1", ints(2, 12, 6).to(torch.uint8), 0, True)],
    "aten.any.dims": [use("d0 d2", bools(2, 3, 4), [0, -1], True), use("", bools(4, 6), [])],
    "aten.argmax.default": [
        use("k0 d1", x(4, 6), -1),
        use("d0", x(4, 6)),
        use("d0 k1", tied(12, 6), 0, True),
        use("d0", tied(12), 0),
        use("d0", tied(12, 2), None, True),
        use("k0 d1", ints(3, 4, 12), 1),
        use("", x()),
    ],
    "aten.argmin.default": [use("k0 d1", tied(4, 12), 1), use("d0", tied(4, 3, 2)), use("k0 d1", ints(3, 4, 12), 1)],
    "aten.argsort.default": [use("k0", x(4, 6)), use("k1", x(4, 6), 0, True)],
    "aten.argsort.stable": [use("k0", tied(4, 6), stable=True)],
    "aten.cosine_similarity.default": [
        use("k0 d1", x(4, 6), x(4, 6)),
        use("k0 d1 k2", x(2, 6, 4), x(2, 6, 4), 1, 1e-3),
        use("d0 k1", x(12, 6), x(12, 6), 0, 10.0),
        use("d1 k0", x(12), x(4, 12), -1),
        use("k0 d1", x(4, 12), x(4, 1), -1),
    ],
    "aten.count_nonzero.default": [use("d0 d1", Buffer(tied(4, 6))), use("k0 d1", ints(2, 4, 6), 1)],
    "aten.count_nonzero.dim_IntList": [use("d0 d2", Buffer(tied(2, 3, 4)), [0, -1])],
    "aten.cummax.default": [use("k0", x(4, 6), 1)],
    "aten.cummin.default": [use("k1", x(4, 6), 0)],
    "aten.cumprod.default": [use("k0", x(4, 6), 1)],
    "aten.cumsum.default": [
        use("k0 d1 P", x(4, 6), 1),
        use("d0 k1 P", x(12, 6), -2),
        use("k0 d1", bools(4, 6), 1),
        use("d0 P", ints(9, 12), 0),
        use("d0 P", ints(9, 12).int(), 0, dtype=torch.float64),
        use("d0", Buffer(x(12)), 0, dtype=torch.int64),
        use("P", x(), 0),
    ],
    "aten.dist.default": [
        use("d.1 d.0", x(4, 6), x(4, 6)),
        use("d.1 d.0", x(4, 6), x(6), 1),
        use("d.0", x(12), x(12), math.inf),
        use("", x(12), x(12), -1),
    ],
    "aten.histc.default": [use("d0 d1", Buffer(x(4, 6)), 5, -1, 1), use("", Buffer(x(4, 6)), 5)],
    "aten.kthvalue.default": [use("k0 d1", x(4, 6), 2), use("d0 k1", x(12, 6), 7, 0, True), use("k0", ints(9, 4, 6), 2)],
    "aten.linalg_matrix_norm.str_ord": [
        use("k0 d1 d2", x(2, 4, 6)),
        use("d0 k1 d2", x(4, 2, 6), "fro", [0, -1], True),
        use("k0", x(2, 4, 6), "nuc"),
    ],
    "aten.linalg_norm.default": [
        use("d0 d1", x(4, 6)),
        use("k0 d1", x(4, 6), None, [1]),
        use("k0 d1", x(4, 6), 3, [1], True),
        use("d0", x(12), 1),
        use("", x(4, 6), 2),
        use("d0 d1", x(4, 6), None, [0, 1]),
    ],
    "aten.linalg_vector_norm.default": [
        use("k0 d1", x(4, 6), 2, [1]),
        use("d0 d1", x(4, 6)),
        use("k0 d1", zeros_among(4, 12), 2, [-1], True),
        use("k0 d1", torch.zeros(4, 6, dtype=torch.float64), 2, [1]),
        use("k0 d1", zeros_among(4, 12), 1, [1]),
        use("d0 d2", x(2, 3, 4), 3, [0, 2]),
        use("k0 d1", x(4, 6), 0.5, [1]),
        use("k0 d1", zeros_among(4, 12), 0, [1]),
        use("k0 d1", tied(4, 12), math.inf, [1]),
        use("k0 d1", tied(4, 12) - 1, -math.inf, [1], True),
        use("k0", pos(4, 12), -1, [1]),
        use("k0 d1", x(4, 6).float(), 2, [1], False, dtype=torch.float64),
        use("k0 d1", x(4, 6).bfloat16(), 2, [1]),
        use("", x()),
    ],
    "aten.log_softmax.int": [use("k0 d1", x(4, 6), -1), use("d0", x(6), 0), use("k0 d1", x(4, 6).half(), -1, torch.float32)],
    "aten.logcumsumexp.default": [use("k0", x(4, 6), 1)],
    "aten.logsumexp.default": [
        use("k0 d1", x(4, 6), [1]),
        use("d0 d2", 100 * x(2, 3, 4), [0, -1], True),
        use("d0", torch.full((12,), -math.inf, dtype=torch.float64), [0]),
        use("d0 k1", ints(9, 4, 6), [0]),
    ],
    "aten.max.default": [use("d0 d1", x(4, 6)), use("d0 d1", tied(4, 6)), use("d0", ints(9, 12)), use("", x())],
    "aten.max.dim": [
        use("k0 d1", x(4, 6), 1),
        use("k0 d1", tied(4, 12), -1),
        use("d0 k1", tied(12, 2), 0, True),
        use("k0 d1", ints(3, 4, 12), 1),
        use("", x(), 0),
    ],
    "aten.mean.default": [use("d0 d1 P", x(4, 6)), use("P", x())],
    "aten.mean.dim": [
        use("k0 d1 P", x(4, 6), [1]),
        use("d0 k1 d2 P", x(4, 6, 2), [0, -1], True),
        use("d0 d1 P", x(4, 6), []),
        use("d0 d1 P", x(4, 6), None),
        use("k1 P", x(1, 6), [0]),
        use("k0 d1 P", x(4, 6).bfloat16(), [1]),
        use("k0 d1 P", ints(9, 4, 6), [1], dtype=torch.float64),
    ],
    "aten.median.default": [use("", x(4, 6))],
    "aten.median.dim": [use("k0", x(4, 6), 1), use("k1", x(4, 6), 0, True)],
    "aten.min.default": [use("d0 d1", tied(4, 6)), use("d0", ints(9, 12))],
    "aten.min.dim": [use("k0 d1", tied(4, 12), 1), use("d0 k1", tied(12, 2), 0, True)],
    "aten.mode.default": [use("k0", tied(4, 6))],
    "aten.msort.default": [use("k1", x(4, 6))],
    "aten.nanmean.default": [use("d0 d1", gaps(4, 6)), use("k0 d1", gaps(4, 12), [1]), use("d0 k1", gaps(12, 6), [0], True)],
    "aten.nanmedian.default": [use("", gaps(4, 6))],
    "aten.nanmedian.dim": [use("k0", gaps(4, 6), 1)],
    "aten.nanquantile.scalar": [use("k0", gaps(4, 6), 0.3, 1)],
    "aten.nansum.default": [
        use("d0 d1", gaps(4, 6)),
        use("k0 d1", gaps(4, 6), [1], True),
        use("k0 d1", gaps(4, 6), [1], dtype=torch.float32),
    ],
    "aten.norm.Scalar": [use("d0 d1", x(4, 6)), use("d0 d1", x(4, 6), 3)],
    "aten.norm.ScalarOpt_dim": [use("k0 d1", x(4, 6), 2, [1]), use("k0 d1", x(4, 6), None, [1], True), use("k0", pos(4, 6), -2, [1])],
    "aten.pairwise_distance.default": [
        use("b.0 d", x(4, 6), x(4, 6)),
        use("b.1 b.0 d", x(2, 4, 6), x(6), 1.0, 1e-6, True),
        use("d b.0", x(12), x(4, 12), 3.0),
        use("b.0", x(4, 6), x(4, 6), -1.0),
    ],
    "aten.prod.default": [
        use("d0 d1", x(4, 6)),
        use("d0", zeros_among(12)),
        use("d0 d1", ints(4, 4, 6)),
        use("d0 d1", x(4, 6).float(), dtype=torch.float64),
    ],
    "aten.prod.dim_int": [use("k0 d1", zeros_among(4, 12), 1), use("d0 k1", x(12, 6), 0, True), use("d0 k1", bools(4, 6), 0)],
    "aten.quantile.scalar": [use("k0", x(4, 6), 0.3, 1), use("k1", x(4, 6), 0.5, 0, True)],
    "aten.renorm.default": [use("k0", x(4, 6), 2, 0, 1.0), use("k1", x(4, 6, 3), 1, 1, 0.5)],
    "aten.softmax.int": [
        use("k0 d1", x(4, 6), -1),
        use("k0 d1 k2", x(4, 6, 2), 1),
        use("k0 d1", x(4, 12).float(), 1, torch.float64),
        use("k0 d1", x(4, 12).bfloat16(), 1),
        use("", x(), 0),
    ],
    "aten.sort.default": [use("k0", x(4, 6)), use("k1", x(4, 6), 0, True), use("", x())],
    "aten.sort.stable": [use("k0 k2", tied(4, 6, 2), stable=True, dim=1)],
    "aten.std.correction": [
        use("k0 d1", x(4, 6), [1]),
        use("d0 k1", x(4, 6), [0], correction=0, keepdim=True),
        use("d0 d1", x(4, 6)),
        use("k0 d1", torch.ones(4, 6, dtype=torch.float64), [1]),
    ],
    "aten.std.default": [use("d0 d1", x(4, 6)), use("d0 d1", x(4, 6), False)],
    "aten.std.dim": [use("k0 d1", x(4, 6), [1], False), use("d0 k1", x(12, 6), [0], True, True)],
    "aten.std_mean.correction": [use("k0 d1", x(4, 6), [1], correction=2), use("d0 d1", x(4, 6))],
    "aten.std_mean.default": [use("d0 d1", x(4, 6), False)],
    "aten.std_mean.dim": [use("k0 d1", x(4, 6), [1], True, True)],
    "aten.sum.default": [use("d0 d1 P", x(4, 6)), use("d0 d1", bools(4, 6)), use("d0 d1 P", ints(9, 4, 6)), use("P", x())],
    "aten.sum.dim_IntList": [
        use("k0 d1 P", x(4, 6), [1]),
        use("d0 k1 d2 P", x(4, 6, 2), [0, -1], True),
        use("d0 d1 P", x(4, 6), []),
        use("d0 d1 P", x(4, 6), None),
        use("k0 d1", bools(4, 6), [1]),
        use("d0 k1", Buffer(x(4, 6)), [0], dtype=torch.int64),
    ],
    "aten.topk.default": [
        use("k0 d1", x(4, 6), 2),
        use("d0 k1", x(12, 6), 9, 0, False),
        use("k0 d1 k2", x(2, 12, 4), 1, -2, True, False),
        use("k0 d1", Buffer(x(4, 12)), 12),
        use("k0", ints(9, 4, 12), 2),
        use("", x(), 1, 0),
    ],
    "aten.trace.default": [use("", x(4, 6))],
    "aten.trapezoid.dx": [use("k0", x(4, 6), dx=0.5), use("k1", x(4, 6), dim=0)],
    "aten.var.correction": [
        use("k0 d1", x(4, 6), [-1]),
        use("d0 d1", x(4, 6)),
        use("d0 k1 d2", x(4, 6, 2), [0, 2], correction=0, keepdim=True),
        use("k0 d1", x(4, 6).bfloat16(), [1]),
    ],
    "aten.var.default": [use("d0 d1", x(4, 6)), use("d0 d1", x(4, 6), False)],
    "aten.var.dim": [use("k0 d1", x(4, 6), [1]), use("d0 k1", x(12, 6), [0], False, True), use("d0 d1", x(4, 6), None, False)],
    "aten.var_mean.correction": [use("k0 d1", x(4, 6), [1], correction=0, keepdim=True), use("d0 d1", x(4, 6))],
    "aten.var_mean.default": [use("d0 d1", x(4, 6))],
    "aten.var_mean.dim": [use("k0 d1", x(4, 6), [1], False)],
}
