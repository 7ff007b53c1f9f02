"""Uses of the ops of autoshard/ops/pointwise.py: see tests/test_rules.py."""

import torch
from torch import Tensor
from torch.nn import Buffer

from uses.arguments import Use, bools, ints, pos, use, x

# fmt: off
USES: dict[str, list[Use]] = {
    "aten.__and__.Tensor": [use("p.1 p.0", bools(4, 6), bools(6))],
    "aten.__or__.Tensor": [use("p.1 p.0", bools(4, 6), bools(4, 1))],
    "aten._to_copy.default": [
        use("p.1 p.0 P", x(4, 6), dtype=torch.float32),
        use("p.1 p.0", x(4, 6), dtype=torch.int64),
        use("p.1 p.0", ints(5, 4, 6), dtype=torch.bool),
        use("p.1 p.0", bools(4, 6), dtype=torch.float64),
    ],
    "aten.abs.default": [use("p.1 p.0", x(4, 6))],
    "aten.add.Scalar": [use("p.1 p.0", x(4, 6), 2.0)],
    "aten.add.Tensor": [
        use("p.1 p.0 P", x(4, 6), x(4, 6)),
        use("p.2 p.1 p.0 P", x(2, 4, 6), x(6), alpha=3),
        use("p.1 p.0 P", x(4, 1), x(1, 6)),
        use("p.1 p.0", x(4, 6), 1.5),
        use("p.0 P", ints(9, 4), ints(9, 4)),
        use("p.0", bools(4), bools(4)),
        use("p.0 P", x(4), x()),
    ],
    "aten.alias.default": [use("p.1 p.0 P", x(4, 6))],
    "aten.bitwise_and.Tensor": [use("p.1 p.0", ints(9, 4, 6), ints(9, 6))],
    "aten.bitwise_not.default": [use("p.1 p.0", ints(9, 4, 6)), use("p.0", bools(4))],
    "aten.bitwise_or.Tensor": [use("p.1 p.0", bools(4, 6), bools(4, 6))],
    "aten.ceil.default": [use("p.1 p.0", x(4, 6))],
    "aten.clamp.default": [use("p.1 p.0", x(4, 6), -0.5, 0.5), use("p.1 p.0", x(4, 6), None, 0.5)],
    "aten.clamp_max.default": [use("p.1 p.0", x(4, 6), 0.5)],
    "aten.clamp_min.default": [use("p.1 p.0", x(4, 6), 0.5)],
    "aten.clone.default": [use("p.1 p.0 P", x(4, 6)), use("p.1 p.0", bools(4, 6)), use("p.0 P", ints(9, 6)), use("P", x())],
    "aten.contiguous.default": [use("p.1 p.0 P", x(4, 6))],
    "aten.cos.default": [use("p.1 p.0", x(4, 6))],
    "aten.detach.default": [use("p.1 p.0 P", x(4, 6))],
    "aten.div.Scalar": [use("p.1 p.0 P", x(4, 6), 3.0)],
    "aten.div.Tensor": [
        use("p.1 p.0 P", x(4, 6), pos(4, 6)),
        use("p.1 p.0 P", x(4, 6), pos(6)),
        use("p.0 p.1 P", x(6), pos(4, 6)),
        use("p.1 p.0 P", x(4, 6), 3.0),
        use("p.0 P", ints(9, 4), 2),
        use("p.0 p.1 P", x(1, 6), pos(4, 1)),
    ],
    "aten.elu.default": [use("p.1 p.0", x(4, 6))],
    "aten.eq.Scalar": [use("p.1 p.0", ints(3, 4, 6), 1)],
    "aten.eq.Tensor": [use("p.1 p.0", ints(3, 4, 6), ints(3, 6))],
    "aten.erf.default": [use("p.1 p.0", x(4, 6))],
    "aten.exp.default": [use("p.1 p.0", x(4, 6))],
    "aten.expm1.default": [use("p.1 p.0", x(4, 6))],
    "aten.floor.default": [use("p.1 p.0", x(4, 6))],
    "aten.floor_divide.default": [use("p.1 p.0", ints(9, 4, 6), ints(5, 6, low=1))],
    "aten.fmod.Scalar": [use("p.1 p.0", x(4, 6), 0.7)],
    "aten.ge.Scalar": [use("p.1 p.0", x(4, 6), 0.0)],
    "aten.ge.Tensor": [use("p.1 p.0", x(4, 6), x(4, 1))],
    "aten.gelu.default": [use("p.1 p.0", x(4, 6)), use("p.1 p.0", x(4, 6), approximate="tanh")],
    "aten.gt.Scalar": [use("p.1 p.0", x(4, 6), 0.0)],
    "aten.gt.Tensor": [use("p.1 p.0", x(4, 6), x(6))],
    "aten.hardsigmoid.default": [use("p.1 p.0", x(4, 6))],
    "aten.hardswish.default": [use("p.1 p.0", x(4, 6))],
    "aten.hardtanh.default": [use("p.1 p.0", x(4, 6))],
    "aten.isinf.default": [use("p.1 p.0", x(4, 6))],
    "aten.isnan.default": [use("p.1 p.0", x(4, 6))],
    "aten.le.Scalar": [use("p.1 p.0", x(4, 6), 0.0)],
    "aten.le.Tensor": [use("p.1 p.0", x(4, 6), x(6))],
    "aten.leaky_relu.default": [use("p.1 p.0", x(4, 6), 0.1)],
    "aten.lift_fresh_copy.default": [use("p.1 p.0 P", x(4, 6))],
    "aten.log.default": [use("p.1 p.0", pos(4, 6))],
    "aten.log1p.default": [use("p.1 p.0", pos(4, 6))],
    "aten.logical_and.default": [use("p.1 p.0", bools(4, 6), bools(6))],
    "aten.logical_not.default": [use("p.1 p.0", bools(4, 6))],
    "aten.logical_or.default": [use("p.1 p.0", bools(4, 6), bools(4, 6))],
    "aten.lt.Scalar": [use("p.1 p.0", x(4, 6), 0.0)],
    "aten.lt.Tensor": [use("p.0 p.1", ints(6, 1, 6), ints(6, 4, 1))],
    "aten.masked_fill.Scalar": [use("p.1 p.0", x(4, 6), bools(4, 6), -1.0), use("p.2 p.1 p.0", x(2, 4, 6), bools(4, 1), 0.0)],
    "aten.maximum.default": [use("p.1 p.0", x(4, 6), x(6))],
    "aten.minimum.default": [use("p.1 p.0", x(4, 6), x(6))],
    "aten.mish.default": [use("p.1 p.0", x(4, 6))],
    "aten.mul.Scalar": [use("p.1 p.0 P", x(4, 6), 3.0)],
    "aten.mul.Tensor": [
        use("p.1 p.0 P", x(4, 6), x(4, 6)),
        use("p.2 p.1 p.0 P", x(2, 4, 6), x(4, 1)),
        use("p.1 p.0 P", x(4, 6), 3.0),
        use("p.1 p.0 P", x(4, 6), bools(4, 6)),
        use("p.1 p.0", bools(4, 6), bools(6)),
        use("p.1 p.0 P", x(4, 6), x()),
    ],
    "aten.ne.Scalar": [use("p.1 p.0", ints(3, 4, 6), 1)],
    "aten.ne.Tensor": [use("p.1 p.0", ints(3, 4, 6), ints(3, 6))],
    "aten.neg.default": [use("p.1 p.0 P", x(4, 6))],
    "aten.ones_like.default": [use("p.1 p.0", x(4, 6))],
    "aten.pow.Scalar": [use("p.1 p.0", 2.0, x(4, 6))],
    "aten.pow.Tensor_Scalar": [use("p.1 p.0", x(4, 6), 2)],
    "aten.pow.Tensor_Tensor": [use("p.1 p.0", pos(4, 6), x(6))],
    "aten.reciprocal.default": [use("p.1 p.0", pos(4, 6))],
    "aten.relu.default": [use("p.1 p.0", x(4, 6))],
    "aten.relu6.default": [use("p.1 p.0", x(4, 6))],
    "aten.remainder.Scalar": [use("p.1 p.0", x(4, 6), 0.7)],
    "aten.round.default": [use("p.1 p.0", x(4, 6))],
    "aten.rsqrt.default": [use("p.1 p.0", pos(4, 6))],
    "aten.rsub.Scalar": [use("p.1 p.0", x(4, 6), 1.0)],
    "aten.sigmoid.default": [use("p.1 p.0", x(4, 6))],
    "aten.sign.default": [use("p.1 p.0", x(4, 6))],
    "aten.silu.default": [use("p.1 p.0", x(4, 6))],
    "aten.sin.default": [use("p.1 p.0", x(4, 6))],
    "aten.softplus.default": [use("p.1 p.0", x(4, 6))],
    "aten.sqrt.default": [use("p.1 p.0", pos(4, 6))],
    "aten.square.default": [use("p.1 p.0", x(4, 6))],
    "aten.sub.Scalar": [use("p.1 p.0", x(4, 6), 1.0)],
    "aten.sub.Tensor": [use("p.1 p.0 P", x(4, 6), x(4, 6)), use("p.1 p.0 P", x(4, 6), x(6), alpha=2), use("p.1 p.0", x(4, 6), 1.0)],
    "aten.tanh.default": [use("p.1 p.0", x(4, 6))],
    "aten.to.device": [use("p.1 p.0 P", x(4, 6), "cpu", torch.float32)],
    "aten.to.dtype": [
        use("p.1 p.0 P", x(4, 6), torch.float32),
        use("p.1 p.0", x(4, 6), torch.int32),
        use("p.0", ints(9, 4), torch.int8),
        use("p.0", ints(9, 4).to(torch.int8), torch.int64),
        use("p.1 p.0", bools(4, 6), torch.int64),
    ],
    "aten.to.dtype_layout": [use("p.1 p.0 P", x(4, 6), dtype=torch.float32)],
    "aten.to.other": [use("p.1 p.0 P", x(4, 6), x(2).float())],
    "aten.type_as.default": [use("p.1 p.0 P", x(4, 6), x(2).float()), use("p.1 p.0", x(4, 6), ints(9, 4, 6))],
    "aten.where.ScalarOther": [use("p.1 p.0", bools(4, 6), x(4, 6), 0.0), use("p.1 p.0 p.2", bools(6, 6), x(2, 6, 6), -1.0)],
    "aten.where.self": [
        use("p.1 p.0 P", bools(4, 6), x(4, 6), x(4, 6)),
        use("p.1 p.0 P", bools(4, 1), x(4, 6), x()),
        use("p.1 p.0", bools(4, 6), bools(4, 6), bools(6)),
    ],
    "aten.zero.default": [use("p.1 p.0", x(4, 6))],
    "aten.arccos.default": [use("p.1 p.0", x(4, 6).tanh() * 0.9)],
    "aten.arccosh.default": [use("p.1 p.0", pos(4, 6) + 1)],
    "aten.arcsin.default": [use("p.1 p.0", x(4, 6).tanh() * 0.9)],
    "aten.arcsinh.default": [use("p.1 p.0", x(4, 6))],
    "aten.arctan.default": [use("p.1 p.0", x(4, 6))],
    "aten.arctan2.default": [use("p.1 p.0", x(4, 6), x(6))],
    "aten.arctanh.default": [use("p.1 p.0", x(4, 6).tanh())],
    "aten.subtract.Tensor": [use("p.1 p.0 P", x(4, 6), x(6), alpha=2)],
    "aten.subtract.Scalar": [use("p.1 p.0", x(4, 6), 2.0)],
    "aten.multiply.Scalar": [use("p.1 p.0 P", x(4, 6), 2.0)],
    "aten.divide.Scalar": [use("p.1 p.0 P", x(4, 6), 2.0)],
    "aten.divide.Tensor_mode": [use("p.1 p.0", x(4, 6), pos(6), rounding_mode="floor")],
    "aten.divide.Scalar_mode": [use("p.1 p.0", x(4, 6), 0.3, rounding_mode="trunc")],
    "aten.zeros_like.default": [use("p.1 p.0", x(4, 6))],
    "either": [
        use("p.1 p.0 P", torch.tensor(True), x(4, 6), x(4, 6), 1),
        use("p.1 p.0 P", torch.tensor(False), x(4, 6), x(4, 6), 1),
        use("p.1 p.0", torch.tensor(True), bools(4, 6), bools(4, 6), 2),
    ],
}


