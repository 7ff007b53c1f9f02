"""Pictures of pipelined plans: stages as frames, layers folded within a stage, what is sent from stage to stage; nothing is rendered."""

from __future__ import annotations

import functools
import html
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import GPT
from pipeline_models import CASES
from test_pictures import clusters, edges, gpt, statements
from torch import nn

import autoshard
from autoshard.mesh import MeshSpec
from autoshard.pictures import draw
from autoshard.pictures.staging import ranks_of, stage_of, staged, stages_of
from autoshard.pipeline import Pipeline, Pipelining
from autoshard.program import facts
from autoshard.stages import sent_over
from autoshard.text import human_seconds

STARTS = ("blocks.2",)


@functools.cache
def plan(name: str = "gpt", mesh: str = "pp=2,dp=2", **asked: Any) -> autoshard.Plan:
    torch.manual_seed(0)
    model: nn.Module = GPT(layers=4) if name == "gpt" else CASES[name].make()
    args, kwargs = CASES[name].batch(0)
    args = tuple(arg.float() if arg.is_floating_point() else arg for arg in args)
    how = Pipelining(microbatches=2, schedule="1f1b", **asked)
    return autoshard.plan(model, mesh, args, kwargs, hardware="h100", pipeline=how, template="ddp")


def stage_frames(source: str) -> list[str]:
    return [label for label in clusters(source) if label.startswith("stage ")]


def drawn_stages(source: str) -> dict[str, int]:
    """By the name of a drawn node the stage in whose frame it stands."""
    found, inside, depth = dict[str, int](), list[tuple[int, int]](), 0
    for line in source.splitlines():
        if opened := re.match(r'\s*subgraph "cluster_(.*)" \{', line):
            depth += 1
            stage = stage_of(opened[1])
            inside += [(depth, stage)] if stage is not None and not inside else []
        elif line.strip() == "}":
            inside = [known for known in inside if known[0] < depth]
            depth -= 1
        elif inside and (name := re.match(r'\s*(\w+|"[^"]+") \[label=', line)):
            found[name[1].strip('"')] = inside[0][1]
    return found


@pytest.mark.parametrize("level", ["modules", "layer", "ops"])
@pytest.mark.parametrize("name", ["gpt", "UNet", "MoE", "ValuesManyRead"])
def test_every_op_stands_in_the_frame_of_its_stage(name: str, level: str) -> None:
    """Ops of one stage in its frame, and what has no stage of its own where its only reader is."""
    program = plan(name).program
    source = draw(program, level).source  # type: ignore[arg-type]
    shown, stages = drawn_stages(source), stages_of(program)
    assert level == "layer" or set(shown.values()) == {0, 1}
    by_name = {node.name: node for node in program.nodes()}
    for drawn in [drawn for drawn in statements(source) if drawn in by_name]:
        assert shown.get(drawn) == stages.get(by_name[drawn])
    for node in program.nodes("op"):
        assert facts(node).stage is None or stages[node] == facts(node).stage


def test_frames_name_ranks_and_seconds() -> None:
    """Of a microbatch, as the plan has them."""
    pipeline = plan(starts=STARTS).program.pipeline
    assert pipeline is not None
    found = stage_frames(plan(starts=STARTS).graph().source)
    assert [label.split(", forward ")[0] for label in found] == ["stage 0 ranks 0-1", "stage 1 ranks 2-3"]
    for label, costs in zip(found, pipeline.costs, strict=True):
        assert label.endswith(f"forward {human_seconds(costs.forward_s)}, backward {human_seconds(costs.backward_s)}")


def test_ranks_of_a_stage_are_those_at_its_coordinate() -> None:
    meshes = {"pp=2": "rank 1", "dp=2,pp=2": "ranks 1, 3", "dp=2,pp=2,tp=2": "ranks 2-3, 6-7", "dp=8,pp=2": "ranks 1, 3, 5, 7, ..."}
    for mesh, words in meshes.items():
        assert ranks_of(Pipeline(MeshSpec.of(mesh), 2, {}, {}, ()), 1) == words


def test_layers_are_folded_within_a_stage() -> None:
    source = plan(starts=STARTS).graph().source
    assert "blocks.0 … blocks.1 ×2 Block" in clusters(source)
    assert "blocks.2 … blocks.3 ×2 Block" in clusters(source)
    assert "in part" not in source


