"""Uses of the ops of autoshard/ops/indexing.py: see tests/test_rules.py."""

import torch
from torch.nn import Buffer

from uses.arguments import Use, bools, ints, use, x

# fmt: off
USES: dict[str, list[Use]] = {
    "aten.bucketize.Tensor": [
        use("b.1 b.0", Buffer(x(4, 6)), Buffer(x(5).sort().values)),
        use("b.0", ints(9, 4), ints(9, 3).sort().values, right=True),
    ],
    "aten.diag_embed.default": [use("d0 P", x(4, 6)), use("d0 d1 P", x(2, 4, 6), 1, 0, -2)],
    "aten.diagonal.default": [use("d0 P", x(4, 6, 5), 0, -2, -1), use("d1 P", x(4, 6, 5), 1, 0, 2), use("P", x(4, 4))],
    "aten.diagonal_scatter.default": [use("d0 P", x(4, 6, 5), x(4, 5), 0, 1, 2), use("P", x(4, 4), x(3), 1)],
    "aten.fill.Scalar": [use("p.1 p.0", x(4, 6), 2.0)],
    "aten.fill.Tensor": [use("p.1 p.0", x(4, 6), x())],
    "aten.gather.default": [
        use("d0 u i P", x(4, 12), 1, ints(12, 4, 6)),
        use("u d1 i P", x(12, 6), -2, ints(12, 4, 6)),
        use("u i P", x(12, 6), 0, ints(12, 4, 5)),
        use("d1", bools(12, 6), 0, ints(12, 1, 6)),
    ],
    "aten.index.Tensor": [
        use("u r1 b.1 b.0 P", x(12, 6), [ints(12, 4, 6, low=-12)]),
        use("r0 u b.0 P", x(4, 12), [None, ints(12, 6)]),
        use("u v b.1 b.0 P", x(6, 12), [ints(6, 4, 1), ints(12, 6, low=-12)]),
        use("u r1 v b.0 P", x(6, 4, 12), [ints(6, 2), None, ints(12, 2)]),
        use("r0 u v r3 b.1 b.0 P", x(2, 6, 6, 4), [None, ints(6, 2, 6), ints(6, 6)]),
        use("u v w b.0 P", x(6, 6, 6, 6), [ints(6, 4), ints(6, 4), ints(6, 4), ints(6, 4)]),
        use("b.0", bools(6, 12), [ints(6, 4), ints(12, 1)]),
        use("u v P", x(6, 4), [ints(6), ints(4)]),
        use("r1 v b.0 P", ints(9, 1, 6, 12), [ints(1, 4), None, ints(12, 4)]),
    ],
    "aten.index_add.default": [
        use("u d1 i P", x(12, 6), 0, ints(12, 4), x(4, 6), alpha=2.0),
        use("d0 u P", x(4, 12), -1, ints(12, 1), x(4, 1)),
    ],
    "aten.index_copy.default": [
        use("u d1 P", x(12, 6), 0, ints(12, 1), x(1, 6)),
        use("d0 u P", x(4, 12), 1, torch.tensor([3, 8]), x(4, 2)),
    ],
    "aten.index_fill.int_Scalar": [use("u d1", x(12, 6), 0, ints(12, 4, low=-12), 2.0), use("d0 u", x(4, 12), 1, ints(12), 0.0)],
    "aten.index_fill.int_Tensor": [use("u d1 P", x(12, 6), 0, ints(12, 4), x())],
    "aten.index_put.default": [
        use("u r1 P", x(12, 6), [torch.tensor([3, 8, 0, -1])], x(4, 6)),
        use("u r1 b0 P", x(12, 6), [ints(12, 4)], x(4, 6), True),
        use("u v b0 b1 P", x(6, 12), [ints(6, 4, 1), ints(12, 6, low=-12)], x(4, 6), True),
        use("u v P", x(6, 12), [ints(6, 4), ints(12, 4)], x(), True),
        use("r0 u r2 b0 P", x(2, 6, 4), [None, ints(6, 4)], x(4, 4), True),
        use("r0 u r2 P", x(2, 6, 4), [None, ints(6, 4)], x(4), True),
        use("u r1 b1 P", x(12, 6), [ints(12, 4, 6)], x(1, 6, 6), True),
        use("u r1 v P", x(6, 4, 12), [torch.tensor([0, 5]), None, torch.tensor([11, 2])], x(2, 4)),
        use("u r1 P", ints(9, 12, 6), [torch.tensor([3, 8])], ints(9)),
        use("d0 d1 P", x(4, 6), [bools(4, 6)], x()),
        use("d0 d1 P", x(4, 6), [bools(4)], x(6)),
        use("d0 d1 P", x(4, 6), [bools(4)], x(1, 6)),
        use("P", x(4), [torch.tensor([True, False, True, True])], x(3)),
    ],
    "aten.index_select.default": [use("u d1 i P", x(12, 6), 0, ints(12, 4)), use("d0 u i P", x(4, 12), -1, ints(12, 6))],
    "aten.masked_fill.Tensor": [use("p.1 p.0 P", x(4, 6), bools(4, 6), x()), use("p.1 p.0 P", x(4, 6), bools(6), x())],
    "aten.masked_scatter.default": [use("P", x(4, 6), bools(4, 6), x(24)), use("P", x(4, 6), bools(6), x(4, 6))],
    "aten.meshgrid.default": [use("d0 d1 d2", [x(4), x(6), x(2)]), use("d1", [x(), x(6)])],
    "aten.meshgrid.indexing": [use("d0 d1", [x(4), x(6)], indexing="ij"), use("d0 d1 d2", [x(4), x(6), x(2)], indexing="xy")],
    "aten.one_hot.default": [use("b.1 b.0 c", ints(12, 4, 6), 12), use("b.0", ints(5, 4), 5), use("c", ints(12), 12)],
    "aten.repeat_interleave.self_int": [
        use("d0 d1 P", x(4, 6), 2, 1),
        use("d0 d1 P", x(4, 6), 3, 0),
        use("d0 d1 P", x(4, 6), 2),
    ],
    "aten.scatter.reduce": [use("u d1", Buffer(x(12, 6)), 0, ints(12, 4, 6), Buffer(x(4, 6)), reduce="add")],
    "aten.scatter.src": [
        use("u d1 P", x(12, 6), 0, torch.arange(4).view(4, 1).expand(4, 6), x(4, 6)),
        use("d0 u P", x(4, 12), 1, torch.tensor([[3, 7]] * 4), Buffer(x(4, 6))),
        use("u P", x(12, 6), 0, torch.tensor([[3, 7]]), Buffer(x(2, 4))),
    ],
    "aten.scatter.value": [use("u d1", x(12, 6), 0, ints(12, 4, 6), 2.0)],
    "aten.scatter.value_reduce": [use("u d1", Buffer(x(12, 6)), 0, ints(12, 4, 6), 2.0, reduce="multiply")],
    "aten.scatter_add.default": [
        use("u d1 i P", x(12, 6), 0, ints(12, 4, 6), x(4, 6)),
        use("d0 u P", x(4, 12), -1, ints(12, 4, 6), Buffer(x(4, 8))),
    ],
    "aten.scatter_reduce.two": [
        use("u d1 i P", x(12, 6), 0, ints(12, 4, 6), x(4, 6), "sum"),
        use("u d1", x(12, 6), 0, ints(12, 4, 6), x(4, 6), "sum", include_self=False),
        use("u d1", x(12, 6), 0, ints(12, 4, 6), x(4, 6), "amax"),
        use("u d1", x(12, 6), 0, ints(12, 4, 6), x(4, 6), "mean"),
        use("d0 u", x(4, 12), 1, ints(12, 4, 6), x(4, 6), "prod"),
    ],
    "aten.searchsorted.Tensor": [
        use("b.1 b.0", Buffer(x(5).sort().values), Buffer(x(4, 6))),
        use("b.0 q", Buffer(x(4, 5).sort().values), Buffer(x(4, 6))),
        use("b.0 q", ints(9, 4, 5), ints(9, 4, 6), sorter=torch.argsort(ints(9, 4, 5), 1)),
    ],
    "aten.select_scatter.default": [use("d0 P", x(4, 6), x(4), 1, 2), use("d1 P", x(4, 6), x(6), 0, -1)],
    "aten.slice_scatter.default": [use("d0 P", x(4, 6), x(4, 2), 1, 2, 4), use("d1 P", x(4, 6), x(4, 6))],
    "aten.take.default": [use("b.1 b.0 P", x(4, 3), ints(12, 4, 6))],
    "aten.take_along_dim.default": [
        use("d0 u i P", x(4, 12), ints(12, 4, 6), 1),
        use("d0 u i P", x(4, 12), ints(12, 1, 6), 1),
        use("P", x(4, 3), ints(12, 6)),
    ],
    "aten.tril.default": [use("r c P", x(4, 6)), use("b.0 r c P", x(2, 6, 4), -2), use("b.0 r c", bools(2, 6, 4), 1)],
    "aten.triu.default": [use("r c P", x(6, 4), 1), use("b.0 r c P", x(2, 4, 6), -2)],
}
