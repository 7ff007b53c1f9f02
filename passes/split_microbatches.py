"""split_microbatches: rewrite the program of a whole batch into that of one microbatch.

A microbatch is to the batch what a rank is to an axis, but in time: the pass gives every value one of the placements

    S(d)   each microbatch has its slice along dim d           arguments and activations
    P      each has a term; the value is the sum               a loss
    R      all have the whole value                            parameters, and what comes of them

by the rules of the ops, walking the graph once. What one microbatch cannot know of the others is had in one of these ways, in this
order: an R is cut, or divided into equal terms; rows are picked out of an R; a value that arguments alone make (how many labels count,
say) is computed of the whole arguments; and of a sum over the batch that is not used linearly (the balance loss of experts) each
microbatch takes its own estimate, its term times the number of microbatches, which is reported. The statistics of a BatchNorm are
each microbatch's own.

A mean of losses over labels that count is spelled as their sum over their number first, so that it is exact; an index that counts the
rows as a gather, as a microbatch counts its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from autoshard.candidates import base, bound_rule, find_segmentations
from autoshard.equations import Strategy, divides, strategies
from autoshard.errors import AutoshardError, InputError, PlanError
from autoshard.masked_means import MASKED_LOSSES, spell_masked_means
from autoshard.mesh import PIPELINE_AXIS, MeshSpec
from autoshard.ops.row import Rule, TensorInfo, is_differentiable
from autoshard.passes.localize_shapes import localize_sizes
from autoshard.pipeline import Joined, Pipeline
from autoshard.pipeline_limits import batch_dims, loss_of, most_that_divide, refuse
from autoshard.placements import I, P, Placement, R, S, local_shape
from autoshard.program import Facts, Program, facts, op_name, producer, replace_operands, set_facts, tensor_operands, writes_statistics
from autoshard.resolving import copied
from autoshard.row_numbers import spell_row_numbers
from autoshard.runtime.loss import AVERAGED

_DIVIDED = frozenset({"mean", "kl_div", *AVERAGED})  # lowerings that only divide by the number of pieces
_WITH_NUMBER = frozenset(f"aten.{name}" for name in ("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Scalar"))  # x + 1
_SPREAD, _PICK, _WHOLE, _ESTIMATE = 1, 10, 100, 1000  # how dear it is to give an op the operand it wants
Value = tuple[fx.Node, int]


@dataclass(frozen=True)
class SplitMicrobatches:
    """Cut the batch in `microbatches` where the mesh has stages. batch: see autoshard.Pipelining. Raises InputError, PlanError."""

    mesh: MeshSpec
    microbatches: int = 1
    batch: Mapping[str, int | None] = field(default_factory=dict)

    def __call__(self, program: Program) -> Program:
        if PIPELINE_AXIS not in self.mesh.axes:
            return program
        refuse(program)
        count = self.microbatches if program.is_training else most_that_divide(program, self.batch, self.microbatches)
        cut = batch_dims(program, self.batch, count)
        if count > 1:
            spell_masked_means(program)
            spell_row_numbers(program)
        whole = copied(program) if self.batch and count > 1 else None
        splitter = _Splitter(program, count, cut)
        results = splitter.run()
        if whole is not None and splitter.estimates:
            self._refuse_a_worse_batch(whole, count)
        names = (facts(node).name for node in program.nodes("input") if facts(node).name not in splitter.rows)
        inputs = {name: (name.removesuffix(_OF_ALL), cut.get(name)) for name in names}
        program.pipeline = Pipeline(self.mesh, count, inputs, splitter.rows, results, loss_of(program))
        return program

    def _refuse_a_worse_batch(self, program: Program, count: int) -> None:
        """Raise InputError where the dims that were named give estimates, and those taken by default none."""
        try:
            usual = batch_dims(program, {}, count)
            splitter = _Splitter(program, count, usual)
            splitter.run()
        except AutoshardError:
            return
        if not splitter.estimates:
            said = ", ".join(f"{name!r}: {dim}" for name, dim in self.batch.items())
            exact = ", ".join(f"dim {dim} of {name}" for name, dim in usual.items())
            raise InputError(
                f"batch={{{said}}} cuts what the model sums over and then uses otherwise than linearly, so that microbatches would only "
                f"estimate its results; cut along {exact} they are exact: leave out batch=, or name these"
            )


_OF_ALL = " of all microbatches"


class _Splitter:
    """One walk over the graph; `at` is where each value lies among the microbatches."""

    def __init__(self, program: Program, count: int, cut: Mapping[str, int]) -> None:
        self.program, self.count, self.cut = program, count, cut
        self.axis = MeshSpec(("microbatch",), (count,))
        self.at: dict[Value, Placement] = {}
        self.strategy: dict[fx.Node, Strategy] = {}
        self.of_arguments: set[fx.Node] = set()  # what arguments and constants alone make, the same at any time
        self.estimates: set[fx.Node] = set()
        self.share_of: dict[fx.Node, fx.Node] = {}  # a microbatch's term, and the value that is the sum
        self.made: dict[tuple, fx.Node] = {}
        self.rows: dict[str, int] = {}
        self.segmentations = find_segmentations(program)
        self.cuttings: dict[tuple[fx.Node, int, Placement], Strategy | None] = {}

    def run(self) -> tuple[Joined, ...]:
        for node in self.program.nodes():
            known = facts(node)
            if node.op == "placeholder":
                dim = self.cut.get(known.name) if known.role == "input" and self.count > 1 else None
                self.at[node, 0] = R if dim is None else S(dim)
            elif known.role == "op":
                self._place(node)
            elif known.role == "update":
                self._update(node)
            elif known.role == "projection":
                self._inherit(node)
            elif known.role != "output":
                raise PlanError(f"{node.name} ({known.source}) cannot be part of a pipeline stage; leave out axis 'pp'")
            if (known.role == "input" and not known.needs_grad) or known.is_constant or self._is_of_arguments(node):
                self.of_arguments.add(node)
        results = self._results()
        self._localize()
        self._drop_dead()
        return results

    def _is_of_arguments(self, node: fx.Node) -> bool:
        is_computed = facts(node).role in ("op", "projection") and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())
        return is_computed and self.of_arguments.issuperset(node.all_input_nodes)

    def _cut_dims(self) -> str:
        return ", ".join(f"dim {dim} of {name}" for name, dim in self.cut.items()) or "no dim of any argument"

    def _inherit(self, node: fx.Node) -> None:
        self.at[node, 0] = self.at[producer(node)]
        if producer(node)[0] in self.estimates:
            self.estimates.add(node)

    def _lies(self, operand: fx.Node) -> Placement:
        return self.at[producer(operand)]

    # ------------------------------------------------------------------------------------------------------- one op

    def _place(self, node: fx.Node) -> None:
        operands = tensor_operands(node)
        have = [self._lies(operand) for operand in operands]
        outputs = len(facts(node).values)
        if all(placement == R for placement in have):
            self._settle(node, Strategy((R,) * len(have), (R,) * outputs), operands)
            return
        if have == [P] and op_name(node) in _WITH_NUMBER and isinstance(node.args[1], (int, float)) and self._is_real(operands[0]):
            node.args = (node.args[0], node.args[1] / self.count, *node.args[2:])  # each microbatch adds its share
            self._settle(node, Strategy((P,), (P,)), operands)
            return
        found = min(
            ((self._dearness(operands, have, option), k, option) for k, option in enumerate(self._options(node))),
            default=(None, 0, None),
            key=lambda entry: (entry[0] is None, entry[0], entry[1]),
        )
        if found[0] is None or found[2] is None:
            raise PlanError(
                f"{op_name(node)} ({facts(node).source}) cannot be computed of one microbatch: no rule says how it acts on part of the "
                f"batch, which is {self._cut_dims()}. If the batch is another dim, say so: Pipelining(batch={{...}}); if rows do not mix "
                "here, register a rule that splits its batch dim (autoshard.register_rule); else leave out axis 'pp'"
            )
        strategy = found[2]
        new = [self._fetch(operand, want, node) for operand, want in zip(operands, strategy.inputs, strict=True)]
        self._settle(node, strategy, new)

    @staticmethod
    def _is_real(operand: fx.Node) -> bool:
        source, index = producer(operand)
        return facts(source).values[index].dtype.is_floating_point

    def _options(self, node: fx.Node) -> list[Strategy]:
        """Ways to run an op on one microbatch: those whose local code is the op itself, or divides by the number of pieces."""
        rule, equation = bound_rule(node)
        whole = Strategy((R,) * len(tensor_operands(node)), (R,) * len(facts(node).values))
        if rule is None or equation is None:
            return [whole]
        found = []
        for option in strategies(equation, self.count, self.segmentations):
            option = Strategy(tuple(map(_unmarked, option.inputs)), tuple(map(_unmarked, option.outputs)), option.factor)
            is_known = not _is_lowered(rule, option) or rule.lowering.function in _DIVIDED or self._is_batch_norm(node)  # type: ignore[union-attr]
            is_known = is_known or (op_name(node) in MASKED_LOSSES and base(option.factor) in "bs")  # a sum by now
            if is_known and divides(equation, [option.factor], (self.count,)):
                found.append(option)
        return found

    @staticmethod
    def _is_batch_norm(node: fx.Node) -> bool:
        return op_name(node) == "aten.batch_norm.default"

    def _settle(self, node: fx.Node, strategy: Strategy, operands: list[fx.Node]) -> None:
        replace_operands(node, operands)
        self.strategy[node] = strategy
        for k, placement in enumerate(strategy.outputs):
            self.at[node, k] = placement
        if any(operand in self.estimates for operand in operands):
            self.estimates.add(node)
        rule, _ = bound_rule(node)
        if self._is_batch_norm(node) and bool(node.args[5]) and self.count > 1:
            self.program.note(f"{node.name} ({facts(node).source}) takes statistics of each microbatch by itself, not of the whole batch")
        elif rule is not None and _is_lowered(rule, strategy) and rule.lowering.function in _DIVIDED:  # type: ignore[union-attr]
            users = list(node.users)
            share = self._scaled(node, 1.0 / self.count, "share", strategy.outputs[0])
            for user in users:
                user.replace_input_with(node, share)

    # ------------------------------------------------------------------------------------------- operands as wanted

    def _dearness(self, operands: list[fx.Node], have: list[Placement], option: Strategy) -> int | None:
        """None: cannot be had."""
        total = 0
        for operand, placement, want in zip(operands, have, option.inputs, strict=True):
            if placement == want:
                continue
            source, index = producer(operand)
            value = facts(source).values[index]
            is_share = placement == R and want == P and is_differentiable(value.dtype)
            if is_share:
                total += _SPREAD
            elif placement == R and want.is_split and (self._can_cut(operand, want) or not want.segments):
                total += _SPREAD if self._can_cut(operand, want) else _PICK
            elif want == R and operand in self.of_arguments:
                total += _WHOLE
            elif placement == P and want == R:
                total += _ESTIMATE
            else:
                return None
        return total

    def _fetch(self, operand: fx.Node, want: Placement, user: fx.Node) -> fx.Node:
        have = self._lies(operand)
        if have == want:
            return operand
        if want.is_split:
            return self._cut(operand, want) if self._can_cut(operand, want) else self._picked(operand, want)
        if want == P:
            return self._scaled(operand, 1.0 / self.count, "share", P)
        if operand in self.of_arguments:
            return self._of_all(operand)
        found = self._scaled(operand, float(self.count), "estimate", R)
        self.estimates.add(found)
        self.program.note(
            f"{facts(user).source}: a sum over the batch is not used linearly; each microbatch takes an estimate of it from its own rows, "
            "and the results are averaged"
        )
        return found

    def _scaled(self, operand: fx.Node, by: float, suffix: str, placement: Placement) -> fx.Node:
        """`operand * by`, behind it (integers stay integers: they are only multiplied)."""
        if (operand, suffix) not in self.made:
            source, index = producer(operand)
            value = facts(source).values[index]
            new = self._insert(operand, torch.ops.aten.mul.Tensor, (operand, by if is_differentiable(value.dtype) else int(by)), {}, suffix)
            set_facts(new, replace(facts(source), role="op", values=(value,), is_constant=False, op=None, random_axes=None))
            self.made[operand, suffix] = new
            self.strategy[new] = Strategy((placement,), (placement,))
            self.at[new, 0] = placement
            if suffix == "share":
                self.share_of[new] = operand
            if operand in self.of_arguments or self._is_of_arguments(operand):
                self.of_arguments.add(new)
            if operand in self.estimates:
                self.estimates.add(new)
        return self.made[operand, suffix]

    def _insert(self, after: fx.Node, target: Any, args: Any, kwargs: Any, suffix: str, op: str = "call_function") -> fx.Node:
        with self.program.graph.inserting_after(after):
            return self.program.graph.create_node(op, target, args, kwargs, name=f"{after.name}_{suffix}")

    def _can_cut(self, operand: fx.Node, want: Placement) -> bool:
        """Whether the ops behind an R can make a microbatch's slice of it alone."""
        node, index = producer(operand)
        if facts(node).role != "op" or node in self.estimates:
            return False
        return self._cutting(node, index, want) is not None

    def _cutting(self, node: fx.Node, index: int, want: Placement) -> Strategy | None:
        if (node, index, want) not in self.cuttings:
            self.cuttings[node, index, want] = self._find_cutting(node, index, want)
        return self.cuttings[node, index, want]

    def _find_cutting(self, node: fx.Node, index: int, want: Placement) -> Strategy | None:
        for option in self._options(node):
            if option.outputs[index] != want:
                continue
            pairs = zip(tensor_operands(node), option.inputs, strict=True)
            if all(w == R or (w.is_split and self._lies(operand) == R and self._can_cut(operand, w)) for operand, w in pairs):
                return option
        return None

    def _cut(self, operand: fx.Node, want: Placement) -> fx.Node:
        """A copy of the ops behind an R that makes a microbatch's slice of it."""
        node, index = producer(operand)
        if (node, index, want) not in self.made:
            strategy = self._cutting(node, index, want)
            assert strategy is not None
            wanted = zip(tensor_operands(node), strategy.inputs, strict=True)
            inputs = [self._cut(o, w) if w.is_split else o for o, w in wanted]
            new = self._copy(node, "of_microbatch", inputs)
            self.strategy[new] = strategy
            for k, placement in enumerate(strategy.outputs):
                self.at[new, k] = placement
            self.made[node, index, want] = new if operand is node else self._copied_projection(operand, new)
        return self.made[node, index, want]

    def _picked(self, operand: fx.Node, want: Placement) -> fx.Node:
        """A microbatch's rows of an R, by their numbers."""
        if (operand, want) not in self.made:
            source, index = producer(operand)
            value = facts(source).values[index]
            new = self._insert(
                operand, torch.ops.aten.index_select.default, (operand, want.dim, self._rows(value.shape[want.dim])), {}, "rows"
            )
            set_facts(new, replace(facts(source), role="op", values=(value,), is_constant=False, op=None, random_axes=None))
            self.strategy[new] = Strategy((R, S(0)), (want,), "rows")
            self.at[new, 0] = want
            self.made[operand, want] = new
        return self.made[operand, want]

    def _rows(self, length: int) -> fx.Node:
        """The numbers of a microbatch's rows among `length`: an argument that the caller does not give."""
        if ("rows", length) not in self.made:
            first = next(node for node in self.program.nodes("input") if facts(node).name in self.cut)
            name = f"rows_of_{length}"
            with self.program.graph.inserting_before(next(iter(self.program.graph.nodes))):
                new = self.program.graph.create_node("placeholder", name, (), {}, name=name)
            known = Facts("input", (TensorInfo((length,), torch.int64),), name, layouts=facts(first).layouts)
            set_facts(new, known)
            self.at[new, 0] = S(0)
            self.rows[name] = length
            self.of_arguments.add(new)
            self.made["rows", length] = new
        return self.made["rows", length]

    def _of_all(self, operand: fx.Node) -> fx.Node:
        """A copy of what arguments alone make, of the whole arguments."""
        if operand in self.share_of:
            return self._of_all(self.share_of[operand])
        if self._lies(operand) == R or (operand, "of_all") in self.made:
            return self.made.get((operand, "of_all"), operand)
        known = facts(operand)
        if known.role == "input":
            name = f"{operand.name}_of_all"
            new = self._insert(operand, name, (), {}, "of_all", "placeholder")
            set_facts(new, replace(known, name=known.name + _OF_ALL))
            self.at[new, 0] = R
        elif known.role == "projection":
            new = self._copied_projection(operand, self._of_all(producer(operand)[0]))
        else:
            new = self._copy(operand, "of_all", [self._of_all(o) for o in tensor_operands(operand)])
            self.strategy[new] = Strategy(tuple(R for _ in tensor_operands(new)), (R,) * len(known.values))
            self.at |= {(new, k): R for k in range(len(known.values))}
        self.of_arguments.add(new)
        self.made[operand, "of_all"] = new
        return new

    def _copy(self, node: fx.Node, suffix: str, operands: list[fx.Node]) -> fx.Node:
        new = self._insert(node, node.target, node.args, node.kwargs, suffix)
        set_facts(new, replace(facts(node)))
        replace_operands(new, operands)
        return new

    def _copied_projection(self, operand: fx.Node, source: fx.Node) -> fx.Node:
        new = self._insert(operand, operand.target, (source, operand.args[1]), {}, "copy")
        set_facts(new, replace(facts(operand)))
        self.at[new, 0] = self.at[producer(new)]
        return new

    # -------------------------------------------------------------------------------------------- what leaves the graph

    def _update(self, node: fx.Node) -> None:
        if any(self._lies(operand) != R or operand in self.estimates for operand in node.all_input_nodes):
            raise PlanError(
                f"{facts(node).source} writes a buffer with what the whole batch makes, which no microbatch knows; leave out axis 'pp'"
            )

    def _results(self) -> tuple[Joined, ...]:
        found: list[Joined] = []
        loss = loss_of(self.program)
        results = list(self.program.output.args[0])  # type: ignore[arg-type]
        if loss is not None and self._lies(results[loss]) == R and self.count > 1:  # backward starts from terms of it
            results[loss] = self._scaled(results[loss], 1.0 / self.count, "share", P)
            self.program.output.args = (tuple(results),)
        for node in results:
            placement = self._lies(node) if isinstance(node, fx.Node) else R
            if placement.segments:
                raise PlanError(f"the result {node.name} interleaves rows of microbatches; return it with its batch dim in front")
            if node in self.estimates and not is_differentiable(facts(producer(node)[0]).values[producer(node)[1]].dtype):
                raise PlanError(f"the result {node.name} is a whole number or a bool of the whole batch, which microbatches only estimate")
            whole: Joined = "mean" if node in self.estimates else "same"
            found.append("sum" if placement == P else placement.dim if placement.is_split else whole)
        return tuple(found)

    def _localize(self) -> None:
        """Write sizes of the whole batch as those of a microbatch."""
        program, mesh = self.program, self.program.mesh
        program.mesh = self.axis
        for node, strategy in self.strategy.items():
            facts(node).strategies = (strategy,)
            facts(node).layouts = tuple((placement,) for placement in strategy.outputs)
        bound = {node: bound_rule(node) for node in self.strategy if self.strategy[node].factor}
        for node, (rule, equation) in bound.items():
            if rule is not None and equation is not None:
                localize_sizes(program, node, rule, equation)
        for node in program.nodes():
            known = facts(node)
            if known.role in ("output", "update"):
                continue
            placements = [self.at[node, k] for k in range(len(known.values))]
            known.values = tuple(self._local(value, placement) for value, placement in zip(known.values, placements, strict=True))
            known.strategies, known.layouts = (), () if known.role != "input" else known.layouts
            if writes_statistics(node) and self.count > 1:
                self.program.note("running statistics are updated once per microbatch")
        program.mesh = mesh

    def _local(self, value: TensorInfo, placement: Placement) -> TensorInfo:
        shape = local_shape(value.shape, (placement,), (self.count,))
        assert shape is not None
        return replace(value, shape=shape)

    def _drop_dead(self) -> None:
        for node in reversed(list(self.program.graph.nodes)):
            is_pure = facts(node).role in ("op", "projection") and not writes_statistics(node)
            if is_pure and not node.users:
                self.program.graph.erase_node(node)


def _is_lowered(rule: Rule, strategy: Strategy) -> bool:
    """Whether the op needs other code where the factor is split between ranks."""
    return rule.lowering is not None and bool(strategy.factor) and base(strategy.factor) in rule.lowering.axes


def _unmarked(placement: Placement) -> Placement:
    return R if placement == I else placement
