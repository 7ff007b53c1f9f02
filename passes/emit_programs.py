"""emit_programs: write the program as one readable Python module.

The text reads as the model's forward in order: a comment per module and per source line, the model's parameter names, and
at the end of each line the local shape and layout. It imports torch and autoshard_runtime alone, and the text that is
written to a directory is the text that runs in memory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autoshard.autocast import Autocast, State
from autoshard.backward_halves import wholes
from autoshard.branches import SIDES, cond_of, number_of
from autoshard.conversions import BY_NAME, COMMUNICATES, PADDING, STARTS, WAIT
from autoshard.instantiation import multiple_of
from autoshard.mesh import PIPELINE_AXIS
from autoshard.ops import lowerings
from autoshard.placements import padded_axes, shown_layout
from autoshard.program import Facts, Program, facts, is_of_runtime, is_wait, row_of
from autoshard.regions import repeats_gathers, results, statistics
from autoshard.stages import given_to_forward, given_to_prepare, prepared_by
from autoshard.symbolic import Real, Size, Symbol
from autoshard.text import describe_value, short_dtype

_OPERATORS = {"aten.add.Tensor": "+", "aten.sub.Tensor": "-", "aten.mul.Tensor": "*", "aten.div.Tensor": "/"}
_COMMENT_COLUMN = 104
_AXIS_ONE = "        one, = self.axes"
_NAME = re.compile(r"\w+")
_CALLED = re.compile(r"(?<![.\w])(\w+)\(")


@dataclass(frozen=True)
class EmitPrograms:
    """Write `program.source`. name: what the program is called in its header.

    record_modules: put each module's lines in a `torch.profiler.record_function` of the module's name.
    """

    name: str = "model"
    record_modules: bool = False

    def __call__(self, program: Program) -> Program:
        for number, (stage, reason) in enumerate(zip(program.stages, wholes(program), strict=True)):
            stage.passes = program.passes
            self._write(stage, f"Stage {number} of {len(program.stages)} of {self.name}", number, reason)
        if program.stages:
            program.source = "\n\n".join(stage.source for stage in program.stages)
        else:
            self._write(program, self.name)
        return program

    def _write(self, program: Program, name: str, stage: int | None = None, is_whole_because: str = "") -> None:
        """Write `program.source`. is_whole_because: why the backward of a stage is not split where the schedule splits it."""
        body = [*_constants(program), *_prepare(program), *_bind_sizes(program, _forward(program, self.record_modules))]
        axes = dict(zip(program.mesh.axes, program.mesh.shape, strict=True))
        if program.mesh.is_alone and not any("one" in _NAME.findall(line.partition("  # ")[0]) for line in body if line != _AXIS_ONE):
            body, axes = [line for line in body if line != _AXIS_ONE], {}
        used = {word for line in body for word in _CALLED.findall(line.partition("  # ")[0])}
        used |= {"gathers_again"} if repeats_gathers(program) else set()
        imported = sorted(used & {*BY_NAME, *STARTS, WAIT, *lowerings(), *PADDING, "gathers_again", "zero_gradients"})
        names = ", ".join(["Program", *imported])
        program.source = "\n".join(
            [
                *_header(program, name, stage),
                "import torch",
                f"from autoshard_runtime import {names}",
                "",
                *_tables(program, axes, is_whole_because),
                *body,
                "",
            ]
        )


def _header(program: Program, name: str, stage: int | None) -> list[str]:
    mode = "training" if program.is_training else "evaluation"
    sizes = [f"    {_sized(symbol, multiple_of(program, symbol.name))}" for symbol in program.symbols.values()]
    return [
        f'"""{name} on mesh {program.whole_mesh}, {mode}: the program of {_ranks(program, stage)}. Written by autoshard.',
        "",
        f"Passes: {', '.join(program.passes)}.",
        *(["Sizes that may change from call to call:", *sizes] if sizes else []),
        '"""',
        "",
    ]


def _ranks(program: Program, stage: int | None) -> str:
    """`every rank at pp=1`."""
    if stage is None or program.pipeline is None:
        return "every rank"
    return f"{'the' if program.mesh.is_alone else 'every'} rank at {PIPELINE_AXIS}={program.pipeline.stage_ranks[stage]}"


def _sized(symbol: Symbol, multiple: int | None) -> str:
    which = "only as in the example" if multiple is None else symbol.range if multiple == 1 else f"a multiple of {multiple}, {symbol.range}"
    return f"{symbol.name}: {which}; {symbol.example} in the example."


