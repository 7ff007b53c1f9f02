"""torch.nn.utils.clip_grad_norm_ over pipeline stages: each rank has the gradients of its own stages, the norm is that of all.

torch computes the norm of the gradients that it is given, which DTensor makes that of all ranks of their mesh: those of one stage. So the
function inside torch that does it is replaced, once a model with stages exists, by one that adds up over the stages where gradients
are a pipeline's. Weights that two stages hold count once. Every rank calls clip_grad_norm_, as the training loop does anyway.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils import clip_grad

from autoshard.errors import PlanError

_NAME = "_get_total_norm"  # what clip_grad_norm_ and get_total_norm call


@dataclass(frozen=True)
class _Piped:
    """A model with stages: its ranks of `pp`, and the parameters here that an earlier stage holds as well."""

    model: weakref.ref[nn.Module]
    mesh: DeviceMesh
    group: dist.ProcessGroup
    repeated: frozenset[str]


_PIPED: list[_Piped] = []


def register(model: nn.Module, mesh: DeviceMesh, group: dist.ProcessGroup, repeated: Iterable[str]) -> None:
    """From now on norms of this model's gradients are those of all its stages. Raises PlanError where torch has changed."""
    if not hasattr(clip_grad, _NAME):
        raise PlanError(f"torch {torch.__version__} computes gradient norms in another way: install torch >= 2.11, < 2.14")
    _PIPED[:] = [piped for piped in _PIPED if piped.model() is not None]
    _PIPED.append(_Piped(weakref.ref(model), mesh, group, frozenset(repeated)))
    if not hasattr(getattr(clip_grad, _NAME), "of_one_stage"):
        setattr(clip_grad, _NAME, _over_stages(getattr(clip_grad, _NAME)))


def _over_stages(of_one_stage: Any) -> Any:
    @functools.wraps(of_one_stage)
    def total_norm(tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None) -> Tensor:
        given = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        piped = _pipeline_of(given)
        if piped is None:
            return of_one_stage(given, norm_type, error_if_nonfinite, foreach)
        if not {id(gradient) for gradient in _gradients(piped).values()}.issubset(map(id, given)):
            raise PlanError(
                "clip the gradients of all parameters of a model with pipeline stages in one call, "
                "clip_grad_norm_(model.parameters(), ...): a part of them may lie on some of the ranks alone"
            )
        again = _repeated(piped)
        own = of_one_stage([tensor for tensor in given if id(tensor) not in again], norm_type, False, foreach)
        norm = _combined(own.full_tensor() if isinstance(own, DTensor) else own, float(norm_type), piped)
        if error_if_nonfinite and not bool(norm.isfinite()):
            raise RuntimeError(f"the norm of order {norm_type} of the gradients of all stages is {float(norm)}, so it cannot be clipped")
        norm = norm.to(given[0].dtype if given else torch.float32)
        return DTensor.from_local(norm, piped.mesh, [Replicate()] * piped.mesh.ndim, run_check=False)

    total_norm.of_one_stage = of_one_stage  # type: ignore[attr-defined]
    return total_norm


def _pipeline_of(tensors: list[Tensor]) -> _Piped | None:
    """The pipeline whose gradients these are; where there are none, one whose stages here have nothing to train."""
    alive = [piped for piped in _PIPED if piped.model() is not None]
    if tensors:
        given = {id(tensor) for tensor in tensors}
        return next((piped for piped in alive if not given.isdisjoint(map(id, _gradients(piped).values()))), None)
    return next((piped for piped in alive if not _gradients(piped)), None)


def _gradients(piped: _Piped) -> dict[str, Tensor]:
    """By parameter of the model, under all of its names."""
    model = piped.model()
    named = model.named_parameters(remove_duplicate=False) if model is not None else ()
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def _repeated(piped: _Piped) -> set[int]:
    """Gradients that another stage counts."""
    gradients = _gradients(piped)
    return {id(gradients[name]) for name in piped.repeated if name in gradients}


def _combined(own: Tensor, order: float, piped: _Piped) -> Tensor:
    norm = own.detach().to(piped.mesh.device_type, torch.float64)  # of one dtype on all ranks, whatever they hold
    if math.isinf(order):
        dist.all_reduce(norm, dist.ReduceOp.MAX, group=piped.group)
        return norm
    norm = norm**order if order else norm
    dist.all_reduce(norm, group=piped.group)
    return norm ** (1.0 / order) if order else norm
