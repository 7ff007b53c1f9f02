"""Uses of the ops of autoshard/ops/random.py: see tests/test_rules.py."""

from uses.arguments import Use, use, x

# fmt: off
USES: dict[str, list[Use]] = {
    "aten.dropout.default": [use("p.1 p.0 P", x(4, 6), 0.5, False), use("p.1 p.0 P", x(4, 6), 0.0, True)],
}