def _bind_sizes(program: Program, lines: list[str]) -> list[str]:
    """The method `forward` with the sizes that it uses bound in front: global ones, from this rank's arguments."""
    used = {word for line in lines for word in _NAME.findall(line.partition("  # ")[0])}
    bound: dict[str, str] = {}
    for known in map(facts, program.nodes("input")):
        for dim, size in enumerate(known.value.shape):
            if isinstance(size, Size) and str(size) in used and str(size) not in bound:
                ways = math.prod(n for p, n in zip(known.layout, program.mesh.shape, strict=True) if p.is_split and p.dim == dim)
                text = f"        {size} = {_argument(program, known.name)}.shape[{dim}]{f' * {ways}' if ways > 1 else ''}"
                bound[str(size)] = f"{text.ljust(_COMMENT_COLUMN)}  # of all ranks together" if ways > 1 else text
    start = next(k for k, line in enumerate(lines) if line.lstrip().startswith("def forward(")) + 2
    return [*lines[:start], *bound.values(), *lines[start:]]


def _argument(program: Program, name: str) -> str:
    return next(node.name for node in program.nodes("input") if facts(node).name == name)


def _tables(program: Program, mesh: Mapping[str, int], is_whole_because: str) -> list[str]:
    def table(title: str, *roles: Any) -> list[str]:
        def row(n: Facts) -> str:
            shape, layout = [*map(int, n.value.shape)], shown_layout(n.layout, program.mesh)  # sizes that may change: the example's
            return f'        {quoted(n.name)}: ({shape}, "{short_dtype(n.value.dtype)}", "{layout}"),'

        rows = [row(known) for known in map(facts, program.nodes(*roles))]
        return [f"    {title} = {{", *rows, "    }"] if rows else [f"    {title} = {{}}"]

    axes = ", ".join(f'"{axis}": {size}' for axis, size in mesh.items())
    of_stage = "  # of a stage" if program.pipeline is not None else ""
    return [
        "aten = torch.ops.aten",
        "",
        "",
        "class Rank(Program):",
        f"    MESH = {{{axes}}}{of_stage}",
        *([f"    SPLITS_BACKWARD = False  # {is_whole_because}"] if is_whole_because else []),
        *table("PARAMETERS", "parameter"),
        *table("BUFFERS", "buffer"),
        *(table("RECEIVED", "received") if any(True for _ in program.nodes("received")) else []),
        *table("INPUTS", "input"),
        "",
    ]


def _constants(program: Program) -> list[str]:
    """A method that computes, once, the constants that the forward pass reads."""
    frontier = [node for node in program.nodes() if _is_frontier(node)]
    if not frontier:
        return []
    lines = ["    def constants(self):"]
    needed = [node for node in program.nodes() if facts(node).is_constant]
    if any(facts(node).role in ("conversion", "mask") or facts(node).op is not None for node in needed):
        lines.append(f"        {_axes_of(program)} = self.axes")
    text = _Text(program, lines)
    for node in needed:
        text.compute(node)
    text.enter(())
    names = ", ".join(f'"{node.name}": {node.name}' for node in frontier)
    return [*lines, f"        return {{{names}}}", ""]


def _prepare(program: Program) -> list[str]:
    """A method that computes, once per step, what no microbatch changes and the forward pass reads."""
    needed = [node for node in program.nodes() if facts(node).is_prepared]
    if not needed:
        return []
    read = dict.fromkeys(operand for node in needed for operand in node.all_input_nodes if not facts(operand).is_prepared)
    arguments = ", ".join(["self", *(node.name for node in given_to_prepare(program))])
    lines = [f"    def prepare({arguments}):  # once per step", f"        {_axes_of(program)} = self.axes"]
    constants = [node for node in read if facts(node).is_constant and node.op != "placeholder"]
    lines += [f'        {node.name} = self.constant("{node.name}")' for node in constants]
    text = _Text(program, lines)
    for node in [*(node for node in read if facts(node).role in ("parameter", "buffer")), *needed]:
        text.compute(node)
    text.enter(())
    names = ", ".join(f'"{node.name}": {node.name}' for node in prepared_by(program))
    return [*lines, f"        return {{{names}}}", ""]


def _axes_of(program: Program) -> str:
    return ", ".join(program.mesh.axes) + ("," if program.mesh.ndim == 1 else "")


def _is_frontier(node: fx.Node) -> bool:
    return facts(node).is_constant and node.op != "placeholder" and any(not facts(user).is_constant for user in node.users)


def _is_read_forward(node: fx.Node) -> bool:
    return _is_frontier(node) and any(not facts(user).is_constant and not facts(user).is_prepared for user in node.users)


