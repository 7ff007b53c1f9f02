"""Rules found by execution: of ops whose row is known, at least what the row allows; of custom ops, one row to register."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import autoshard
from autoshard.equations import strategies
from autoshard.errors import RuleError
from autoshard.mesh import MeshSpec
from autoshard.program import facts, op_name
from autoshard.rules import RULES, Rule, register_rule
from autoshard.testing import OpCase, UnsoundRuleError, check_rule, discover_rule

aten = torch.ops.aten
_generator = torch.Generator().manual_seed(0)


def x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=_generator)


def ints(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=_generator)


# An op, its arguments, the equation that must be found; what the row splits and execution on plain pieces cannot.
KNOWN: dict[str, tuple[Any, tuple, str, str]] = {
    "linear": (aten.linear.default, (x(4, 6), x(12, 6), x(12)), "~a b, ~c b, +c -> a c", ""),
    "linear without bias": (aten.linear.default, (x(4, 6), x(12, 6)), "~a b, ~c b -> a c", ""),
    "mm": (aten.mm.default, (x(4, 6), x(6, 12)), "~a b, ~b c -> a c", ""),
    "bmm": (aten.bmm.default, (x(4, 6, 12), x(4, 12, 8)), "~a b c, ~a c d -> a b d", ""),
    "addmm": (aten.addmm.default, (x(12), x(4, 6), x(6, 12)), "+a, ~b c, ~c a -> b a", ""),
    "layer_norm": (aten.layer_norm.default, (x(4, 6, 12), [12], x(12), x(12)), "a b [w0], +[w1], +[w2] -> a b [w3]", "n0"),
    "softmax": (aten.softmax.int, (x(4, 6, 12), 1), "a [w0] b -> a [w1] b", "d1"),
    "cumsum": (aten.cumsum.default, (x(4, 6), 1), "~a [w0] -> a [w1]", "d1"),
    "sum": (aten.sum.dim_IntList, (x(4, 6, 12), [1]), "~a b c -> a c", ""),
    "sum of all": (aten.sum.default, (x(4, 6),), "~a b -> ", ""),
    "amax": (aten.amax.default, (x(4, 6), [1]), "a [w0] -> a", "d1"),
    "transpose": (aten.transpose.int, (x(4, 6, 12), 0, 2), "~a b c -> c b a", ""),
    "add": (aten.add.Tensor, (x(4, 6), x(6)), "+a b, +b -> a b", ""),
    "mul": (aten.mul.Tensor, (x(4, 6), x(4, 1)), "~a b, ~a 1 -> a b", ""),
    "div": (aten.div.Tensor, (x(4, 6), x(4, 6)), "~a b, a b -> a b", ""),
    "where": (aten.where.self, (x(4, 6) > 0, x(4, 6), x(4, 6)), "a b, +a b, +a b -> a b", ""),
    "gelu": (aten.gelu.default, (x(4, 6),), "a b -> a b", ""),
    "cat": (aten.cat.default, ([x(4, 6), x(4, 12), x(4, 6)], 1), "+a b0, +a b1, +a b2 -> a b0|b1|b2", ""),
    "chunk": (aten.chunk.default, (x(4, 12), 2, 1), "~a b0|b1 -> a b0, a b1", ""),
    "unbind": (aten.unbind.int, (x(4, 2, 6), 1), "~a [w0] b -> a b, a b", ""),
    "attention": (
        aten.scaled_dot_product_attention.default,
        (x(4, 6, 8, 9), x(4, 6, 10, 9), x(4, 6, 10, 12)),
        "a b c [w0], a b [w1] [w2], ~a b [w3] d -> a b c d",
        "k q&k",
    ),
    "conv1d": (aten.conv1d.default, (x(4, 6, 9), x(12, 6, 3), x(12)), "~a b [w0], ~c b [w1], +c -> a c [w2]", ""),
    "embedding": (aten.embedding.default, (x(10, 6), ints(10, 4, 12)), "~[w0] a, b c -> b c a", "v"),
    "cross entropy, a sum": (aten.cross_entropy_loss.default, (x(4, 6), ints(6, 4), None, 2), "a [w0], a -> ", "c"),
    "mean": (aten.mean.dim, (x(4, 6), [1]), "~a [w0] -> a", "d1"),
    "flatten": (aten.flatten.using_ints, (x(4, 6, 12), 0, 1), "~[w0] [w1] a -> [w2] a", "f0 f1"),
}


def allowed(rule: Rule, case: OpCase) -> dict[tuple, str]:
    """Placements of every strategy of a rule on two ranks, and the factor that it splits."""
    kept = RULES[str(case.op)]
    RULES[str(case.op)] = rule
    try:
        equation = case.equation()
    finally:
        RULES[str(case.op)] = kept
    return {(s.inputs, s.outputs): s.factor for s in strategies(equation, 2)}


@pytest.mark.parametrize("case", KNOWN.values(), ids=KNOWN)
def test_known_rows_are_found_again(case: tuple[Any, tuple, str, str]) -> None:
    op, args, equation, beyond = case
    before = RULES[str(op)]
    found = discover_rule(op, *args)
    assert found.equation == equation
    assert RULES[str(op)] is before, "the table is as it was"
    use = OpCase(op, args, {}, MeshSpec.of("a=2"))
    row, discovered = allowed(before, use), allowed(Rule(found.equation), use)
    missing = {factor for placements, factor in row.items() if placements not in discovered}
    assert missing == set(beyond.split()), "what the row allows besides needs a lowering or a product"
    assert min(found.strategies) == len(discovered)


SEVERAL: dict[str, tuple[Any, list[tuple], str]] = {
    "linear": (
        aten.linear.default,
        [(x(4, 6), x(12, 6), x(12)), (x(2, 4, 6), x(12, 6), x(12)), (x(6), x(12, 6), x(12))],
        "~x* a, ~b a, +b -> x* b",
    ),
    "mul": (aten.mul.Tensor, [(x(4, 6), x(6)), (x(8, 4, 6), x(4, 6)), (x(6), x(6))], "~x*, ~x* -> x*"),
    "softmax": (aten.softmax.int, [(x(4, 6), -1), (x(8, 4, 6), -1)], "x* [w0] -> x* [w1]"),
    "layer_norm": (
        aten.layer_norm.default,
        [(x(4, 6), [6], x(6), x(6)), (x(8, 4, 6), [6], x(6), x(6))],
        "x* [w0], +[w1], +[w2] -> x* [w3]",
    ),
    "broadcast": (aten.add.Tensor, [(x(4, 6), x(1, 6)), (x(4, 6), x(4, 6))], "+a b, +a b -> a b"),
    "sum to the last": (aten.sum.dim_IntList, [(x(4, 6), [-1]), (x(8, 4, 6), [-1])], "~x* a -> x*"),
}


@pytest.mark.parametrize("case", SEVERAL.values(), ids=SEVERAL)
def test_samples_of_several_shapes_give_one_row(case: tuple[Any, list[tuple], str]) -> None:
    op, uses, equation = case
    found = discover_rule(op, samples=[(args, {}) for args in uses])
    assert found.equation == equation
    assert len(found.strategies) == len(uses)


# ----------------------------------------------------------------------------------------------------------- custom ops

LIBRARY = "autoshard_discovery"


def mix(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bti,ti,oi->bto", x, torch.ones_like(x[0]), w)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ((q @ k.mT + bias).softmax(-1)) @ v


def energy(x: Tensor, scale: Tensor) -> Tensor:
    return (x.square() * scale).sum((0, 2))


def whiten(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std() + x.flip(0) * x.flip(1).sum()


BODIES = {"mix": mix, "attend": attend, "energy": energy, "whiten": whiten}
ARGUMENTS = {
    "mix": (x(4, 6, 8), x(12, 8)),
    "attend": (x(4, 6, 8), x(4, 12, 8), x(4, 12, 10), x(6, 12)),
    "energy": (x(4, 6, 12), x(12)),
    "whiten": (x(4, 6),),
}
FOUND = {
    "mix": "~a b c, ~d c -> a b d",
    "attend": "a b [w0], a [w1] [w2], ~a [w3] c, b [w4] -> a b c",
    "energy": "a b c, ~c -> b",
    "whiten": "[w0] [w1] -> [w2] [w3]",
}


def define(name: str, body: Callable[..., Tensor], backward: Callable[..., tuple]) -> None:
    """A custom op with its own backward, opaque to tracing."""
    types = ", ".join(f"Tensor a{k}" for k in range(len(ARGUMENTS[name])))
    op = torch.library.custom_op(f"{LIBRARY}::{name}", lambda *a: body(*a).clone(), mutates_args=(), schema=f"({types}) -> Tensor")
    op.register_fake(lambda *a: body(*a))
    op.register_autograd(
        lambda ctx, grad: backward(ctx.saved_tensors, grad), setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
    )


def of_body(body: Callable[..., Tensor]) -> Callable[..., tuple]:
    """The backward that autograd derives."""

    def backward(saved: tuple[Tensor, ...], grad: Tensor) -> tuple:
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in saved]
            return torch.autograd.grad(body(*leaves), leaves, grad)

    return backward


@pytest.fixture(scope="module", autouse=True)
def _custom_ops() -> Iterator[None]:
    for name, body in BODIES.items():
        define(name, body, of_body(body))
    ARGUMENTS["biased"] = (x(4, 6), x(6))
    define("biased", lambda a, b: a * b, lambda saved, grad: (grad * saved[1], (grad * saved[0]).sum(0) + 1))
    yield
    for name in [name for name in RULES if name.startswith(LIBRARY)]:
        del RULES[name]


@pytest.mark.parametrize("name", BODIES)
def test_custom_ops(name: str) -> None:
    args = ARGUMENTS[name]
    found = discover_rule(f"{LIBRARY}::{name}", *args)
    assert found.equation == FOUND[name]
    assert (
        str(found).splitlines()[0].startswith(f'register_rule("{LIBRARY}::{name}", "{found.equation}")  # {found.strategies[0]} strategies')
    )
    register_rule(f"{LIBRARY}::{name}", found.equation)
    assert len(check_rule(f"{LIBRARY}::{name}", *args)) == found.strategies[0]


def test_a_found_rule_splits_a_model() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(x(12, 8))

        def forward(self, given: Tensor) -> Tensor:
            return torch.ops.autoshard_discovery.mix(given, self.w).square().mean()

    register_rule(f"{LIBRARY}::mix", discover_rule(f"{LIBRARY}::mix", *ARGUMENTS["mix"]).equation)
    model, split = Model(), set[str]()
    for seed, mesh in itertools.product(range(12), ("a=2", "a=2,b=2")):
        plan = autoshard.plan(model, mesh, (ARGUMENTS["mix"][0],), options=autoshard.Options(seed=seed))
        assert autoshard.verify(model, plan, (ARGUMENTS["mix"][0],)).is_equal
        used = [
            strategy
            for node in plan.program.nodes("op")
            if op_name(node) == f"{LIBRARY}.mix.default"
            for strategy in facts(node).strategies
        ]
        split |= {strategy.factor for strategy in used}
    assert split >= set("bcd"), "a dim of the input, the contracted one, and one of the weight"


def test_a_gradient_that_is_not_linear_has_no_rule() -> None:
    """One that adds 1: terms of it add more."""
    with pytest.raises(RuleError, match=r"not even with everything whole: .*\n  nothing split: a0 R, a1 R -> R: gradient of a1 differs by"):
        discover_rule(f"{LIBRARY}::biased", *ARGUMENTS["biased"])


# ------------------------------------------------------------------------------------------------- what is not decided


@pytest.mark.parametrize(
    ("op", "args", "text"),
    [
        (
            aten.flatten.using_ints,
            (x(4, 6, 12), 0, 1),
            "splitting self along 0 -> output along 0: their lengths [4, 24] differ, so they are products",
        ),
        (
            aten.mul.Tensor,
            (x(5, 6), x(6)),
            "splitting self along 0 -> output along 0 was tried on 5 ranks alone: lengths like 4 and 6 decide more",
        ),
    ],
)
def test_what_is_not_decided_is_told(op: Any, args: tuple, text: str) -> None:
    found = discover_rule(op, *args)
    (note,) = (note for note in found.undecided if text in note)
    assert note.startswith("splitting self along 0 -> output along 0")
    assert f"\n# {note}" in str(found)


def test_a_split_that_only_some_samples_allow() -> None:
    found = discover_rule(aten.flip.default, samples=[((x(4, 6), [0]), {}), ((x(4, 6), [1]), {})])
    assert found.equation == "~[w0] [w1] -> [w2] [w3]"
    assert "splitting self along 1 -> output along 1 holds in some samples and fails in others" in found.undecided


def test_what_has_no_rule() -> None:
    with pytest.raises(RuleError, match=r"aten.bernoulli.default gives another result each time"):
        discover_rule("aten::bernoulli", x(40, 60).sigmoid())
    with pytest.raises(RuleError, match=r"aten.ones.default has no tensors among its operands"):
        discover_rule(aten.ones.default, [4])
    with pytest.raises(RuleError, match=r"no op 'aten::no_such_op'"):
        discover_rule("aten::no_such_op", x(4))


# ---------------------------------------------------------------------------------------------- smallest counterexamples


@pytest.mark.parametrize(
    ("name", "equation", "args", "shapes"),
    [
        ("softmax.int", "b i -> b i", (x(8, 12), 1), "self = [[#, #]]: i split on a"),
        ("amax.default", "b i -> b", (x(8, 12), [1]), "self = [[#, #]]: i split on a"),
        ("linear.default", "b i, o i, o -> b o", (x(8, 6), x(4, 6), x(4)), "input = [[#, #]], weight = [[#, #]], bias = [#]: i split on a"),
        ("mul.Tensor", "+p*, +p* -> p*", (x(4, 6), x(4, 6)), "self = [[#]], other = [[#]]: nothing split: self P, other P -> P"),
    ],
)
def test_a_wrong_row_is_refuted_by_the_smallest_operands(
    name: str, equation: str, args: tuple, shapes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULES, f"aten.{name}", Rule(equation))
    with pytest.raises(UnsoundRuleError) as caught:
        check_rule(f"aten::{name}", *args)
    last = str(caught.value).splitlines()[-1]
    assert last.startswith("  smallest counterexample: ")
    assert shapes in re.sub(r"-?\d+\.\d+(?=[,\]])", "#", last)
