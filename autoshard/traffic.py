"""Bytes that a rank sends: in conversion nodes, and inside lowerings, which are run on tensors without memory to find out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from autoshard import runtime
from autoshard.conversions import COMMUNICATES, WIRE, Step
from autoshard.costs import CostModel
from autoshard.mesh import MeshSpec
from autoshard.ops.row import Call, TensorInfo
from autoshard.placements import Layout, local_shape
from autoshard.program import Program, asked_of, call_of, facts, passed_on, producer, row_of, tensor_operands
from autoshard.runtime import Collective
from autoshard.simulator import Context

Sent = tuple[str, str, float]  # axis, the collective, bytes that the axis holds together
_SAME_FOR_EVERY_BLOCK = frozenset({"add", "_block", "_block_gradient"})  # of a ring: shapes of tensors decide the result's


@dataclass
class MeteredAxis:
    """Stands for runtime.Axis: notes what would be sent, and gives results of the right shape."""

    name: str
    size: int
    sent: list[Sent] = field(default_factory=list)  # axis, collective, bytes that the axis holds together
    rank: int = 0

    def convert(self, x: torch.Tensor, forward: Collective, backward: Collective) -> torch.Tensor:
        x = runtime.pad_cut(forward, x, self.size)
        whole = x.numel() * x.element_size() * (self.size if forward.name in ("all_gather", "all_to_all", "rotate") else 1)
        self.sent.append((self.name, forward.name, whole))
        if x.requires_grad:
            self.sent.append((self.name, backward.name, whole))
        if forward.name == "all_gather":
            return runtime.trim_joined(forward, torch.cat([x] * self.size, forward.dim))
        return x.chunk(self.size, forward.dim)[0] if forward.name in ("reduce_scatter", "slice") else x

    def apply(self, function: type[torch.autograd.Function], *args: Any) -> torch.Tensor:
        plain = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
        context = Context(plain, [isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args])
        result = function.forward(context, *plain)
        if any(context.needs_input_grad):
            function.backward(context, torch.empty_like(result))
            result.requires_grad_()
        return result

    def exchange(self, x: torch.Tensor, sent: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
        """As many rows come as go: what is sent depends on values, and is priced as if it were balanced."""
        whole = x.numel() * x.element_size() * self.size
        self.sent += [(self.name, "all_to_all", whole)] * (2 if x.requires_grad else 1)
        return x

    def maximum(self, x: torch.Tensor) -> torch.Tensor:
        self.sent.append((self.name, "all_reduce", x.numel() * x.element_size()))
        return x.detach()


class _Once(TorchFunctionMode):
    """Runs what a ring does for each of its blocks for one of them: a block without memory is like any other."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[object, Any] = {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if kwargs or getattr(func, "__name__", "") not in _SAME_FOR_EVERY_BLOCK or any(x.requires_grad for x in tensors):
            return func(*args, **(kwargs or {}))
        key = func, tuple((x.shape, x.dtype) if isinstance(x, torch.Tensor) else x if isinstance(x, bool) else type(x) for x in args)
        if key not in self.known:
            self.known[key] = func(*args)
        return self.known[key]


def meter(function: str, call: Call, layouts: Sequence[Layout], axes: Mapping[str, Sequence[str]], mesh: MeshSpec) -> list[Sent]:
    """What the lowering `function` sends for `call` with inputs in `layouts`; axes: keyword -> mesh axes that split its factor."""
    sent: list[Sent] = []
    metered = {key: tuple(MeteredAxis(name, mesh.shape[mesh.index(name)], sent) for name in names) for key, names in axes.items()}
    with _Once():
        run_lowering(function, call, [_empty(info, layout, mesh) for info, layout in zip(call.inputs, layouts, strict=False)], metered)
    return sent


