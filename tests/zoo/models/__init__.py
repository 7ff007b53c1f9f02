"""All models of the zoo, in families."""

from __future__ import annotations

import importlib.util

import torch

from zoo import torchvision_beside_cpu_torch
from zoo.models import diffusers_models, encoders, language, multimodal, plain, sequence_to_sequence, timm_models, vision
from zoo.models.entry import Entry, Made, no_weight_is_zero

torchvision_beside_cpu_torch.prepare()
_FILES = (plain, language, encoders, sequence_to_sequence, vision, multimodal, timm_models, diffusers_models)
EVERYTHING: dict[str, Entry] = {entry.name: entry for file in _FILES for entry in file.TABLE.entries}
ENTRIES = {name: entry for name, entry in EVERYTHING.items() if not entry.refusal}
REFUSED = {name: entry for name, entry in EVERYTHING.items() if entry.refusal}

assert len(EVERYTHING) == sum(len(file.TABLE.entries) for file in _FILES), "two entries have one name"


def missing(entry: Entry) -> str:
    """Why the entry cannot run here: the packages that are not installed; "" when it can."""
    return " ".join(name for name in entry.package.split() if importlib.util.find_spec(name) is None)


def build(entry: Entry, mode: str) -> Made:
    """The model of an entry, in `train` or `eval` mode, no weight zero, and its arguments."""
    torch.manual_seed(0)
    model, args, kwargs = entry.make()
    return no_weight_is_zero(model).train(mode == "train"), args, kwargs
