"""The simulator: all ranks of a program in one process, with autograd.

A value is a `Ranks`: one tensor per rank. Ops run rank by rank; a conversion acts on the whole list, group by group along
its axis, by the same tables and the same cut and join as on real processes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx
from torch.autograd.function import once_differentiable

from autoshard import autocast, runtime
from autoshard.branches import is_either, predicates, runs, taken
from autoshard.mesh import MeshSpec
from autoshard.placements import padded_axes, shard, unshard
from autoshard.program import Program, facts, is_of_runtime
from autoshard.quiet_random import without_draws
from autoshard.regions import repeats_gathers
from autoshard.runtime import Collective, Started, change_padding, cut, join, mix, pad_cut, pad_shard, seeded, trim_joined


class Ranks:
    """One tensor per rank, in rank order; torch functions, methods and operators act on each."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = list(values)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Ranks:
        return cls.apply(func, args, dict(kwargs or {}))

    @classmethod
    def apply(cls, func: Callable, args: tuple, kwargs: dict) -> Ranks:
        """`func` on every rank's own arguments."""
        count = next(len(a.values) for a in _leaves((args, kwargs)) if isinstance(a, Ranks))
        results = [func(*_pick(args, rank), **_pick(kwargs, rank)) for rank in range(count)]
        return cls(results)

    def __getattr__(self, name: str) -> Any:
        first = getattr(self.values[0], name)
        if not callable(first):
            return first
        if name in ("dim", "numel", "size"):
            return first
        return lambda *args, **kwargs: Ranks.apply(lambda x, *a, **k: getattr(x, name)(*a, **k), (self, *args), kwargs)

    def __getitem__(self, index: Any) -> Ranks:
        return Ranks.apply(lambda x, i: x[i], (self, index), {})


def _operator(name: str) -> Callable:
    return lambda self, *args: Ranks.apply(lambda x, *a: getattr(torch.as_tensor(x), name)(*a), (self, *args), {})


_ARITHMETIC = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "mod", "neg")
for _name in (*_ARITHMETIC, "and", "or", "invert", "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Ranks, f"__{_name}__", _operator(f"__{_name}__"))


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, (tuple, list)):
        return [leaf for item in tree for leaf in _leaves(item)]
    if isinstance(tree, dict):
        return [leaf for item in tree.values() for leaf in _leaves(item)]
    return [tree]


def _pick(tree: Any, rank: int) -> Any:
    if isinstance(tree, Ranks):
        return tree.values[rank]
    if isinstance(tree, (tuple, list)):
        return type(tree)(_pick(item, rank) for item in tree) if not hasattr(tree, "_fields") else tree
    if isinstance(tree, dict):
        return {key: _pick(item, rank) for key, item in tree.items()}
    return tree


