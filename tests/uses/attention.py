"""Uses of the ops of autoshard/ops/attention.py: see tests/test_rules.py."""

from uses.arguments import Use, bools, causal, use, x

# fmt: off
USES: dict[str, list[Use]] = {
    "aten.scaled_dot_product_attention.default": [
        use("b.1 b.0 q k e q&k P", x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4)),
        use("b.1 b.0 s k e s&k P", x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), None, 0.0, True),
        use("b.1 b.0 s k e s&k P", x(2, 4, 6, 2), x(2, 4, 12, 2), x(2, 4, 12, 6), None, 0.0, True),
        use("b.1 b.0 s k e s&k P", x(2, 4, 12, 2), x(2, 4, 6, 2), x(2, 4, 6, 6), None, 0.0, True, scale=0.3),
        use("b.1 b.0 k e P", x(2, 4, 1, 4), x(2, 4, 6, 4), x(2, 4, 6, 4)),
        use("b.1 b.0 q k e q&k P", x(2, 4, 6, 2), x(2, 4, 12, 2), x(2, 4, 12, 6), x(6, 12)),
        use("b.1 b.0 q k e q&k P", x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), causal(6)),
        use("b.1 b.0 q k e q&k P", x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), bools(2, 1, 6, 6)),
        use("b.1 b.0 q k e q&k P", x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 1, 1, 6)),
        use("b.1 b.0 q k e q&k P", x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), x(6, 1)),
        use("b.1 b.0 q k e q&k P", x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 6), scale=0.3),
        use("b.0 g r q k e q&k g&r P", x(2, 8, 6, 4), x(2, 2, 6, 4), x(2, 2, 6, 4), enable_gqa=True),
        use("b.0 g r s k e s&k g&r P", x(2, 8, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), None, 0.0, True, enable_gqa=True),
        use("b.0 g r q k e q&k g&r P", x(2, 8, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), x(6, 6), enable_gqa=True),
        use("b.0 g r q k e q&k g&r P", x(2, 8, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), bools(2, 1, 6, 6), enable_gqa=True),
        use("b.0 g r q k e q&k g&r P", x(2, 8, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 8, 6, 6), enable_gqa=True),
        use("b.0 g r q k e q&k g&r P", x(2, 8, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), x(8, 6, 6), enable_gqa=True),
        use("b.1 b.0 s k e s&k P", x(2, 4, 6, 4), x(2, 4, 6, 4), x(2, 4, 6, 4), None, 0.0, True, enable_gqa=True),
        use("b.0 r q k e q&k g&r P", x(2, 6, 6, 4), x(2, 3, 6, 4), x(2, 3, 6, 4), enable_gqa=True),
        use("b.0 q k e q&k P", x(4, 6, 4), x(4, 6, 4), x(4, 6, 4)),
    ],
}
