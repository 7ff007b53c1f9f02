"""Pictures: what is drawn, what is folded, and that every conversion shows; the DOT text is read, nothing is rendered."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from models import EXAMPLES, GPT
from torch import fx, nn

import autoshard
from autoshard.conversions import BY_NAME, Step
from autoshard.costs import CostModel
from autoshard.errors import InputError
from autoshard.hardware import PRESETS
from autoshard.mesh import MeshSpec
from autoshard.passes import NormalizeGraph, TraceModel
from autoshard.passes.insert_collectives import insert_conversion
from autoshard.pictures import draw
from autoshard.placements import I, R
from autoshard.program import Program, facts
from autoshard.runner import run_passes
from autoshard.text import human_bytes
from autoshard.traffic import sent_inside, wire_bytes

TEMPLATES = ["ddp", "fsdp", "megatron", "megatron_sp"]


def planned(model: nn.Module, args: tuple, kwargs: dict | None = None, *, mesh: str = "dp=2,tp=2", **asked: Any) -> Program:
    return autoshard.plan(model, mesh, args, kwargs, hardware="h100", **asked).program


def example(name: str, seed: int | None = None) -> Program:
    return planned(EXAMPLES[name].model(), *EXAMPLES[name].batch(0), options=autoshard.Options(seed=seed))


def gpt(layers: int, template: str = "megatron") -> Program:
    return planned(GPT(layers), *EXAMPLES["gpt"].batch(0), template=template)


def statements(source: str) -> dict[str, str]:
    """Node name -> the label that the text gives it, tags removed."""
    found = re.findall(r'^\s*(\w+|"[^"]+") \[label=(<.*?>|""|\w+)(?= \w+=|\])', source, re.M)
    return {name.strip('"'): re.sub(r"<[^>]*>", " ", label) for name, label in found if name not in ("graph", "node", "edge")}


def edges(source: str) -> list[tuple[str, str]]:
    found = re.findall(r'^\s*(\w+|"[^"]+") -> (\w+|"[^"]+")', source, re.M)
    return [(one.strip('"'), other.strip('"')) for one, other in found]


def clusters(source: str) -> list[str]:
    """Labels of the module clusters, tags removed."""
    found = re.findall(r"label=<(.*)> labeljust", source)
    return [" ".join(re.sub(r"<[^>]*>", " ", label).split()) for label in found]


@pytest.mark.parametrize("level", ["ops", "modules"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_models_are_drawn(name: str, level: str) -> None:
    source = draw(example(name), level).source  # type: ignore[arg-type]
    assert source.count("{") == source.count("}")
    assert "mesh dp=2,tp=2, 4 ranks, predicted step" in source
    assert {"the legend", "output"} <= set(statements(source))
    assert {end for edge in edges(source) for end in edge} <= set(statements(source))


@pytest.mark.parametrize("seed", range(4))
def test_level_ops_draws_all(seed: int) -> None:
    """Every node and operand, and each conversion with its axis and what it sends."""
    program = example("gpt", seed)
    costs = CostModel(program.mesh, PRESETS["cpu"])
    source = draw(program, "ops", costs).source
    shown = statements(source)
    assert set(shown) == {node.name for node in program.nodes()} | {"the legend"}
    assert set(edges(source)) == {(operand.name, node.name) for node in program.nodes() for operand in node.all_input_nodes}
    for node in program.nodes("conversion"):
        row, label = BY_NAME[node.target.__name__], shown[node.name]  # type: ignore[union-attr]
        assert f"@{node.args[1]}" in label
        for collective, count in zip((row.forward, row.backward), wire_bytes(program, node, costs), strict=True):
            assert not count or (collective.replace("_", "-") in label and human_bytes(count) in label)


def test_equal_layers_are_folded() -> None:
    """A folded picture does not grow with the model, and says how many layers one stands for."""
    short, long = (draw(gpt(layers)).source for layers in (3, 6))
    assert set(statements(short)) == set(statements(long))
    assert edges(short) == edges(long)
    assert clusters(short) == ["blocks.0 … blocks.2 ×3 Block", "attn Attention"]
    assert clusters(long) == ["blocks.0 … blocks.5 ×6 Block", "attn Attention"]
    assert any("next layer" in label for label in statements(long).values())


def test_level_ops_folds_nothing() -> None:
    shown = clusters(draw(gpt(2), "ops").source)
    assert {"blocks", "0 Block", "1 Block", "attn Attention", "qkv Linear"} <= set(shown)
    assert shown.count("attn Attention") == 2


def test_layers_that_differ_are_drawn_apart() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)), nn.Tanh(), nn.Linear(16, 16))
    source = draw(planned(model, (torch.zeros(8, 16),), mesh="dp=2", template="ddp")).source
    assert clusters(source) == ["0 … 2 ×3 Linear"]
    assert "4.weight" in source
    assert "1.weight" not in source


def stack_of_linears(count: int) -> tuple[Program, list[fx.Node]]:
    """Equal layers, all values invariant on two ranks, and their nodes."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(count)))
    program = run_passes((TraceModel(model, (torch.zeros(8, 16),), {}), NormalizeGraph()), Program(fx.Graph(), MeshSpec.of("dp=2")))
    for node in program.nodes():
        facts(node).layouts = tuple((I,) for _ in facts(node).values)
    return program, list(program.nodes("op"))


