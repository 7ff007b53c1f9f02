"""The program that passes transform: an fx graph whose nodes carry typed facts, and what surrounds it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from autoshard import autocast, runtime
from autoshard.conversions import BY_NAME, Conversion
from autoshard.equations import Strategy
from autoshard.mesh import MeshSpec
from autoshard.ops.row import Call, TensorInfo
from autoshard.pipeline import Pipeline
from autoshard.placements import I, Layout, R
from autoshard.symbolic import Size, Symbol, at, sizes_in

if TYPE_CHECKING:
    from autoshard.autograd_saves import Kept

# A received value is what the pipeline stage before passes on.
Role = Literal["parameter", "buffer", "input", "received", "op", "start", "conversion", "mask", "tie", "projection", "update", "output"]
# A branch of torch.cond that a node stands in: the number of the cond and which of its two branches, for conds inside each
# other the outermost first; empty outside of all.
Branch = tuple[tuple[int, bool], ...]
META_KEY = "autoshard"
_STRANGERS = (3, 5, 7, 11, 13, 17)


@dataclass(frozen=True)
class Source:
    """Where a node comes from: the module's path and class, and the innermost line of the user's code."""

    module: str = ""
    module_class: str = ""
    call: str = ""  # tells apart repeated calls of one module
    file: str = ""
    line: int = 0
    text: str = ""

    def __str__(self) -> str:
        place = f"{self.file.rsplit('/', 1)[-1]}:{self.line}" if self.file else ""
        return "  ".join(part for part in (self.module, place, self.text) if part)


@dataclass
class Facts:
    """What the passes know of a node.

    values: global shape and dtype of each output. layouts: one per value. strategies: of an op, one per axis.
    name: of a parameter or buffer its name in the model, of an input its argument name. axes: mesh axes on which a random
    op draws different numbers (None: not random), `site` its number. is_constant: computed once, not at every step.
    hub: a layout the value is converted to once for several users; the only one they may read from when is_pinned.
    op: the op that a lowering stands for. is_drawn_whole: a random op that every rank computes whole, from torch's default
    generator. strides: of what a random op returned on the single device. autocast: the regions of torch.autocast that it
    runs in. recompute: number of the region of torch.utils.checkpoint that it belongs to. branch: the branches of torch.cond
    that it stands in. gathers_again: copies of this weight that are gathered for an op are not kept for backward, which gathers
    them again. number: what a traced node computes that is no tensor but a size. stage: the pipeline stage that computes it; None for
    what stages compute or hold where they read it. is_prepared: computed once per step, whatever the microbatch.
    """

    role: Role
    values: tuple[TensorInfo, ...] = ()
    name: str = ""
    source: Source = field(default_factory=Source)
    layouts: tuple[Layout, ...] = ()
    strategies: tuple[Strategy, ...] = ()
    random_axes: tuple[str, ...] | None = None
    site: int = 0
    is_constant: bool = False
    is_persistent: bool = True
    hub: Layout | None = None
    is_pinned: bool = False
    op: torch._ops.OpOverload | None = None
    is_drawn_whole: bool = False
    strides: tuple[int, ...] = ()
    autocast: autocast.State = ()
    recompute: int | None = None
    gathers_again: bool = False
    branch: Branch = ()
    number: int | float | None = None
    stage: int | None = None
    is_prepared: bool = False

    @property
    def value(self) -> TensorInfo:
        return self.values[0]

    @property
    def layout(self) -> Layout:
        return self.layouts[0]

    @property
    def needs_grad(self) -> bool:
        return any(value.needs_grad for value in self.values)


def facts(node: fx.Node) -> Facts:
    """The facts of a node; every node of a program has them."""
    return node.meta[META_KEY]


def set_facts(node: fx.Node, new: Facts) -> None:
    node.meta[META_KEY] = new


def op_of(node: fx.Node) -> Any:
    """What an op node computes on global tensors: its target, or the op that its lowering stands for."""
    return facts(node).op or node.target


def op_name(node: fx.Node) -> str:
    """`aten.linear.default` for a torch op, the plain name for a function."""
    target = op_of(node)
    return str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


def is_of_runtime(target: Any) -> bool:
    """Whether a node calls a conversion or a lowering rather than a torch op."""
    return getattr(target, "__module__", "").startswith(runtime.__name__)


@dataclass
class Program:
    """One traced forward pass on a mesh.

    is_typed: conversions stand between all layouts, so the checker may judge. is_localized: ops are written for local
    tensors. leaves_whole: results are promised whole on every rank.
    flat_inputs: for every leaf of (args, kwargs), the name of its placeholder, or None for a constant that was baked in
    (`baked`: as texts).
    outputs: for every leaf of the result, a node or a constant, in graph order. aliases: further names of tied
    parameters and buffers -> the name that the graph uses. notes: what the user must know, one sentence each. passes: the
    names of those that ran. constants: values of tensors that the
    model made outside its parameters and buffers. symbols: sizes that may change from call to call (autoshard.symbolic).
    source: the text of the emitted program. pipeline: how microbatches go through stages, whose programs are `stages`.
    kept: of a program of microbatches what autograd keeps of its ops, found before sharding.
    """

    graph: fx.Graph
    mesh: MeshSpec
    is_training: bool = True
    is_typed: bool = False
    is_localized: bool = False
    leaves_whole: bool = False
    in_spec: Any = None
    out_spec: Any = None
    flat_inputs: tuple[str | None, ...] = ()
    baked: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    stats: dict[str, float] = field(default_factory=dict)
    passes: list[str] = field(default_factory=list)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    symbols: dict[str, Symbol] = field(default_factory=dict)
    source: str = ""
    pipeline: Pipeline | None = None
    stages: tuple[Program, ...] = ()
    kept: Kept | None = None

    def nodes(self, *roles: Role) -> Iterator[fx.Node]:
        """Nodes with one of `roles` (all without any), in order."""
        return (node for node in list(self.graph.nodes) if not roles or facts(node).role in roles)

    @property
    def output(self) -> fx.Node:
        return next(iter(reversed(self.graph.nodes)))

    def parameters(self) -> dict[str, fx.Node]:
        """Placeholders of parameters by name."""
        return {facts(node).name: node for node in self.nodes("parameter")}

    @property
    def whole_mesh(self) -> MeshSpec:
        """The mesh of all ranks: with axis `pp`, where there is a pipeline."""
        return self.mesh if self.pipeline is None else self.pipeline.mesh

    def given(self) -> dict[str, Facts]:
        """What is known of the tensor arguments by name: of whole ones, where placeholders stand for microbatches of them."""
        found = {facts(node).name: facts(node) for node in self.nodes("input")}
        if self.pipeline is None:
            return found
        whole: dict[str, Facts] = {}
        for name, (argument, dim) in self.pipeline.inputs.items():
            value = found[name].value
            ways = [self.pipeline.microbatches if k == dim else 1 for k in range(len(value.shape))]
            shape = tuple(size * n for size, n in zip(value.shape, ways, strict=True))
            whole[argument] = replace(found[name], name=argument, values=(replace(value, shape=shape),))
        return whole

    def on_mesh(self, mesh: MeshSpec) -> Program:
        """A copy for another plan, on `mesh`: what is decided on one is not seen on the other. For programs before annotate_shardings."""
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            made[node] = graph.node_copy(node, lambda operand: made[operand])
            made[node].name = node.name
            set_facts(made[node], replace(facts(node)))
        return replace(self, graph=graph, mesh=mesh, notes=list(self.notes), stats=dict(self.stats), passes=list(self.passes))

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


_WITHOUT_GRADIENT = re.compile(r"aten\.(detach|zeros_like|ones_like|full_like|empty_like|rand_like|randn_like|new_\w+)\.")


def carries_gradient(node: fx.Node) -> bool:
    """Whether the floating point results of an op have a gradient: some operand has one, and the op passes it on."""
    has_one = any(facts(p).values[k].needs_grad for p, k in map(producer, tensor_operands(node)))
    return has_one and not _WITHOUT_GRADIENT.match(op_name(node))


def baked_values(leaves: Sequence[Any], model: nn.Module) -> tuple[str, ...]:
    """What a trace bakes in besides shapes: arguments that are no tensors, which modules train, the caller's autocast."""
    modes = "".join("t" if module.training else "e" for module in model.modules())
    regions = (f"autocast {region.device} {region.dtype}" for region in autocast.ambient())
    return (*(repr(leaf) for leaf in leaves if not isinstance(leaf, torch.Tensor)), f"modes {modes}", *regions)


