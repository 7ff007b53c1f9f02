"""Pictures: what is drawn, what is folded, and that every conversion shows; the DOT text is read, nothing is rendered."""

from __future__ import annotations

import functools
import itertools
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from models import EXAMPLES, GPT
from random_graphs import Graph, graphs
from torch import fx, nn

import autoshard
from autoshard import pictures
from autoshard.conversions import BY_NAME, Step
from autoshard.cost_report import Pricer
from autoshard.costs import CostModel
from autoshard.errors import InputError
from autoshard.hardware import PRESETS
from autoshard.mesh import MeshSpec
from autoshard.ops.row import TensorInfo
from autoshard.passes import NormalizeGraph, TraceModel
from autoshard.passes.insert_collectives import insert_conversion
from autoshard.pictures import draw
from autoshard.pictures.grouping import Groups, is_view
from autoshard.placements import I, R
from autoshard.program import Facts, Program, Source, facts, set_facts
from autoshard.runner import run_passes
from autoshard.text import human_bytes, human_seconds
from autoshard.traffic import sent_inside, wire_bytes

TEMPLATES = ["ddp", "fsdp", "megatron", "megatron_sp"]
HAS_DOT = shutil.which("dot") is not None


def planned(model: nn.Module, args: tuple, kwargs: dict | None = None, *, mesh: str = "dp=2,tp=2", **asked: Any) -> Program:
    return autoshard.plan(model, mesh, args, kwargs, hardware="h100", **asked).program


@functools.cache
def example(name: str, seed: int | None = None) -> Program:
    return planned(EXAMPLES[name].model(), *EXAMPLES[name].batch(0), options=autoshard.Options(seed=seed))


@functools.cache
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


@pytest.mark.parametrize("level", ["ops", "layer", "modules"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_models_are_drawn(name: str, level: str) -> None:
    source = draw(example(name), level).source  # type: ignore[arg-type]
    assert source.count("{") == source.count("}")
    assert "mesh dp=2,tp=2, 4 ranks, predicted step" in source
    assert "split along a dim" in source
    assert level == "layer" or "output" in statements(source)
    assert {end for edge in edges(source) for end in edge} <= set(statements(source))


@pytest.mark.parametrize("seed", range(4))
def test_level_ops_draws_all(seed: int) -> None:
    """Every node and operand, and each conversion with its axis and what it sends."""
    program = example("gpt", seed)
    costs = CostModel(program.mesh, PRESETS["cpu"])
    source = draw(program, "ops", costs).source
    shown = statements(source)
    assert set(shown) == {node.name for node in program.nodes()}
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
    assert clusters(short) == ["blocks.0 … blocks.2 ×3 Block"]
    assert clusters(long) == ["blocks.0 … blocks.5 ×6 Block"]
    assert any("next layer" in label for label in statements(long).values())


def test_level_ops_folds_nothing() -> None:
    shown = clusters(draw(gpt(2), "ops").source)
    assert {"blocks", "0 Block", "1 Block", "attn Attention", "qkv Linear"} <= set(shown)
    assert shown.count("attn Attention") == 2


def test_layers_that_differ_are_drawn_apart() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)), nn.Tanh(), nn.Linear(16, 16))
    source = draw(planned(model, (torch.zeros(8, 16),), mesh="dp=2", template="ddp")).source
    assert sorted(titles(source)) == ["0 … 2 ×3 Linear", "3 Tanh", "4 Linear"]


def titles(source: str) -> list[str]:
    """Names and classes of the closed modules, which are one card each."""
    found = re.findall(r"label=<<TABLE[^>]*><TR><TD[^>]*><FONT[^>]*><B>([^<]*)</B></FONT> <FONT[^>]*>(\w+)</FONT></TD>", source)
    return [" ".join(f"{name} {kind}".split()) for name, kind in found]


