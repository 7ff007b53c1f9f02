"""What a rank of a pipeline knows of the parameters and buffers that other ranks' stages hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from autoshard.errors import PlanError
from autoshard.mesh import PIPELINE_AXIS
from autoshard.module_state import State
from autoshard.plan import Plan
from autoshard.program import facts


def drop_other_stages(state: State, plan: Plan) -> None:
    """Free the parameters and buffers that other ranks' stages hold; the model has no entries for them any more."""
    pipeline = plan.program.pipeline
    assert pipeline is not None
    here = dist.get_rank(state.whole_mesh.get_group(PIPELINE_AXIS))
    needed: dict[str, set[int]] = {}
    for rank, stage in zip(pipeline.stage_ranks, plan.program.stages, strict=True):
        for node in stage.nodes("parameter", "buffer"):
            needed.setdefault(facts(node).name, set()).add(rank)
    for name, (owner, leaf) in list(state.slots.items()):
        ranks = needed.get(state.aliases.get(name, name))
        if ranks is None or here in ranks:
            continue
        tensor: Any = owner[leaf]
        if isinstance(tensor, nn.Parameter):
            empty = DTensor.from_local(torch.empty(0, device=state.device), state.mesh, [Replicate()] * state.spec.ndim, run_check=False)
            torch.utils.swap_tensors(tensor, nn.Parameter(empty, requires_grad=tensor.requires_grad))
        state.absent[name], owner[leaf] = tensor, None
        state.slots[name] = state.absent, name


def all_parameters(state: State) -> list[tuple[str, nn.Parameter]]:
    """Those of other stages too, which are empty here; each once, by the first of its names."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, _ in state.source.named_parameters(remove_duplicate=False):
        owner, leaf = state.slots[name]
        found.setdefault(id(owner[leaf]), (name, owner[leaf]))
    return list(found.values())


def changed_alone(state: State) -> list[str]:
    """Parameters whose `requires_grad` changed since the stages were cut, and which only some ranks hold: the others do not know."""
    found = []
    for name, was in state.trained.items():
        owner, leaf = state.slots[name]
        ranks = {state.stage_ranks[stage] for stage in (state.stages or {}).get(state.aliases.get(name, name), ())}
        if owner[leaf].requires_grad != was and len(ranks) < state.whole_spec.stages:
            found.append(name)
    return found


def trained_everywhere(state: State) -> dict[str, bool]:
    """By name whether a parameter is trained, alike on all ranks: where one rank alone knows of a change, as it was before."""
    alone = changed_alone(state)
    return {name: state.trained[name] if name in alone else owner[leaf].requires_grad for name, (owner, leaf) in state.slots.items()}


def told_to_freeze_before(name: str) -> PlanError:
    return PlanError(
        f"requires_grad of {name} changed after the model was cut into pipeline stages, and only its stage knows; freeze parameters "
        "before the first call, or set .grad to None before the optimizer steps"
    )


def follow_dtypes(state: State, own: Iterable[tuple[str, Any]], originals: Mapping[str, Any]) -> None:
    """Give what other stages hold the dtypes that this rank's own went to, so that all plan the same program."""
    dtypes = {mine.dtype for _, mine in own if mine.dtype.is_floating_point}
    for name in state.absent:
        if len(dtypes) == 1 and name in originals and originals[name].dtype.is_floating_point:
            originals[name].data = originals[name].data.to(next(iter(dtypes)))
    state.ready.clear()
