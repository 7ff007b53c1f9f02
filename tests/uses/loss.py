"""Uses of the ops of autoshard/ops/loss.py: see tests/test_rules.py."""

from torch.nn import Buffer

from uses.arguments import Use, ints, labels, pos, use, x

# fmt: off
USES: dict[str, list[Use]] = {
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
}
