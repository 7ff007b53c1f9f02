"""Uses of the ops of autoshard/ops/random.py: see tests/test_rules.py."""

from torch.nn import Buffer

from uses.arguments import Use, pos, use, x

# fmt: off
USES: dict[str, list[Use]] = {
    "aten.alpha_dropout.default": [use("p.1 p.0", x(4, 6), 0.5, False), use("p.1 p.0", x(4, 6), 0.0, True)],
    "aten.dropout.default": [use("p.1 p.0 P", x(4, 6), 0.5, False), use("p.1 p.0 P", x(4, 6), 0.0, True)],
    "aten.feature_alpha_dropout.default": [use("b c s.1 s.0", x(4, 6, 2, 4), 0.5, False), use("b c", x(4, 6), 0.0, True)],
    "aten.feature_dropout.default": [use("b c s.1 s.0 P", x(4, 6, 2, 4), 0.5, False), use("b c P", x(4, 6), 0.0, True)],
    "aten.native_dropout.default": [use("p.1 p.0", x(4, 6), 0.5, False), use("p.1 p.0", x(4, 6), 0.0, True)],
}
# Ops that draw whatever their arguments: what is proved is which ranks draw alike.
DRAWN: dict[str, Use] = {
    "aten.bernoulli.default": use("p.1 p.0", x(8, 12).sigmoid().detach()),
    "aten.bernoulli.p": use("p.1 p.0", Buffer(x(8, 12)), 0.5),
    "aten.cauchy.default": use("p.1 p.0", Buffer(x(8, 12))),
    "aten.exponential.default": use("p.1 p.0", Buffer(x(8, 12))),
    "aten.geometric.default": use("p.1 p.0", Buffer(x(8, 12)), 0.3),
    "aten.log_normal.default": use("p.1 p.0", Buffer(x(8, 12))),
    "aten.multinomial.default": use("b.0", pos(8, 12), 6),
    "aten.normal_functional.default": use("p.1 p.0", Buffer(x(8, 12))),
    "aten.rand_like.default": use("p.1 p.0", Buffer(x(8, 12))),
    "aten.randint_like.default": use("p.1 p.0", Buffer(x(8, 12)), 9),
    "aten.randint_like.low_dtype": use("p.1 p.0", Buffer(x(8, 12)), 2, 9),
    "aten.randn_like.default": use("p.1 p.0", Buffer(x(8, 12))),
    "aten.random.default": use("p.1 p.0", Buffer(x(8, 12))),
    "aten.random.from": use("p.1 p.0", Buffer(x(8, 12)), 2, 9),
    "aten.random.to": use("p.1 p.0", Buffer(x(8, 12)), 9),
    "aten.uniform.default": use("p.1 p.0", Buffer(x(8, 12))),
}
