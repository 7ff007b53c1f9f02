"""Elementwise ops, with broadcasting."""

from __future__ import annotations

from autoshard.ops.row import Call, Rule, rows, spell


def pointwise(call: Call) -> str:
    """Elementwise, with broadcasting; not linear."""
    return spell(["p*"] * len(call.inputs), ["p*"])


def additive(call: Call) -> str:
    """Sums of tensors; a scalar term makes the op affine, so then partial terms would each add it."""
    return spell(["+p*"] * 2, ["p*"]) if len(call.inputs) == 2 else pointwise(call)


def multilinear(call: Call) -> str:
    """Elementwise, linear in each operand."""
    return spell(["~p*"] * len(call.inputs), ["p*"])


def first_linear(call: Call) -> str:
    """Elementwise, linear in the first operand."""
    return spell(["~p*", *["p*"] * (len(call.inputs) - 1)], ["p*"])


def cast(call: Call) -> str:
    """Linear, except from floats to integers: a sum rounded is not the sum of the terms rounded."""
    mark = "" if call.inputs[0].dtype.is_floating_point and not call.outputs[0].dtype.is_floating_point else "~"
    return spell([f"{mark}p*", *["[w*]"] * (len(call.inputs) - 1)], ["p*"])


ROWS: dict[str, Rule] = {
    # Pointwise. `+` operands add up, `~` operands are multiplied; a scalar in place of a tensor makes the op affine.
    **rows("add.Tensor sub.Tensor", Rule(additive)),
    **rows("mul.Tensor", Rule(multilinear)),
    **rows("neg clone contiguous alias detach lift_fresh_copy mul.Scalar div.Scalar", Rule("~p* -> p*")),
    **rows("to.dtype to.dtype_layout to.device to.other type_as _to_copy", Rule(cast)),
    **rows("div.Tensor", Rule(first_linear)),
    **rows("where.self", Rule("p*, +p*, +p* -> p*")),
    **rows("where.ScalarOther masked_fill.Scalar", Rule(pointwise)),
    **rows(
        """relu gelu silu tanh sigmoid exp log sqrt rsqrt sin cos abs square reciprocal erf softplus leaky_relu elu hardswish hardsigmoid
        hardtanh relu6 mish log1p expm1 floor ceil round sign logical_not bitwise_not clamp clamp_min clamp_max pow.Tensor_Scalar
        pow.Tensor_Tensor pow.Scalar rsub.Scalar add.Scalar sub.Scalar maximum minimum eq.Tensor eq.Scalar ne.Tensor ne.Scalar lt.Tensor
        lt.Scalar le.Tensor le.Scalar gt.Tensor gt.Scalar ge.Tensor ge.Scalar __and__.Tensor __or__.Tensor logical_and logical_or
        bitwise_and.Tensor bitwise_or.Tensor floor_divide fmod.Scalar remainder.Scalar zeros_like ones_like isnan isinf""",
        Rule(pointwise),
    ),
}
