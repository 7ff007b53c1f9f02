"""The notation of op rules: what it reads, how it binds to shapes, which strategies follow, and what its errors say."""

import re
from dataclasses import replace

import pytest

from autoshard.equations import Equation, Strategy, bind, divides, parse, strategies
from autoshard.errors import RuleError
from autoshard.placements import I, P, R, S


def show(strategy: Strategy) -> str:
    return f"{strategy.factor}: {', '.join(map(str, strategy.inputs))} -> {', '.join(map(str, strategy.outputs))}".lstrip(": ")


def splits(equation: Equation, n: int = 2, **segmentations: list) -> list[str]:
    """Strategies beyond everything R and everything I."""
    whole, invariant, *rest = strategies(equation, n, {int(k[1:]): v for k, v in segmentations.items()})
    assert set(whole.inputs + whole.outputs) <= {R}
    assert set(invariant.inputs + invariant.outputs) <= {I}
    return [show(strategy) for strategy in rest]


NOT_READ = {
    "b i, o i": "rule 'b i, o i' has no '->' between its inputs and its outputs",
    "b i -> b -> i": "cannot read '-> i' in rule operand 'b -> i'; terms look like i, b*, [n], (a b), q|k|v or 1",
    "b (i j -> b": "cannot read '(i j' in rule operand 'b (i j'; terms look like i, b*, [n], (a b), q|k|v or 1",
    "b*i -> b*": "cannot read 'b*i' in rule operand 'b*i'; terms look like i, b*, [n], (a b), q|k|v or 1",
    "(a [b*]) -> a": "cannot read '(a [b*])' in rule operand '(a [b*])'; terms look like i, b*, [n], (a b), q|k|v or 1",
    "(a*) -> a": "cannot read '(a*)' in rule operand '(a*)'; terms look like i, b*, [n], (a b), q|k|v or 1",
    "() -> a": "cannot read '()' in rule operand '()'; terms look like i, b*, [n], (a b), q|k|v or 1",
    "q| -> q": "cannot read 'q|' in rule operand 'q|'; terms look like i, b*, [n], (a b), q|k|v or 1",
    "b 3 -> b": "cannot read '3' in rule operand 'b 3'; terms look like i, b*, [n], (a b), q|k|v or 1",
    "~+b -> b": "cannot read '+b' in rule operand '~+b'; terms look like i, b*, [n], (a b), q|k|v or 1",
    "b ~i -> b": "cannot read '~i' in rule operand 'b ~i'; terms look like i, b*, [n], (a b), q|k|v or 1",
    "b* c* -> b*": "rule operand 'b* c*' has two terms that stand for any number of dims; at most one can",
    "b* [c*] -> b*": "rule operand 'b* [c*]' has two terms that stand for any number of dims; at most one can",
}