def writes_statistics(node: fx.Node) -> bool:
    """Whether an op writes running statistics (its arguments 3 and 4), which its schema does not say."""
    flag = {"aten.batch_norm.default": "training", "aten.instance_norm.default": "use_input_stats"}.get(op_name(node))
    return flag is not None and bool(arguments(node)[flag])


def draws_random(node: fx.Node) -> bool:
    """Whether torch says that the op draws random numbers, whatever its arguments."""
    return torch.Tag.nondeterministic_seeded in getattr(op_of(node), "tags", ())


def producer(node: fx.Node) -> tuple[fx.Node, int]:
    """The node that computes a value and the number of the output: projections (getitem) are looked through."""
    if facts(node).role == "projection":
        return node.args[0], node.args[1]  # type: ignore[return-value]
    return node, 0


def is_sized(node: fx.Node) -> bool:
    """Whether an argument or a result of the node has a size that may change from call to call."""
    return any(True for _ in sizes_in([node.args, node.kwargs, *(value.shape for value in facts(node).values)]))


def is_wait(node: fx.Node) -> bool:
    """Whether a conversion node is the second part of one that is started elsewhere."""
    return node.target is runtime.wait


def asked_of(node: fx.Node) -> fx.Node:
    """The node whose target and arguments say what a conversion converts: the start of one in two parts, itself otherwise."""
    return node.all_input_nodes[0] if is_wait(node) else node


