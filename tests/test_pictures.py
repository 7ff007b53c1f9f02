"""Pictures: what is drawn, what is folded, and that every conversion shows; the DOT text is read, nothing is rendered."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from models import EXAMPLES, GPT
from torch import fx, nn

from autoshard.conversions import BY_NAME
from autoshard.costs import CostModel, wire_bytes
from autoshard.hardware import PRESETS
from autoshard.mesh import MeshSpec
from autoshard.passes import AnnotateShardings, FoldConstants, InsertCollectives, LocalizeShapes, NormalizeGraph, TraceModel
from autoshard.pictures import draw
from autoshard.program import Program, facts
from autoshard.runner import run_passes
from autoshard.text import human_bytes

CPU = PRESETS["cpu"]


def planned(model: nn.Module, args: tuple = (), kwargs: dict | None = None, mesh: str = "dp=2,tp=2", seed: int | None = None, **asked: str) -> Program:
    annotate = AnnotateShardings(CPU, asked.get("template", "auto"), {}, {}, None, True, seed)  # type: ignore[arg-type]
    passes = (TraceModel(model, args, kwargs or {}), NormalizeGraph(), FoldConstants(), annotate, InsertCollectives(CPU), LocalizeShapes())
    return run_passes(passes, Program(fx.Graph(), MeshSpec.of(mesh)))


def example(name: str, seed: int | None = None, **asked: str) -> Program:
    return planned(EXAMPLES[name].model(), *EXAMPLES[name].batch(0), seed=seed, **asked)


def gpt(layers: int, template: str = "megatron") -> Program:
    return planned(GPT(layers), *EXAMPLES["gpt"].batch(0), template=template)


def drawn_nodes(source: str) -> set[str]:
    """Names of the nodes that the text declares; a label may not hold an edge."""
    found = re.findall(r'^\s*("[^"]+"|\w+) \[label=', source, re.M)
    return {name.strip('"') for name in found}


def edges(source: str) -> list[tuple[str, str]]:
    return re.findall(r"^\s*(\w+) -> (\w+)", source, re.M)


def labels(source: str) -> list[str]:
    """Readable text of every cluster label."""
    found = re.findall(r"^\s*graph \[.*?label=<(.*?)> labeljust", source, re.M) + re.findall(r"label=<(<FONT.*?)> labeljust", source)
    return [re.sub(r"<[^>]+>", "", label).strip() for label in found]


@pytest.mark.parametrize("level", ["ops", "modules"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_models_are_drawn(name: str, level: str) -> None:
    source = draw(example(name), level).source  # type: ignore[arg-type]
    assert source.count("{") == source.count("}")
    assert "cluster_legend" in source
    assert "mesh dp=2,tp=2, 4 ranks, predicted step" in source
    declared = drawn_nodes(source)
    assert all(end in declared for edge in edges(source) for end in edge)


@pytest.mark.parametrize("seed", range(4))
def test_random_plans_are_drawn_whole(seed: int) -> None:
    """Level ops: every node, every operand, and each conversion with what it moves."""
    program = example("gpt", seed=seed)
    costs = CostModel(program.mesh, CPU)
    source = draw(program, "ops", costs).source
    assert drawn_nodes(source) - {"legend"} == {node.name for node in program.nodes()}
    assert set(edges(source)) == {(operand.name, node.name) for node in program.nodes() for operand in node.all_input_nodes}
    for node in program.nodes("conversion"):
        line = next(line for line in source.splitlines() if line.strip().startswith(f"{node.name} [label="))
        row, sent = BY_NAME[node.target.__name__], wire_bytes(program, node, costs)  # type: ignore[union-attr]
        assert f"@{node.args[1]}" in line
        for collective, count in zip((row.forward, row.backward), sent, strict=True):
            assert not count or (collective.replace("_", "-") in line and human_bytes(count) in line)


def test_layers_are_folded() -> None:
    """A folded picture does not grow with the model, and says for how many layers one stands."""
    short, long = (draw(gpt(layers)).source for layers in (3, 6))
    assert drawn_nodes(short) == drawn_nodes(long)
    assert sorted(edges(short)) == sorted(edges(long))
    assert "blocks.0 … blocks.5  ×6 Block" in labels(long)
    assert "blocks.0 … blocks.2  ×3 Block" in labels(short)
    assert any("next" in node for node in drawn_nodes(long))
    assert "blocks.1" not in long.replace("blocks.1 ", "")


def test_ops_are_not_folded() -> None:
    source = draw(gpt(2), "ops").source
    assert {"blocks.0 Block", "blocks.1 Block"} <= {label.removeprefix("blocks ") for label in labels(source)} | {
        f"blocks.{label}" for label in labels(source)
    }


def test_layers_that_differ_are_drawn_apart() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)), nn.Tanh(), nn.Linear(16, 16))
    source = draw(planned(model, (torch.zeros(8, 16),), mesh="dp=2", template="ddp")).source
    assert any(label.startswith("0 … 2  ×3") for label in labels(source))
    assert "4.weight" in source


@pytest.mark.parametrize("template", ["ddp", "fsdp", "megatron", "megatron_sp"])
def test_modules_show_every_kind_of_communication(template: str) -> None:
    program = gpt(2, template)
    source = draw(program).source
    costs = CostModel(program.mesh, CPU)
    for node in program.nodes("conversion"):
        row = BY_NAME[node.target.__name__]  # type: ignore[union-attr]
        for collective, count in zip((row.forward, row.backward), wire_bytes(program, node, costs), strict=True):
            assert not count or f"{collective.replace('_', '-')} @{node.args[1]}" in source or f"bwd {collective.replace('_', '-')}" in source


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_modules_are_acyclic(name: str, seed: int | None) -> None:
    """Classes join only where no path between them leaves the class."""
    pairs = edges(draw(example(name, seed=seed)).source)
    while pairs:
        targets = {target for _, target in pairs}
        kept = [pair for pair in pairs if pair[0] in targets]
        assert len(kept) < len(pairs), f"a cycle among {sorted(set(itertools.chain(*pairs)))}"
        pairs = kept


def test_parameters_show_name_shape_and_layout() -> None:
    program = gpt(1)
    source = draw(program).source
    for node in program.nodes("parameter"):
        for placement, axis in zip(facts(node).layout, program.mesh.axes, strict=True):
            assert f"{placement}@{axis}" in source
    assert "attn.qkv.weight" in source or "qkv.weight" in source
    assert "S(0:3x16)@tp" in source


def test_untyped_programs_are_drawn() -> None:
    model, (args, kwargs) = GPT(1), EXAMPLES["gpt"].batch(0)
    traced = run_passes((TraceModel(model, args, kwargs), NormalizeGraph()), Program(fx.Graph(), MeshSpec.of("dp=2")))
    for level in ("ops", "modules"):
        assert "linear" in draw(traced, level).source  # type: ignore[arg-type]


def test_pictures_are_deterministic() -> None:
    assert draw(gpt(2)).source == draw(gpt(2)).source
    assert draw(gpt(2), "ops").source == draw(gpt(2), "ops").source
