"""Bad input on the command line: one line on stderr that says where and what to do, exit status 2, nothing on stdout."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_lines import refused, run

from autoshard.cli import hugging_face, planning
from autoshard.plan import Plan

MODELS = """
import torch
from torch import nn

def good():
    return nn.Linear(4, 4), (torch.zeros(4, 4),)

def deep():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (torch.zeros(4, 4),)

def helper(n):
    return 1 / n

def broken():
    return helper(0)

def leaves():
    raise SystemExit("no such data")

def deep_in_torch():
    return torch.zeros(2) @ torch.zeros(3)

def nothing():
    return None

def pair():
    return (1, 2)

def four():
    return nn.Linear(4, 4), (), {}, 1

def bare_tensor():
    return nn.Linear(4, 4), torch.zeros(4, 4)

def bad_kwargs():
    return nn.Linear(4, 4), (), [1]

def alone():
    return nn.Linear(4, 4)

def meta():
    return nn.Linear(4, 4, device="meta"), (torch.zeros(4, 4, device="meta"),)

def needs(config):
    return config

def sized(batch):
    return nn.Linear(4, 4), (torch.zeros(batch, 4),)

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
    def forward(self, x):
        if x.sum() > 0:
            return x @ self.weight
        return x

def branches():
    return Branches(), (torch.zeros(4, 4),)

