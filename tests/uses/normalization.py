"""Uses of the ops of autoshard/ops/normalization.py: see tests/test_rules.py."""

from torch.nn import Buffer

from uses.arguments import Use, pos, use, x

# fmt: off
USES: dict[str, list[Use]] = {
    "aten.batch_norm.default": [
        use("b s.1", x(4, 6, 2, 3), x(6), x(6), Buffer(x(6)), Buffer(pos(6)), True, 0.1, 1e-5, False),
        use("b c", x(12, 6), x(6), x(6), None, None, True, 0.1, 1e-5, False),
        use("b s.0", x(4, 6, 4), None, None, Buffer(x(6)), Buffer(pos(6)), True, 0.3, 1e-5, False),
        use("b s.0", x(4, 6, 4), x(6), None, Buffer(x(6)), Buffer(pos(6)), True, 0.3, 1e-5, False),
        use("b c s.0", x(4, 6, 4), None, None, None, None, True, 0.3, 1e-5, False),
        use("b c s.0", x(4, 6, 4), x(6), x(6), Buffer(x(6)), Buffer(pos(6)), False, 0.1, 1e-5, False),
        use("b c", x(4, 6), None, None, Buffer(x(6)), Buffer(pos(6)), False, 0.1, 1e-5, False),
    ],
    "aten.layer_norm.default": [
        use("b.1 b.0", x(4, 2, 6), [6], x(6), x(6)),
        use("b.0", x(4, 2, 6), [2, 6], x(2, 6), x(2, 6)),
        use("b.0", x(4, 6), [6]),
        use("b.0", x(4, 6), [6], None, x(6)),
        use("", x(6), [6], x(6)),
    ],
    "aten.native_layer_norm.default": [use("b.1 b.0", x(4, 2, 6), [6], x(6), x(6), 1e-5), use("b.0", x(4, 6), [6], None, None, 1e-5)],
    "aten.rms_norm.default": [use("b.1 b.0", x(4, 2, 6), [6], x(6)), use("b.0", x(4, 6), [6])],
}
