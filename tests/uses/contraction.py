"""Uses of the ops of autoshard/ops/contraction.py: see tests/test_rules.py."""

from torch.nn import Buffer

from uses.arguments import Use, use, x

# fmt: off
USES: dict[str, list[Use]] = {
    "aten.addmm.default": [
        use("n m k P", x(6), x(4, 12), x(12, 6)),
        use("m n k P", x(4, 6), x(4, 12), x(12, 6), beta=0.5, alpha=2),
        use("n m k P", x(1, 6), x(4, 12), x(12, 6)),
        use("m k n P", x(1), x(4, 12), x(12, 6)),
    ],
    "aten.bmm.default": [use("b m k n P", x(4, 2, 6), x(4, 6, 8))],
    "aten.einsum.default": [
        use("b q d k P", "bqd,bkd->bqk", [x(4, 6, 2), x(4, 8, 2)]),
        use("t h e c P", "th,tec->ech", [x(4, 6), x(4, 2, 2)]),
        use("e c h f P", "e c h, e h f -> e c f", [x(2, 4, 6), x(2, 6, 4)]),
        use("i k P", "ij,jk", [x(4, 3), x(3, 6)]),
        use("i j P", "ij->j", [x(4, 6)]),
        use("i j k l P", "ij,jk,kl->il", [x(4, 6), x(6, 2), x(2, 8)]),
        use("i k P", "ij,jk->ik", [x(4, 1), x(3, 6)]),
        use("P", "i,->i", [x(1), x()]),
    ],
    "aten.linear.default": [
        use("b.1 b.0 i o P", x(4, 2, 6), x(12, 6), x(12)),
        use("b.0 i o P", x(4, 6), x(12, 6)),
        use("i o P", x(6), x(12, 6), x(12)),
        use("b.0 i o P", Buffer(x(4, 6)), x(12, 6), x(12)),
    ],
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
    "aten.mm.default": [use("m k n P", x(4, 6), x(6, 12))],
    "aten.addbmm.default": [use("m n b k P", x(4, 8), x(2, 4, 6), x(2, 6, 8), beta=0.5), use("n b m k P", x(8), x(2, 4, 6), x(2, 6, 8))],
    "aten.addmv.default": [use("m k P", x(4), x(4, 6), x(6), alpha=2.0), use("m k P", x(), x(4, 6), x(6))],
    "aten.addr.default": [use("m n P", x(4, 6), x(4), x(6), beta=0.5)],
    "aten.baddbmm.default": [use("b m n k P", x(2, 4, 8), x(2, 4, 6), x(2, 6, 8)), use("n b m k P", x(1, 1, 8), x(2, 4, 6), x(2, 6, 8))],
    "aten.bilinear.default": [
        use("b.0 i j o P", x(4, 2), x(4, 6), x(8, 2, 6), x(8)),
        use("b.1 b.0 i j o P", x(2, 4, 2), x(2, 4, 6), x(8, 2, 6)),
    ],
    "aten.cdist.default": [use("b.0 m n", x(2, 4, 3), x(2, 6, 3)), use("m n", x(4, 3), x(6, 3), 1.0)],
    "aten.dot.default": [use("k P", x(6), x(6))],
    "aten.ger.default": [use("m n P", x(4), x(6))],
    "aten.inner.default": [use("m0 k n0 P", x(4, 6), x(2, 6)), use("k P", x(6), x(6)), use("m0 m1 k P", x(4, 2, 6), x(6))],
    "aten.kron.default": [use("a2 a1 b2 b1 P", x(4, 2), x(2, 6)), use("a1 b2 b1 P", x(4), x(2, 6))],
    "aten.linalg_cross.default": [use("d0 P", x(4, 3), x(4, 3)), use("d1 P", x(3, 4), x(3, 4), dim=0)],
    "aten.linalg_matmul.default": [use("m k n P", x(4, 6), x(6, 12))],
    "aten.linalg_vecdot.default": [use("d0 d1 P", x(4, 6), x(4, 6)), use("d0 d1 P", x(4, 6), x(4, 6), dim=0)],
    "aten.mv.default": [use("m k P", x(4, 6), x(6))],
    "aten.outer.default": [use("m n P", x(4), x(6))],
    "aten.vdot.default": [use("k P", x(6), x(6))],
}
