"""What pipeline stages cannot have, and how a batch may be cut: told before anything is planned."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping

from torch import fx

from autoshard.errors import InputError, PlanError
from autoshard.program import Program, facts, op_name
from autoshard.torch_internals import pytree


def refuse(program: Program) -> None:
    """Raise PlanError for what stages cannot have yet."""
    if program.symbols:
        raise PlanError("sizes that change from call to call cannot be planned with pipeline stages; leave out dynamic=")
    if any(facts(node).branch or op_name(node) == "either" for node in program.nodes()):
        raise PlanError("torch.cond cannot be planned with pipeline stages: microbatches could take other branches; leave out axis 'pp'")
    for node in program.nodes("update"):
        _refuse_update(node)
    if any(facts(node).is_drawn_whole for node in program.nodes("op")):
        raise PlanError("randomness='single_device' needs the whole batch at once; leave out axis 'pp' to compare number by number")


def _refuse_update(node: fx.Node) -> None:
    """A buffer that is written may be read by nothing else: each microbatch, and each stage that has it, would find another value."""
    buffer, written = node.args[0], [node]
    assert isinstance(buffer, fx.Node)
    seen, waiting = {buffer}, [buffer]
    while waiting:
        for user in waiting.pop().users:
            if user not in seen and user not in written:
                seen.add(user)
                waiting.append(user)
    if any(facts(user).role == "output" or len(facts(user).values) > 1 or _mixes(user, seen) for user in seen):
        raise PlanError(
            f"{facts(buffer).name} is a buffer that the model writes and computes with, which stages would see at different times; "
            "write it outside of forward, or leave out axis 'pp'"
        )


def _mixes(node: fx.Node, seen: set[fx.Node]) -> bool:
    """Whether an op computes with a buffer and with something that is no number and no constant."""
    return any(operand not in seen and not facts(operand).is_constant for operand in node.all_input_nodes)


def batch_dims(program: Program, asked: Mapping[str, int | None], microbatches: int) -> dict[str, int]:
    """By argument the dim that microbatches cut. Raises InputError where it does not divide."""
    inputs = {facts(node).name: facts(node).value for node in program.nodes("input")}
    unknown = [name for name in asked if name not in inputs]
    if unknown:
        raise InputError(f"batch names {unknown[0]!r}, which is no tensor argument; there are {', '.join(inputs)}")
    lengths = [value.shape[0] for name, value in inputs.items() if value.shape and name not in asked]
    common = Counter(lengths).most_common(1)[0][0] if lengths else 0
    dims = {name: 0 for name, value in inputs.items() if name not in asked and value.shape and value.shape[0] == common}
    dims |= {name: dim for name, dim in asked.items() if dim is not None}
    for name, dim in dims.items():
        if not 0 <= dim < len(inputs[name].shape):
            raise InputError(f"batch says dim {dim} of {name}, which is {tuple(inputs[name].shape)}: count its dims from 0")
        size = inputs[name].shape[dim]
        if size % microbatches:
            near = max(microbatches, size // microbatches * microbatches)
            raise InputError(
                f"{name} has length {size} along its batch dim {dim}, which does not divide in {microbatches} microbatches; "
                f"use a batch of {near} or {near + microbatches}, or another number of microbatches"
            )
    return dims


def most_that_divide(program: Program, asked: Mapping[str, int | None], microbatches: int) -> int:
    """The most microbatches, up to `microbatches`, that the batch divides in: without a backward any number will do."""
    for count in range(microbatches, 1, -1):
        with contextlib.suppress(InputError):
            batch_dims(program, asked, count)
            return count
    return 1


def loss_of(program: Program) -> int | None:
    """The number of the result that backward starts from: of the numbers with a gradient the one called `loss`, else the first."""
    results = list(program.output.args[0])  # type: ignore[arg-type]
    found = [
        k for k, node in enumerate(results) if isinstance(node, fx.Node) and facts(node).value.needs_grad and not facts(node).value.shape
    ]
    if len(found) < 2:
        return found[0] if found else None
    numbered = pytree.tree_unflatten(list(range(len(results))), program.out_spec) if program.out_spec is not None else None
    named = numbered.get("loss") if isinstance(numbered, Mapping) else getattr(numbered, "loss", None)
    return named if named in found else found[0]