number = 3
"""

_WHISPER = {"d_model": 12, "vocab_size": 8, "pad_token_id": 1, "encoder_layers": 1, "decoder_layers": 1}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with models.py, in which commands run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "models.py").write_text(MODELS)
    yield tmp_path
    for name in ("models", "imports"):
        sys.modules.pop(name, None)


def line_of(text: str) -> int:
    """The line of models.py that holds `text`."""
    return next(k for k, line in enumerate(MODELS.split("\n"), 1) if text in line)


# ------------------------------------------------------------------------------------------------------ MODEL as a function


def test_what_a_function_raises_is_told_with_the_callers_line(folder: Path) -> None:
    place = f"{folder}/models.py"
    told = {
        "broken": f"at {place}:{line_of('1 / n')} (in helper): ZeroDivisionError: division by zero",
        "leaves": f"at {place}:{line_of('SystemExit')} (in leaves): SystemExit: no such data",
        "deep_in_torch": f"at {place}:{line_of('torch.zeros(2) @')} (in deep_in_torch): RuntimeError: ",
    }
    for name, text in told.items():
        assert refused(f"plan models.py:{name} --mesh dp=2").startswith(f"models.py:{name} raised {text}")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nothing", "models.py:nothing returned no model but NoneType; return the model, (model, args) or (model, args, kwargs)"),
        ("pair", "models.py:pair returned no model but tuple of int, int; return the model, (model, args) or (model, args, kwargs)"),
        ("four", "models.py:four returned 4 things; return the model, (model, args) or (model, args, kwargs)"),
        ("bare_tensor", "models.py:bare_tensor returned args that are Tensor; args are a tuple: write (model, (x,))"),
        ("bad_kwargs", "models.py:bad_kwargs returned kwargs that are list; kwargs are a dict: write (model, args, {'x': x})"),
        ("alone", "models.py:alone returned a model without inputs, and its forward takes input; return (model, args)"),
        ("needs", "models.py:needs takes config, which autoshard has no values for; give them defaults (--batch, --seq are known)"),
        ("sized", "models.py:sized takes batch; give --batch"),
    ],
)
def test_functions_that_give_no_model_are_refused(name: str, text: str) -> None:
    assert refused(f"plan models.py:{name} --mesh dp=2") == text


def test_sizes_that_a_function_does_not_take_are_refused() -> None:
    text = "--seq is given, and models.py:good makes its own inputs; give it a parameter 'seq', or leave --seq out"
    assert refused("plan models.py:good --mesh dp=2 --seq 4") == text


def test_functions_that_are_not_there_are_refused(folder: Path) -> None:
    Path("syntax.py").write_text("x = 1\ndef f(:\n")
    Path("imports.py").write_text("import nothing_of_this_name\n")
    own = "good, deep, helper, broken, leaves"
    assert refused("plan models.py:god --mesh dp=2").startswith(f"models.py has no function 'god'; it has {own}, ")
    assert "has no function 'number'" in refused("plan models:number --mesh dp=2")
    assert refused("plan gone.py:build --mesh dp=2") == "there is no file gone.py; write path/to/file.py:function"
    assert refused("plan gone:build --mesh dp=2").startswith(f"there is no module 'gone' on Python's path or in {folder}; write path/to")
    assert refused("plan gone.part:build --mesh dp=2").startswith("there is no module 'gone.part'")
    assert refused("plan syntax.py:f --mesh dp=2") == f"importing syntax.py failed at {folder}/syntax.py:2: SyntaxError: invalid syntax"
    for model in ("imports:f", "imports.py:f"):
        assert re.search(
            r"imports.py:1 \(in <module>\): ModuleNotFoundError: No module named 'nothing_", refused(f"plan {model} --mesh dp=2")
        )
    assert refused("plan models.py --mesh dp=2") == "models.py names no model; write models.py:FUNCTION"
    assert "names no model; write module:function, path/to/file.py:function, or" in refused("plan models --mesh dp=2")


def test_a_model_that_does_not_trace_gives_one_line(folder: Path) -> None:
    text = refused("plan models.py:branches --mesh dp=2")
    assert f"at {folder}/models.py:{line_of('x.sum() > 0')}: if x.sum() > 0: The model branches on values of tensors" in text
    assert logging.root.manager.disable == logging.NOTSET
    debug = run("plan models.py:branches --mesh dp=2 --debug")
    assert debug.status == 2
    assert "Traceback (most recent call last)" in debug.err
    assert debug.err.rstrip("\n").splitlines()[-1].startswith("error: cannot trace Branches")


def test_running_takes_numbers() -> None:
    assert refused("verify models.py:meta --mesh dp=2").startswith("models.py:meta is on the meta device, and this command runs it; make")


# ---------------------------------------------------------------------------------------------------- MODEL as a config file


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("{", "cannot read config.json: JSONDecodeError: Expecting property name"),
        ("[1]", "config.json holds a list; a Hugging Face config is a JSON object"),
        ('{"model_type": "llama"}', 'config.json names no architectures; add the class to it, e.g. "architectures": ['),
    ],
)
def test_config_files_that_are_none_are_refused(body: str, text: str) -> None:
    Path("config.json").write_text(body)
    assert refused("plan config.json --mesh dp=2").startswith(text)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"architectures": ["FooForBar"]}, "config.json names the class FooForBar, which transformers "),
        (
            {"architectures": ["LlamaForCausalLM"]},
            "transformers cannot build LlamaForCausalLM from config.json: ValueError: Unrecognized model",
        ),
        (
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 30, "num_attention_heads": 4},
            "transformers cannot build LlamaForCausalLM from config.json: ",
        ),
        (
            {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", **_WHISPER},
            "WhisperForConditionalGeneration reads 'input_features', which are not made from --batch and --seq; write a function",
        ),
    ],
)
def test_config_files_that_transformers_does_not_build_are_refused(body: dict, text: str) -> None:
    pytest.importorskip("transformers")
    Path("config.json").write_text(json.dumps(body))
    assert refused("plan . --mesh dp=2" if text.startswith("Whisper") else "plan config.json --mesh dp=2").startswith(text)


def test_config_files_that_are_not_there_are_refused(folder: Path) -> None:
    assert refused("plan gone.json --mesh dp=2").startswith("there is no gone.json; a model is module:function")
    assert refused(f"plan {folder} --mesh dp=2").startswith(f"there is no {folder}/config.json; a model is")


def test_transformers_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    Path("config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert refused("plan config.json --mesh dp=2").startswith(
        "config files need transformers: pip install transformers; or name a function"
    )


def test_running_takes_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(hugging_face, "available_memory_bytes", lambda: 1000)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    Path("config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes}))
    text = refused("verify config.json --mesh dp=2")
    assert re.fullmatch(
        r"running config.json takes about [\d.]+ kB for 4 copies of its weights, and 1.0 kB are free; use a config of .*", text
    )


# ------------------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("plan models.py:good --mesh dp", "cannot read mesh 'dp'; write it like 'dp=2,tp=4'"),
        ("plan models.py:good --mesh dp=2 --hardware h1000", "no hardware preset 'h1000'; there are a100"),
        ("search models.py:good --devices 8 --cluster h1000", "no hardware preset 'h1000'; there are a100"),
        ("search models.py:good --devices 8 --max-axes 7", "max_axes is a whole number, 1 to 3; got 7"),
        (
            "search models.py:good --devices -8",
            "argument --devices: '-8' is not a whole number of 1 or more; autoshard search --help shows",
        ),
        ("plan models.py:good --mesh dp=2 --dtype f8", "argument --dtype: 'f8' is not one of float32, "),
        (
            "plan models.py:good --mesh dp=2 --memory-budget lots",
            "argument --memory-budget: cannot read 'lots'; write it like 70GB or 512MiB",
        ),
        ("plan models.py:good --mesh dp=2 --constraint weight", "argument --constraint: cannot read 'weight'; write NAME=LAYOUT"),
        ("plan models.py:good --mesh dp=2 --constraint weight=Q@dp", "constraint 'weight': 'Q@dp': cannot read placement 'Q'"),
        (
            "plan models.py:good --mesh dp=2 --constraint weight=I@dp --constraint weight=S(0)",
            "--constraint 'weight' is given twice; write its axes in one, e.g. 'weight=S(0)@tp I@dp'",
        ),
        ("plan models.py:good", "the following arguments are required: --mesh; autoshard plan --help shows what there is"),
        ("plan models.py:good --mesh dp=2 --train --eval", "argument --eval: not allowed with argument --train"),
        ("plam models.py:good", "argument COMMAND: invalid choice: 'plam' (choose from "),
        ("", "the following arguments are required: COMMAND; autoshard --help shows what there is"),
        (
            "plan models.py:good --mesh dp=2 --microbatches 2",
            "--microbatches is for pipeline stages; give the mesh an axis pp, e.g. --mesh pp=2,dp=2",
        ),
        ("plan models.py:good --mesh pp=2 --schedule 2f2b", "argument --schedule: invalid choice: '2f2b' (choose from "),
        ("explain models.py:good", "models.py:good is no saved plan, and to plan a model takes --mesh, e.g. --mesh dp=2,tp=4"),
        ("verify models.py:good", "verify takes a saved plan, or --mesh to plan at once"),
    ],
)
def test_options_that_make_no_sense_are_refused(line: str, text: str) -> None:
    assert refused(line).startswith(text)


def test_no_plan_within_the_budget_is_an_answer() -> None:
    assert refused("plan models.py:good --mesh dp=2 --memory-budget 10B", status=1).startswith("no plan on dp=2 fits: budget of 10 bytes")


# --------------------------------------------------------------------------------------------------------- plans and places


@pytest.fixture
def saved(folder: Path) -> str:
    """A saved plan."""
    assert run("plan models.py:good --mesh dp=2 --out plan.json --quiet").status == 0
    return "plan.json"


def test_a_saved_plan_is_not_planned_again(saved: str) -> None:
    assert refused(f"plan {saved} --mesh dp=2").startswith("plan.json is a saved plan; this command takes a model: module:function")
    text = "plan.json is a saved plan, made for its own mesh and hardware; leave out --mesh, --dtype, --train or --eval"
    assert refused(f"show {saved} --mesh dp=2 --dtype bf16 --eval") == text
    assert refused(f"verify models.py:good {saved} --template ddp").endswith("leave out --template")
    assert refused(f"explain {saved} --why weight=I@dp").startswith("--why solves the plan again, which takes the model")
    assert refused(f"verify models.py:branches {saved}").startswith("this plan was made for another Linear: bias [4] is missing")


def test_files_that_are_no_plans_are_refused(saved: str) -> None:
    body = json.loads(Path(saved).read_text())
    Path("newer.json").write_text(json.dumps({**body, "version": body["version"] + 1}))
    Path("altered.json").write_text(json.dumps({**body, "template": "ddp"}))
    Path("cut.json").write_text(Path(saved).read_text()[:-100])
    newer = f"the plan has format version {body['version'] + 1}, this autoshard reads {body['version']}; plan again with this version"
    for command in ("show newer.json", "emit newer.json folder", "diff plan.json newer.json", "verify models.py:good newer.json"):
        assert refused(command) == newer
    assert refused("explain altered.json").startswith("the plan was altered after it was saved")
    assert refused("diff plan.json cut.json").startswith("this is not a plan, or a truncated one")
    assert refused("show gone.json") == "there is no file gone.json; autoshard plan MODEL --mesh ... --out gone.json writes a plan"
    assert refused("diff plan.json gone.json").startswith("cannot read the plan gone.json")


def test_places_that_cannot_be_written_are_told_before_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = "there is no folder gone; make it, or choose another"
    assert refused("plan models.py:broken --mesh dp=2 --out gone/plan.json") == f"cannot write gone/plan.json: {none}"
    assert refused("search models.py:broken --devices 2 --out gone/plan.json") == f"cannot write gone/plan.json: {none}"
    assert refused("show models.py:broken --mesh dp=2 --graph gone/plan.svg") == f"cannot write gone/plan.svg: {none}"
    assert refused(f"plan models.py:broken --mesh dp=2 --out {folder}").startswith(f"cannot write {folder}: it is a folder; name a file")
    assert refused("emit models.py:broken models.py/inside --mesh dp=2").endswith("models.py is a file; choose another folder")
    assert refused("show models.py:broken --mesh dp=2 --graph plan.gif").startswith(
        "--graph plan.gif: what kind of picture is that? name a file"
    )
    monkeypatch.setattr("autoshard.cli.options.os.access", lambda path, mode: False)
    assert refused("plan models.py:broken --mesh dp=2 --out plan.json").startswith("cannot write plan.json: the folder . is read-only here")


def test_writing_that_fails_after_all_is_told(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Plan, path: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Plan, "save", full)
    assert (
        refused("plan models.py:good --mesh dp=2 --out other.json")
        == "cannot write other.json: No space left on device; choose another place"
    )
    assert refused(f"emit {saved} folder") == "cannot write folder: No space left on device; choose another place"


def test_pictures_take_graphviz(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    text = refused(f"show {saved} --graph plan.svg")
    assert text.endswith("which is not on PATH: apt-get install graphviz, or write plan.gv, which needs none")
    assert not Path("plan.svg").exists()
    assert run(f"show {saved} --graph plan.gv").status == 0


def test_faults_are_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*args: object, **kwargs: object) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(planning.autoshard, "plan", fault)
    text = refused("plan models.py:good --mesh dp=2")
    assert re.fullmatch(
        r"unexpected, at .*test_cli_bad_input.py:\d+ \(in fault\): KeyError: 'a fault'; --debug shows the whole traceback", text
    )
