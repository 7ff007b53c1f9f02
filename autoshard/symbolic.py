"""Sizes that may change from call to call: integers that know the expression they are a value of.

Every pass works at the sizes of the example. A `Size` is such an integer, so rules, search and costs see plain numbers; it
carries an expression in named symbols (`batch // 2`), which survives in shapes and arguments, is what emitted programs
compute and what plan files hold. One text serves all three, and a small reader evaluates it: `+ - * // % /`, powers, max,
min and `a if b > c else d` over integers and symbols, nothing else.

Why a plan that was made at one size holds at another: docs/decisions/007-dynamic-sizes.md.
"""

from __future__ import annotations

import ast
import keyword
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy
from sympy.printing.str import StrPrinter

from autoshard.errors import PlanError, TraceError

_LONGEST_TEXT = 1000
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_COMPARED: dict[type, tuple[Callable[[Any, Any], bool], type]] = {
    ast.Eq: (operator.eq, sympy.Eq),
    ast.NotEq: (operator.ne, sympy.Ne),
    ast.Lt: (operator.lt, sympy.Lt),
    ast.LtE: (operator.le, sympy.Le),
    ast.Gt: (operator.gt, sympy.Gt),
    ast.GtE: (operator.ge, sympy.Ge),
}
_EXPONENTS = (2, 3, 4, 0.5, -0.5, -1, -2)


@dataclass(frozen=True)
class Symbol:
    """One size by name: its value in the example, and the range in which the model's code does the same."""

    name: str
    example: int
    least: int = 2
    most: int | None = None

    @property
    def range(self) -> str:
        """`2 or more`, `2 to 64`."""
        return f"{self.least} or more" if self.most is None else f"{self.least} to {self.most}"