def _forward(program: Program, records: bool) -> list[str]:
    inputs = [node.name for node in given_to_forward(program)]
    lines = ["    @gathers_again  # autograd keeps shards of the weights of all_gather_again, and backward gathers them again"]
    lines = lines if repeats_gathers(program) else []
    lines += [f"    def forward({', '.join(['self', *inputs])}):", f"        {_axes_of(program)} = self.axes"]
    lines += [f'        {node.name} = self.constant("{node.name}")' for node in program.nodes() if _is_read_forward(node)]
    lines += [f'        {node.name} = self.prepared["{node.name}"]' for node in prepared_by(program)]
    text = _Text(program, lines, records)
    for node in given_to_forward(program):
        if facts(node).role == "input" and _is_padded(program, node):
            text.compute(node)
    text.add_all([node for node in program.nodes() if not facts(node).is_prepared])
    text.enter(())
    return [*lines, f"        return {_value(program.output.args[0])}"]


class _Text:
    """Lines of a method body, and what they depend on: where the source comments are, which variables nobody reads any more."""

    def __init__(self, program: Program, lines: list[str], records: bool = False) -> None:
        self.program, self.lines, self.records = program, lines, records
        self.last_use = _last_uses(program)
        self.module: str | None = None
        self.place: tuple[str, int] | None = None
        self.dying: list[str] = []
        self.state: State = ()
        self.recorded = ""  # the module whose range of the profiler is open
        self.margin = " " * 8
        self.own: set[fx.Node] | None = None  # the nodes of the function or branch that is being written

    def add_all(self, nodes: list[fx.Node], region: int | None = None, depth: int = 0) -> None:
        """Nodes of one checkpointed region (or none) and one branch (of `depth` steps): inner ones as blocks of their own."""
        conds = [cond_of(node, depth) for node in nodes]
        last = {cond: k for k, cond in enumerate(conds)}
        k = 0
        while k < len(nodes):
            end, number = k + 1, facts(nodes[k]).recompute
            made = [node for node in nodes[k:] if len(facts(node).branch) == depth and cond_of(node, depth) == conds[k]] if conds[k] else []
            if made and facts(made[0]).recompute == region:
                end = last[conds[k]] + 1
                self.add_cond(nodes[k:end], made, region, depth)
            elif number == region:
                self.add(nodes[k])
            else:
                end = next((j for j in range(k, len(nodes)) if facts(nodes[j]).recompute != number), len(nodes))
                if number is not None and results(nodes[k:end]):
                    self.add_region(number, nodes[k:end], depth)
                else:
                    self.add_all(nodes[k:end], number, depth)
            k = end

    def add(self, node: fx.Node) -> None:
        known = facts(node)
        if ((known.is_constant or known.is_prepared) and node.op != "placeholder") or known.role in (
            "parameter",
            "input",
            "received",
            "output",
        ):
            return
        if known.role == "buffer" and all(
            facts(user).is_constant or facts(user).is_prepared or _reads_by_name(user, node) for user in node.users
        ):
            return
        if known.role in ("op", "update"):
            self.enter(known.autocast, self._module_of(node))
        elif self.records:
            self.enter(self.state, self._module_of(node))
        if known.role in ("op", "projection", "update"):
            self._say_where(known)
        operands = list(dict.fromkeys(node.all_input_nodes))
        self._read_parameters(operands, {node})
        self._write(_statement(self.program, node))
        own = (operand for operand in operands if self.own is None or operand in self.own)
        self.dying += [operand.name for operand in own if self.last_use.get(operand) is node and operand.op != "placeholder"]

    def compute(self, node: fx.Node) -> None:
        """A constant, or an input as it is padded: no comments, and nothing is deleted."""
        self.enter(facts(node).autocast)
        self._write(_statement(self.program, node))

    def _read_parameters(self, operands: Iterable[fx.Node], nodes: set[fx.Node], inner: Sequence[set[fx.Node]] = ()) -> None:
        """Statements for the parameters that `nodes` read first, where what is written now reads all of them and none of `inner` does."""
        for operand in operands:
            readers = _readers(operand) if facts(operand).role == "parameter" else []
            is_ours = (self.own is None or self.own.issuperset(readers)) and not any(part.issuperset(readers) for part in inner)
            if readers and readers[0] in nodes and is_ours:
                self._write(_statement(self.program, operand))

    def add_cond(self, nodes: list[fx.Node], made: list[fx.Node], region: int | None, depth: int) -> None:
        """An `if` over the predicate; every result gets its value at the end of either branch."""
        number, outer, own = number_of(made[0]), self.own, set(nodes)
        sides = {side: [node for node in nodes if facts(node).branch[depth : depth + 1] == ((number, side),)] for side in SIDES}
        self.enter(())
        self._say_where(facts(made[0]))
        read = dict.fromkeys(operand for node in nodes for operand in node.all_input_nodes if operand not in own)
        self._read_parameters(read, own, [set(side) for side in sides.values()])
        for side, k in SIDES.items():
            self._write([*_delete(self.dying), "else:" if k == SIDES[False] else f"if self.decide({_value(made[0].args[0])}):"])
            self.dying, self.module, self.place, self.own, self.margin = [], None, None, set(sides[side]), self.margin + "    "
            self.add_all(sides[side], region, depth + 1)
            self.enter(())
            for node in made:
                value: fx.Node = node.args[k]  # type: ignore[assignment]
                self._write(_commented(f"{node.name} = {value.name}", facts(node), self.program))
                self.dying += [value.name] if value in self.own and self.last_use[value] in made else []
            self._write(_delete(self.dying))
            self.dying, self.module, self.place, self.own, self.margin = [], None, None, outer, self.margin[4:]
        mine = (operand for operand in read if self.own is None or operand in self.own)
        self.dying = [o.name for o in mine if self.last_use.get(o) in own and o.op != "placeholder"]

    def add_region(self, number: int, nodes: list[fx.Node], depth: int) -> None:
        """A function of its own, and its call: what it reads are its arguments, but parameters that it alone reads."""
        self.enter(())
        own, outer, made = set(nodes), self.own, results(nodes)
        read = dict.fromkeys(operand for node in nodes for operand in node.all_input_nodes if operand not in own)
        read = {operand: None for operand in read if not all(_reads_by_name(user, operand) for user in operand.users if user in own)}
        shared = [operand for operand in read if facts(operand).role != "parameter" or not own.issuperset(_readers(operand))]
        self._read_parameters(shared, own)
        name, arguments = f"region_{number}", ", ".join(operand.name for operand in shared)
        self._write([*_delete(self.dying), f"def {name}({arguments}):  # runs again in backward"])
        self.dying, self.module, self.place, self.own, self.margin = [], None, None, own, self.margin + "    "
        self.add_all(nodes, number, depth)
        self.enter(())
        given = ", ".join(node.name for node in made)
        self._write([f"return {given}"])
        self.dying, self.module, self.place, self.own, self.margin = [], None, None, outer, self.margin[4:]
        self._write([f"{given} = self.checkpoint({', '.join([name, *([arguments] if arguments else [])])})"])
        mine = (operand for operand in shared if self.own is None or operand in self.own)
        self.dying = [o.name for o in mine if self.last_use.get(o) in own and o.op != "placeholder"]

    def enter(self, state: State, recorded: str = "") -> None:
        """Close the blocks that are open, and open those of the autocast regions `state` and of the module `recorded`."""
        if (state, recorded) == (self.state, self.recorded):
            return
        self._write(_delete(self.dying))
        self.margin = self.margin[4:] if self.state or self.recorded else self.margin
        self.dying, self.state, self.recorded = [], state, recorded
        contexts = [f"torch.profiler.record_function({quoted(recorded)})"] if recorded else []
        contexts += map(_autocast, state)
        if contexts:
            self._write([f"with {', '.join(contexts)}:"])
            self.margin += "    "

    def _module_of(self, node: fx.Node) -> str:
        """What the profiler shows for a node, where that was asked: a conversion of a parameter belongs to the module that reads it."""
        if not self.records:
            return ""
        while not facts(node).source.module_class and node.users:
            node = next(iter(node.users))
        return facts(node).source.module or facts(node).source.module_class

    def _say_where(self, known: Facts) -> None:
        if known.source.module != self.module:
            self._write([*_delete(self.dying), f"# ---- {known.source.module or 'the model itself'} ({known.source.module_class})"])
            self.dying, self.module = [], known.source.module
        if (known.source.file, known.source.line) != self.place and known.source.text:
            self.place = (known.source.file, known.source.line)
            self._write([f"# {self.place[0].rsplit('/', 1)[-1]}:{self.place[1]}  {known.source.text}"])

    def _write(self, lines: Iterable[str]) -> None:
        self.lines += [self.margin + line for line in lines]


