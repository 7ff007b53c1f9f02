"""What the microbatches of a batch are given, and what their results make together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from autoshard.pipeline import Pipeline


def of_microbatch(
    pipeline: Pipeline, arguments: Mapping[str, torch.Tensor], number: int, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """By placeholder what microbatch `number` is given: views of the whole arguments, or these themselves."""
    found = {}
    for name, (argument, dim) in pipeline.inputs.items():
        whole = arguments[argument]
        found[name] = whole if dim is None else whole.chunk(pipeline.microbatches, dim)[number]
    for name, length in pipeline.rows.items():
        size = length // pipeline.microbatches
        found[name] = torch.arange(number * size, (number + 1) * size, device=device)
    return found


def joined(pipeline: Pipeline, results: Sequence[Sequence[Any]]) -> list[Any]:
    """The results of the whole batch from those of every microbatch, in order; constants stay as they are."""
    return [_joined(how, values) for how, values in zip(pipeline.results, zip(*results, strict=True), strict=True)]


def _joined(how: Any, values: Sequence[Any]) -> Any:
    if how == "same" or not isinstance(values[0], torch.Tensor):
        return values[0]
    if how == "sum":
        return torch.stack(list(values)).sum(0)
    if how == "mean":
        return torch.stack(list(values)).mean(0)
    return torch.cat(list(values), how)