@dataclass(frozen=True)
class SimulatedAxis:
    """Stands for runtime.Axis: converts all ranks at once."""

    mesh: MeshSpec
    name: str

    @property
    def size(self) -> int:
        return self.mesh.shape[self.mesh.index(self.name)]

    @property
    def rank(self) -> Ranks:
        return Ranks([torch.tensor(coordinate[self.mesh.index(self.name)]) for coordinate in self.mesh.coordinates()])

    def groups(self) -> list[list[int]]:
        """Ranks that differ on this axis alone, in the order of their coordinate."""
        axis = self.mesh.index(self.name)
        found: dict[tuple[int, ...], list[int]] = {}
        for rank, coordinate in enumerate(self.mesh.coordinates()):
            found.setdefault((*coordinate[:axis], *coordinate[axis + 1 :]), []).append(rank)
        return list(found.values())

    def convert(self, x: Ranks, forward: Collective, backward: Collective) -> Ranks:
        if self.size == 1:
            return x
        return Ranks(_Convert.apply(self, forward, backward, *x.values))

    def start(self, x: Ranks, forward: Collective, backward: Collective) -> Started:
        """The collective reads its operand now; all else happens at `wait`, as there is no time here."""
        pending = [value.detach().clone() for value in x.values]
        return Started(self, x, Ranks(self.run(forward, pending) if self.size > 1 else pending), forward, backward)  # type: ignore[arg-type]

    def wait(self, started: Started) -> Ranks:
        source, pending = (cast(Ranks, ranks) for ranks in (started.source, started.pending))
        if self.size == 1:
            return source
        return Ranks(_Wait.apply(self, started.backward, len(source.values), *source.values, *pending.values))

    def pieces_again(self, x: Ranks, result: Ranks, forward: Collective, source: Callable) -> list[tuple[torch.Tensor, Callable]]:
        """Per rank the result and what makes it again: the whole group's sources, gathered."""
        sources = [source(value) for value in x.values]

        def make(rank: int) -> torch.Tensor:
            group = next(group for group in self.groups() if rank in group)
            return run_group(forward, [sources[other]() for other in group])[group.index(rank)].clone()

        return [(value, functools.partial(make, rank)) for rank, value in enumerate(result.values)]

    def apply(self, function: type[torch.autograd.Function], *args: Any) -> Ranks:
        leaves = [value for arg in args if isinstance(arg, Ranks) for value in arg.values]
        return Ranks(_Apply.apply(function, args, *leaves))

    def maximum(self, x: Ranks) -> Ranks:
        result = [value.detach() for value in x.values]
        for group in self.groups():
            top = torch.stack([result[rank] for rank in group]).amax(0)
            for rank in group:
                result[rank] = top
        return Ranks(result)

    def exchange(self, x: Ranks, sent: Ranks, received: Ranks) -> Ranks:
        """Rows of x to the ranks of the axis, sent[k] of them to the k-th."""
        pieces = [value.split(counts.tolist()) for value, counts in zip(x.values, sent.values, strict=True)]
        result = list(x.values)
        for group in self.groups():
            for k, rank in enumerate(group):
                result[rank] = torch.cat([pieces[other][k] for other in group])
        return Ranks(result)

    def run(self, collective: Collective, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        result = list(values)
        for group in self.groups():
            for rank, value in zip(group, run_group(collective, [values[r] for r in group]), strict=True):
                result[rank] = value
        return result


class _Convert(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, axis: SimulatedAxis, forward: Collective, backward: Collective, *values: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.axis, ctx.backward_collective = axis, backward
        return tuple(value.clone() for value in axis.run(forward, values))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        return None, None, None, *(grad.clone() for grad in ctx.axis.run(ctx.backward_collective, grads))


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: SimulatedAxis, backward: Collective, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.axis, ctx.backward_collective = axis, backward
        return tuple(pending.clone() for pending in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        found = [grad.clone() for grad in ctx.axis.run(ctx.backward_collective, grads)]
        return None, None, None, *found, *(None for _ in grads)


class Context:
    """Stands for the context of an autograd.Function that is run on all ranks at once."""

    def __init__(self, args: Sequence[Any], needs_input_grad: Sequence[bool]) -> None:
        self.args, self.needs_input_grad = args, tuple(needs_input_grad)
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors


class _Apply(torch.autograd.Function):
    """A function that communicates on its own, all ranks at once."""

    @staticmethod
    def forward(ctx: Any, function: type[torch.autograd.Function], args: tuple, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.function = function
        ctx.inner = Context(args, [isinstance(arg, Ranks) and arg.values[0].requires_grad for arg in args])
        return tuple(value.clone() for value in function.forward(ctx.inner, *args).values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        found = ctx.function.backward(ctx.inner, Ranks(grads))
        flat = [given.values if given is not None else [None] * len(grads) for given in found]
        kept = [values for arg, values in zip(ctx.inner.args, flat, strict=True) if isinstance(arg, Ranks)]
        return None, None, *(value for values in kept for value in values)


def run_group(collective: Collective, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One collective on the tensors of one group: the specification of autoshard.runtime.run."""
    results = _run_group(collective, [pad_cut(collective, x, len(values)) for x in values])
    return [trim_joined(collective, x) for x in results]


def _run_group(collective: Collective, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    name, dim, segments, cut_dim, cut_segments = collective[:5]
    count = len(values)
    if name in ("pad", "unpad", "mask"):
        return [change_padding(collective, x, rank, count) for rank, x in enumerate(values)]
    if name == "identity":
        return list(values)
    if name == "all_gather":
        return [join(values, dim, segments)] * count
    if name == "reduce_scatter":
        return cut(sum(values[1:], values[0]), dim, segments, count)
    if name == "all_reduce":
        return [sum(values[1:], values[0])] * count
    if name == "all_to_all":
        return [join(column, dim, segments) for column in zip(*(cut(x, cut_dim, cut_segments, count) for x in values), strict=True)]
    if name == "rotate":
        return [values[(rank - dim) % count] for rank in range(count)]
    if name == "slice":
        return [cut(x, dim, segments, count)[rank] for rank, x in enumerate(values)]
    if name == "place":
        return [join([x if r == rank else torch.zeros_like(x) for r in range(count)], dim, segments) for rank, x in enumerate(values)]
    if name == "keep_first":
        return [x if rank == 0 else torch.zeros_like(x) for rank, x in enumerate(values)]
    raise ValueError(f"unknown collective {name!r}")


@dataclass
class Simulation:
    """One simulated forward pass: every node's tensors per rank, the results, and the local leaves that collect gradients."""

    program: Program
    values: dict[str, Ranks] = field(default_factory=dict)
    leaves: dict[str, Ranks] = field(default_factory=dict)
    inputs: dict[str, Ranks] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)

    def whole(self, name: str) -> torch.Tensor:
        """The global value of a node, put together from its ranks."""
        node = next(n for n in self.program.graph.nodes if n.name == name)
        return unshard(self.values[name].values, facts(node).layout, self.program.mesh, facts(node).value.shape)

    def gradient(self, name: str) -> torch.Tensor | None:
        """The global gradient of the parameter called `name`, after backward; None when none reached it."""
        leaf = self.leaves[self.program.aliases.get(name, name)]
        if leaf.values[0].grad is None:
            return None
        node = self.program.parameters()[self.program.aliases.get(name, name)]
        return unshard([x.grad for x in leaf.values], facts(node).layout, self.program.mesh)

    def buffer(self, name: str) -> torch.Tensor:
        """A buffer as the first rank has it now."""
        return self.leaves[name].values[0]

    def backward(self, grads: Sequence[torch.Tensor | None] | None = None) -> None:
        """Backward from every output that has a gradient: `grads` (global, one per output that is a tensor), ones when not given."""
        roots, seeds = [], []
        nodes = list(self.program.output.args[0])  # type: ignore[arg-type]
        tensors = [(node, output) for node, output in zip(nodes, self.outputs, strict=True) if isinstance(output, Ranks)]
        for k, (node, output) in enumerate(tensors):
            if not output.values[0].requires_grad or (grads is not None and grads[k] is None):
                continue
            given = None if grads is None else grads[k]
            seed = torch.ones(facts(node).value.shape, dtype=facts(node).value.dtype) if given is None else given
            roots += output.values
            seeds += [shard(seed, facts(node).layout, self.program.mesh, at) for at in self.program.mesh.coordinates()]
        torch.autograd.backward(roots, seeds)


def run_program(
    program: Program, tensors: Mapping[str, torch.Tensor | Ranks], inputs: Mapping[str, torch.Tensor], seed: int = 0, is_random: bool = True
) -> Simulation:
    """Run a finished program on all ranks. tensors: global parameters and buffers by name; inputs: global, by name.

    A parameter or buffer may be the Ranks of an earlier simulation's `leaves` instead: training goes on with those very
    tensors. is_random: False switches random ops off (autoshard.quiet_random).
    """
    with runtime.shards_kept() if repeats_gathers(program) else contextlib.nullcontext():
        return _run_nodes(program, tensors, inputs, seed if is_random else None)


def _run_nodes(
    program: Program, tensors: Mapping[str, torch.Tensor | Ranks], inputs: Mapping[str, torch.Tensor], seed: int | None
) -> Simulation:
    simulation = Simulation(program)
    env: dict[fx.Node, Any] = {}
    axes = {name: SimulatedAxis(program.mesh, name) for name in program.mesh.axes}
    conds = predicates(program)

    def holds(predicate: fx.Node) -> bool:
        return any(bool(value) for value in env[predicate].values)

    for node in program.graph.nodes:
        known = facts(node)
        if not runs(node, conds, holds):
            continue
        if known.role == "output":
            simulation.outputs = list(fx.map_arg(node.args[0], lambda n: env[n]))
            break
        if known.role == "received":
            env[node] = inputs[known.name]
        elif node.op == "placeholder":
            given = inputs[known.name] if known.role == "input" else tensors[known.name]
            held = given if isinstance(given, Ranks) else _spread(given, node, program)
            (simulation.inputs if known.role == "input" else simulation.leaves)[known.name] = held
            env[node] = _padded(held, node, program, axes)
        elif is_either(node):
            env[node] = env[taken(node, holds)]
        else:
            with autocast.entered(known.autocast):
                env[node] = _run_node(program, node, axes, lambda tree: fx.map_arg(tree, lambda n: env[n]), seed)
        simulation.values[node.name] = env[node]
    return simulation


def _spread(tensor: torch.Tensor, node: fx.Node, program: Program) -> Ranks:
    pieces = [shard(tensor.detach(), facts(node).layout, program.mesh, at).clone() for at in program.mesh.coordinates()]
    return Ranks([piece.requires_grad_() if facts(node).needs_grad else piece for piece in pieces])


def _padded(x: Ranks, node: fx.Node, program: Program, axes: Mapping[str, SimulatedAxis]) -> Ranks:
    """What lies at rest, as the program reads it."""
    shape = facts(node).value.shape
    for axis, dim in padded_axes(shape, facts(node).layout, program.mesh.shape):
        x = pad_shard(x, axes[program.mesh.axes[axis]], dim, shape[dim])  # type: ignore[arg-type,assignment]
    return x


def _run_node(program: Program, node: fx.Node, axes: Mapping[str, SimulatedAxis], lookup: Callable, seed: int | None) -> Any:
    known, target = facts(node), node.target
    args, kwargs = lookup(node.args), lookup(node.kwargs)
    if known.role == "tie":
        return Ranks.apply(target, args, kwargs)  # type: ignore[arg-type]
    if is_of_runtime(target):
        args = tuple(axes[a] if isinstance(a, str) and a in axes else a for a in args)
        kwargs = {k: tuple(axes[a] for a in v) if k.endswith("_axes") else v for k, v in kwargs.items()}
        result = target(*args, **kwargs)  # type: ignore[operator]
        is_several = isinstance(result, tuple) and not isinstance(result, Started)
        return Ranks(list(zip(*(part.values for part in result), strict=True))) if is_several else result
    if known.is_drawn_whole:
        return _run_drawn_whole(program, node, args, kwargs)
    if known.random_axes is not None and seed is None:
        target, *given = without_draws(node)
        args, kwargs = lookup(given)
    elif known.random_axes is not None and seed is not None:
        return _run_random(program, node, args, kwargs, seed)
    if not any(isinstance(leaf, Ranks) for leaf in _leaves((args, kwargs))):
        return Ranks([target(*args, **kwargs) for _ in range(program.mesh.size)])  # type: ignore[operator]
    return Ranks.apply(target, args, kwargs)  # type: ignore[arg-type]


def _run_random(program: Program, node: fx.Node, args: tuple, kwargs: dict, seed: int) -> Ranks:
    known, mesh, results = facts(node), program.mesh, []
    for rank, coordinate in enumerate(mesh.coordinates()):
        places = [(mesh.shape[k], coordinate[k]) for k in map(mesh.index, known.random_axes or ())]
        with seeded(mix(seed, known.site, *(number for place in places for number in place)), torch.device("cpu")):
            results.append(node.target(*_pick(args, rank), **_pick(kwargs, rank)))  # type: ignore[operator]
    return Ranks(results)


def _run_drawn_whole(program: Program, node: fx.Node, args: tuple, kwargs: dict) -> Ranks:
    """Every rank draws the same from the default generator, which moves on once."""
    state, results = torch.get_rng_state(), []
    for rank in range(program.mesh.size):
        torch.set_rng_state(state)
        results.append(node.target(*_pick(args, rank), **_pick(kwargs, rank)))  # type: ignore[operator]
    return Ranks(results)