def _reads_by_name(node: fx.Node, buffer: fx.Node) -> bool:
    return facts(node).recompute is not None and buffer in statistics(node)


def _autocast(region: Autocast) -> str:
    return f"torch.autocast({quoted(region.device)}, {region.dtype})"


def _readers(node: fx.Node) -> list[fx.Node]:
    return sorted(user for user in node.users if not facts(user).is_prepared)  # fx orders nodes by their place in the graph


def _last_uses(program: Program) -> dict[fx.Node, fx.Node]:
    found: dict[fx.Node, fx.Node] = {}
    for node in program.nodes():
        for operand in node.all_input_nodes:
            found[operand] = node
    return found


def _delete(names: list[str]) -> list[str]:
    return [f"del {', '.join(dict.fromkeys(names))}"] if names else []


def _statement(program: Program, node: fx.Node) -> Iterator[str]:
    known = facts(node)
    text = f"{node.name} = {_placeholder(program, node) if node.op == 'placeholder' else _expression(node, known)}"
    if known.role == "update":
        text = _expression(node, known)
    yield from _commented(text, known, program, node)


def _commented(text: str, known: Facts, program: Program, node: fx.Node | None = None) -> Iterator[str]:
    """A statement and what it makes; `node`: the one that it stands for."""
    comment = describe_value(known, program) if len(known.values) == 1 else f"{len(known.values)} x {describe_value(known, program)}"
    if known.role == "start" and node is not None:
        row = row_of(node)
        words = [f"{row.forward} starts"] if row.forward in COMMUNICATES else []
        words += [f"backward {row.backward} ends"] if row.backward in COMMUNICATES and known.needs_grad else []
        comment += f"   {'; '.join(words)}"
    if known.role == "conversion" and node is not None:
        row = row_of(node)
        both = f"{row.forward}; backward {row.backward}" if known.needs_grad else row.forward
        both += ", and all_gather again" if row.is_repeated else ""
        comment += f"   {both}"
    if known.role == "mask":
        comment += "   zero at padding"
    yield f"{text.ljust(_COMMENT_COLUMN - 8)}  # {comment}"


