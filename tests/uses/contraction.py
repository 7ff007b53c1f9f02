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
}
