"""The command line: each command's answer, as text and as JSON, is that of the function behind it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_lines import run
from torch import nn

import autoshard
from autoshard.cli import doctor, options, screen
from autoshard.cli.command_line import COMMANDS, parser
from autoshard.cli.doctor import PYTHON_RANGE, TORCH_RANGE, check_loopback
from autoshard.cli.screen import as_json
from autoshard.mesh import MeshSpec
from autoshard.plan import Plan
from autoshard.program import facts
from autoshard.runner import announce, heard_by

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x, scale=None):
        print("forward runs")
        y = self.down(torch.relu(self.up(x)))
        return y if scale is None else y * scale

def build(batch=4):
    print("build runs")
    return Net(), (torch.randn(batch, 8),)

def with_kwargs():
    return Net(), (torch.randn(4, 8),), {"scale": torch.ones(8)}

def without_inputs():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
        def forward(self):
            return self.weight.sum()
    return Own()
"""
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip
ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PLAN = "--mesh dp=2,tp=2 --hardware h100"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with net.py, in which commands run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "net.py").write_text(NET)
    yield tmp_path
    sys.modules.pop("net", None)


# ---------------------------------------------------------------------------------------------------------------- plans


def test_plan_shows_a_table_and_saves() -> None:
    ran = run(f"plan net.py:build {PLAN} --out plan.json")
    assert ran.status == 0
    assert all(text in ran.words for text in ("Net on dp=2,tp=2 (h100), predicted step", "up.weight f32[32, 8]", "saved as plan.json"))
    assert "build runs" in ran.err
    assert "runs" not in ran.out
    assert str(Plan.load("plan.json").mesh) == "dp=2,tp=2"


def test_plan_as_json_is_what_the_plan_says() -> None:
    ran = run(f"plan net.py:build {PLAN} --template fsdp --json --out plan.json")
    plan = Plan.load("plan.json")
    body = ran.json
    assert (body["model"], body["mesh"], body["template"], body["out"]) == ("Net", {"dp": 2, "tp": 2}, "fsdp", "plan.json")
    assert {name: one["layout"] for name, one in body["parameters"].items()}["up.weight"] == "S(0)@dp S(0)@tp"
    assert body["parameters"]["up.weight"] == {"shape": [32, 8], "dtype": "f32", "layout": "S(0)@dp S(0)@tp", "rank_bytes": 256}
    assert body["stats"]["predicted_s"] == plan.stats["predicted_s"]
    assert body["fingerprint"] == plan.fingerprint


def test_what_is_asked_reaches_the_plan() -> None:
    asked = "--constraint up.weight=S(0)@tp --constraint 'down.weight=S(1)@tp' --dtype f64 --eval --batch 16 --memory-budget 1MB --overlap"
    body = run(f"plan net.py:build {PLAN} {asked} --json").json
    assert body["constraints"] == {"up.weight": "S(0)@tp", "down.weight": "S(1)@tp"}
    assert body["is_training"] is False
    assert body["parameters"]["up.weight"]["dtype"] == "f64"
    assert body["parameters"]["up.weight"]["layout"].endswith("S(0)@tp")
    assert run(f"plan net.py:build {PLAN} --train --json").json["is_training"] is True
    assert run(f"show net.py:build {PLAN} --batch 48 --source").out.count("48") > 0


def test_models_come_from_modules_and_files_with_and_without_arguments() -> None:
    for model in ("net:build", "net.py:build", "./net.py:with_kwargs", "net.py:without_inputs"):
        ran = run(f"plan {model} --mesh dp=2 --quiet")
        assert (ran.status, ran.out) == (0, ""), (model, ran.err)


def test_pipeline_stages_are_planned_and_verified() -> None:
    asked = "--mesh pp=2,dp=2 --microbatches 2 --schedule gpipe --batch 8 --json"
    body = run(f"plan net.py:build {asked}").json
    assert body["mesh"] == {"pp": 2, "dp": 2}
    assert body["pipeline"] == {"microbatches": 2, "schedule": "gpipe", "stage_ranks": [0, 1]}
    body = run(f"verify net.py:build {asked}").json
    assert (body["is_equal"], body["mesh"]) == (True, "pp=2,dp=2")
    assert run(f"plan net.py:build {asked} --out stages.json").status == 0
    emitted = run("emit stages.json stages --json").json
    assert emitted["run"].startswith("torchrun --standalone --nproc-per-node 4 ")
    assert {"stage_0.py", "stage_1.py", "run.py", "plan.json"} <= set(emitted["files"])
    shown = run("show stages.json --source").out
    assert "Stage 0 of 2" in shown
    assert "Stage 1 of 2" in shown


