"""Whether the backward of a pipeline stage can run in two halves: I (of what it received) and W (of weights); proved on its graph.

torch finds, in autograd's graph, the nodes at which the way to a weight leaves the way to what was received. I runs the latter and keeps
what arrives at these nodes; W starts there. The halves add up to one backward, and no more than that, where

    a weight meets the activations in one op        else W runs what lies between two such ops again
    that op computes either gradient by itself      else a fused function runs whole, and communicates, in both halves
    it stands in no region that backward runs again else the region runs again in both halves

A stage for which this is not so runs its backward whole in I, and nothing in W. A stage that receives nothing with a gradient, as the first
one, runs it whole in W.
"""

from __future__ import annotations

from torch import fx

from autoshard.program import Program, facts, is_of_runtime, op_name
from autoshard.stages import prepared_by

_RECURRENT = ("aten.lstm.", "aten.gru.", "aten.rnn_tanh.", "aten.rnn_relu.")


def whole_because(stage: Program) -> str:
    """Why the backward of a stage must run whole, in words; "" where it can be split, or where nothing that is received has a gradient."""
    path = _activations(stage)
    for leaf in _leaves(stage) if path else ():
        meetings = _meetings(leaf, path)
        name = _name(leaf)
        if len(meetings) > 1:
            return f"{name} reaches the activations in {meetings[0].name} and in {meetings[1].name}; what lies between would run twice"
        for node in meetings:
            if facts(node).recompute is not None:
                return f"{node.name}, which reads {name}, stands in a checkpointed region, which would run again in both halves"
            if _is_fused(node):
                return f"{node.name} computes the gradients of {name} and of its other operands in one function, which would run twice"
    return ""


def wholes(program: Program) -> tuple[str, ...]:
    """Of every stage of a program why its backward runs whole; "" where it does not, and everywhere if no backward is split."""
    pipeline = program.pipeline
    splits = pipeline is not None and any(action.kind == "I" for own in pipeline.schedule for action in own)
    return tuple(whole_because(stage) if splits else "" for stage in program.stages)


def can_split(stage: Program) -> bool:
    """Whether I and W both have something to do."""
    return bool(_activations(stage)) and bool(_leaves(stage)) and not whole_because(stage)


def _has_gradient(node: fx.Node) -> bool:
    return any(value.needs_grad for value in facts(node).values)


def _activations(stage: Program) -> set[fx.Node]:
    """What is received with a gradient, and everything with a gradient that is made of it."""
    found: set[fx.Node] = set()
    for node in stage.nodes():
        if node.op != "output" and _has_gradient(node) and (facts(node).role == "received" or not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def _leaves(stage: Program) -> list[fx.Node]:
    """What forward reads and gradients of all microbatches add up in: parameters, and what was prepared of them."""
    read = [node for node in stage.nodes("parameter") if any(not facts(user).is_prepared for user in node.users)]
    return [node for node in (*read, *prepared_by(stage)) if _has_gradient(node)]


def _meetings(leaf: fx.Node, path: set[fx.Node]) -> list[fx.Node]:
    """The first ops on the way of the activations that read a leaf, directly or through ops on it alone; in program order."""
    seen, found, waiting = {leaf}, set[fx.Node](), [leaf]
    while waiting:
        for user in waiting.pop().users:
            if user in path:
                found.add(user)
            elif user not in seen and user.op != "output" and not facts(user).is_prepared and _has_gradient(user):
                seen.add(user)
                waiting.append(user)
    return sorted(found)


def _is_fused(node: fx.Node) -> bool:
    """Whether an op is one autograd function of Python, as those of other libraries and attention over split sequences.

    Or a recurrent layer, which meets its weights once here and at every step of the sequence in autograd's graph.
    """
    if is_of_runtime(node.target):
        return str(getattr(node.target, "__module__", "")).endswith(".attention")
    name = op_name(node)
    return facts(node).role == "op" and (not name.startswith("aten.") or name.startswith(_RECURRENT))


def _name(leaf: fx.Node) -> str:
    while facts(leaf).role != "parameter" and leaf.all_input_nodes:
        leaf = leaf.all_input_nodes[0]
    return facts(leaf).name
