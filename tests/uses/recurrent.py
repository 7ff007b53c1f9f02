"""Uses of the ops of autoshard/ops/recurrent.py: see tests/test_rules.py."""

from torch import Tensor

from uses.arguments import Use, use, x


def params(gates: int, inputs: int, units: int, layers: int = 1, directions: int = 1, biases: bool = True) -> list[Tensor]:
    found = []
    for layer in range(layers):
        width = inputs if layer == 0 else units * directions
        for _ in range(directions):
            found += [x(gates * units, width), x(gates * units, units)]
            found += [x(gates * units), x(gates * units)] if biases else []
    return found


# fmt: off
USES: dict[str, list[Use]] = {
    "aten.gru.input": [
        use("b h", x(3, 4, 5), x(1, 4, 6), params(3, 5, 6), True, 1, 0.0, True, False, False),
        use("b h", x(4, 3, 5), x(4, 4, 6), params(3, 5, 6, 2, 2, False), False, 2, 0.0, True, True, True),
    ],
    "aten.gru_cell.default": [use("b h", x(4, 5), x(4, 6), *params(3, 5, 6)), use("b h", x(4, 5), x(4, 6), *params(3, 5, 6, biases=False))],
    "aten.lstm.input": [
        use("b h", x(3, 4, 5), [x(1, 4, 6), x(1, 4, 6)], params(4, 5, 6), True, 1, 0.0, True, False, False),
        use("b h", x(4, 3, 5), [x(4, 4, 6), x(4, 4, 6)], params(4, 5, 6, 2, 2), True, 2, 0.0, True, True, True),
        use("b", x(3, 4, 5), [x(1, 4, 2), x(1, 4, 6)], [x(24, 5), x(24, 2), x(24), x(24), x(2, 6)], True, 1, 0.0, True, False, False),
        use("b", x(257, 2, 1), [x(1, 2, 2), x(1, 2, 2)], params(4, 1, 2), True, 1, 0.0, False, False, False),
    ],
    "aten.lstm_cell.default": [
        use("b h", x(4, 5), [x(4, 6), x(4, 6)], *params(4, 5, 6)),
        use("b h", x(4, 5), [x(4, 6), x(4, 6)], *params(4, 5, 6, biases=False)),
    ],
    "aten.rnn_relu.input": [use("b h", x(3, 4, 5), x(1, 4, 6), params(1, 5, 6), True, 1, 0.0, True, False, False)],
    "aten.rnn_tanh.input": [use("b h", x(3, 4, 5), x(1, 4, 6), params(1, 5, 6), True, 1, 0.0, True, False, False)],
}