def unit(*shape: int) -> Tensor:
    """Between 0.1 and 0.9, where every function below is smooth."""
    return x(*shape).sigmoid() * 0.8 + 0.1


def complexes(*shape: int) -> Tensor:
    return torch.complex(x(*shape), x(*shape))


_UNARY = """acos angle asin asinh atan atanh celu cosh digamma erfc erfinv exp2 fix frac hardshrink i0 isfinite isneginf isposinf isreal
lgamma log10 log2 log_sigmoid logit nan_to_num selu sgn signbit sinc sinh softshrink special_entr special_erfcx special_expit special_i0e
special_i1 special_i1e special_log_ndtr special_logit special_ndtri tan trunc absolute"""
_BINARY = """atan2 copysign.Tensor div.Tensor_mode float_power.Tensor_Tensor fmax fmin fmod.Tensor heaviside hypot igamma igammac isclose
logaddexp logaddexp2 max.other min.other nextafter remainder.Tensor rsub.Tensor special_xlog1py xlogy.Tensor greater.Tensor
greater_equal.Tensor less.Tensor less_equal.Tensor not_equal.Tensor"""
_WITH_SCALAR = """copysign.Scalar div.Scalar_mode float_power.Tensor_Scalar floor_divide.Scalar remainder.Scalar true_divide.Scalar
xlogy.Scalar_Other greater.Scalar greater_equal.Scalar less.Scalar less_equal.Scalar not_equal.Scalar"""
_BITS = """bitwise_left_shift.Tensor bitwise_right_shift.Tensor bitwise_xor.Tensor __xor__.Tensor gcd lcm logical_xor"""
_BITS_WITH_SCALAR = """bitwise_and.Scalar bitwise_left_shift.Tensor_Scalar bitwise_or.Scalar bitwise_right_shift.Tensor_Scalar
bitwise_xor.Scalar __and__.Scalar __or__.Scalar __xor__.Scalar __lshift__.Scalar __rshift__.Scalar"""
_FLAT = ("heaviside", "igamma", "igammac", "nextafter", "floor_divide.Scalar", "isclose", "isreal")  # no derivative


