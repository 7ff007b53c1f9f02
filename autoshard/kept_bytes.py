"""Bytes that a plan keeps on each rank, as tables for the search: what autograd saves, in the layouts that candidates give and want.

Parameters count with gradient and optimizer state. Of activations counts what autograd keeps (autoshard.autograd_saves), once
for each copy: where the value is made, or, for what a conversion copies, where it is converted. A view is the memory of what it
looks at. An upper bound where a value and a converted copy of its view are both counted though only the copy is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from torch import fx

from autoshard.autograd_saves import Kept, kept_values
from autoshard.candidates import Candidate
from autoshard.conversions import without_gradient
from autoshard.costs import CostModel
from autoshard.ops.row import TensorInfo
from autoshard.placements import Layout
from autoshard.program import Program, facts, producer, tensor_operands

Value = tuple[fx.Node, int]  # a producing node and the number of its output


class KeptBytes:
    """What autograd keeps of one program, priced for layouts."""

    def __init__(self, program: Program, costs: CostModel) -> None:
        self.program, self.costs = program, costs
        self._local: dict[tuple[TensorInfo, Layout], float] = {}

    @cached_property
    def kept(self) -> Kept:
        return kept_values(self.program) if self.program.is_training else Kept()

    @cached_property
    def _reads(self) -> dict[tuple[fx.Node, int], bool]:
        """Per op and number of a tensor operand: is the operand's memory kept, by the op or by what reads a view that the op makes."""
        found: dict[tuple[fx.Node, int], bool] = {}
        kept = self.kept
        wanted: set[Value] = set()  # values whose memory some reader keeps
        for node in reversed(list(self.program.nodes("op"))):
            saves = kept.of_op.get(node)
            if saves is None:
                continue
            outputs = range(len(facts(node).values))
            for k, source in enumerate(map(producer, tensor_operands(node))):
                base = kept.base.get(source, source)
                is_viewed = any((node, j) in wanted and kept.base[node, j] == base for j in outputs)
                found[node, k] = is_viewed or saves.operands[k]
                if found[node, k]:
                    wanted.add(source)
        return found

    def is_read(self, user: fx.Node, k: int) -> bool:
        """Whether backward needs the memory of operand `k` of an op."""
        return self._reads.get((user, k), False)

    def is_counted_before(self, value: Value) -> bool:
        """Whether the memory of a value is counted where it is made: at rest, as a view of another value, or kept by the op itself."""
        node, k = value
        if facts(node).role != "op":
            return True
        saves = self.kept.of_op.get(node)
        return self.kept.base.get(value, value) != value or (saves is not None and saves.outputs[k])

    def at_rest(self, node: fx.Node, layout: Layout) -> float:
        """A parameter with gradient and optimizer state, or alone where it is not trained."""
        value = facts(node).value
        return (2 if value.needs_grad else 1) * self.local(value, layout) + self.costs.state_bytes(value, layout)

    def of_op(self, node: fx.Node, candidate: Candidate) -> float:
        """What the op itself keeps: results, and tensors of its own, taken to be split as the largest it reads or makes is."""
        saves = self.kept.of_op.get(node)
        if saves is None:
            return 0.0
        values, layouts = facts(node).values, candidate.outputs
        held = sum(self.local(v, x) for v, x, is_kept in zip(values, layouts, saves.outputs, strict=True) if is_kept)
        if not saves.extra_bytes:
            return held
        read = [facts(source).values[k] for source, k in map(producer, tensor_operands(node))]
        largest, layout = max(zip([*read, *values], [*candidate.inputs, *layouts], strict=True), key=lambda pair: pair[0].nbytes)
        return held + saves.extra_bytes * (self.local(largest, layout) / largest.nbytes if largest.nbytes else 1.0)

    def local(self, value: TensorInfo, layout: Layout) -> float:
        key = value, layout
        if key not in self._local:
            self._local[key] = self.costs.local_bytes(value, layout)
        return self._local[key]

    def column(self, value: TensorInfo, layouts: Sequence[Layout]) -> np.ndarray:
        """f64[len(layouts)]: bytes of a value in each."""
        return np.array([self.local(value, layout) for layout in layouts])


def copies(have: Sequence[Layout], want: Sequence[Layout]) -> np.ndarray:
    """bool[len(have), len(want)]: whether the conversion makes a copy; between I and R it does not."""
    number: dict[Layout, int] = {}
    a, b = (np.array([number.setdefault(without_gradient(x), len(number)) for x in layouts]) for layouts in (have, want))
    return a[:, None] != b[None, :]