@pytest.mark.parametrize("text", NOT_READ)
def test_notation_errors(text: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse(text)
    assert str(caught.value) == NOT_READ[text]


NOT_BOUND = {
    "too many operands": ("b i -> b i", [(2, 3), (3,)], [(2, 3)], "rule 'b i -> b i' describes 1 inputs and 1 outputs, got 2 and 1"),
    "too many outputs": ("b -> b", [(2,)], [(2,), (2,)], "rule 'b -> b' describes 1 inputs and 1 outputs, got 1 and 2"),
    "too few dims": ("b i -> b", [(2,)], [(2,)], "rule 'b i -> b' does not fit a tensor of shape (2,)"),
    "too many dims": ("b -> b", [(2, 3)], [(2,)], "rule 'b -> b' does not fit a tensor of shape (2, 3)"),
    "other size": (
        "b i, i -> b", [(2, 3), (4,)], [(2,)],
        "rule 'b i, i -> b' does not fit shapes [(2, 3), (4,), (2,)]: dim i of size 4 with {'b': 2, 'i': 3}",
    ),
    "no product": (
        "(a b) -> a b", [(7,)], [(2, 3)],
        "rule '(a b) -> a b' does not fit shapes [(7,), (2, 3)]: dim a b of size 7 with {'a': 2, 'b': 3}",
    ),
    "no sum": (
        "q|k -> q, k", [(7,)], [(2,), (3,)],
        "rule 'q|k -> q, k' does not fit shapes [(7,), (2,), (3,)]: dim q k of size 7 with {'q': 2, 'k': 3}",
    ),
    "unknown parts": (
        "(a b) -> (a b)", [(6,)], [(6,)],
        "rule '(a b) -> (a b)' does not fit shapes [(6,), (6,)]: dim a b of size 6 with {}",
    ),
    "reduced output": (
        "b i -> b i", [(4, 6)], [(4, 1)],
        "rule 'b i -> b i' does not fit shapes [(4, 6), (4, 1)]: an output has length 1 along 'i'; write 1 there if it is reduced",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "inputs", "outputs", "error"), NOT_BOUND.values(), ids=NOT_BOUND)
def test_binding_errors(text: str, inputs: list, outputs: list, error: str) -> None:
    with pytest.raises(RuleError, match=f"^{re.escape(error)}$"):
        bind(text, inputs, outputs)


def test_linear() -> None:
    equation = bind("~b* i, ~o i, +o -> b* o", [(4, 2, 6), (8, 6), (8,)], [(4, 2, 8)])
    assert equation.sizes == {"b.1": 4, "b.0": 2, "i": 6, "o": 8}
    assert splits(equation) == [
        "b.1: S(0), R, R -> S(0)",
        "b.0: S(1), R, R -> S(1)",
        "i: S(2), S(1), P -> P",
        "o: R, S(0), S(0) -> S(2)",
        "P, R, P -> P",
        "R, P, P -> P",
    ]
    padded = "o: R, S(0), S(0) -> S(2)"  # 8 on three ranks: pieces of 3, one of nine positions is padding
    assert splits(equation, 3) == ["i: S(2), S(1), P -> P", padded, "P, R, P -> P", "R, P, P -> P"]


def test_trailing_operands_may_be_absent() -> None:
    assert splits(bind("~b* i, ~o i, +o -> b* o", [(4, 6), (8, 6)], [(4, 8)]))[1] == "i: S(1), S(1) -> P"


def test_variadic_dims_count_from_the_right() -> None:
    equation = bind("p*, p* -> p*", [(4, 2, 6), (6,)], [(4, 2, 6)])
    assert splits(equation) == ["p.2: S(0), R -> S(0)", "p.1: S(1), R -> S(1)", "p.0: S(2), S(0) -> S(2)"]
    assert splits(bind("p* -> p*", [()], [()])) == []


def test_broadcasting() -> None:
    """A dim of length 1 lacks the factor: its operand stays whole, and its gradient is a sum."""
    equation = bind("+p*, +p* -> p*", [(4, 1), (1, 6)], [(4, 6)])
    assert splits(equation) == ["p.1: S(0), R -> S(0)", "p.0: R, S(1) -> S(1)", "P, P -> P"]
    assert splits(bind("p* -> p*", [(1, 4)], [(1, 4)])) == ["p.0: S(1) -> S(1)"]
    assert splits(bind("a -> a", [(0,)], [(0,)])) == []


def test_whole_factors_are_not_split() -> None:
    assert splits(bind("b* [n], [n] -> b* [n]", [(4, 6), (6,)], [(4, 6)])) == ["b.0: S(0), R -> S(0)"]
    assert splits(bind("b [s*] -> b [s*]", [(4, 6, 2)], [(4, 6, 2)])) == ["b: S(0) -> S(0)"]


def test_summed_factor_and_reduced_dim() -> None:
    assert splits(bind("~b i -> b 1", [(4, 6)], [(4, 1)])) == ["b: S(0) -> S(0)", "i: S(1) -> P", "P -> P"]


def test_compound_dims() -> None:
    """Splitting an inner factor of a product cuts every repetition of it."""
    equation = bind("b (n d) -> b n d", [(4, 24)], [(4, 6, 4)])
    assert splits(equation) == ["b: S(0) -> S(0)", "n: S(1) -> S(1)", "d: S(1:6x4) -> S(2)"]
    one_unknown = bind("(a b) -> (a b)", [(6,)], [(6,)], {"a": 3})
    assert one_unknown.sizes == {"a": 3, "b": 2}
    assert splits(bind("(a b) -> a b", [(4,)], [(1, 4)])) == ["b: S(0) -> S(1)"]


def test_joined_dims_split_together() -> None:
    equation = bind("~b q|k|v -> b q, b k, b v", [(3, 16)], [(3, 8), (3, 4), (3, 4)])
    assert equation.joined == (("q", "k", "v"),)
    assert splits(equation) == ["q: S(1:8+4+4) -> S(1), S(1), S(1)", "P -> P, P, P"]
    assert splits(bind("b q|k -> b q, b k", [(3, 7)], [(3, 4), (3, 3)])) == []


def test_proposed_segments() -> None:
    equation = bind("~i, ~o i -> o", [(6,), (12, 6)], [(12,)])
    assert splits(equation, s12=[(8, 4), (9, 3)]) == [
        "i: S(0), S(1) -> P",
        "o: R, S(0) -> S(0)",
        "o: R, S(0:8+4) -> S(0:8+4)",
        "P, R -> P",
        "R, P -> P",
    ]


def test_factor_twice_in_an_operand_is_not_split() -> None:
    assert splits(bind("i i -> i", [(4, 4)], [(4,)])) == []


def test_several_outputs() -> None:
    """An output that lacks a factor which another has is a sum too."""
    assert splits(bind("i j -> i, j", [(4, 3)], [(4,), (3,)])) == ["i: S(0) -> S(0), P"]


def test_scalars() -> None:
    assert splits(bind("~i, ~i -> ", [(4,), (4,)], [()])) == ["i: S(0), S(0) -> P", "P, R -> P", "R, P -> P"]
    assert splits(bind("~p*,  -> p*", [(4,), ()], [(4,)])) == ["p.0: S(0), R -> S(0)", "P, R -> P"]


def test_positions_without_terms_are_never_partial() -> None:
    equation = bind("~i, ~o i -> o", [(4,), (3, 4)], [(3,)])
    termless = Equation(equation.inputs, equation.outputs, equation.sizes, termless=frozenset([0]))
    assert splits(termless) == ["i: S(0), S(1) -> P", "R, P -> P"]
    assert P in strategies(equation, 2)[-2].inputs
    ordered = Equation(equation.inputs, equation.outputs, equation.sizes, ordered=frozenset("i"))
    assert splits(ordered, s4=[(2, 2)])[0:2] == ["i: S(0), S(1) -> P", "P, R -> P"]
    assert S(0, (2, 2)) not in {placement for strategy in strategies(ordered, 2, {4: [(2, 2)]}) for placement in strategy.inputs}


def test_linked_factors_are_split_together() -> None:
    equation = bind("~b [y], b [y] -> b [v]; y&v", [(4, 6), (4, 6)], [(4, 3)])
    assert [s.factor for s in strategies(equation, 3)] == ["", "", "y&v", ""]
    assert [s.factor for s in strategies(equation, 2)] == ["", "", "b", ""], "3 does not divide by 2"
    (linked,) = [s for s in strategies(equation, 3) if s.factor == "y&v"]
    assert (linked.inputs, linked.outputs) == ((S(1), S(1)), (S(1),))


def test_an_operand_with_several_linked_factors_is_split_along_the_first() -> None:
    equation = bind("b q, b k, q k -> b q; q&k", [(2, 4), (2, 6), (4, 6)], [(2, 4)])
    (linked,) = [s for s in strategies(equation, 2) if s.factor == "q&k"]
    assert linked.inputs == (S(1), S(1), S(0))


def test_limits_bound_the_pieces_of_a_link() -> None:
    equation = replace(bind("[y] -> [v]; y&v", [(12,)], [(12,)]), limits={"y&v": 3})
    assert [s.factor for s in strategies(equation, 3)] == ["", "", "y&v"]
    assert [s.factor for s in strategies(equation, 4)] == ["", ""]
    assert divides(equation, ["y&v", ""], [3, 2])
    assert not divides(equation, ["y&v", "y&v"], [3, 2])


def test_whole_parts_of_a_product() -> None:
    equation = bind("(c [y]) -> c [y]", [(12,)], [(4, 3)])
    assert [s.factor for s in strategies(equation, 2)] == ["", "", "c"]
    assert [s.factor for s in strategies(equation, 3)] == ["", ""]