def test_search_ranks_meshes() -> None:
    ran = run("search net.py:build --devices 4 --cluster h100 --out best.json --json")
    found = autoshard.search(nn.Linear(8, 8), (torch.zeros(4, 8),), devices=4, cluster="h100")
    assert ran.status == 0
    assert {row["mesh"] for row in ran.json["ranking"]} == {str(row.mesh) for row in found.ranking}
    assert Plan.load("best.json").mesh == MeshSpec.of(ran.json["best"]["mesh"])
    assert "Net on 4 devices (h100)" in run("search net.py:build --devices 4 --cluster h100").words
    assert run("search net.py:build --devices 4 --cluster h100 --memory-budget 10B --quiet").status == 1


def test_verify_tells_equal_from_different(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(f"plan net.py:build {PLAN} --template megatron --out plan.json --quiet").status == 0
    assert run("verify net.py:build plan.json").out.startswith("Net on dp=2,tp=2: equal: outputs")
    body = run(f"verify net.py:build {PLAN} --dtype f64 --json").json
    assert body["is_equal"] is True
    assert body["tolerance"] == 1e-9
    assert set(body["gradients"]) == {"up.weight", "up.bias", "down.weight", "down.bias"}
    found = autoshard.api.Verification(0.0, {"up.weight": float("inf"), "up.bias": 0.5, "down.bias": 0.0}, {}, 1e-4, False)
    monkeypatch.setattr(autoshard, "verify", lambda *args, **kwargs: found)
    ran = run("verify net.py:build plan.json")
    assert ran.status == 1
    assert "DIFFERENT" in ran.out
    assert "gradient of up.weight inf gradient of up.bias 5.0e-01" in ran.words
    assert "down.bias" not in ran.words
    body = run("verify net.py:build plan.json --json").json
    assert (body["is_equal"], body["gradients"]["up.weight"]) == (False, None)


# -------------------------------------------------------------------------------------------------------- reading plans


@pytest.fixture
def plans() -> tuple[str, str]:
    """Two saved plans of one model."""
    for template in ("ddp", "megatron"):
        assert run(f"plan net.py:build {PLAN} --batch 64 --template {template} --out {template}.json --quiet").status == 0
    return "ddp.json", "megatron.json"


def test_show(plans: tuple[str, str]) -> None:
    plan = Plan.load(plans[1])
    assert "Net on dp=2,tp=2 (h100)" in run(f"show {plans[1]}").words
    assert run(f"show {plans[1]} --source").out.rstrip("\n") == plan.source().rstrip("\n")
    assert run(f"show {plans[1]} --graph ops.gv --level ops --quiet").status == 0
    assert Path("ops.gv").read_text() == plan.graph("ops").source
    body = run(f"show {plans[1]} --source --memory --graph modules.dot --json").json
    assert (body["source"], body["graph"]) == (plan.source(), "modules.dot")
    assert body["memory"]["peak_bytes"] == plan.memory().peak_bytes
    assert "Memory of a rank, adamw" in run(f"show {plans[1]} --memory").words


def test_show_draws_with_graphviz(plans: tuple[str, str]) -> None:
    if doctor._dot().status != "ok":
        pytest.skip("needs Graphviz's dot")
    assert run(f"show {plans[1]} --graph plan.svg").out == "drawn as plan.svg\n"
    assert "<svg" in Path("plan.svg").read_text()


def test_explain(plans: tuple[str, str]) -> None:
    assert "under template 'megatron'" in run(f"explain {plans[1]}").words
    explanation = Plan.load(plans[1]).explain()
    body = run(f"explain {plans[1]} --json").json
    assert body["modules"] == json.loads(json.dumps([dataclasses.asdict(row) for row in explanation.modules]))
    assert run(f"explain net.py:build {PLAN} --why 'up.weight=S(1)@tp'").out.startswith("up.weight lies as")
    answer = run(f"explain net.py:build {PLAN} --template ddp --why up.weight=I --json").json
    assert (answer["verdict"], answer["diff"]) == ("already so", None)


def test_diff(plans: tuple[str, str]) -> None:
    assert "Net under 'ddp' -> Net under 'megatron'" in run(f"diff {plans[0]} {plans[1]}").out
    body = run(f"diff {plans[0]} {plans[1]} --json").json
    assert body["is_empty"] is False
    assert [change["name"] for change in body["layouts"]][:1] == ["up.weight"]
    assert body["mesh_before"] == "dp=2,tp=2"
    assert [run(f"diff {one} {other} --exit-code --quiet").status for one, other in (plans, (plans[0], plans[0]))] == [1, 0]


def test_emit(plans: tuple[str, str]) -> None:
    ran = run(f"emit {plans[1]} some/where --json")
    assert ran.json["run"] == "torchrun --standalone --nproc-per-node 4 some/where/run.py"
    assert {"program.py", "run.py", "plan.json", "autoshard_runtime/axes.py"} <= set(ran.json["files"])
    assert all(Path("some/where", name).is_file() for name in ran.json["files"])
    assert run(f"emit net.py:build again {PLAN}").out.startswith("written to again; run it: torchrun")


def test_report_calls_the_plan(plans: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def report(self: Plan, path: str) -> Path:
        Path(path).write_text(self.model_name)
        return Path(path)

    monkeypatch.setattr(Plan, "report", report, raising=False)
    assert run(f"report {plans[0]} --out page.html").out == "written as page.html\n"
    assert Path("page.html").read_text() == "Net"
    assert run(f"report {plans[0]} --json").json == {"report": "report.html"}


# --------------------------------------------------------------------------------------------------------- config files


def write_config(**changes: object) -> str:
    """A small config.json in the folder `llama`, with changes."""
    Path("llama").mkdir(exist_ok=True)
    Path("llama/config.json").write_text(json.dumps({**CONFIG, **changes}))
    return "llama"


def test_a_config_is_planned_with_a_loss() -> None:
    pytest.importorskip("transformers")
    ran = run(f"plan {write_config()} --mesh dp=2 --hardware h100 --batch 4 --seq 8 --dtype bf16 --out plan.json --json")
    plan = Plan.load("plan.json")
    shapes = {facts(node).name: facts(node).value.shape for node in plan.program.nodes("input")}
    assert shapes == {"input_ids": (4, 8), "labels": (4, 8)}
    assert ran.json["parameters"]["lm_head.weight"]["dtype"] == "bf16"
    assert ran.json["is_training"] is True
    evaluated = run("plan llama/config.json --mesh dp=2 --eval --json")
    assert evaluated.json["is_training"] is False
    assert "inputs are a batch of 8 of 16 tokens; --batch and --seq change that" in evaluated.err


def test_a_config_is_verified_with_random_weights() -> None:
    pytest.importorskip("transformers")
    assert run(f"verify {write_config()} --mesh tp=2 --batch 2 --seq 4 --quiet").status == 0


def test_a_model_of_transformers_gets_inputs_of_its_own() -> None:
    pytest.importorskip("transformers")
    text = "from transformers import LlamaConfig, LlamaForCausalLM\ndef build():\n    return LlamaForCausalLM(LlamaConfig(**CONFIG))\n"
    config = {**CONFIG, "use_cache": False}
    Path("llama_net.py").write_text(f"CONFIG = {config!r}\n{text}")
    ran = run("show llama_net.py:build --mesh tp=2 --batch 2 --seq 4 --eval --source")
    assert "input_ids" in ran.out, ran.err
    assert "f32[2, 4, 32]" in ran.out  # logits


# -------------------------------------------------------------------------------------------------------------- machine


def test_doctor_says_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = run("doctor --no-processes --json")  # with processes: tests/test_command_line_page.py
    checks = {check["name"]: check for check in ran.json["checks"]}
    assert (ran.status, ran.json["works"]) == (0, True)
    assert checks["torch"] == {"name": "torch", "found": torch.__version__, "status": "ok", "note": ""}
    assert checks["memory bandwidth"]["found"].startswith("about ")
    assert "gloo between processes" not in checks
    monkeypatch.setenv("PATH", "")
    assert "graphviz dot: pictures stay .gv texts" in run("doctor --no-processes").out


def test_doctor_finds_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_loopback(0.0).status == "broken"
    monkeypatch.setattr(doctor.loopback, "__file__", str(Path("net.py").absolute()))
    Path("net.py").write_text("raise SystemExit('no network')")
    failed = check_loopback()
    assert (failed.status, failed.note) == ("broken", "compiled models cannot run here: no network")
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    ran = run("doctor --no-processes")
    assert ran.status == 1
    assert "torch: autoshard is made for torch from 2.11 to below 2.14" in ran.out


def test_doctor_sees_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"is_available": True, "device_count": 1, "get_device_name": "NVIDIA H200", "mem_get_info": (140e9, 150e9)}
    for name, value in known.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    checks = {check["name"]: check for check in run("doctor --no-processes --json").json["checks"]}
    assert checks["cuda:0"]["found"] == "NVIDIA H200, 140.0 GB free of 150.0 GB"
    assert "cuda" not in checks
    assert (checks["nccl"]["status"], checks["nccl"]["note"]) == ("limited", "GPUs cannot talk to each other")


def test_doctor_knows_the_supported_versions() -> None:
    project = PROJECT["project"]
    least, below = (".".join(map(str, limit)) for limit in TORCH_RANGE)
    assert f"torch>={least},<{below}" in project["dependencies"]
    assert project["requires-python"] == ">=" + ".".join(map(str, PYTHON_RANGE[0]))


# ------------------------------------------------------------------------------------------------------- around it all


def test_the_script_and_its_package_are_installed() -> None:
    assert PROJECT["project"]["scripts"] == {"autoshard": "autoshard.cli:main"}
    folders = {ROOT / "autoshard", ROOT / "autoshard/passes", *(path.parent for path in ROOT.glob("autoshard/*/__init__.py"))}
    packages = {folder.relative_to(ROOT).as_posix().replace("/", ".") for folder in folders}
    assert packages == {*PROJECT["tool"]["setuptools"]["packages"]}


def test_help_has_examples_that_parse() -> None:
    listed = run("--help").out
    for command in COMMANDS:
        assert f"\n    {command.name} " in listed
        ran = run(f"{command.name} --help")
        assert ran.status == 0
        assert "examples:\n  " in ran.out
        for line in (line for line in command.examples if line.startswith("autoshard ")):
            assert parser().parse_args(shlex.split(line.partition(" | ")[0])[1:]).run is command.run or command.name not in line
    assert run("--version").out == f"autoshard {autoshard.__version__}\n"


@pytest.mark.parametrize(("text", "size"), [("70GB", 70e9), ("1.5 MB", 1.5e6), ("512MiB", 512 * 2**20), ("123", 123), ("2tb", 2e12)])
def test_sizes_are_read(text: str, size: float) -> None:
    assert options.size_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "7 parsecs", "1e9"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="write it like 70GB"):
        options.size_bytes(text)