def test_cut_layers_are_drawn_in_parts() -> None:
    """A layer that a stage boundary cuts is not folded with whole ones; each part is a card that says so."""
    source = plan(starts=("blocks.2.up",)).graph().source
    parts = [label for label in statements(source).values() if "Block, in part" in label]
    assert len(parts) == 2
    assert all("blocks.2" in label for label in parts)
    assert {drawn_stages(source)[name] for name, label in statements(source).items() if "Block, in part" in label} == {0, 1}
    assert "blocks.0 … blocks.1 ×2 Block" in clusters(source)


def test_a_cut_layer_is_drawn_whole_at_level_layer() -> None:
    asked = Pipelining(microbatches=2, schedule="1f1b", starts=("blocks.0.up",))
    cut = autoshard.plan(GPT(layers=1), "pp=2", *CASES["gpt"].batch(0), pipeline=asked, hardware="h100")
    found = clusters(cut.graph("layer").source)
    assert [label.split(",")[0] for label in found if label.startswith("stage")] == ["stage 0 rank 0", "stage 1 rank 1"]
    assert found.count("blocks.0 Block, in part") == 2
    assert {"attn Attention", "up Linear"} <= set(found)


def test_many_stages_show_layers_as_sums() -> None:
    """Where all stages' layers opened are too many for a screen, one of those that are alike is; a closed one tells counts and bytes."""
    many = autoshard.plan(
        GPT(layers=12), "pp=6,dp=2", *CASES["gpt"].batch(0), hardware="h100", template="ddp",
        pipeline=Pipelining(microbatches=2, schedule="1f1b", starts=tuple(f"blocks.{k}" for k in range(2, 12, 2))),
    )  # fmt: skip
    source = many.graph().source
    assert [label for label in clusters(source) if "Block" in label] == ["blocks.0 … blocks.1 ×2 Block"]
    closed = [" ".join(label.split()) for label in statements(source).values() if "Block" in label]
    assert len(closed) == 5
    block = [facts(node) for node in many.program.nodes("parameter") if facts(node).name.startswith("blocks.2.")]
    assert all(f"{len(block)} parameters" in label and "all-reduce" in label for label in closed)


@pytest.mark.parametrize("name", ["gpt", "UNet"])
def test_what_is_sent_stands_out(name: str) -> None:
    """An edge that leaves a stage for a later one, and no other, is drawn as sent; with what each value is."""
    program = plan(name).program
    source = draw(program, "ops").source
    shown = drawn_stages(source)
    lines = [line for line in source.splitlines() if " -> " in line]
    for line, (start, end) in zip(lines, edges(source), strict=True):
        is_sent = start in shown and end in shown and shown[start] != shown[end]
        assert is_sent == (f"sent to stage {shown.get(end)}" in line)
    by_stage = {node: facts(node).stage or 0 for node in program.nodes() if node.name in shown and facts(node).stage is not None}
    told = {edges(line)[0][0] for line in lines if "sent to stage" in line}
    assert {node.name for node in sent_over(program, by_stage, 0)} <= told


def test_tied_weights_and_arguments_stand_outside() -> None:
    """Every stage that reads them has them."""
    source = plan().graph("ops").source
    shown = drawn_stages(source)
    assert {"ids", "labels", "head_weight"} <= set(statements(source)) - set(shown)


def test_stages_of_one_rank_have_one_colour() -> None:
    asked = Pipelining(microbatches=2, schedule="interleaved_1f1b", stages_per_rank=2)
    several = autoshard.plan(GPT(layers=4), "pp=2", *CASES["gpt"].batch(0), pipeline=asked, hardware="h100")
    frames = re.findall(r"fillcolor=\"(#\w+)\" label=<<FONT[^>]*><B>stage \d", several.graph().source)
    assert len(frames) == 4
    assert frames[:2] == frames[2:]
    assert frames[0] != frames[1]


def test_reports_show_the_frames(tmp_path: Path) -> None:
    assert "ranks 2-3, forward" in html.unescape(plan().report(tmp_path / "report.html").read_text())


@pytest.mark.parametrize("level", ["modules", "layer", "ops"])
def test_pictures_of_stages_are_deterministic(level: str) -> None:
    assert plan().graph(level).source == plan().graph(level).source


def test_without_a_pipeline_there_are_no_stages() -> None:
    """Not even where a module is called like one."""
    assert stages_of(gpt(2)) == {}
    assert not stage_frames(draw(gpt(2)).source)
    assert "later stage" not in draw(gpt(2)).source
    assert [stage_of(path) for path in ("stage 0", "stage 0.blocks", staged("", 0), staged("blocks.1", 12))] == [None, None, 0, 12]
