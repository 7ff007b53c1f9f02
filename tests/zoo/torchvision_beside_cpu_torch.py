"""timm needs torchvision, whose builds on PyPI are for CUDA: beside a CPU build of torch its import fails, since it registers
fake kernels for compiled ops that are not there ("operator torchvision::nms does not exist"). No model here uses one of them, so
an empty module stands in for the one that registers them.
"""

from __future__ import annotations

import sys
import types

import torch


def prepare() -> None:
    """To be called before timm, diffusers or transformers are imported."""
    if torch.version.cuda is None:
        sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