def test_json_holds_no_infinity() -> None:
    assert json.loads(as_json({"a": float("nan"), "b": [float("-inf"), 1.5, Path("x")], "mesh": MeshSpec.of("dp=2")})) == {
        "a": None,
        "b": [None, 1.5, "x"],
        "mesh": "dp=2",
    }


def test_passes_are_heard_while_one_listens() -> None:
    heard: list[str] = []
    with heard_by(heard.append):
        autoshard.search(nn.Linear(8, 8), (torch.zeros(4, 8),), devices=2)
    announce("nobody listens")
    assert heard[0] == "trace_model"
    assert "annotate_shardings on dp=2" in heard
    assert heard[-1] == "emit_programs"
    assert "nobody listens" not in heard


@pytest.mark.usefixtures("plans")
def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    escape = "\x1b["
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    assert escape not in run("show ddp.json").out
    monkeypatch.setenv("FORCE_COLOR", "1")  # stands for a terminal
    monkeypatch.setenv("TERM", "xterm-256color")
    assert f"{escape}32mok" in run("doctor --no-processes").out
    assert escape not in run("show ddp.json --json").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert f"{escape}3" not in run("doctor --no-processes").out.replace(f"{escape}3m", "")  # titles may be italic


def test_progress_names_the_pass_on_a_terminal_alone() -> None:
    class Terminal(screen.io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = {}
    for name, kind, is_quiet in (("terminal", Terminal, False), ("pipe", screen.io.StringIO, False), ("quiet", Terminal, True)):
        err = kind()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TERM", "xterm")
            with screen.Screen(screen.io.StringIO(), err, is_quiet=is_quiet).working("plan net"):
                announce("trace_model")
        shown[name] = err.getvalue()
    assert "plan net: trace_model" in shown["terminal"]
    assert shown["pipe"] == shown["quiet"] == ""
