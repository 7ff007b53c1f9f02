"""Ranks agree before they run: what each is about to do is compared, and ranks that differ all stop with the same error.

Without this, ranks that run different programs wait for each other forever.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from autoshard.errors import AutoshardError, InputError, PlanError

Exchange = Callable[[dict[str, Any]], list[dict[str, Any]]]  # mine -> everybody's, in rank order

_ADVICE = {
    "values of arguments": "Plain tensors are the global batch, the same on every rank: seed the data loader alike, "
    "or pass inputs='local' when each rank loads its own part of the batch.",
    "shapes of arguments": "Plain tensors are the global batch, the same on every rank.",
    "values of parameters": "Build the model with the same seed, or load the same weights, on every rank before autoshard.compile.",
    "state of the random generator": "With randomness='single_device' all ranks draw alike: call torch.manual_seed with the same number "
    "on every rank before the first step, and draw nothing on some ranks only.",
    "mode": "Call train() or eval() on every rank.",
    "versions": "Install one version everywhere.",
    "program": "Build the model, its configuration and the arguments of autoshard.compile alike on every rank.",
}


def agree(exchange: Exchange, mine: Mapping[str, str], failure: Exception | None, text: str = "") -> None:
    """Compare `mine` across ranks.

    failure: what stopped this rank; raised here, and told to the others. text: what the program is a digest of, to show
    its first line that differs. Raises PlanError where another rank failed, InputError where ranks differ: on every rank.
    """
    problem = "" if failure is None else str(failure) if isinstance(failure, AutoshardError) else f"{type(failure).__name__}: {failure}"
    everyone = exchange({**mine, "error": problem})
    if failure is not None:
        raise failure
    failed = [f"rank {rank}: {other['error']}" for rank, other in enumerate(everyone) if other["error"]]
    if failed:
        raise PlanError("stopped, because other ranks failed: " + "; ".join(failed))
    for what in mine:
        groups: dict[str, list[int]] = {}
        for rank, other in enumerate(everyone):
            if " of part" in what and what not in other:
                continue  # another part of the batch
            groups.setdefault(other.get(what, "nothing (they run another program)"), []).append(rank)
        if len(groups) > 1:
            texts = [other["text"] for other in exchange({"text": text})] if what == "program" else []
            raise InputError(_disagreement(what, groups, texts))


def _disagreement(what: str, groups: Mapping[str, list[int]], texts: Sequence[str]) -> str:
    shown = "; ".join(f"ranks {', '.join(map(str, ranks))} have {value}" for value, ranks in groups.items())
    if texts:
        ranks = [members[0] for members in groups.values()][:2]
        pairs = itertools.zip_longest(*(texts[rank].splitlines() for rank in ranks), fillvalue="nothing")
        telling = (pair for pair in pairs if pair[0] != pair[1] and not pair[0].startswith("from "))  # imports only follow from the rest
        different = next(telling, ("other arguments",) * 2)
        shown = "; ".join(f"rank {rank} has `{line.strip()}`" for rank, line in zip(ranks, different, strict=True))
    return f"ranks disagree on the {what}, stopped before the first step: {shown}. {_ADVICE[what.partition(' of part')[0]]}"


def content(tensor: torch.Tensor) -> str:
    """Digest of a tensor's values."""
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return hashlib.sha256(raw).hexdigest()[:16]


def generators(device: torch.device) -> str:
    """Digest of the state of torch's default generators, of the CPU and of `device`."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return content(torch.cat(states))


def sample(tensor: torch.Tensor, count: int = 4096) -> str:
    """Digest of about `count` numbers spread over a tensor."""
    flat = tensor.detach().flatten()
    return content(flat[:: max(1, flat.numel() // count)])