def stack_of_linears(count: int) -> tuple[Program, list[fx.Node]]:
    """Equal layers, all values invariant on two ranks, and their nodes."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(count)))
    program = run_passes((TraceModel(model, (torch.zeros(8, 16),), {}), NormalizeGraph()), Program(fx.Graph(), MeshSpec.of("dp=2")))
    for node in program.nodes():
        facts(node).layouts = tuple((I,) for _ in facts(node).values)
    return program, list(program.nodes("op"))


def test_layers_with_different_layouts_are_drawn_apart() -> None:
    program, linears = stack_of_linears(4)
    assert titles(draw(program).source) == ["0 … 3 ×4 Linear"]
    facts(linears[1]).layouts = ((R,),)
    assert titles(draw(program).source) == ["0 Linear", "1 Linear", "2 … 3 ×2 Linear"]


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


@pytest.mark.parametrize("level", ["modules", "layer"])
@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("name", EXAMPLES)
def test_pictures_are_acyclic(name: str, seed: int | None, level: str) -> None:
    """Nodes join only where no path between them leaves the group."""
    pairs = edges(draw(example(name, seed), level).source)  # type: ignore[arg-type]
    while pairs:
        kept = [pair for pair in pairs if pair[0] in {target for _, target in pairs}]
        assert len(kept) < len(pairs), f"a cycle within {pairs}"
        pairs = kept


@settings(max_examples=60)
@given(st.data())
def test_groups_join_exactly_where_the_picture_stays_acyclic(data: st.DataObject) -> None:
    """On random graphs, against a search for a path from a group to the node that leaves the group."""
    graph, nodes = fx.Graph(), list[fx.Node]()
    for k in range(data.draw(st.integers(2, 14))):
        reads = data.draw(st.lists(st.sampled_from(nodes), max_size=3, unique=True)) if nodes else []
        nodes.append(graph.call_function(torch.add, tuple(reads)) if reads else graph.placeholder(f"x{k}"))
    groups = Groups({})
    for node in nodes:
        head = data.draw(st.sampled_from([None, *groups.members]))
        if head is None:
            groups.add(node)
            continue
        before = {(groups.head[o], groups.head[n]) for n in groups.head for o in n.all_input_nodes} - {(h, h) for h in groups.members}
        reached, stack = set[fx.Node](), [o for o in groups.operands(node) if o is not head]
        while stack:
            one = stack.pop()
            reached.add(one)
            stack += [source for source, target in before if target is one and source not in reached]
        assert groups.join(head, node) == (head not in reached)
        if node not in groups.head:
            groups.add(node)
    assert sorted(n.name for members in groups.members.values() for n in members) == sorted(n.name for n in nodes)


@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
@given(graphs(8), st.integers(0, 9999))
def test_random_models_are_drawn(graph: Graph, seed: int) -> None:
    """Every collective that a random plan makes is told at every level."""
    program = planned(graph.model(), (), graph.arguments(), options=autoshard.Options(seed=seed))
    rows = [row for row in Pricer(program, CostModel(program.mesh, PRESETS["h100"])).rows() if row.axis and row.is_per_step]
    for level in ("modules", "ops"):
        source = draw(program, level).source  # type: ignore[arg-type]
        told = set(re.findall(r"(all-gather|reduce-scatter|all-reduce|all-to-all|rotate) @(\w+)  (?:fwd|bwd)", source))
        assert told == {(row.kind.replace("_", "-"), row.axis) for row in rows}
        assert level != "ops" or source.count("label=<") > sum(1 for _ in program.nodes())


def test_a_closed_module_is_one_card() -> None:
    """Its name, its parameters with local shapes and layouts, what it makes, and what it sends with bytes and seconds."""
    program = gpt(1)
    costs = CostModel(program.mesh, PRESETS["h100"])
    source = draw(program, "modules", costs).source
    inside = {"norm1 LayerNorm", "attn Attention", "norm2 LayerNorm", "up Linear", "down Linear"}
    assert set(titles(source)) == {"pos Embedding", "tok Embedding", *inside, "norm LayerNorm", "head Linear"}
    card = " ".join(next(label for label in statements(source).values() if "qkv.weight" in label).split())
    assert "qkv.weight f32[24, 16] I@dp S(0:3x16)@tp" in card
    assert "qkv.bias f32[24] I@dp S(0:3x16)@tp" in card
    rows = [row for row in Pricer(program, costs).rows() if row.module.startswith("blocks.0.attn") and row.axis == "dp"]
    sent, seconds = sum(row.wire_bytes for row in rows), sum(row.total_s for row in rows)
    assert f"all-reduce @dp bwd {len(rows)}×, {human_bytes(sent)}, {human_seconds(seconds)}" in card


def test_few_modules_are_opened() -> None:
    """A model without repeated layers is drawn module by module, and never in more cards than fit a screen."""
    deep = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16 + k)) for k in range(1)), nn.Linear(16, 8))
    source = draw(planned(deep, (torch.zeros(8, 16),), mesh="dp=2", template="ddp")).source
    assert sorted(titles(source)) == ["0 Linear", "1 Linear", "1 Tanh", "2 Linear"]
    wide = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), *[nn.Tanh()] * k) for k in range(6)))
    source = draw(planned(wide, (torch.zeros(8, 16),), mesh="dp=2", template="ddp")).source
    assert 10 <= len(titles(source)) <= 24


def test_a_layer_is_drawn_in_full() -> None:
    """All ops of the first of the repeated layers but views, no other layer, and what goes in and out."""
    program = gpt(3)
    source = draw(program, "layer").source
    shown = statements(source)
    assert clusters(source) == ["blocks.0 … blocks.2 ×3 Block", "norm1 LayerNorm", "attn Attention"] + [
        "qkv Linear", "proj Linear", "norm2 LayerNorm", "up Linear", "down Linear",
    ]  # fmt: skip
    ops = {node.name for node in program.nodes("op") if facts(node).source.module.startswith("blocks.0") and not is_view(node)}
    assert ops <= set(shown)
    assert not any(name.startswith(("blocks_1", "blocks_2")) for name in shown)
    assert [label.strip(" >").split() for name, label in shown.items() if name.endswith(" out")] == [
        ["to", "the", "next", "layer,", "norm"]
    ]
    assert any("from" in label for name, label in shown.items() if name.endswith(" in"))


def test_models_without_numbered_modules_have_no_layer() -> None:
    program = planned(nn.ModuleDict({"a": nn.Linear(16, 16)})["a"], (torch.zeros(8, 16),), mesh="dp=2", template="ddp")
    with pytest.raises(InputError, match="numbered modules"):
        draw(program, "layer")


def test_large_graphs_are_folded_then_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture never has more nodes than the limit, and says what it leaves out."""
    program = gpt(3)
    count = sum(1 for _ in program.nodes())
    monkeypatch.setattr(pictures, "_MOST_NODES", count - 1)
    folded = draw(program, "ops").source
    assert f"of {count:,} nodes, those of repeated layers are drawn once" in folded
    assert not any(name.startswith("blocks_1") for name in statements(folded))
    for level in ("ops", "modules", "layer"):
        monkeypatch.setattr(pictures, "_MOST_NODES", 500)
        whole = list(statements(draw(program, level).source)) if level != "ops" else list(statements(folded))  # type: ignore[arg-type]
        monkeypatch.setattr(pictures, "_MOST_NODES", 5)
        source = draw(program, level).source  # type: ignore[arg-type]
        drawn = [name for name in statements(source) if " " not in name]
        assert len(drawn) == 5
        assert set(drawn) <= set(whole)
        assert "only the first 5 are drawn" in source


