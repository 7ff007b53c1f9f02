"""How exact an op and its lowerings are in half types, by the same numbers in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoshard.mesh import MeshSpec
from autoshard.placements import unshard
from autoshard.testing import OpCase, dual

MESH = MeshSpec.of("a=2,b=2")
Errors = tuple[float, ...]  # of every result, then of every operand's gradient, over the largest number there


def errors(op: torch._ops.OpOverload, dtype: torch.dtype, *args: Any, **kwargs: Any) -> tuple[Errors, dict[str, Errors]]:
    """Errors of the op in `dtype`, and of its rule with each factor split on both of two axes. Gradients must flow to `dtype`."""
    half = tuple(_cast(a, dtype) for a in args)
    case = OpCase(op, half, kwargs, MESH)
    exact = OpCase(op, tuple(_cast(a, torch.float64) for a in half), kwargs, MESH)
    exact.cotangents = [None if y is None else y.double() for y in case.cotangents]
    wanted = [*exact.outputs, *_gradients(exact)]
    found: dict[str, Errors] = {}
    for candidate in case.candidates({}):
        names = {strategy.factor for strategy in candidate.strategies}
        if len(names) == 1 and "" not in names:
            run = case.run(candidate)
            split = [
                unshard([p.detach() for p in pieces], layout, MESH) for pieces, layout in zip(run.outputs, candidate.outputs, strict=True)
            ]
            for pieces, layout in zip(run.operands, candidate.inputs, strict=True):
                if pieces[0].requires_grad:
                    split.append(unshard([p.grad for p in pieces], dual(layout), MESH))  # type: ignore[misc]
            assert [y.dtype for y in split] == [y.dtype for y in (*case.outputs, *(g for g in case.gradients if g is not None))]
            found[names.pop()] = _apart(split, wanted)
    return _apart([*case.outputs, *(g for g in case.gradients if g is not None)], wanted), found


def _gradients(case: OpCase) -> list[Tensor]:
    """Gradients that the case's cotangents give its operands."""
    leaves = [x.detach().clone().requires_grad_(g is not None) for x, g in zip(case.operands, case.gradients, strict=True)]
    order = iter(leaves)
    results = case.op(*(next(order) if isinstance(a, Tensor) else a for a in case.args), **case.kwargs)
    results = results if isinstance(results, tuple) else (results,)
    pairs = [(y, g) for y, g in zip(results, case.cotangents, strict=True) if g is not None]
    torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
    return [leaf.grad for leaf in leaves if leaf.requires_grad]  # type: ignore[misc]


def _cast(a: Any, dtype: torch.dtype) -> Any:
    return a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a


def _apart(found: list[Tensor], wanted: list[Tensor]) -> Errors:
    return tuple(float((a.double() - b).abs().max() / max(float(b.abs().max()), 1e-3)) for a, b in zip(found, wanted, strict=True))


def check_precision(monkeypatch: pytest.MonkeyPatch, op: torch._ops.OpOverload, dtype: torch.dtype, *args: Any, **kwargs: Any) -> set[str]:
    """Split on two axes, no result and no gradient is further from float64 than the op's own by more than one unit in the last place."""
    monkeypatch.setattr("autoshard.testing._wants_gradient", lambda x: x.is_floating_point() and not isinstance(x, nn.Buffer))
    own, split = errors(op, dtype, *args, **kwargs)
    for factor, found in split.items():
        worse = [(error, limit) for error, limit in zip(found, own, strict=True) if error > limit + torch.finfo(dtype).eps]
        assert not worse, f"{factor} split: {worse}"
    return set(split)
