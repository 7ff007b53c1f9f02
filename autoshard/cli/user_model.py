"""MODEL as `module:function` or `path/to/file.py:function`: the caller's own function makes the model and its inputs.

What goes wrong in that function is told with the file and line of the caller's code, not with a traceback through autoshard.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from autoshard.errors import InputError
from autoshard.torch_internals import pytree

_OURS = Path(__file__).parent.parent
_FOREIGN = (str(_OURS), sysconfig.get_path("stdlib"), "<frozen")
RETURNS = "return the model, (model, args) or (model, args, kwargs)"


@dataclass(frozen=True)
class Loaded:
    """A model with the arguments of one call of it. unused: sizes that were given and that the function has no parameter for."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    unused: tuple[str, ...] = ()


def load_function(text: str, sizes: Mapping[str, int | None]) -> Loaded:
    """Call the function that `text` names. sizes: what its parameters of these names get, where given on the command line.

    Raises InputError for a module or function that is not there, that raises, or that returns something else.
    """
    place, _, name = text.rpartition(":")
    module = _import_file(Path(place)) if place.endswith(".py") or "/" in place else _import_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__]
        raise InputError(f"{place} has no function {name!r}; it has {', '.join(own) or 'none'}; write {place}:FUNCTION")
    given = _arguments(text, function, sizes)
    loaded = _read(text, _told(f"{text} raised", lambda: function(**given)))
    return replace(loaded, unused=tuple(name for name, size in sizes.items() if size is not None and name not in given))


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"there is no file {path}; write path/to/file.py:function")
    spec = importlib.util.spec_from_file_location(f"autoshard_model_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is no Python file; write path/to/file.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up
    _reach(path.resolve().parent)
    _told(f"importing {path} failed", lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
    return module


def _import_module(name: str) -> ModuleType:
    _reach(Path.cwd())
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise InputError(f"there is no module {name!r} on Python's path or in {Path.cwd()}; write path/to/file.py:function for a file")
    return _told(f"importing {name} failed", lambda: importlib.import_module(name))


def _reach(folder: Path) -> None:
    """Let the caller's code import what lies beside it, as `python file.py` does."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _arguments(text: str, function: Callable, sizes: Mapping[str, int | None]) -> dict[str, int]:
    """`batch` and `seq` where the function asks for them. Raises InputError for parameters that nothing can be given for."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some functions written in C say nothing
        return {}
    fixed = {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    needed = [name for name, p in fixed.items() if p.default is p.empty and sizes.get(name) is None]
    if needed:
        asked = [f"--{name}" for name in needed if name in sizes]
        if len(asked) == len(needed):
            raise InputError(f"{text} takes {', '.join(needed)}; give {' and '.join(asked)}")
        raise InputError(
            f"{text} takes {', '.join(needed)}, which autoshard has no values for; give them defaults (--batch, --seq are known)"
        )
    return {name: size for name, size in sizes.items() if size is not None and name in fixed}


def _told(what: str, work: Callable[[], Any]) -> Any:
    """`work()`; what it raises becomes an InputError with the last place in the caller's own code."""
    try:
        return work()
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{what} {place_of(error)}{describe(error)}") from error


def place_of(error: BaseException) -> str:
    """`at file.py:12 (in build): `, the innermost frame of the caller's code; "" where there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"at {error.filename}:{error.lineno}: "
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_FOREIGN)]
    own = [f for f in frames if "site-packages" not in f.filename] or frames
    return f"at {own[-1].filename}:{own[-1].lineno} (in {own[-1].name}): " if own else ": "


def describe(error: BaseException) -> str:
    """`ValueError: what it says`, in one line."""
    said = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _read(text: str, returned: Any) -> Loaded:
    """What the function returned, as a model and its arguments."""
    parts = returned if isinstance(returned, tuple) else (returned,)
    if not parts or not isinstance(parts[0], nn.Module):
        what = type(returned).__name__ + (f" of {', '.join(type(part).__name__ for part in parts)}" if isinstance(returned, tuple) else "")
        raise InputError(f"{text} returned no model but {what}; {RETURNS}")
    args, kwargs = parts[1] if len(parts) > 1 else (), parts[2] if len(parts) > 2 else {}
    if len(parts) > 3:
        raise InputError(f"{text} returned {len(parts)} things; {RETURNS}")
    if not isinstance(args, tuple | list):
        raise InputError(f"{text} returned args that are {type(args).__name__}; args are a tuple: write (model, (x,))")
    if not isinstance(kwargs, Mapping):
        raise InputError(f"{text} returned kwargs that are {type(kwargs).__name__}; kwargs are a dict: write (model, args, {{'x': x}})")
    return Loaded(parts[0], tuple(args), dict(kwargs))


def as_asked(loaded: Loaded, dtype: torch.dtype | None, is_training: bool | None) -> Loaded:
    """In another dtype (parameters and floating inputs) and mode, where these were asked."""
    model, args, kwargs = loaded.model, loaded.args, dict(loaded.kwargs or {})
    if is_training is not None:
        model.train(is_training)
    if dtype is not None:
        model = model.to(dtype)
        args, kwargs = pytree.tree_map(
            lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, (args, kwargs)
        )
    return replace(loaded, model=model, args=args, kwargs=kwargs)
