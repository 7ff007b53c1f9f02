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


def channels(call: Call) -> str:
    """prelu: one slope for all, or one per channel (dim 1)."""
    ndim, slopes = len(call.inputs[0].shape), call.inputs[1].shape
    if ndim < 2 or not slopes or slopes[0] == 1:
        return spell(["b*", " ".join("1" for _ in slopes)], ["b*"])
    return spell(["b c s*", "c"], ["b c s*"])


def halves(call: Call) -> str:
    """glu: the dim is taken apart in two, which stay whole."""
    ndim = len(call.inputs[0].shape)
    dim = call.get("dim") % ndim
    source, gated = (" ".join(f"[{letter}]" if k == dim else f"d{k}" for k in range(ndim)) for letter in "xy")
    return spell([source], [gated])


def interpolation(call: Call) -> str:
    """start + weight * (end - start): linear in both ends together."""
    return spell(["+p*", "+p*", *["p*"] * (len(call.inputs) - 2)], ["p*"])


def shaped_like(call: Call) -> str:
    """Values of the first operand are not read, only its shape."""
    return spell(["p*"], ["p*"])


ROWS: dict[str, Rule] = {
    # `+` operands add up, `~` operands are multiplied; a scalar in place of a tensor makes the op affine.
    **rows("add.Tensor sub.Tensor subtract.Tensor", Rule(additive)),
    **rows("mul.Tensor multiply.Tensor", Rule(multilinear)),
    **rows(
        """neg negative positive clone contiguous alias detach lift_fresh_copy mul.Scalar div.Scalar multiply.Scalar divide.Scalar
        deg2rad rad2deg""",
        Rule("~p* -> p*"),
    ),
    **rows("real imag conj conj_physical _conj resolve_conj resolve_neg", Rule("~p* -> p*")),
    **rows("view_as_complex", Rule("~p* [c] -> p*")),
    **rows("view_as_real", Rule("~p* -> p* [c]")),
    **rows("complex", Rule("+p*, +p* -> p*")),
    **rows("polar", Rule(pointwise)),  # the gradient of its modulus depends on the sign, so terms are not sound
    **rows("to.dtype to.dtype_layout to.device to.other type_as _to_copy", Rule(cast)),
    **rows("div.Tensor true_divide.Tensor divide.Tensor", Rule(first_linear)),
    **rows("where.self", Rule("p*, +p*, +p* -> p*")),
    "either": Rule("[q*], +p*, +p* -> p*"),
    **rows("lerp.Scalar lerp.Tensor", Rule(interpolation)),
    **rows("addcmul", Rule("+p*, ~p*, ~p* -> p*")),
    **rows("addcdiv", Rule("+p*, ~p*, p* -> p*")),
    **rows("prelu", Rule(channels)),
    **rows("glu", Rule(halves)),
    **rows("zeros_like ones_like full_like zero", Rule(shaped_like)),
    **rows(
        """relu gelu silu tanh sigmoid exp log sqrt rsqrt sin cos abs square reciprocal erf softplus leaky_relu elu hardswish hardsigmoid
        hardtanh relu6 mish log1p expm1 floor ceil round sign logical_not bitwise_not clamp clamp_min clamp_max pow.Tensor_Scalar
        pow.Tensor_Tensor pow.Scalar rsub.Scalar add.Scalar sub.Scalar maximum minimum eq.Tensor eq.Scalar ne.Tensor ne.Scalar lt.Tensor
        lt.Scalar le.Tensor le.Scalar gt.Tensor gt.Scalar ge.Tensor ge.Scalar __and__.Tensor __or__.Tensor logical_and logical_or
        bitwise_and.Tensor bitwise_or.Tensor floor_divide fmod.Scalar remainder.Scalar isnan isinf""",
        Rule(pointwise),
    ),
    **rows(
        """arccos arccosh arcsin arcsinh arctan arctan2 arctanh subtract.Scalar divide.Tensor_mode divide.Scalar_mode
        acos acosh asin asinh atan atan2 atanh cosh sinh tan angle celu selu log_sigmoid hardshrink softshrink threshold logit erfc
        erfinv exp2 log2 log10 digamma lgamma polygamma sinc xlogy.Tensor xlogy.Scalar_Self xlogy.Scalar_Other special_entr
        special_erfcx special_i0e special_i1 special_i1e special_log_ndtr special_ndtri special_xlog1py special_expit special_logit i0
        mvlgamma igamma igammac copysign.Tensor copysign.Scalar hypot logaddexp logaddexp2 fmax fmin max.other min.other clamp.Tensor
        clamp_max.Tensor clamp_min.Tensor clip clip.Tensor nextafter heaviside frac trunc fix sgn signbit nan_to_num isfinite isneginf
        isposinf isreal isclose fmod.Tensor remainder.Tensor remainder.Scalar floor_divide.Scalar float_power.Tensor_Tensor
        float_power.Tensor_Scalar float_power.Scalar div.Tensor_mode div.Scalar_mode rsub.Tensor round.decimals ldexp.Tensor
        true_divide.Scalar absolute logical_xor gcd lcm bitwise_and.Scalar bitwise_or.Scalar bitwise_xor.Tensor bitwise_xor.Scalar
        bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar
        __and__.Scalar __or__.Scalar __xor__.Tensor __xor__.Scalar __lshift__.Scalar __rshift__.Scalar greater.Tensor greater.Scalar
        greater_equal.Tensor greater_equal.Scalar less.Tensor less.Scalar less_equal.Tensor less_equal.Scalar not_equal.Tensor
        not_equal.Scalar where.ScalarOther where.ScalarSelf where.Scalar""",
        Rule(pointwise),
    ),
    **rows("masked_fill.Scalar", Rule(pointwise)),
}