def test_ten_thousand_nodes_are_drawn() -> None:
    """Nothing is left to be laid out that a person would wait for: few nodes, and no value is drawn through the whole picture."""
    graph, value = fx.Graph(), TensorInfo((16, 16), torch.float32, True)
    x = last = graph.placeholder("x")
    set_facts(x, Facts("input", (value,), "x", layouts=((I,),)))
    for k in range(10_000):
        last = graph.call_function(torch.ops.aten.mm.default, (last, x))
        set_facts(last, Facts("op", (value,), source=Source(f"part{k // 7}.at{k % 7}", "Part"), layouts=((I,),)))
    set_facts(graph.output(last), Facts("output", (value,), layouts=((I,),)))
    for level in ("ops", "modules"):
        source = draw(Program(graph, MeshSpec.of("dp=2")), level).source  # type: ignore[arg-type]
        assert len([name for name in statements(source) if " " not in name]) == 500
        assert "more are left out" in source
        readers = Counter(start for start, _ in edges(source))
        assert max(readers.values()) <= 16


@pytest.mark.skipif(not HAS_DOT, reason="needs Graphviz's dot")
def test_pictures_are_rendered_by_dot() -> None:
    svg = draw(gpt(1), "layer").pipe("svg").decode()
    assert "<svg" in svg
    assert "models.py:" in svg  # in tooltips


