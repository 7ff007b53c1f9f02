"""Uses of the ops of autoshard/ops/normalization.py: see tests/test_rules.py."""

from torch.nn import Buffer

from uses.arguments import Use, pos, use, x

# fmt: off
USES: dict[str, list[Use]] = {
    "aten._fused_rms_norm.default": [
        use("b.1 b.0 n0", x(4, 2, 6), [6], x(6), 1e-5),
        use("b.0 n0", x(4, 12), [12], None, None),
        use("b.0 n0 n1", x(2, 4, 6), [4, 6], x(4, 6), None),
    ],
    "aten.batch_norm.default": [
        use("b s.1", x(4, 6, 2, 3), x(6), x(6), Buffer(x(6)), Buffer(pos(6)), True, 0.1, 1e-5, False),
        use("b c", x(12, 6), x(6), x(6), None, None, True, 0.1, 1e-5, False),
        use("b s.0", x(4, 6, 4), None, None, Buffer(x(6)), Buffer(pos(6)), True, 0.3, 1e-5, False),
        use("b s.0", x(4, 6, 4), x(6), None, Buffer(x(6)), Buffer(pos(6)), True, 0.3, 1e-5, False),
        use("b c s.0", x(4, 6, 4), None, None, None, None, True, 0.3, 1e-5, False),
        use("b c s.0", x(4, 6, 4), x(6), x(6), Buffer(x(6)), Buffer(pos(6)), False, 0.1, 1e-5, False),
        use("b c", x(4, 6), None, None, Buffer(x(6)), Buffer(pos(6)), False, 0.1, 1e-5, False),
    ],
    "aten.group_norm.default": [
        use("b g s.0", x(2, 12, 6), 6, x(12), x(12)),
        use("b g c s.1 s.0", x(2, 8, 2, 6), 2, x(8), None, 1e-3),
        use("b c s.0", x(6, 12, 4), 3),
        use("b c s.0", x(2, 6, 4), 1, x(6), None),
        use("b g", x(4, 24), 6, x(24), x(24)),
        use("g s.0", x(1, 12, 4), 12, x(12), x(12)),
    ],
    "aten.instance_norm.default": [
        use("b c s.0", x(2, 6, 12), None, None, None, None, True, 0.1, 1e-5, False),
        use("b s.1 s.0", x(4, 3, 2, 4), x(3), x(3), None, None, True, 0.1, 1e-4, False),
        use("", x(4, 6, 4), x(6), x(6), Buffer(x(6)), Buffer(pos(6)), True, 0.3, 1e-5, False),
        use("b c t.0", x(4, 6, 4), x(6), x(6), Buffer(x(6)), Buffer(pos(6)), False, 0.3, 1e-5, False),
    ],
    "aten.layer_norm.default": [
        use("b.1 b.0 n0", x(4, 2, 6), [6], x(6), x(6)),
        use("b.0 n0 n1", x(4, 2, 6), [2, 6], x(2, 6), x(2, 6)),
        use("b.0 n0", x(4, 12), [12]),
        use("b.0 n0", x(4, 6), [6], None, x(6)),
        use("n0", x(12), [12], x(12), None, 1e-3),
    ],
    "aten.native_layer_norm.default": [
        use("b.1 b.0 n0", x(4, 2, 6), [6], x(6), x(6), 1e-5),
        use("b.0 n0", x(4, 6), [6], None, None, 1e-5),
        use("b.0 n1", x(6, 3, 4), [3, 4], x(3, 4), None, 1e-5),
        use("b.0", x(4, 6).bfloat16(), [6], None, None, 1e-5),
    ],
    "aten.rms_norm.default": [
        use("b.1 b.0 n0", x(4, 2, 6), [6], x(6)),
        use("b.0 n0", x(4, 12), [12]),
        use("b.0 n0 n1", x(2, 4, 6), [4, 6], x(4, 6), 1e-3),
    ],
}
