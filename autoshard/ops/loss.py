"""Losses. Samples are split on every one; a mean over split samples is the local mean over the number of pieces."""

from __future__ import annotations

from dataclasses import replace

from autoshard.ops.row import Call, Lowering, Rule, rows, spell
from autoshard.runtime.loss import AVERAGED

_NONE, _MEAN, _SUM = 0, 1, 2
_CLASSES = frozenset("c")


def cross_entropy(call: Call) -> str:
    """Classes on dim 1 (dim 0 of a single sample); targets are class numbers, or probabilities of the input's shape."""
    logits, target = call.inputs[:2]
    batch = "b " if len(logits.shape) > 1 else ""
    wanted = f"{batch}c s*" if target.dtype.is_floating_point else f"{batch}s*"
    weight = ", c" if len(call.inputs) > 2 else ""
    return f"{batch}c s*, {wanted}{weight} -> {f'{batch}s*' if call.get('reduction') == _NONE else ''}"


def _samples(call: Call) -> str:
    """Name of the factors that are samples: a lowering divides where a mean is taken over them."""
    return "m" if call.get("reduction") == _MEAN else "p"


def pointwise_loss(call: Call) -> str:
    """A loss of each number, with broadcasting, and their sum or mean."""
    samples = f"{_samples(call)}*"
    return spell([samples] * len(call.inputs), [samples if call.get("reduction") == _NONE else ""])


def sample_loss(call: Call) -> str:
    """A loss of each sample, whose last dim stays whole, and their sum or mean."""
    samples = f"{_samples(call)}*"
    return spell([f"{samples} [n]"] * len(call.inputs), [samples if call.get("reduction") == _NONE else ""])


def class_margin_loss(call: Call) -> str:
    """A loss of each sample, whose classes stay whole, its class number and weights of the classes."""
    samples = f"{_samples(call)}*"
    return spell([f"{samples} [n]", samples, "[n]"][: len(call.inputs)], [samples if call.get("reduction") == _NONE else ""])


def pair_loss(call: Call) -> str:
    """A loss of each pair of vectors, which stay whole, and its label."""
    samples = f"{_samples(call)}*"
    return spell([f"{samples} [n]"] * 2 + [samples], [samples if call.get("reduction") == _NONE else ""])


def _of_classes(name: str) -> Lowering:
    return Lowering(name, {"c": "class_axes", "b": "batch_axes", "s": "batch_axes"}, _CLASSES, _CLASSES)


# Losses of more than one number each; the others of AVERAGED are losses of each number.
_EQUATIONS = {
    "cosine_embedding_loss": pair_loss,
    "multi_margin_loss": class_margin_loss,
    "multilabel_margin_loss": sample_loss,
    "triplet_margin_loss": sample_loss,
}

ROWS: dict[str, Rule] = {
    **rows("cross_entropy_loss", Rule(cross_entropy, replace(_of_classes("cross_entropy"), uneven=_CLASSES))),
    **rows("nll_loss nll_loss2d nll_loss_nd", Rule(cross_entropy, _of_classes("nll_loss"))),
    **{
        op: rule
        for name in (*AVERAGED, "kl_div")
        for op, rule in rows(name, Rule(_EQUATIONS.get(name, pointwise_loss), Lowering(name, {"m": "sample_axes"}))).items()
    },
}
