"""The op table: one row per op, in the notation of autoshard.equations.

A row is an equation, or a builder that writes one for a given call (autoshard.equation_builders). The rest of a row says
what the equation cannot: the argument that holds a shape, the function that replaces the op when some factors are split
(a lowering, in autoshard.runtime), whether the op draws random numbers, and what dominates its time.
An op without a row is replicated, and the plan reports it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from autoshard import equation_builders as build
from autoshard.equation_builders import Call
from autoshard.equations import Equation, bind, parse
from autoshard.errors import RuleError

Builder = Callable[[Call], "str | tuple[str, Mapping[str, int]]"]


@dataclass(frozen=True)
class Lowering:
    """`function` of autoshard.runtime replaces the op where a factor named in `axes` is split.

    It takes the op's own arguments and, per entry of `axes` (factor without its number -> keyword), the mesh axes that
    split the factor. Factors in `settled` leave outputs that lack them I rather than P: the lowering sums inside.
    `ordered` factors cannot be split in segments: the lowering counts positions from the rank's number.
    """

    function: str
    axes: Mapping[str, str]
    settled: frozenset[str] = frozenset()
    ordered: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Rule:
    """One row of the table."""

    equation: str | Builder
    lowering: Lowering | None = None
    shape: str | None = None  # argument that holds the output's shape
    piece: str | None = None  # argument that holds sizes along the dim that the op splits
    is_random: Callable[[Call], bool] = lambda call: False
    undrawn: frozenset[str] = frozenset()  # factors that the random numbers do not depend on
    bound: Literal["matmul", "memory"] = "memory"

    def bind(self, call: Call) -> Equation:
        """The equation bound to the shapes of `call`. Raises RuleError when it does not fit."""
        text = self.equation if isinstance(self.equation, str) else self.equation(call)
        text, sizes = text if isinstance(text, tuple) else (text, {})
        equation = bind(text, [t.shape for t in call.inputs], [t.shape for t in call.outputs], sizes)
        termless = frozenset(k for k, t in enumerate((*call.inputs, *call.outputs)) if not _has_terms(t.dtype))
        return replace(equation, termless=termless, ordered=self.lowering.ordered if self.lowering else frozenset())


def _has_terms(dtype: torch.dtype) -> bool:
    """A bool is no sum, and sums of small integers wrap around, which a later conversion to a wider type would see."""
    return dtype.is_floating_point or dtype.itemsize >= 4


def _rows(names: str, rule: Rule) -> dict[str, Rule]:
    return {f"aten.{name}" if "." in name else f"aten.{name}.default": rule for name in names.split()}


def _dropout(call: Call) -> bool:
    return bool(call.get("train") and call.get("p"))


RULES: dict[str, Rule] = {
    # Pointwise. `+` operands add up, `~` operands are multiplied; a scalar in place of a tensor makes the op affine.
    **_rows("add.Tensor sub.Tensor", Rule(build.additive)),
    **_rows("mul.Tensor", Rule(build.multilinear)),
    **_rows("neg clone contiguous alias detach lift_fresh_copy mul.Scalar div.Scalar", Rule("~p* -> p*")),
    **_rows("to.dtype to.dtype_layout to.device to.other type_as _to_copy", Rule(build.cast)),
    **_rows("div.Tensor", Rule(build.first_linear)),
    **_rows("where.self", Rule("p*, +p*, +p* -> p*")),
    **_rows("where.ScalarOther masked_fill.Scalar", Rule(build.pointwise)),
    **_rows(
        """relu gelu silu tanh sigmoid exp log sqrt rsqrt sin cos abs square reciprocal erf softplus leaky_relu elu hardswish hardsigmoid
        hardtanh relu6 mish log1p expm1 floor ceil round sign logical_not bitwise_not clamp clamp_min clamp_max pow.Tensor_Scalar
        pow.Tensor_Tensor pow.Scalar rsub.Scalar add.Scalar sub.Scalar maximum minimum eq.Tensor eq.Scalar ne.Tensor ne.Scalar lt.Tensor
        lt.Scalar le.Tensor le.Scalar gt.Tensor gt.Scalar ge.Tensor ge.Scalar __and__.Tensor __or__.Tensor logical_and logical_or
        bitwise_and.Tensor bitwise_or.Tensor floor_divide fmod.Scalar remainder.Scalar zeros_like ones_like isnan isinf""",
        Rule(build.pointwise),
    ),
    **_rows("dropout", Rule("~p* -> p*", is_random=_dropout)),
    # Contractions.
    **_rows("linear", Rule("~b* i, ~o i, +o -> b* o", bound="matmul")),
    **_rows("addmm", Rule(build.addmm, bound="matmul")),
    **_rows("mm", Rule("~m k, ~k n -> m n", bound="matmul")),
    **_rows("bmm", Rule("~b m k, ~b k n -> b m n", bound="matmul")),
    **_rows("matmul", Rule(build.matmul, bound="matmul")),
    **_rows("conv1d conv2d conv3d conv1d.padding conv2d.padding conv3d.padding", Rule(build.convolution, bound="matmul")),
    **_rows(
        "scaled_dot_product_attention",
        Rule(build.attention, is_random=lambda call: bool(call.get("dropout_p")), undrawn=frozenset("e"), bound="matmul"),
    ),
    # Lookup and normalisation.
    **_rows("embedding", Rule(build.embedding, Lowering("embedding", {"v": "row_axes"}, ordered=frozenset("v")))),
    **_rows("layer_norm native_layer_norm rms_norm", Rule(build.last_dims_norm)),
    **_rows("batch_norm", Rule(build.batch_norm, Lowering("batch_norm", {"b": "batch_axes", "s": "batch_axes"}))),
    **_rows("softmax.int log_softmax.int _softmax cumsum argmax", Rule(build.whole_dim)),
    **_rows(
        "cross_entropy_loss",
        Rule(
            build.cross_entropy,
            Lowering("cross_entropy", {"c": "class_axes", "b": "batch_axes", "s": "batch_axes"}, frozenset("c"), frozenset("c")),
        ),
    ),
    # Reductions.
    **_rows("sum sum.dim_IntList", Rule(build.reduction)),
    **_rows("mean mean.dim", Rule(build.reduction, Lowering("mean", {"d": "reduced_axes"}))),
    **_rows("amax amin var.correction std.correction", Rule(build.whole_reduction)),
    # Shapes.
    **_rows("view _unsafe_view", Rule(build.reshape, shape="size")),
    **_rows("reshape", Rule(build.reshape, shape="shape")),
    **_rows("unflatten.int", Rule(build.reshape, shape="sizes")),
    **_rows("flatten.using_ints unsqueeze", Rule(build.reshape)),
    **_rows("expand", Rule(build.expand, shape="size")),
    **_rows("permute transpose.int t numpy_T", Rule(build.permute)),
    **_rows("squeeze.dim squeeze squeeze.dims", Rule(build.squeeze)),
    **_rows("slice.Tensor pad diff flip roll", Rule(build.resized_dims)),
    **_rows("select.int", Rule(build.select)),
    **_rows("chunk", Rule(build.split)),
    **_rows("split.Tensor", Rule(build.split, piece="split_size")),
    **_rows("split_with_sizes", Rule(build.split, piece="split_sizes")),
    **_rows("unbind.int", Rule(build.unbind)),
    **_rows("cat", Rule(build.concatenate)),
    **_rows("stack", Rule(build.stack)),
    # Pooling: whole in space.
    **_rows("max_pool2d avg_pool2d adaptive_avg_pool2d", Rule("b* [y] [x] -> b* [v] [u]")),
    **_rows("max_pool1d avg_pool1d adaptive_avg_pool1d", Rule("b* [x] -> b* [u]")),
}


def rule_of(op: str) -> Rule | None:
    """The row of an op named like `aten.linear.default`, or None."""
    return RULES.get(op)


def register_rule(op: str, equation: str, *, bound: Literal["matmul", "memory"] = "matmul") -> None:
    """Add the row of a custom op: `register_rule("mylib::scale", "~b* i, i -> b* i")`.

    op: `namespace::name` or `namespace::name.overload`. equation: one operand per tensor argument, in schema order; a
    factor that the outputs lack is taken to be summed, write `[i]` where it is not. Sound only if the equation is:
    autoshard.testing.check_rule proves it by execution.
    Raises RuleError when the equation does not parse or the op does not exist.
    """
    parse(equation)
    namespace, _, name = op.partition("::")
    base, _, overload = name.partition(".")
    try:
        getattr(getattr(getattr(torch.ops, namespace), base), overload or "default")
    except (AttributeError, RuntimeError) as error:
        raise RuleError(f"no op {op!r}: import or define it before registering its rule (write it as 'namespace::name')") from error
    RULES[f"{namespace}.{base}.{overload or 'default'}"] = Rule(equation, bound=bound)


def catalogue() -> str:
    """The page docs/ops.md: every row of the table with its equation and its lowering."""
    lines = [
        "# Op rules",
        "",
        "Every op that autoshard can split, by the equations of `autoshard/equations.py`; `tests/test_rules.py` proves each row by",
        "execution. Where the equation depends on the call, a builder of `autoshard/equation_builders.py` writes it. A lowering replaces",
        "the op where one of the factors named is split. Made from the table, to be made anew when it changes:",
        "`python -c \"from autoshard.rules import catalogue; print(catalogue(), end='')\" > docs/ops.md`",
        "",
        "| op | equation | lowering |",
        "| --- | --- | --- |",
    ]
    for op, rule in sorted(RULES.items()):
        summary = (getattr(rule.equation, "__doc__", None) or "").partition("\n")[0]
        text = f"`{rule.equation}`" if isinstance(rule.equation, str) else f"{rule.equation.__name__}: {summary}"
        lowering = f"`{rule.lowering.function}` of {', '.join(sorted(rule.lowering.axes))}" if rule.lowering else ""
        lines.append(f"| `{op}` | {text.replace('|', '&#124;')} | {lowering} |")
    return "\n".join(lines) + "\n"


def describe(op: str) -> str:
    """The row as a line of the catalogue."""
    rule = RULES[op]
    text = rule.equation if isinstance(rule.equation, str) else f"<{rule.equation.__name__}>"
    parts: list[Any] = [text]
    if rule.lowering is not None:
        parts.append(f"{rule.lowering.function}({', '.join(sorted(set(rule.lowering.axes)))})")
    return "   ".join(parts)
