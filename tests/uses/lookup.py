"""Uses of the ops of autoshard/ops/lookup.py: see tests/test_rules.py."""

from torch.nn import Buffer

from uses.arguments import Use, ints, use, x

# fmt: off
USES: dict[str, list[Use]] = {
    "aten.embedding.default": [
        use("v h b.1 b.0 P", x(12, 6), ints(12, 4, 8)),
        use("v h b.1 b.0 P", x(12, 6), ints(12, 4, 6), 3),
        use("v h b.0 P", x(12, 6), ints(12, 4), 0),
        use("v h P", x(12, 6), ints(12)),
        use("h P", x(12, 6), ints(12, 24), -1, True),
        use("v h b.0 P", Buffer(x(12, 6)), ints(12, 4)),
    ],
}