def test_layers_with_different_layouts_are_drawn_apart() -> None:
    program, linears = stack_of_linears(4)
    assert clusters(draw(program).source) == ["0 … 3 ×4 Linear"]
    facts(linears[1]).layouts = ((R,),)
    assert clusters(draw(program).source) == ["2 … 3 ×2 Linear"]


def test_equal_conversions_between_folded_layers_are_one() -> None:
    program, linears = stack_of_linears(4)
    for linear, user in itertools.pairwise(linears):
        with program.graph.inserting_before(user):
            user.replace_input_with(linear, insert_conversion(program, linear, Step(0, I, R)))
    source = draw(program).source
    (pill,) = (label for label in statements(source).values() if "bwd" in label)
    assert "all-reduce @dp ×3" in pill
    assert any(end.endswith(" next") for _, end in edges(source))


@pytest.mark.parametrize("template", TEMPLATES)
def test_modules_show_all_communication(template: str) -> None:
    program = gpt(2, template)
    costs = CostModel(program.mesh, PRESETS["cpu"])
    pills = [label for label in statements(draw(program).source).values() if "fwd" in label or "bwd" in label]
    for node in program.nodes("conversion"):
        row = BY_NAME[node.target.__name__]  # type: ignore[union-attr]
        for collective, count in zip((row.forward, row.backward), wire_bytes(program, node, costs), strict=True):
            assert not count or any(collective.replace("_", "-") in pill and f"@{node.args[1]}" in pill for pill in pills)


def test_lowerings_show_what_they_send() -> None:
    images = EXAMPLES["conv_net"]
    program = planned(images.model(), *images.batch(0), mesh="dp=2", template="ddp")
    shown = statements(draw(program, "ops").source)
    sending = [node for node in program.nodes("op") if sent_inside(program, node)]
    assert sending
    assert all("all-reduce @dp" in shown[node.name] for node in sending)


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("name", EXAMPLES)
def test_modules_are_acyclic(name: str, seed: int | None) -> None:
    """Ops join only where no path between them leaves the class."""
    pairs = edges(draw(example(name, seed)).source)
    while pairs:
        kept = [pair for pair in pairs if pair[0] in {target for _, target in pairs}]
        assert len(kept) < len(pairs), f"a cycle within {pairs}"
        pairs = kept


def test_parameters_show_name_local_shape_and_layout() -> None:
    shown = statements(draw(gpt(1)).source)
    note = " ".join(next(label for label in shown.values() if "qkv.weight" in label).split())
    assert "qkv.weight f32[24, 16] I@dp S(0:3x16)@tp" in note
    assert "qkv.bias f32[24] I@dp S(0:3x16)@tp" in note


def test_tooltips_show_source_and_layout() -> None:
    source = draw(gpt(1)).source
    assert re.search(r"attn_scaled_dot_product_attention: f32\[2, 2, 8, 4\]  S\(0\)@dp S\(1\)@tp  blocks.0.attn  models.py:\d+", source)


def test_programs_without_layouts_are_drawn() -> None:
    model, (args, kwargs) = GPT(1), EXAMPLES["gpt"].batch(0)
    traced = run_passes((TraceModel(model, args, kwargs), NormalizeGraph()), Program(fx.Graph(), MeshSpec.of("dp=2")))
    for level in ("ops", "modules"):
        assert "linear" in draw(traced, level).source  # type: ignore[arg-type]


@pytest.mark.parametrize("level", ["ops", "modules"])
def test_pictures_are_deterministic(level: str) -> None:
    assert draw(gpt(2), level).source == draw(gpt(2), level).source  # type: ignore[arg-type]


def test_unknown_level_is_refused() -> None:
    with pytest.raises(InputError, match="level='layers' is not known; there are 'ops', 'modules'"):
        draw(stack_of_linears(1)[0], "layers")  # type: ignore[arg-type]
