"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from autoshard import schedules
from autoshard.api import Options
from autoshard.constraints import Template
from autoshard.errors import InputError
from autoshard.hardware import hardware_of
from autoshard.mesh import PIPELINE_AXIS, MeshSpec
from autoshard.pipeline import Pipelining

MODEL_HELP = (
    "module:function or path/to/file.py:function that returns the model, (model, args) or (model, args, kwargs); or a Hugging Face "
    "config.json or its folder"
)
_UNITS = {"": 1, "b": 1, **{f"{letter}b": 1000**k for k, letter in enumerate("kmgt", 1)}}
_UNITS |= {f"{letter}ib": 1024**k for k, letter in enumerate("kmgt", 1)}
_DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
_DTYPES |= {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16, "f16": torch.float16}
_OF_PIPELINES = ("microbatches", "schedule", "stages_per_rank")
OF_PLANS = ("mesh", "hardware", "template", "constraint", "memory_budget", "overlap", *_OF_PIPELINES)
_OF_MODELS = ("batch", "seq", "dtype", "is_training")


def size_bytes(text: str) -> float:
    """`70GB`, `512 MiB` or plain bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS or not float(found[1]):
        raise argparse.ArgumentTypeError(f"cannot read {text!r}; write it like 70GB or 512MiB")
    return float(found[1]) * _UNITS[found[2]]


def count(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def dtype(text: str) -> torch.dtype:
    """`bfloat16` or `bf16`."""
    if text not in _DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[text]


def named_layout(text: str) -> tuple[str, str]:
    """`NAME=LAYOUT`."""
    name, equals, layout = text.partition("=")
    if not (name and equals and layout):
        raise argparse.ArgumentTypeError(f"cannot read {text!r}; write NAME=LAYOUT, e.g. '*.up.weight=S(0)@tp'")
    return name.strip(), layout.strip()


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """What every command takes."""
    parser.add_argument("--json", action="store_true", help="print one JSON document, and nothing else")
    parser.add_argument("--quiet", action="store_true", help="no text and no progress: the exit status and the files are the answer")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How a model and its inputs are made."""
    group = parser.add_argument_group("the model")
    group.add_argument("--batch", type=count, metavar="N", help="items in the global batch (config files: 8 if not given)")
    group.add_argument("--seq", type=count, metavar="N", help="tokens of an item (config files: 2048 or what the model takes, if less)")
    group.add_argument("--dtype", type=dtype, metavar="NAME", help="of parameters and floating inputs: bf16, f32, ...")
    mode = group.add_mutually_exclusive_group()
    mode.add_argument("--train", dest="is_training", action="store_const", const=True, help="plan a training step")
    mode.add_argument("--eval", dest="is_training", action="store_const", const=False, help="plan inference")


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """What a search over layouts is held to."""
    group = parser.add_argument_group("the search")
    group.add_argument(
        "--constraint", type=named_layout, action="append", metavar="NAME=LAYOUT", help="pin a layout, e.g. '*.weight=S(0)@tp'; repeat it"
    )
    group.add_argument("--memory-budget", type=size_bytes, metavar="SIZE", help="upper bound per rank, e.g. 70GB")


def add_plan_options(parser: argparse.ArgumentParser, is_required: bool = False) -> None:
    """What it takes to plan a model. is_required: whether there is no saved plan that could stand in for it."""
    add_model_options(parser)
    add_search_options(parser)
    group = parser.add_argument_group("the machines")
    group.add_argument("--mesh", required=is_required, metavar="AXES", help="axis names and sizes, outermost first, e.g. dp=2,tp=4")
    group.add_argument("--hardware", metavar="NAME", help="h100, h100x4 (nodes of 4), a100, h200, b200, cpu, measured, profile:FILE")
    group.add_argument("--template", choices=get_args(Template), help="a known layout in place of the search: ddp, fsdp, ...")
    group.add_argument("--overlap", action="store_true", default=None, help="start collectives early and wait late")
    group = parser.add_argument_group("pipeline stages, where the mesh has an axis pp")
    group.add_argument("--microbatches", type=count, metavar="N", help="parts that the batch is cut into")
    group.add_argument("--schedule", choices=schedules.NAMES, help="what runs when")
    group.add_argument("--stages-per-rank", type=count, metavar="N", help="for schedules of several stages on a rank")


def given_options(asked: argparse.Namespace, names: Sequence[str] = (*OF_PLANS, *_OF_MODELS)) -> list[str]:
    """Which of some options were given, as they are written."""
    shown = {"is_training": "--train or --eval"}
    return [shown.get(name, f"--{name.replace('_', '-')}") for name in names if getattr(asked, name, None) is not None]


def constraints_of(asked: argparse.Namespace) -> dict[str, str]:
    """The constraints by name. Raises InputError where one name has two."""
    given: list[tuple[str, str]] = asked.constraint or []
    found = dict(given)
    if len(found) < len(given):
        twice = next(name for k, (name, _) in enumerate(given) if name in dict(given[:k]))
        raise InputError(f"--constraint {twice!r} is given twice; write its axes in one, e.g. '{twice}=S(0)@tp I@dp'")
    return found


def plan_keywords(asked: argparse.Namespace) -> dict[str, Any]:
    """Keywords of autoshard.plan. Raises an AutoshardError for a mesh or hardware that cannot be read, or that do not go together."""
    has_stages = PIPELINE_AXIS in MeshSpec.of(asked.mesh).axes
    if not has_stages and (given := given_options(asked, _OF_PIPELINES)):
        raise InputError(
            f"{given[0]} is for pipeline stages; give the mesh an axis {PIPELINE_AXIS}, e.g. --mesh {PIPELINE_AXIS}=2,{asked.mesh}"
        )
    return {
        "template": asked.template or "auto",
        "constraints": constraints_of(asked),
        "hardware": hardware_of(asked.hardware),
        "memory_budget_bytes": asked.memory_budget,
        "options": Options(overlap=bool(asked.overlap)),
        "pipeline": Pipelining(asked.microbatches, asked.schedule, asked.stages_per_rank) if has_stages else None,
    }


def check_writable(path: str | Path, example: str = "plan.json") -> None:
    """Raise InputError before long work where its result could not be written as the file `path`."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; name a file, e.g. {path / example}")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}; make it, or choose another")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"cannot write {path}: the folder {path.parent} is read-only here; choose another")


def unwritable(path: str | Path, error: OSError) -> InputError:
    """What to raise where writing failed after all."""
    return InputError(f"cannot write {path}: {error.strerror or error}; choose another place")