def _is_padded(program: Program, node: fx.Node) -> bool:
    return bool(padded_axes(facts(node).value.shape, facts(node).layout, program.mesh.shape))


def _placeholder(program: Program, node: fx.Node) -> str:
    """What lies at rest or is given, padded where its dims do not divide."""
    known = facts(node)
    text = node.name if known.role == "input" else f"self.tensor({quoted(known.name)})"
    for axis, dim in padded_axes(known.value.shape, known.layout, program.mesh.shape):
        text = f"pad_shard({text}, {program.mesh.axes[axis]}, {dim}, size={known.value.shape[dim]})"
    return text


def _expression(node: fx.Node, known: Facts) -> str:
    args = [_value(value) for value in node.args]
    if known.recompute is not None and known.role == "op":
        written = {buffer.name: f"self.once({quoted(facts(buffer).name)})" for buffer in statistics(node)}
        args = [written.get(arg, arg) for arg in args]
    if known.role == "projection":
        return f"{args[0]}[{args[1]}]"
    if known.role == "tie":
        return f"zero_gradients({', '.join(args)})"
    if is_wait(node):
        return f"{WAIT}({args[0]})"
    if known.role in ("start", "conversion", "mask"):
        sizes = [f"{key}={_value(value)}" for key, value in node.kwargs.items()]
        return f"{node.target.__name__}({', '.join([args[0], str(node.args[1]), *args[2:], *sizes])})"  # type: ignore[union-attr]
    target = str(node.target)
    if target in _OPERATORS and len(args) == 2 and not node.kwargs:
        first, second = (_operand(value, text) for value, text in zip(node.args, args, strict=True))
        return f"{first} {_OPERATORS[target]} {second}"
    keywords = [f"{key}={_axes(value) if key.endswith('_axes') else _value(value)}" for key, value in node.kwargs.items()]  # type: ignore[arg-type]
    if is_of_runtime(node.target):
        return f"{node.target.__name__}({', '.join([*args, *keywords])})"  # type: ignore[union-attr]
    name = target if target.startswith("aten.") else f"torch.ops.{target}"
    if known.random_axes is not None:
        return f"self.random({', '.join([str(known.site), _axes(known.random_axes), name, *args, *keywords])})"
    return f"{name}({', '.join([*args, *keywords])})"


def _operand(value: Any, text: str) -> str:
    """An argument beside an operator: `x * (batch // 2)`."""
    return f"({text})" if isinstance(value, (Size, Real)) and not text.isidentifier() else text


def quoted(name: str) -> str:
    """A name as a string literal, in double quotes."""
    return json.dumps(name)


def _axes(names: tuple[str, ...]) -> str:
    return f"({', '.join(names)}{',' if len(names) == 1 else ''})"


def _value(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (tuple, list)):
        inner = ", ".join(map(_value, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, torch.device):
        return "self.device"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return str(value) if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)) else repr(value)
