"""Uses of the ops of autoshard/ops/convolution.py: see tests/test_rules.py."""

from uses.arguments import Use, use, x

# fmt: off
USES: dict[str, list[Use]] = {
    "aten.adaptive_avg_pool1d.default": [use("b.1 b.0", x(4, 6, 8), [2]), use("b.0", x(6, 8), [3])],
    "aten.adaptive_avg_pool2d.default": [use("b.1 b.0", x(4, 6, 4, 8), [2, 1]), use("b.0", x(6, 4, 4), [1, 1])],
    "aten.avg_pool1d.default": [use("b.1 b.0", x(4, 6, 8), [2]), use("b.0", x(6, 8), [3], [1], [1])],
    "aten.avg_pool2d.default": [use("b.1 b.0", x(4, 6, 8, 8), [2, 2]), use("b.0", x(6, 4, 4), [2, 2], [1, 1])],
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
    "aten.max_pool1d.default": [use("b.1 b.0", x(4, 6, 8), [2])],
    "aten.max_pool2d.default": [use("b.1 b.0", x(4, 6, 8, 8), [2, 2]), use("b.0", x(6, 4, 4), [2, 2])],
}
