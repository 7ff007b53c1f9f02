"""What the microbatches of a batch are given, and what their results make together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch


class Batching(Protocol):
    """How a batch is taken apart: what microbatches need of a pipeline.

    inputs: by placeholder the argument and the dim along which it is cut (None: it is given whole). rows: placeholders that get
    the numbers of a microbatch's rows, among how many. results: how the microbatches' are joined: "sum", "mean", "same" or a dim.
    """

    @property
    def microbatches(self) -> int: ...
    @property
    def inputs(self) -> Mapping[str, tuple[str, int | None]]: ...
    @property
    def rows(self) -> Mapping[str, int]: ...
    @property
    def results(self) -> Sequence[Any]: ...


def of_microbatch(
    pipeline: Batching, arguments: Mapping[str, torch.Tensor], number: int, device: torch.device | str = "cpu"
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


def joined(pipeline: Batching, results: Sequence[Sequence[Any]]) -> list[Any]:
    """The results of the whole batch from those of every microbatch, in order; constants stay as they are."""
    return [_joined(how, values) for how, values in zip(pipeline.results, zip(*results, strict=True), strict=True)]


def _joined(how: Any, values: Sequence[Any]) -> Any:
    if how == "same" or not isinstance(values[0], torch.Tensor):
        return values[0]
    if how == "sum":
        return torch.stack(list(values)).sum(0, dtype=values[0].dtype)
    if how == "mean":
        return torch.stack(list(values)).mean(0)
    return torch.cat(list(values), how)
