"""What autograd keeps, by op: against the hooks of a real training step, and the memory that really stays allocated."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from autoshard.autograd_saves import kept_values
from autoshard.mesh import MeshSpec
from autoshard.passes import FoldConstants, NormalizeGraph, TraceModel
from autoshard.program import Program, facts, op_name
from examples.gpt import GPT, GPTConfig


def traced(model: nn.Module, *args: torch.Tensor) -> Program:
    program = Program(fx.Graph(), MeshSpec.of("a=2"))
    for a_pass in (TraceModel(model, args, {}), NormalizeGraph(), FoldConstants()):
        program = a_pass(program)
    return program


def saves_of(program: Program, op: str) -> list:
    kept = kept_values(program)
    return [kept.of_op[node] for node in program.nodes("op") if op_name(node) == op]


def kept_bytes(program: Program) -> int:
    """Bytes that stay besides parameters, buffers and inputs."""
    kept = kept_values(program)
    made = [(node, k) for node, k in kept.values if facts(node).role == "op"]
    return sum(facts(node).values[k].nbytes for node, k in made) + sum(kept.extra_bytes.values())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.down(F.dropout(F.gelu(self.up(self.norm(x))), 0.5))).relu()


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(F.max_pool2d(self.norm(self.conv(x)).relu(), 2).flatten(1)).softmax(-1)


def really_kept_bytes(model: nn.Module, *args: torch.Tensor) -> int:
    """Bytes of the storages that autograd holds after a real forward pass, besides the model's own and its arguments'."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers(), *args)}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(*args)
    return sum(storage.nbytes() for pointer, storage in held.items() if pointer not in own)


@pytest.mark.parametrize(
    ("model", "shape"), [(Block(), (4, 16)), (Pooled(), (2, 3, 8, 8)), (nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), (4, 8))]
)
def test_bytes_are_those_that_autograd_holds(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert kept_bytes(traced(model, x)) == really_kept_bytes(model, x) > 0


def test_a_gpt_keeps_what_autograd_holds() -> None:
    model, ids = GPT(GPTConfig(layers=2, heads=2, width=16, block=8, vocab=32)), torch.randint(32, (2, 8))
    assert kept_bytes(traced(model, ids, ids)) == really_kept_bytes(model, ids, ids) > 0


def test_flags_follow_the_formula_of_the_gradient() -> None:
    x = torch.randn(4, 16)
    program = traced(Block(), x)
    (linear, _), (norm,) = saves_of(program, "aten.linear.default"), saves_of(program, "aten.layer_norm.default")
    assert linear.operands == (True, True, False)
    assert norm.extra_bytes == 2 * 4 * 4  # mean and reciprocal deviation of four rows
    (add,), (relu,) = saves_of(program, "aten.add.Tensor"), saves_of(program, "aten.relu.default")
    assert (add.operands, add.outputs) == ((False, False), (False,))
    assert (relu.operands, relu.outputs) == ((False,), (True,))


def test_a_view_is_kept_at_its_base() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return q * k + v

    program = traced(Fused(), torch.randn(4, 8))
    kept = kept_values(program)
    linear = next(node for node in program.nodes("op") if op_name(node) == "aten.linear.default")
    chunk = next(node for node in program.nodes("op") if op_name(node) == "aten.chunk.default")
    assert [kept.base[chunk, k] for k in range(3)] == [(linear, 0)] * 3
    assert [value for value in kept.values if facts(value[0]).role == "op"] == [(linear, 0)]


def test_a_checkpointed_region_keeps_what_it_reads() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(16, 16), Block(), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(checkpoint(self.inner, self.first(x), use_reentrant=False))

    model, x = Checkpointed(), torch.randn(4, 16)
    program = traced(model, x)
    kept = kept_values(program)
    names = {facts(node).source.module for node, _ in kept.values if facts(node).role == "op"}
    assert names == {"first", "inner"}  # what enters the region, and its result, which the last layer keeps
    assert kept_bytes(program) == 2 * 4 * 16 * 4


def test_an_op_that_must_see_values_is_assumed_to_keep_what_it_reads() -> None:
    program = traced(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.randn(4, 8))
    node = next(node for node in program.nodes("op") if op_name(node) == "aten.tanh.default")

    def unrunnable(x: torch.Tensor) -> torch.Tensor:
        return x * float(x.sum())

    node.target = unrunnable
    kept = kept_values(program)
    assert kept.assumed == [node]
    assert kept.of_op[node].operands == (True,)
