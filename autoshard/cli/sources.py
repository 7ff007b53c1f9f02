"""What MODEL and PLAN on the command line stand for: a model with inputs, a plan of it, or a plan that was saved."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
from pathlib import Path

import torch

import autoshard
from autoshard.cli.hugging_face import DEFAULT_BATCH, example_inputs, load_config, makes_inputs
from autoshard.cli.options import given_options, plan_keywords
from autoshard.cli.screen import Screen
from autoshard.cli.user_model import Loaded, as_asked, load_function
from autoshard.errors import InputError, PlanError
from autoshard.plan import Plan
from autoshard.torch_internals import pytree


def is_saved_plan(text: str) -> bool:
    """Whether `text` is a file that a plan was saved to, sound or not: JSON with what only plans have."""
    path = Path(text)
    if not (path.is_file() and path.suffix == ".json"):
        return False
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(body, dict) and bool({"sha256", "program"} & set(body))


def load_model(asked: argparse.Namespace, screen: Screen, is_real: bool = False) -> Loaded:
    """The model that `asked.model` names. is_real: whether it will run, so that it needs weights and numbers. Raises InputError."""
    text: str = asked.model
    if is_saved_plan(text):
        raise InputError(f"{text} is a saved plan; this command takes a model: module:function, file.py:function or a config.json")
    torch.manual_seed(0)
    with screen.working(f"load {text}"):
        if ":" in text:
            loaded = _of_function(asked, is_real)
        elif Path(text).is_dir() or text.endswith(".json"):
            loaded = load_config(Path(text), asked.batch, asked.seq, asked.dtype, asked.is_training, is_real)
        else:
            what = "module:function, path/to/file.py:function, or a Hugging Face config.json or its folder"
            raise InputError(f"{text} names no model; write {f'{text}:FUNCTION' if text.endswith('.py') else what}")
    leaves = [*loaded.model.parameters(), *pytree.tree_leaves((loaded.args, dict(loaded.kwargs or {})))]
    if is_real and any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in leaves):
        raise InputError(f"{text} is on the meta device, and this command runs it; make it with real weights and inputs")
    _say_sizes(asked, loaded, screen)
    return loaded


def _of_function(asked: argparse.Namespace, is_real: bool) -> Loaded:
    loaded = load_function(asked.model, {"batch": asked.batch, "seq": asked.seq})
    loaded = as_asked(loaded, asked.dtype, asked.is_training)
    if not (loaded.args or loaded.kwargs) and makes_inputs(loaded.model):
        is_meta = next(loaded.model.parameters()).is_meta
        return Loaded(loaded.model, (), example_inputs(loaded.model, asked.batch, asked.seq, is_real or not is_meta))
    if loaded.unused:
        name = loaded.unused[0]
        raise InputError(f"--{name} is given, and {asked.model} makes its own inputs; give it a parameter {name!r}, or leave --{name} out")
    if loaded.args or loaded.kwargs:
        return loaded
    parameters = inspect.signature(loaded.model.forward).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed:
        raise InputError(f"{asked.model} returned a model without inputs, and its forward takes {', '.join(needed)}; return (model, args)")
    return loaded


def _say_sizes(asked: argparse.Namespace, loaded: Loaded, screen: Screen) -> None:
    """Sizes that nobody chose are said, since every predicted number hangs on them."""
    ids = (loaded.kwargs or {}).get("input_ids")
    if ":" in asked.model or (asked.batch and (asked.seq or ids is None)):
        return
    size = f"a batch of {asked.batch or DEFAULT_BATCH}"
    said = f"{size}; --batch changes that" if ids is None else f"{size} of {ids.shape[1]} tokens; --batch and --seq change that"
    screen.note(f"inputs are {said}")


def plan_of_model(asked: argparse.Namespace, screen: Screen, loaded: Loaded | None = None) -> Plan:
    """Plan the model that `asked` names. Raises an AutoshardError."""
    if asked.mesh is None:
        raise InputError(f"{asked.model} is no saved plan, and to plan a model takes --mesh, e.g. --mesh dp=2,tp=4")
    keywords = plan_keywords(asked)  # before the model is made, which may take long
    found = loaded or load_model(asked, screen)
    with screen.tracing(f"plan {asked.model}"):
        return autoshard.plan(found.model, asked.mesh, found.args, found.kwargs, **keywords)


def plan_of(asked: argparse.Namespace, screen: Screen) -> Plan:
    """The plan that `asked.model` names, or the plan of the model that it names. Raises an AutoshardError."""
    if asked.model.endswith(".json") and not Path(asked.model).exists():
        raise InputError(f"there is no file {asked.model}; autoshard plan MODEL --mesh ... --out {asked.model} writes a plan")
    if not is_saved_plan(asked.model):
        return plan_of_model(asked, screen)
    given = given_options(asked)
    if given:
        raise InputError(f"{asked.model} is a saved plan, made for its own mesh and hardware; leave out {', '.join(given)}")
    return saved_plan(asked.model, screen)


def saved_plan(path: str, screen: Screen) -> Plan:
    """A plan from a file. Raises PlanError."""
    with screen.working(f"read {path}"):
        return _loaded(path)


def _loaded(path: str) -> Plan:
    """The plan of a file. Results of Hugging Face models are containers that torch knows once transformers is imported."""
    try:
        return Plan.load(path)
    except PlanError as error:
        if "container type that is not registered" not in str(error) or importlib.util.find_spec("transformers") is None:
            raise
        importlib.import_module("transformers.modeling_outputs")
        return Plan.load(path)
