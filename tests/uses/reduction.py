"""Uses of the ops of autoshard/ops/reduction.py: see tests/test_rules.py."""

import torch
from torch.nn import Buffer

from uses.arguments import Use, bools, ints, use, x

# fmt: off
USES: dict[str, list[Use]] = {
    "aten._softmax.default": [use("d0", x(4, 6), -1, False), use("d0 d2", x(4, 6, 2), 1, False)],
    "aten.amax.default": [use("k0", x(4, 6), [1]), use("k0", x(4, 6), [-1], True), use("", x(4, 6))],
    "aten.amin.default": [use("k1", x(4, 6, 2), [0, 2]), use("k1", x(4, 6), [0], True)],
    "aten.argmax.default": [use("d0", x(4, 6), -1), use("", x(4, 6)), use("d1", x(4, 6), 0, True), use("", x(6), 0)],
    "aten.cumsum.default": [use("d0", x(4, 6), 1), use("d1", x(4, 6), -2)],
    "aten.log_softmax.int": [use("d0", x(4, 6), -1), use("", x(6), 0)],
    "aten.mean.default": [use("d0 d1 P", x(4, 6)), use("P", x())],
    "aten.mean.dim": [
        use("k0 d1 P", x(4, 6), [1]),
        use("d0 k1 d2 P", x(4, 6, 2), [0, -1], True),
        use("d0 d1 P", x(4, 6), []),
        use("d0 d1 P", x(4, 6), None),
        use("k1 P", x(1, 6), [0]),
    ],
    "aten.softmax.int": [use("d0", x(4, 6), -1), use("d0 d2", x(4, 6, 2), 1)],
    "aten.std.correction": [use("k0", x(4, 6), [1]), use("k1", x(4, 6), [0], correction=0, keepdim=True), use("", x(4, 6))],
    "aten.sum.default": [use("d0 d1 P", x(4, 6)), use("d0 d1", bools(4, 6)), use("d0 d1 P", ints(9, 4, 6)), use("P", x())],
    "aten.sum.dim_IntList": [
        use("k0 d1 P", x(4, 6), [1]),
        use("d0 k1 d2 P", x(4, 6, 2), [0, -1], True),
        use("d0 d1 P", x(4, 6), []),
        use("d0 d1 P", x(4, 6), None),
        use("k0 d1", bools(4, 6), [1]),
        use("d0 k1", Buffer(x(4, 6)), [0], dtype=torch.int64),
    ],
    "aten.var.correction": [use("k0", x(4, 6), [-1]), use("", x(4, 6)), use("k1", x(4, 6, 2), [0, 2], correction=0, keepdim=True)],
}
