"""Random ops: a piece of a value that is split draws by itself, replicas draw alike. Factories have no row: they are drawn whole."""

from __future__ import annotations

from autoshard.ops.row import Call, Rule, rows


def _dropout(call: Call) -> bool:
    return bool(call.get("train") is not False and call.get("p"))


def _always(call: Call) -> bool:
    return True


# Ops that read their operand's shape alone; most have no derivative.
SHAPE_ALONE = {f"aten.{name}.default" for name in ("rand_like", "randn_like", "randint_like", "uniform", "normal_functional", "random")}
SHAPE_ALONE |= {f"aten.{name}.default" for name in ("exponential", "log_normal", "cauchy", "geometric")}
SHAPE_ALONE |= {"aten.bernoulli.p", "aten.randint_like.low_dtype", "aten.random.from", "aten.random.to"}

ROWS: dict[str, Rule] = {
    **rows("dropout", Rule("~p* -> p*", is_random=_dropout)),
    **rows("native_dropout", Rule("p* -> p*, p*", is_random=_dropout)),
    **rows("alpha_dropout", Rule("p* -> p*", is_random=_dropout)),
    # One draw per sample and channel, whatever lies behind them.
    **rows("feature_dropout", Rule("~b c s* -> b c s*", is_random=_dropout, undrawn=frozenset("s"))),
    **rows("feature_alpha_dropout", Rule("b c s* -> b c s*", is_random=_dropout, undrawn=frozenset("s"))),
    **{op: Rule("p* -> p*", is_random=_always) for op in sorted({"aten.bernoulli.default", *SHAPE_ALONE})},
    **rows("multinomial", Rule("b* [n] -> b* [k]", is_random=_always)),
}