class Size(int):
    """An integer that stands for `expr`. Arithmetic gives plain integers, but for the division of a size among ranks."""

    expr: sympy.Expr

    def __new__(cls, value: int, expr: sympy.Expr) -> Size:
        new = super().__new__(cls, value)
        new.expr = expr
        return new

    def __getnewargs__(self) -> tuple[int, sympy.Expr]:  # type: ignore[override]
        return int(self), self.expr

    def __floordiv__(self, ways: int) -> int:
        """The share of one of `ways` ranks. floor(floor(x) / n) is floor(x / n)."""
        if isinstance(ways, Size):
            return int(self) // int(ways)
        inner = self.expr.args[0] if isinstance(self.expr, sympy.floor) else self.expr
        return self if ways == 1 else Size(int(self) // ways, sympy.floor(inner / ways))

    def __repr__(self) -> str:
        return text_of(self.expr)

    __str__ = __repr__


class Real(float):
    """A real number that stands for `expr`, such as one over the length of a batch."""

    expr: sympy.Expr

    def __new__(cls, value: float, expr: sympy.Expr) -> Real:
        new = super().__new__(cls, value)
        new.expr = expr
        return new

    def __getnewargs__(self) -> tuple[float, sympy.Expr]:  # type: ignore[override]
        return float(self), self.expr

    def __repr__(self) -> str:
        return text_of(self.expr)

    __str__ = __repr__


# --------------------------------------------------------------------------------------------------------------- as text


class _Printer(StrPrinter):
    def _print_floor(self, expr: Any) -> str:
        above, below = sympy.fraction(sympy.together(expr.args[0]))
        return f"({self._factor(above)} // {self._factor(below)})"

    def _print_Mod(self, expr: Any) -> str:
        return f"{self._factor(expr.args[0])} % {self._factor(expr.args[1])}"

    def _factor(self, expr: Any) -> str:
        text = self._print(expr)
        return text if expr.is_Atom or (text.startswith("(") and _is_enclosed(text)) else f"({text})"

    def _print_Max(self, expr: Any) -> str:
        return f"max({', '.join(sorted(map(self._print, expr.args)))})"

    def _print_Min(self, expr: Any) -> str:
        return f"min({', '.join(sorted(map(self._print, expr.args)))})"

    def _print_Piecewise(self, expr: Any) -> str:
        *pairs, (text, _) = [(self._factor(value), condition) for value, condition in expr.args]
        for value, condition in reversed(pairs):
            text = f"({value} if {self._factor(condition.lhs)} {condition.rel_op} {self._factor(condition.rhs)} else {text})"
        return text

    def _print_Float(self, expr: Any) -> str:
        return repr(float(expr))


def _is_enclosed(text: str) -> bool:
    """Whether the first bracket of `text` closes at its end."""
    depth = 0
    for k, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return k == len(text) - 1
    return False


@cache
def text_of(expr: sympy.Expr) -> str:
    """An expression as Python: `batch // 2`."""
    text = _Printer().doprint(expr)
    return text[1:-1] if text.startswith("(") and _is_enclosed(text) else text


def short(size: int) -> str:
    """A size in a comment: `batch/2`."""
    return str(size).replace(" ", "").replace("//", "/")


def names_of(size: Size | Real) -> set[str]:
    return {symbol.name for symbol in size.expr.free_symbols}


@cache
def _parsed(text: str) -> ast.expr:
    if len(text) > _LONGEST_TEXT:
        raise PlanError("an expression of a size is too long")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise PlanError(f"cannot read the expression {text!r} of a size") from error


def evaluate(text: str, values: Mapping[str, Any]) -> Any:
    """The value of an expression where its symbols have `values` (integers, or sympy symbols). Raises PlanError for other texts."""
    is_number = all(isinstance(value, int) for value in values.values())

    def walk(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value if is_number else sympy.sympify(node.value)
        if isinstance(node, ast.Name) and node.id in values:
            return values[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -walk(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            left, right = walk(node.left), walk(node.right)
            if isinstance(node.op, ast.Pow) and right not in _EXPONENTS:
                raise PlanError(f"cannot read the expression {text!r} of a size: a power of {right}")
            return _BINARY[type(node.op)](left, right)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("max", "min") and not node.keywords:
            chosen = {"max": (max, sympy.Max), "min": (min, sympy.Min)}[node.func.id][not is_number]
            return chosen(*map(walk, node.args))
        if isinstance(node, ast.IfExp) and isinstance(node.test, ast.Compare):
            return choose(node, node.test)
        known = ", ".join(values) or "no symbols"
        raise PlanError(f"cannot read the expression {text!r} of a size; it may hold numbers, {known} and + - * // %")

    def choose(node: ast.IfExp, test: ast.Compare) -> Any:
        if len(test.ops) > 1 or type(test.ops[0]) not in _COMPARED:
            raise PlanError(f"cannot read the expression {text!r} of a size: it may compare two numbers")
        holds, relation = _COMPARED[type(test.ops[0])]
        left, right, first, second = map(walk, (test.left, test.comparators[0], node.body, node.orelse))
        if is_number:
            return first if holds(left, right) else second
        return sympy.Piecewise((first, relation(left, right)), (second, True))

    try:
        return walk(_parsed(text))
    except (ZeroDivisionError, OverflowError, TypeError, RecursionError) as error:
        raise PlanError(f"cannot evaluate the expression {text!r} of a size: {error}") from error


def parse(text: str, symbols: Mapping[str, Symbol]) -> sympy.Expr:
    """Read an expression that text_of wrote. Raises PlanError for anything else."""
    return evaluate(text, {name: positive(name) for name in symbols})


def positive(name: str) -> sympy.Symbol:
    """The symbol of one size."""
    return sympy.Symbol(name, integer=True, positive=True)


def at(value: Any, sizes: Mapping[str, int]) -> Any:
    """`value` where the symbols have other values: a Size or Real changes, anything else stays."""
    if isinstance(value, Size):
        found = evaluate(str(value), sizes)
        return Size(int(found), value.expr)
    if isinstance(value, Real):
        return Real(float(evaluate(str(value), sizes)), value.expr)
    return value


def name_fault(name: str, taken: Iterable[str]) -> str:
    """What is wrong with `name` as the name of a size; "" where nothing is."""
    if not name.isidentifier() or not name.isascii() or keyword.iskeyword(name) or name.startswith("_"):
        return "a size has a plain Python name"
    return "programs use that name for something else" if name in {*taken, "self", "torch", "aten", "max", "min", "float"} else ""


# --------------------------------------------------------------------------------------------------- from a traced graph

_REBUILT: dict[str, Callable[..., sympy.Expr]] = {
    "Add": sympy.Add,
    "Mul": sympy.Mul,
    "Pow": sympy.Pow,
    "PowByNatural": sympy.Pow,
    "FloatPow": sympy.Pow,
    "FloorDiv": lambda a, b: sympy.floor(a / b),
    "CleanDiv": lambda a, b: sympy.floor(a / b),
    "Mod": sympy.Mod,
    "PythonMod": sympy.Mod,
    "Max": sympy.Max,
    "Min": sympy.Min,
    "ToFloat": lambda a: a,
    "IntTrueDiv": lambda a, b: a / b,
    "FloatTrueDiv": lambda a, b: a / b,
    "OpaqueUnaryFn_sqrt": lambda a: sympy.Pow(a, sympy.Float(0.5)),
}


@dataclass(frozen=True)
class SizeReader:
    """Turns a trace's symbolic integers into sizes. names: the trace's symbol -> the name of the size."""

    names: Mapping[sympy.Symbol, str]

    def knows(self, value: Any) -> bool:
        """Whether a number is a constant or follows from named sizes."""
        return isinstance(value, (int, float)) or value.node.expr.free_symbols <= set(self.names)

    def shape(self, tensor: Any) -> tuple[int, ...]:
        """The shape of a traced tensor."""
        return tuple(self.number(size) for size in tensor.shape)  # type: ignore[misc]

    def number(self, value: Any) -> int | float:
        """A symbolic integer or real as Size or Real, a constant as it is. Raises TraceError where no expression says it."""
        if isinstance(value, (int, float)):
            return value
        expr, hint = self.rebuild(value.node.expr), value.node.hint
        if expr.is_number:
            return type(hint)(expr)
        return Size(hint, expr) if isinstance(hint, int) else Real(hint, expr)

    def rebuild(self, expr: sympy.Expr) -> sympy.Expr:
        """The same expression in named symbols and public sympy functions."""
        if expr.is_Symbol:
            if expr not in self.names:
                raise TraceError(f"the size {expr} follows from no size that was called dynamic")
            return positive(self.names[expr])
        if not expr.args:
            return expr
        if isinstance(expr, sympy.Piecewise):  # torch.sym_ite
            return sympy.Piecewise(*((self.rebuild(value), self._condition(condition)) for value, condition in expr.args))
        make = _REBUILT.get(type(expr).__name__)
        if make is None or (type(expr).__name__.endswith(("Pow", "PowByNatural")) and expr.args[1] not in _EXPONENTS):
            raise TraceError(f"the size {expr} is computed in a way that programs cannot: {type(expr).__name__}")
        return make(*map(self.rebuild, expr.args))

    def _condition(self, condition: Any) -> Any:
        if condition == sympy.true:
            return sympy.true
        if type(condition) in [relation for _, relation in _COMPARED.values()]:
            return type(condition)(*map(self.rebuild, condition.args))
        raise TraceError(f"a size depends on {condition}, which programs cannot compute; compare two sizes there")


def sizes_in(tree: Any) -> Iterator[Size | Real]:
    """Every Size and Real in nested tuples, lists and dicts."""
    if isinstance(tree, (Size, Real)):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from sizes_in(item)
    elif isinstance(tree, dict):
        yield from sizes_in(list(tree.values()))
    elif isinstance(tree, slice):
        yield from sizes_in((tree.start, tree.stop, tree.step))