def run_lowering(function: str, call: Call, operands: Sequence[torch.Tensor], axes: Mapping[str, Sequence[MeteredAxis]]) -> None:
    """Run the lowering `function` as `call` does, on local `operands`, with `axes` in place of those that split its factors."""
    local = iter(operands)

    def tensors(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [tensors(item) for item in value]
        return next(local) if isinstance(value, TensorInfo) else value

    given = {name: tensors(value) for name, value in call.arguments.items()}
    lowering: Callable[..., Any] = getattr(runtime, function)
    by_name = lowering.__kwdefaults__ or {}
    lowering(
        *(value for name, value in given.items() if name not in by_name),
        **{name: given[name] for name in by_name if name in given},
        **axes,
    )


def _empty(info: TensorInfo, layout: Layout, mesh: MeshSpec) -> torch.Tensor:
    shape = local_shape(info.shape, layout, mesh.shape)
    return torch.empty(shape or (), dtype=info.dtype, device="meta", requires_grad=info.needs_grad)


def seconds_inside(costs: CostModel, sent: Sequence[Sent]) -> float:
    """Seconds of what a lowering sends."""
    return sum(costs.collective_s(name, costs.mesh.index(axis), whole) for axis, name, whole in sent)


def sent_by(program: Program, node: fx.Node, costs: CostModel) -> list[Sent]:
    """The collectives of one conversion node: forward, and backward where a gradient flows."""
    known, before, row = facts(node), facts(node.args[0]).layout, row_of(node)  # type: ignore[arg-type]
    name = str(asked_of(node).args[1])
    axis = program.mesh.index(name)
    whole = costs.whole_bytes(Step(axis, before[axis], known.layout[axis]), known.value, before)
    return [(name, collective, whole) for collective in (row.forward, row.backward)[: 2 if known.needs_grad else 1]]


def wire_bytes(program: Program, node: fx.Node, costs: CostModel) -> tuple[float, float]:
    """Bytes that a rank sends in one conversion node: forward, and backward where a gradient flows."""
    shape, index = program.mesh.shape, program.mesh.index
    sent = [WIRE[name](shape[index(axis)]) * whole for axis, name, whole in sent_by(program, node, costs)]
    return sent[0], sum(sent[1:])


def is_sent_again(node: fx.Node) -> bool:
    """Whether what a conversion or an op sends in forward is sent once more in backward."""
    is_repeated = facts(node).role == "conversion" and row_of(node).is_repeated
    return is_repeated or facts(node).recompute is not None


def all_sent(program: Program, costs: CostModel) -> Iterator[Sent]:
    """Every collective of one forward and backward pass of a rank; constants are converted once and not counted."""
    for node in program.nodes():
        yield from sent_at(program, node, costs)


def sent_at(program: Program, node: fx.Node, costs: CostModel) -> Iterator[Sent]:
    """The collectives of one node in one forward and backward pass."""
    if facts(node).role == "op":
        yield from sent_inside(program, node)
    elif facts(node).role == "conversion" and not facts(node).is_constant:
        sent = sent_by(program, node, costs)
        yield from sent
        if program.is_training and is_sent_again(node):
            yield sent[0]


def traffic(program: Program, costs: CostModel) -> dict[str, float]:
    """Bytes that a rank sends in one step, by collective; with pipeline stages, the rank that sends most, and "send" to its neighbours."""
    if program.stages:
        assert program.pipeline is not None
        of_rank: list[dict[str, float]] = [{} for _ in program.pipeline.schedule]
        for rank, stage in zip(program.pipeline.stage_ranks, program.stages, strict=True):
            for name, nbytes in _traffic_of_stage(stage, costs).items():
                of_rank[rank][name] = of_rank[rank].get(name, 0.0) + nbytes
        return max(of_rank, key=lambda moved: sum(moved.values()))
    moved: dict[str, float] = {}
    for sent in all_sent(program, costs):
        _add(moved, program, sent)
    return moved


def _add(moved: dict[str, float], program: Program, sent: Sent, times: int = 1) -> None:
    axis, name, whole = sent
    nbytes = WIRE[name](program.mesh.shape[program.mesh.index(axis)]) * whole * times
    if nbytes:
        moved[name] = moved.get(name, 0.0) + nbytes


def _traffic_of_stage(stage: Program, costs: CostModel) -> dict[str, float]:
    """What is prepared is sent once, all else with every microbatch; values go to the next stage, gradients to the one before."""
    assert stage.pipeline is not None
    times, moved = stage.pipeline.microbatches, dict[str, float]()
    for node in stage.nodes():
        for sent in sent_at(stage, node, costs):
            _add(moved, stage, sent, 1 if facts(node).is_prepared else times)
    forward_bytes, backward_bytes = messages_of(stage, costs)
    if forward_bytes or backward_bytes:
        moved["send"] = times * (forward_bytes + backward_bytes)
    return moved


def messages_of(stage: Program, costs: CostModel) -> tuple[float, float]:
    """Bytes that a stage passes on for a microbatch: values to the next stage, gradients to the one before."""
    passed = [(facts(node), k) for node, k in map(producer, passed_on(stage))]
    received = [facts(node) for node in stage.nodes("received")]
    values = sum(costs.local_bytes(known.values[k], known.layouts[k]) for known, k in passed)
    return values, sum(costs.local_bytes(known.value, known.layout) for known in received if known.needs_grad)


def seconds_by_term(program: Program, costs: CostModel) -> dict[str, float]:
    """The price of the program in parts: "all_gather on dp" and so on, "local copies", "optimizer" and "compute".

    The sum is the predicted step, of random plans too. What several readers share is charged once, where the search may have charged
    it twice, so that it may be below `objective_s`. What ops send inside them counts as communication.
    """
    terms: dict[str, float] = {}
    inside_s = 0.0
    for sent in all_sent(program, costs):
        key = f"{sent[1]} on {sent[0]}" if sent[1] in COMMUNICATES else "local copies"
        terms[key] = terms.get(key, 0.0) + seconds_inside(costs, [sent])
    for node in program.nodes("op"):
        inside_s += seconds_inside(costs, sent_inside(program, node))
    terms["optimizer"] = sum(costs.parameter_s(facts(node).value, facts(node).layout) for node in program.parameters().values())
    terms["compute"] = program.stats["ops_s"] - terms["optimizer"] - inside_s
    return {key: seconds for key, seconds in terms.items() if seconds}


def sent_inside(program: Program, node: fx.Node) -> list[Sent]:
    """What a lowered op sends: axis, collective, bytes that the axis holds together; nothing for other ops."""
    axes = {key: value for key, value in node.kwargs.items() if key.endswith("_axes")}
    if not axes:
        return []
    layouts = [facts(operand).layout for operand in tensor_operands(node)]
    return meter(node.target.__name__, call_of(node), layouts, axes, program.mesh)  # type: ignore[union-attr,arg-type]
