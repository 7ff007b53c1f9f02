"""The chain that stages are cut from, with the costs of a typed program of one microbatch in the layouts that were chosen.

place     one op, conversion or mask that depends on a microbatch and on weights; what an op returns several of stays with it
weight    a parameter, with what is computed of it once per step: its conversions and casts, forward and backward
copy      a value that arguments alone make
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import fx

from autoshard.chain import Chain, Copy, Weight
from autoshard.costs import CostModel
from autoshard.kept_bytes import KeptBytes
from autoshard.program import Program, facts, producer, tensor_operands
from autoshard.stages import kinds_of, readers
from autoshard.timeline import Task, Work, work_of


@dataclass(frozen=True)
class PlacedChain:
    """A chain and the nodes of its places, in order."""

    chain: Chain
    places: tuple[fx.Node, ...]

    def starts_of(self, module: str) -> int:
        """The first place of a module, by path; -1 where it has none."""
        return min((k for k, node in enumerate(self.places) if _is_in(node, module)), default=-1)

    def of(self, module: str) -> list[int]:
        """The places of a module."""
        return [k for k, node in enumerate(self.places) if _is_in(node, module)]

    def write(self, starts: Iterable[int]) -> None:
        """Say in which stage every place stands."""
        first = Counter(starts)  # stages without a place start where the next one does
        stage = -1
        for k, node in enumerate(self.places):
            stage += first[k]
            facts(node).stage = stage


def _is_in(node: fx.Node, module: str) -> bool:
    path = facts(node).source.module
    return path == module or path.startswith(module + ".")


def chain_of(program: Program, costs: CostModel) -> PlacedChain:
    """The chain of a program after insert_collectives. costs: of the mesh of a stage."""
    kinds = kinds_of(program)
    places = tuple(node for node in program.nodes() if kinds[node] == "place" and facts(node).role != "output")
    number = {node: k for k, node in enumerate(places)}
    count = len(places)
    works = {node: work_of(program, node, costs) for node in program.nodes() if not facts(node).is_constant}
    forward = np.array([_seconds(works[node].forward) for node in places])
    backward = np.array([_seconds(works[node].backward) for node in places])
    share = np.array([_input_share(node, kinds) for node in places])
    again = np.array([_seconds(works[node].forward) if works[node].region is not None and works[node].backward else 0.0 for node in places])
    sent, sent_back = (np.zeros(count + 2) for _ in range(2))
    for node, k in number.items():
        last = max((number.get(user, count - 1) for user in node.users), default=k)
        if last > k and len(facts(node).values) == 1:
            held = costs.local_bytes(facts(node).value, facts(node).layout)
            for total, nbytes in ((sent, held), (sent_back, held if facts(node).needs_grad else 0.0)):
                total[k + 1] += nbytes
                total[last + 1] -= nbytes
    return PlacedChain(
        Chain(
            forward.tolist(),
            (backward + again).tolist(),
            (backward * share + again).tolist(),
            np.maximum(np.cumsum(sent)[: count + 1], 0.0).tolist(),
            np.maximum(np.cumsum(sent_back)[: count + 1], 0.0).tolist(),
            _kept(program, costs, number).tolist(),
            _weights(program, costs, kinds, number, works),
            [
                Copy(tuple(number[r] for r in readers(node, kinds) if r in number), _seconds(works[node].forward))
                for node, kind in kinds.items()
                if kind == "copied" and _seconds(works[node].forward)
            ],
            [_may_cut(places, k) for k in range(count + 1)],
        ),
        places,
    )


def _seconds(tasks: Iterable[Task]) -> float:
    return sum(task.seconds for task in tasks if task.verb != "wait")


def _input_share(node: fx.Node, kinds: dict[fx.Node, str]) -> float:
    """The part of an op's backward that makes gradients of what microbatches change, not of weights."""
    flows = [kinds[operand] == "place" for operand in node.all_input_nodes if facts(operand).needs_grad]
    return sum(flows) / len(flows) if flows else 1.0


def _may_cut(places: tuple[fx.Node, ...], k: int) -> bool:
    """Not between an op and what it returns several of, and not inside of what backward runs again."""
    if k in (0, len(places)):
        return True
    before, after = facts(places[k - 1]), facts(places[k])
    return after.role != "projection" and (after.recompute is None or before.recompute != after.recompute)


def _weights(
    program: Program, costs: CostModel, kinds: dict[fx.Node, str], number: dict[fx.Node, int], works: dict[fx.Node, Work]
) -> list[Weight]:
    kept = KeptBytes(program, costs)
    prepared: dict[fx.Node, list[fx.Node]] = {}
    owner: dict[fx.Node, fx.Node] = {}
    for node in program.nodes():
        if kinds[node] == "prepared" and facts(node).role not in ("update", "output"):
            first = next((owner[o] for o in node.all_input_nodes if o in owner), None)
            if first is not None:
                owner[node] = first
                prepared.setdefault(first, []).append(node)
        elif facts(node).role == "parameter":
            owner[node] = node
    found = []
    for node in program.nodes("parameter"):
        own, known = prepared.get(node, []), facts(node)
        copies = sum(costs.local_bytes(facts(n).value, facts(n).layout) * (2 if facts(n).needs_grad else 1) for n in own if _is_copy(n))
        found.append(
            Weight(
                tuple(number[r] for r in readers(node, kinds) if r in number),
                kept.at_rest(node, known.layout) + copies,
                sum(_seconds(works[n].forward) for n in own),
                sum(_seconds(works[n].backward) for n in own),
                costs.parameter_s(known.value, known.layout) if known.value.needs_grad else 0.0,
            )
        )
    return found


def _is_copy(node: fx.Node) -> bool:
    """Whether a prepared node has memory of its own: conversions between I and R and views do not."""
    before = node.all_input_nodes[0]
    return facts(node).layouts != facts(before).layouts and any(
        a.kind != b.kind and not {a.kind, b.kind} <= {"I", "R"} for a, b in zip(facts(node).layout, facts(before).layout, strict=False)
    )


def _kept(program: Program, costs: CostModel, number: dict[fx.Node, int]) -> np.ndarray:
    """f64[places]: what autograd keeps of each place, counted where it is made; what is copied counts where it is read."""
    found = np.zeros(len(number))
    kept, seen = program.kept, set()
    if kept is None:
        return found
    for node, k in number.items():
        saves = kept.of_op.get(node)
        if saves is None:
            continue
        held = [operand for operand, flag in zip(tensor_operands(node), saves.operands, strict=True) if flag]
        memories = [o if facts(o).role == "conversion" else kept.base.get(producer(o), (o, 0))[0] for o in held]
        memories += [node] * any(saves.outputs)
        for memory in memories:
            if memory in seen or facts(memory).role in ("parameter", "buffer", "input") or facts(memory).is_constant:
                continue
            seen.add(memory)
            values = zip(facts(memory).values, facts(memory).layouts, strict=True)
            found[number.get(memory, k)] += sum(costs.local_bytes(value, layout) for value, layout in values)
        if saves.extra_bytes:
            value, layout = facts(node).value, facts(node).layout
            found[k] += saves.extra_bytes * (costs.local_bytes(value, layout) / value.nbytes if value.nbytes else 1.0)
    return found
