"""Records which memory lives when: every storage that ops make while a block of code runs, from its first op to its release.

Storages are followed, not tensors: views cost nothing, and what autograd keeps alive stays counted for as long as it does. Works on
tensors with and without memory alike, and sees what ops return; what a kernel takes and gives back inside one op must be told.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autoshard.torch_internals import pytree

Ops = Callable[[Any, tuple, Mapping[str, Any]], tuple[Any, int]]


@dataclass(eq=False, slots=True)
class Block:
    """One storage. place: where the code stood when it was made; left: when it was released (None: it still lives).

    op: what made it. kind, module: set from outside, where `place` does not tell.
    """

    nbytes: int
    place: Any
    op: str = ""
    left: Any = None
    kind: str = ""
    module: str = ""


class Event(NamedTuple):
    """A block is made or released."""

    block: Block
    is_made: bool
    place: Any


class Recorder(TorchDispatchMode):
    """While it is entered, notes in `events` what ops make and what is released, in order.

    place: called at every event, says where the code stands. tick: called at every op. run: runs an op, and says how many bytes its
    kernel takes and gives back.
    """

    def __init__(self, place: Callable[[], Any], tick: Callable[[], None], run: Ops) -> None:
        super().__init__()
        self.place, self.tick, self.run = place, tick, run
        self.live: dict[int, Block] = {}
        self.events: list[Event] = []
        self._watched: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "prim":
            return func(*args, **(kwargs or {}))
        result, workspace_bytes = self.run(func, args, kwargs or {})
        self.tick()
        for tensor in (result,) if isinstance(result, Tensor) else pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor, str(func))
        if workspace_bytes:
            self.take(workspace_bytes)
        return result

    def hold(self, tensors: Iterable[Tensor], kind: str, module: str = "") -> None:
        """Count tensors that were made outside, or say of which kind those are that were made inside."""
        for tensor in tensors:
            block = self._note(tensor, "")
            block.kind, block.module = kind, module

    def take(self, nbytes: int, is_given_back: bool = True) -> None:
        """Workspace that no tensor holds."""
        block = Block(nbytes, self.place(), kind="workspace")
        self.events.append(Event(block, True, block.place))
        if is_given_back:
            block.left = block.place
            self.events.append(Event(block, False, block.place))

    def _note(self, tensor: Tensor, op: str) -> Block:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.live:
            self.live[key] = block = Block(storage.nbytes(), self.place(), op)
            self.events.append(Event(block, True, block.place))
            self._watched[key] = weakref.ref(storage, lambda _: self._release(key))
        return self.live[key]

    def _release(self, key: int) -> None:
        block = self.live.pop(key)
        del self._watched[key]
        block.left = self.place()
        self.events.append(Event(block, False, block.left))