@pytest.mark.parametrize("way", ["pipe", "render"])
def test_without_dot_the_error_says_how_to_get_it(way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    picture = draw(gpt(1))
    with pytest.raises(InputError, match="apt-get install graphviz"):
        picture.pipe("svg") if way == "pipe" else picture.render(outfile=tmp_path / "plan.svg")
    assert "apt-get install graphviz" in picture._repr_mimebundle_()["text/plain"]
    picture.save(tmp_path / "plan.gv")
    assert (tmp_path / "plan.gv").read_text().startswith("// mesh dp=2,tp=2, level modules")


def test_names_are_escaped() -> None:
    """Names of a model stand in HTML-like labels and in tooltips."""
    program, _ = stack_of_linears(1)
    for node in program.nodes("parameter", "op"):
        facts(node).name = facts(node).name.replace("0.", "a<b>&.")
        facts(node).source = replace(facts(node).source, module="a<b>&", text='x = "<i>"')
    for level in ("modules", "ops"):
        picture = draw(program, level)  # type: ignore[arg-type]
        assert "a&lt;b&gt;&amp;" in picture.source
        if HAS_DOT:
            links = ElementTree.fromstring(picture.pipe("svg")).iter("{http://www.w3.org/2000/svg}a")
            assert any('x = "<i>"' in link.get("{http://www.w3.org/1999/xlink}title", "") for link in links)


@pytest.mark.parametrize("level", ["modules", "layer"])
def test_tooltips_show_source_layout_and_cost(level: str) -> None:
    source = draw(gpt(1), level).source  # type: ignore[arg-type]
    assert re.search(
        r"attn_scaled_dot_product_attention: f32\[2, 2, 8, 4\]  S\(0\)@dp S\(1\)@tp  blocks.0.attn  models.py:\d+ .*fwd \S+ \w+, bwd",
        source,
    )


def test_programs_without_layouts_are_drawn() -> None:
    model, (args, kwargs) = GPT(1), EXAMPLES["gpt"].batch(0)
    traced = run_passes((TraceModel(model, args, kwargs), NormalizeGraph()), Program(fx.Graph(), MeshSpec.of("dp=2")))
    for level in ("ops", "layer", "modules"):
        assert "qkv" in draw(traced, level).source  # type: ignore[arg-type]


@pytest.mark.parametrize("level", ["ops", "layer", "modules"])
def test_pictures_are_deterministic(level: str) -> None:
    assert draw(gpt(2), level).source == draw(gpt(2), level).source  # type: ignore[arg-type]


def test_unknown_level_is_refused() -> None:
    with pytest.raises(InputError, match="level='layers' is not known; there are 'modules', 'layer', 'ops'"):
        draw(stack_of_linears(1)[0], "layers")  # type: ignore[arg-type]