def row_of(node: fx.Node) -> Conversion:
    """The row of a conversion node, or of a start."""
    return BY_NAME[asked_of(node).target.__name__.removeprefix("start_")]  # type: ignore[union-attr]


def passed_on(stage: Program) -> list[fx.Node]:
    """What a stage gives to the next one; nothing for the last, which returns results."""
    return list(stage.output.all_input_nodes) if facts(stage.output).name == "passed" else []


def source_of(node: fx.Node) -> fx.Node:
    """The node whose value `node` is but for padding: masks are looked through."""
    while facts(node).role == "mask":
        node = node.args[0]  # type: ignore[assignment]
    return node


def native_layout(ndim: int, needs_grad: bool) -> Layout:
    """The layout of a value that every rank computes alike."""
    return (I if needs_grad else R,) * ndim


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an op node by schema name, defaults filled in; positional names arg0, arg1, ... where there is no schema."""
    schema = getattr(op_of(node), "_schema", None)
    if schema is None:
        given = {name: value for name, value in node.kwargs.items() if not name.endswith("_axes")}
        return {**{f"arg{k}": value for k, value in enumerate(node.args)}, **given}
    bound: dict[str, Any] = {}
    for k, argument in enumerate(schema.arguments):
        if argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif k < len(node.args):
            bound[argument.name] = node.args[k]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """Nodes among the arguments in schema order, lists flattened; one entry per use."""
    found: list[fx.Node] = []
    fx.map_arg(tuple(arguments(node).values()), lambda operand: found.append(operand) or operand)  # type: ignore[func-returns-value]
    return found


def replace_operands(node: fx.Node, new: list[fx.Node]) -> None:
    """Exchange the operands of `node`, in the order of tensor_operands."""
    order = iter(new)
    bound = fx.map_arg(arguments(node), lambda _: next(order))
    names = list(bound)
    node.args = tuple(bound[name] for name in names[: len(node.args)])
    node.kwargs = {name: bound.get(name, value) for name, value in node.kwargs.items()}


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set one argument of an op node by its schema name."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    if names.index(name) < len(node.args):
        node.update_arg(names.index(name), value)
    else:
        node.update_kwarg(name, value)


def call_of(node: fx.Node) -> Call:
    """The Call that rules see."""

    def info(operand: fx.Node) -> TensorInfo:
        source, index = producer(operand)
        return facts(source).values[index]

    bound: dict[str, Any] = fx.map_arg(arguments(node), info)  # type: ignore[arg-type]
    return Call(op_name(node), bound, tuple(map(info, tensor_operands(node))), facts(node).values)


def example_sizes(program: Program) -> dict[str, int]:
    """The sizes that the program was planned at."""
    return {name: symbol.example for name, symbol in program.symbols.items()}


def strange_sizes(program: Program) -> dict[str, int]:
    """Sizes unlike the example's that divide wherever those do: what holds at both does not hold by coincidence."""
    return {
        name: symbol.example * _STRANGERS[k % len(_STRANGERS)] ** (1 + k // len(_STRANGERS))
        for k, (name, symbol) in enumerate(program.symbols.items())
    }


def info_at(info: TensorInfo, sizes: Mapping[str, int]) -> TensorInfo:
    """A value where the symbols have other values."""
    if not any(isinstance(size, Size) for size in info.shape):
        return info
    return replace(info, shape=tuple(at(size, sizes) for size in info.shape))


def call_at(call: Call, sizes: Mapping[str, int]) -> Call:
    """One use of an op where the symbols have other values."""
    given = map_aggregate(dict(call.arguments), lambda leaf: info_at(leaf, sizes) if isinstance(leaf, TensorInfo) else at(leaf, sizes))
    inputs, outputs = (tuple(info_at(info, sizes) for info in infos) for infos in (call.inputs, call.outputs))
    return Call(call.op, given, inputs, outputs)