def _names(text: str) -> list[tuple[str, str]]:
    return [(f"aten.{name}" if "." in name else f"aten.{name}.default", name) for name in text.split()]


def _mode(name: str) -> dict[str, str]:
    return {"rounding_mode": "floor"} if name.endswith("_mode") else {}


USES |= {op: [use("p.1 p.0", Buffer(unit(4, 6)) if name in _FLAT else unit(4, 6))] for op, name in _names(_UNARY)}
USES |= {
    op: [use("p.1 p.0", *(Buffer(v) if name in _FLAT else v for v in (unit(4, 6), unit(6))), **_mode(name))] for op, name in _names(_BINARY)
}
USES |= {
    op: [use("p.1 p.0", Buffer(pos(4, 6)) if name in _FLAT else pos(4, 6), 0.5, **_mode(name))] for op, name in _names(_WITH_SCALAR)
}
USES |= {op: [use("p.1 p.0", ints(9, 4, 6, low=1), ints(9, 6, low=1))] for op, _ in _names(_BITS)}
USES |= {op: [use("p.1 p.0", ints(9, 4, 6), 3)] for op, _ in _names(_BITS_WITH_SCALAR)}
USES |= {
    "aten._conj.default": [use("p.1 p.0 P", complexes(4, 6))],
    "aten.acosh.default": [use("p.1 p.0", pos(4, 6) + 1)],
    "aten.addcdiv.default": [use("p.1 p.0 P", x(4, 6), x(4, 6), pos(6), value=0.5)],
    "aten.addcmul.default": [use("p.1 p.0 P", x(4, 6), x(4, 1), x(6), value=0.5)],
    "aten.clamp.Tensor": [use("p.1 p.0", x(4, 6), x(6) - 1, x(4, 1) + 1), use("p.1 p.0", x(4, 6), None, x(6))],
    "aten.clamp_max.Tensor": [use("p.1 p.0", x(4, 6), x(6))],
    "aten.clamp_min.Tensor": [use("p.1 p.0", x(4, 6), x(6))],
    "aten.clip.default": [use("p.1 p.0", x(4, 6), -0.5, 0.5)],
    "aten.clip.Tensor": [use("p.1 p.0", x(4, 6), x(6) - 1)],
    "aten.complex.default": [use("p.1 p.0 P", x(4, 6), x(4, 6))],
    "aten.conj.default": [use("p.1 p.0 P", complexes(4, 6))],
    "aten.conj_physical.default": [use("p.1 p.0 P", complexes(4, 6))],
    "aten.deg2rad.default": [use("p.1 p.0 P", x(4, 6))],
    "aten.divide.Tensor": [use("p.1 p.0 P", x(4, 6), pos(6))],
    "aten.float_power.Scalar": [use("p.1 p.0", 2.0, x(4, 6))],
    "aten.full_like.default": [use("p.1 p.0", x(4, 6), 3.0)],
    "aten.glu.default": [use("d0 d1", x(4, 6, 8), -1), use("d1", x(4, 6), 0)],
    "aten.imag.default": [use("p.1 p.0 P", complexes(4, 6))],
    "aten.ldexp.Tensor": [use("p.1 p.0", x(4, 6), ints(3, 6))],
    "aten.lerp.Scalar": [use("p.1 p.0 P", x(4, 6), x(6), 0.3)],
    "aten.lerp.Tensor": [use("p.1 p.0 P", x(4, 6), x(6), unit(4, 1))],
    "aten.multiply.Tensor": [use("p.1 p.0 P", x(4, 6), x(6))],
    "aten.mvlgamma.default": [use("p.1 p.0", pos(4, 6) + 2, 2)],
    "aten.negative.default": [use("p.1 p.0 P", x(4, 6))],
    "aten.polar.default": [use("p.1 p.0", x(4, 6), x(6))],
    "aten.polygamma.default": [use("p.1 p.0", 1, pos(4, 6))],
    "aten.positive.default": [use("p.1 p.0 P", x(4, 6))],
    "aten.prelu.default": [use("b c s.0", x(2, 4, 6), x(4)), use("b.1 b.0", x(4, 6), x(1)), use("b c", x(4, 6), x(6))],
    "aten.rad2deg.default": [use("p.1 p.0 P", x(4, 6))],
    "aten.real.default": [use("p.1 p.0 P", complexes(4, 6))],
    "aten.resolve_conj.default": [use("p.1 p.0 P", x(4, 6))],
    "aten.resolve_neg.default": [use("p.1 p.0 P", x(4, 6))],
    "aten.round.decimals": [use("p.1 p.0", x(4, 6), decimals=1)],
    "aten.threshold.default": [use("p.1 p.0", x(4, 6), 0.1, -1.0)],
    "aten.true_divide.Tensor": [use("p.1 p.0 P", x(4, 6), pos(6))],
    "aten.view_as_complex.default": [use("p.1 p.0 P", x(4, 6, 2))],
    "aten.view_as_real.default": [use("p.1 p.0 P", complexes(4, 6))],
    "aten.where.Scalar": [use("p.1 p.0", bools(4, 6), 1.0, 2.0)],
    "aten.where.ScalarSelf": [use("p.1 p.0", bools(4, 6), 1.0, x(6))],
    "aten.xlogy.Scalar_Self": [use("p.1 p.0", 0.5, pos(4, 6))],
}
