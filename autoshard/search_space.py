"""The planning problem: variables, costs and tables for the solver, from a program's candidates.

    variables   one per op and parameter (its candidates), and one per value that several nodes read or a constraint pins
                (its supply: a hub layout it is converted to once for all readers)
    costs       seconds of the op, of the optimizer step, of conversions whose one end is fixed
    tables      seconds of converting what one candidate gives into what another wants

Inputs, constants and what is computed from inputs alone are cheap and read everywhere: they are decided beforehand
(`_fix`), as they come in, so that they do not tie the whole graph together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import fx

from autoshard.candidates import Candidate, CandidateTable, leaving_layout
from autoshard.constraints import Pin
from autoshard.conversion_table import ConversionTable
from autoshard.costs import CostModel
from autoshard.errors import ConstraintError
from autoshard.ops.row import TensorInfo
from autoshard.placements import I, Layout, P, Placement, R, padded_piece
from autoshard.program import Program, facts, native_layout, producer, tensor_operands
from autoshard.solver import Problem
from autoshard.stages import shares_of_microbatch

Value = tuple[fx.Node, int]  # a producing node and the number of its output
_MANY_LAYOUTS = 200  # of one value: above, on three axes, it is offered in one layout only


@dataclass(frozen=True)
class Supply:
    """A way to offer a value: converted to `hub`, from which every reader converts further.

    Most hubs serve a reader of the native layout too, as R gives I and S without communication. Where that costs (S(0)
    against S(1)), the value may also be offered in both; `native` is then the layout that it is made in.
    """

    hub: Layout
    native: Layout | None = None


@dataclass
class SearchSpace:
    """Everything the solver needs, and how to read its answer."""

    program: Program
    costs: CostModel
    pins: Mapping[fx.Node, list[Pin]]
    wants_whole_outputs: bool = True
    random: np.random.Generator | None = None
    table: CandidateTable = field(init=False)
    fixed: dict[Value, Layout] = field(default_factory=dict)
    chosen: dict[fx.Node, Candidate] = field(default_factory=dict)  # of fixed ops
    domains: dict[fx.Node, list[Candidate]] = field(default_factory=dict)
    supplies: dict[Value, list[Supply]] = field(default_factory=dict)
    uses: dict[Value, list[tuple[fx.Node, int]]] = field(default_factory=dict)
    _tables: dict[object, np.ndarray] = field(default_factory=dict)
    _keep: list[object] = field(default_factory=list)
    _same: dict[object, list[Supply]] = field(default_factory=dict)
    _conversions: ConversionTable = field(init=False)
    _shares: dict[fx.Node, float] = field(init=False)  # of what pipeline stages do once for all microbatches

    def __post_init__(self) -> None:
        self.table = CandidateTable(self.program, self.costs)
        self._conversions = ConversionTable(self.costs, self.random)
        self._shares = shares_of_microbatch(self.program) if self.random is None else {}
        self._fix()
        self._collect()

    # ------------------------------------------------------------------------------------------------ what is decided

    def _fix(self) -> None:
        """Decide inputs, constants, buffers and ops that depend on inputs alone."""
        ndim = self.program.mesh.ndim
        for node in self.program.graph.nodes:
            known = facts(node)
            if known.role in ("input", "buffer"):
                self.fixed[node, 0] = known.layouts[0] if known.layouts else native_layout(ndim, known.needs_grad)
                if node in self.pins and known.role == "input":
                    known.hub, known.is_pinned = self._pinned_input(node), True
                    self.fixed[node, 0] = known.hub
            elif known.role == "op" and (known.is_constant or (not known.needs_grad and self._reads_fixed(node))):
                self._fix_op(node)

    def _reads_fixed(self, node: fx.Node) -> bool:
        return node not in self.pins and all(producer(operand) in self.fixed for operand in tensor_operands(node))

    def _fix_op(self, node: fx.Node) -> None:
        given = [self.fixed[producer(operand)] for operand in tensor_operands(node)]
        values = [facts(p).values[k] for p, k in map(producer, tensor_operands(node))]
        if facts(node).is_constant:
            whole = native_layout(self.program.mesh.ndim, False)
            options = [c for c in self.table.of_op(node) if all(x == whole for x in (*c.inputs, *c.outputs))]
        else:
            options = self.table.of_op(node)

        def price(candidate: Candidate) -> tuple[float, float]:
            moved = sum(self._route_s(have, want, value) for have, want, value in zip(given, candidate.inputs, values, strict=True))
            return moved, candidate.cost_s

        best = min((c for c in options if P not in {p for x in c.outputs for p in x}), key=price)
        self.chosen[node] = best
        for k, layout in enumerate(best.outputs):
            self.fixed[node, k] = layout

    def _pinned_input(self, node: fx.Node) -> Layout:
        value = facts(node).value
        options = [c.outputs[0] for c in self.table.of_parameter(value)]
        free = [k for k in range(self.program.mesh.ndim) if not any(pin.allowed[k] for pin in self.pins[node])]
        whole = I if value.needs_grad else R
        fitting = [
            x for x in options if all(pin.admits(x, value.needs_grad) for pin in self.pins[node]) and all(x[k] == whole for k in free)
        ]
        if fitting:
            return fitting[0]
        soft = all(pin.is_soft for pin in self.pins[node])
        if soft:
            return native_layout(self.program.mesh.ndim, value.needs_grad)
        raise_unfit(self.pins[node], facts(node).name, value, self.program)
        raise AssertionError

    # ------------------------------------------------------------------------------------------------ what is searched

    def _collect(self) -> None:
        for node in self.program.nodes("parameter", "op"):
            if facts(node).role == "parameter":
                self.domains[node] = self._admitted(node, self.table.of_parameter(facts(node).value))
            elif node not in self.chosen:
                self.domains[node] = self._splitting(node, self.table.of_op(node))
        for node in self.program.nodes("op", "update", "output"):
            for k, operand in enumerate(tensor_operands(node)):
                self.uses.setdefault(producer(operand), []).append((node, k))
        for value, users in self.uses.items():
            searched = [user for user, _ in users if user in self.domains]
            if value in self.fixed:
                continue
            if self.pins_of(value) or (len(users) > 1 and searched):
                self.supplies[value] = self._supplies(value)

    def _splitting(self, node: fx.Node, options: list[Candidate]) -> list[Candidate]:
        """Candidates of an op that split what constraints ask it to."""
        for pin in (pin for pin in self.pins.get(node, []) if pin.is_split):
            kept = [c for c in options if pin.admits_split(c.strategies)]
            if not kept:
                can = "; ".join(
                    f"{axis}: {', '.join(dict.fromkeys(c.strategies[k].factor for c in options if c.strategies[k].factor)) or 'nothing'}"
                    for k, axis in enumerate(self.program.mesh.axes)
                )
                raise ConstraintError(f"{node.name} at {facts(node).source} cannot split as {pin} asks; by axis, it can split {can}.")
            options = kept
        return options

    def _admitted(self, node: fx.Node, options: list[Candidate]) -> list[Candidate]:
        pins, value = self.pins.get(node, []), facts(node).value
        for pin in pins:
            kept = [c for c in options if pin.admits(c.outputs[0], value.needs_grad)]
            if not kept and not pin.is_soft:
                raise_unfit(pins, facts(node).name, value, self.program)
            if not kept:
                self.program.note(f"{facts(node).name} of shape {value.shape} cannot lie as the template asks ({pin.text}); left free")
            options = kept or options
        return options

    def pins_of(self, value: Value) -> list[Pin]:
        """Pins on what a module returns (a parameter's own pins restrict where it rests instead)."""
        node, index = value
        if facts(node).role != "op":
            return []
        named = node if len(facts(node).values) == 1 else next((u for u in node.users if u.args[1:] == (index,)), node)
        return [pin for pin in self.pins.get(named, []) if not pin.is_split]

    def _supplies(self, value: Value) -> list[Supply]:
        info = facts(value[0]).values[value[1]]
        pins = self.pins_of(value)
        if pins:
            hubs = [x for x in self._restable(info) if all(pin.admits(x, info.needs_grad) for pin in pins)]
            if not hubs and not all(pin.is_soft for pin in pins):
                raise_unfit(pins, facts(value[0]).name or value[0].name, info, self.program)
            if hubs:
                return self._shared([Supply(hub) for hub in hubs])
            self.program.note(
                f"what {facts(value[0]).source.module} returns, {info.shape}, cannot lie as the template asks ({pins[0].text}); left free"
            )
        # equal values of equal layers share a list, by which tables are known
        readers = tuple((id(self.domains.get(user) or self.chosen.get(user)), k) for user, k in self.uses[value])
        key = id(self.domains[value[0]]), value[1], readers, info
        if key not in self._same:
            self._same[key] = self._shared(self._unpinned(value, info))
        return self._same[key]

    def _shared(self, supplies: list[Supply]) -> list[Supply]:
        return self._same.setdefault(tuple(supplies), supplies)

    def _unpinned(self, value: Value, info: TensorInfo) -> list[Supply]:
        natives = list(dict.fromkeys(c.outputs[value[1]] for c in self.domains[value[0]]))
        seen: dict[Layout, int] = {}
        for user, k in self.uses[value]:
            for want in dict.fromkeys(self._wants(user, k)):
                seen[want] = seen.get(want, 0) + 1
        shared = [want for want, count in seen.items() if count > 1 and P not in want]
        alone = dict.fromkeys([*natives, *shared])
        both = []
        if self.program.mesh.ndim < 3 or len(alone) <= _MANY_LAYOUTS:
            near = ((natives[i], shared[j]) for i, j in np.argwhere(_differing_axes(natives, shared) == 1))
            both = [Supply(hub, native) for native, hub in near if self._is_worth_both(native, hub, info)]
        return [*map(Supply, alone), *both]

    def _is_worth_both(self, native: Layout, hub: Layout, info: TensorInfo) -> bool:
        """Whether neither of two layouts that differ on one axis gives the other without communication."""
        return all(self.costs.communicates(a, b, info) for a, b in ((native, hub), (hub, native)))

    def _restable(self, info: TensorInfo) -> list[Layout]:
        return [c.outputs[0] for c in self.table.of_parameter(info)]

    def _wants(self, user: fx.Node, k: int) -> list[Layout]:
        if user in self.domains:
            return [c.inputs[k] for c in self.domains[user]]
        if user in self.chosen:
            return [self.chosen[user].inputs[k]]
        return []

    # ---------------------------------------------------------------------------------------------- costs and tables

    def problem(self) -> tuple[Problem, list[fx.Node | Value]]:
        """The solver's problem and what each of its variables stands for."""
        order: list[fx.Node | Value] = [*self.domains, *self.supplies]
        index = {what: k for k, what in enumerate(order)}
        costs = [self.unary(what) for what in order]
        pairs: dict[tuple[int, ...], np.ndarray] = {}

        def add(a: int, b: int, matrix: np.ndarray) -> None:
            key, oriented = ((a, b), matrix) if a < b else ((b, a), self._transposed(matrix))
            pairs[key] = pairs[key] + oriented if key in pairs else oriented

        for value, supplies in self.supplies.items():
            add(index[value[0]], index[value], self.made(value, supplies))
        for value, users in self.uses.items():
            for user, k in users:
                if user not in self.domains:
                    continue
                if value in self.supplies:
                    add(index[value], index[user], self.offer(value, user, k))
                elif value not in self.fixed:
                    add(index[value[0]], index[user], self.convert(value, user, k))
        return Problem(tuple(costs), pairs), order

    def at(self, choice: Mapping[fx.Node | Value, int]) -> SearchSpace:
        """The space of one plan: every variable has the choice that it took."""
        new = copy.copy(self)
        single: dict[tuple[int, int], list] = {}

        def only(options: list, k: int) -> list:
            return single.setdefault((id(options), k), [options[k]])  # equal layers share lists, and so tables

        new.domains = {node: only(domain, choice[node]) for node, domain in self.domains.items()}
        new.supplies = {value: only(ways, choice[value]) for value, ways in self.supplies.items()}
        return new

    def _transposed(self, matrix: np.ndarray) -> np.ndarray:
        return self.remember(("T", id(matrix)), lambda: np.ascontiguousarray(matrix.T), matrix)

    def remember(self, key: object, make: Callable[[], np.ndarray], *alive: object) -> np.ndarray:
        """`make()`, once per key; `alive` are the objects whose ids are in the key."""
        if key not in self._tables:
            self._keep.extend(alive)
            self._tables[key] = make()
        return self._tables[key]

    def unary(self, what: fx.Node | Value) -> np.ndarray:
        """Seconds of each choice by itself, with what leads to and from nodes that are not searched."""
        if not isinstance(what, fx.Node):
            return self._supply_costs(what)
        own = np.array([self._draw(c.cost_s) for c in self.domains[what]]) * self._shares.get(what, 1.0)
        for k, operand in enumerate(tensor_operands(what) if facts(what).role == "op" else []):
            value = producer(operand)
            if value in self.fixed:
                own = own + self.from_fixed(value, what, k)
        for k in range(len(facts(what).values)):
            if (what, k) in self.uses and (what, k) not in self.supplies:
                own = own + self._leaving((what, k), [(c.outputs[k], None) for c in self.domains[what]])
        return own

    def _supply_costs(self, value: Value) -> np.ndarray:
        ways = self.supplies[value]
        return self._leaving(value, [(way.hub, way.native) for way in ways])

    def _leaving(self, value: Value, ways: list[tuple[Layout, Layout | None]]) -> np.ndarray:
        """Seconds to hand a value to nodes that are not searched: the program's output and fixed ops."""
        info = facts(value[0]).values[value[1]]
        total = np.zeros(len(ways))
        for user, k in self.uses[value]:
            if user in self.domains:
                continue
            for row, (have, other) in enumerate(ways):
                wanted = self.chosen[user].inputs[k] if user in self.chosen else self.leaves_as(have, info)
                total[row] += min(self._route_s(layout, wanted, info) for layout in dict.fromkeys((have, other or have)))
        return total

    def leaves_as(self, have: Layout, info: TensorInfo) -> Layout:
        return leaving_layout(have, info, self.wants_whole_outputs, self.program.mesh.shape)

    def from_fixed(self, value: Value, user: fx.Node, k: int) -> np.ndarray:
        """Seconds of converting a decided value into what each choice of a reader wants."""
        info, have = facts(value[0]).values[value[1]], self.fixed[value]
        want, made = [c.inputs[k] for c in self.domains[user]], self.made_anyway(value)
        return np.where([x in made for x in want], 0.0, self.seconds([have], want, info)[0])

    def made_anyway(self, value: Value) -> set[Layout]:
        """Layouts of a decided value that decided ops or the output read: their conversion is there whatever the search chooses."""
        users, info = self.uses.get(value, []), facts(value[0]).values[value[1]]
        read = {self.chosen[u].inputs[k] for u, k in users if u in self.chosen and not facts(u).is_constant}
        return read | {self.leaves_as(self.fixed[value], info) for u, _ in users if facts(u).role == "output"}

    def made(self, value: Value, supplies: list[Supply]) -> np.ndarray:
        """Between the maker and the supply: the conversion to the hub."""
        domain, info = self.domains[value[0]], facts(value[0]).values[value[1]]
        share = self._shares.get(value[0], 1.0)
        key = ("made", id(domain), value[1], id(supplies), info, share)

        def make() -> np.ndarray:
            natives = [c.outputs[value[1]] for c in domain]
            seconds = self.seconds(natives, [way.hub for way in supplies], info)
            fitting = np.array([[way.native in (None, native) for way in supplies] for native in natives])
            return np.where(fitting, seconds * share, math.inf)

        return self.remember(key, make, domain, supplies)

    def convert(self, value: Value, user: fx.Node, k: int) -> np.ndarray:
        """Between the only producer and the only reader."""
        producer_domain, reader_domain = self.domains[value[0]], self.domains[user]
        info = facts(value[0]).values[value[1]]
        share = self._shares.get(value[0], 1.0)
        key = ("convert", id(producer_domain), value[1], id(reader_domain), k, info, share)

        def make() -> np.ndarray:
            have, want = [c.outputs[value[1]] for c in producer_domain], [c.inputs[k] for c in reader_domain]
            return self.seconds(have, want, info) * share

        return self.remember(key, make, producer_domain, reader_domain)

    def offer(self, value: Value, user: fx.Node, k: int) -> np.ndarray:
        """Between a supply and one of its readers: from the hub, or from the native layout where both are offered."""
        supplies, domain = self.supplies[value], self.domains[user]
        info = facts(value[0]).values[value[1]]
        share = self._shares.get(value[0], 1.0)

        def make() -> np.ndarray:
            want = [c.inputs[k] for c in domain]
            from_native = self.seconds([way.native or way.hub for way in supplies], want, info)
            return np.minimum(self.seconds([way.hub for way in supplies], want, info), from_native) * share

        return self.remember(("offer", id(supplies), id(domain), k, info, share), make, supplies, domain)

    def seconds(self, have: Sequence[Layout], want: Sequence[Layout], info: TensorInfo) -> np.ndarray:
        """f64[len(have), len(want)] of converting a value, both directions where it has a gradient."""
        return self._conversions.seconds(have, want, info)

    def _route_s(self, have: Layout, want: Layout, info: TensorInfo) -> float:
        return float(self.seconds([have], [want], info)[0, 0])

    def _draw(self, seconds: float) -> float:
        """A random price in place of the real one, when random plans are asked for."""
        return float(self.random.random()) if self.random is not None else seconds


def _differing_axes(natives: Sequence[Layout], hubs: Sequence[Layout]) -> np.ndarray:
    """i64[len(natives), len(hubs)]: on how many axes they differ."""
    if not natives or not hubs:
        return np.zeros((len(natives), len(hubs)), dtype=int)
    codes: dict[Placement, int] = {}
    have, want = (np.array([[codes.setdefault(p, len(codes)) for p in layout] for layout in side]) for side in (natives, hubs))
    return (have[:, None] != want[None]).sum(axis=2)


def raise_unfit(pins: list[Pin], name: str, value: TensorInfo, program: Program) -> None:
    """Say why no layout satisfies `pins`, and which sizes would."""
    asked = "; ".join(map(str, pins))
    advice = []
    for pin in pins:
        for axis, texts in enumerate(pin.allowed):
            for placement in (Placement.parse(text) for text in texts if text.startswith("S(")):
                advice += _size_advice(placement.dim, value.shape, program.mesh.axes[axis], program.mesh.shape[axis])
    reason = (
        ". ".join(advice) or "Constraints on one value must agree, and dims must divide by the axes that split them; drop or change one"
    )
    raise ConstraintError(f"{name} of shape {value.shape} on mesh {program.mesh.whole} cannot satisfy {asked}. {reason}.")


def _size_advice(dim: int, shape: Sequence[int], axis: str, n: int) -> list[str]:
    """Why axis `axis` of `n` ranks cannot split `dim`, and which size it could; nothing where it can."""
    if dim >= len(shape):
        return [f"there is no dim {dim}, its dims are 0 to {len(shape) - 1}" if shape else f"there is no dim {dim}, it is a single number"]
    if shape[dim] and padded_piece(shape[dim], n) is not None:
        return []
    near = f"{max(shape[dim] // n, 1) * n} or {(shape[dim] // n + 1) * n} would work"
    return [f"dim {dim} has size {shape[dim]}, axis {axis} of {n} ranks needs a multiple of {n}: {near}"]
