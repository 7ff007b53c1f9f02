"""Uses of the ops of autoshard/ops/attention.py: see tests/test_rules.py."""

from uses.arguments import Use, causal, use, x

# fmt: off
USES: dict[str, list[Use]] = {
    "aten.scaled_dot_product_attention.default": [
        use("b.1 b.0 q e P", x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4)),
        use("b.1 b.0 e P", x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), None, 0.0, True),
        use("b.1 b.0 q e P", x(2, 4, 6, 2), x(2, 4, 4, 2), x(2, 4, 4, 6), x(6, 4)),
        use("b.1 b.0 q e P", x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), causal(6)),
        use("b.1 b.0 q e P", x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 1, 1, 6)),
        use("b.1 b.0 q e P", x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 6), scale=0.3),
        use("b.0 g r q e P", x(2, 8, 6, 4), x(2, 2, 6, 4), x(2, 2, 6, 4), enable_gqa=True),
        use("b.0 g r e P", x(2, 8, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), None, 0.0, True, enable_gqa=True),
        use("b.0 g r q e P", x(2, 8, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), x(6, 6), enable_gqa=True),
        use("b.0 g r q e P", x(2, 8, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 1, 6, 6), enable_gqa=True),
        use("b.0 g r q e P", x(2, 8, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 8, 6, 6), enable_gqa=True),
        use("b.0 g r q e P", x(2, 8, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), x(8, 6, 6), enable_gqa=True),
        use("b.1 b.0 e P", x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), None, 0.0, True, enable_gqa=True),
        use("b.0 q e P", x(4, 6, 4), x(4, 6, 4), x(4, 6, 4)),
    ],
}
