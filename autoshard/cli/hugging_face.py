"""MODEL as a Hugging Face config: the class that `architectures` names, built without weights, with inputs of --batch and --seq.

Nothing is downloaded, and code that a config brings along is not run.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoshard.cli.machine import available_memory_bytes
from autoshard.cli.user_model import Loaded, describe
from autoshard.errors import InputError
from autoshard.text import human_bytes

DEFAULT_BATCH, DEFAULT_SEQ = 8, 2048
# Suffix of the class -> whether its labels are one per token or one per item. Without labels a model returns no loss.
_LABELS = {
    "ForCausalLM": "token", "LMHeadModel": "token", "ForMaskedLM": "token", "ForConditionalGeneration": "token",
    "ForTokenClassification": "token", "ForSequenceClassification": "item", "ForImageClassification": "item",
}  # fmt: skip
_COPIES = 4  # that a comparison holds: the model, its reference, the pieces of all ranks, gradients


def read_config(path: Path) -> dict[str, Any]:
    """The JSON of a config file, or of config.json in a folder. Raises InputError."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"there is no {file}; a model is module:function, file.py:function, or a Hugging Face config.json or its folder")
    try:
        body = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}: {describe(error)}; it should be a Hugging Face config in JSON") from error
    if not isinstance(body, dict):
        raise InputError(f"{file} holds a {type(body).__name__}; a Hugging Face config is a JSON object")
    return body


def load_config(
    path: Path, batch: int | None, seq: int | None, dtype: torch.dtype | None, is_training: bool | None, is_real: bool
) -> Loaded:
    """The model of a config, on the meta device, or with random weights where `is_real`, and inputs of batch x seq.

    dtype: None takes the config's own, float32 where it has none. Raises InputError.
    """
    body = read_config(path)
    names = body.get("architectures")
    if not names or not isinstance(names, list):
        raise InputError(f'{path} names no architectures; add the class to it, e.g. "architectures": ["LlamaForCausalLM"]')
    try:
        import transformers
    except ImportError as error:
        raise InputError("config files need transformers: pip install transformers; or name a function that builds the model") from error
    made = getattr(transformers, str(names[0]), None)
    if not (inspect.isclass(made) and issubclass(made, nn.Module)):
        raise InputError(
            f"{path} names the class {names[0]}, which transformers {transformers.__version__} does not have; "
            "write a function that builds the model: autoshard plan file.py:function"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        config.use_cache = False
        given = dtype or getattr(config, "dtype", None) or torch.float32
        model = _built(made, config, given, "meta")
        if is_real:
            _check_memory(model, path)
            model = _built(made, config, given, "cpu")
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"transformers cannot build {names[0]} from {path}: {describe(error)}") from error
    model.train(is_training is not False)
    return Loaded(model, (), example_inputs(model, batch, seq, is_real))


def _built(made: type[nn.Module], config: Any, dtype: torch.dtype, device: str) -> nn.Module:
    with _default_dtype(dtype), torch.device(device):
        return made(config)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """As loading a checkpoint does it: parameters are of this dtype, tables that the model computes in float32 are not."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _check_memory(model: nn.Module, path: Path) -> None:
    held, available = _COPIES * sum(parameter.nbytes for parameter in model.parameters()), available_memory_bytes()
    if held > available:
        raise InputError(
            f"running {path} takes about {human_bytes(held)} for {_COPIES} copies of its weights, and {human_bytes(available)} are free; "
            "use a config of fewer layers"
        )


def makes_inputs(model: nn.Module) -> bool:
    """Whether `example_inputs` knows what this model reads."""
    return hasattr(model, "config") and getattr(model, "main_input_name", "") in ("input_ids", "pixel_values")


def example_inputs(model: nn.Module, batch: int | None, seq: int | None, is_real: bool) -> Mapping[str, Tensor]:
    """Token ids [batch, seq] or pixels [batch, channels, height, width], and in training labels where the class takes them.

    is_real: drawn at random, else on the meta device. Raises InputError for a model that reads something else.
    """
    config: Any = model.config
    kind = type(model).__name__
    if not makes_inputs(model):
        raise InputError(
            f"{kind} reads {getattr(model, 'main_input_name', 'inputs')!r}, which are not made from --batch and --seq; "
            "write a function that returns (model, args, kwargs): autoshard plan file.py:function"
        )
    batch, device = batch or DEFAULT_BATCH, "cpu" if is_real else "meta"
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        of_batch = torch.randn(batch, getattr(config, "num_channels", 3), height, width, device=device)
        inputs = {"pixel_values": of_batch.to(next(model.parameters()).dtype)}
    else:
        text = config.get_text_config()
        length = seq or min(DEFAULT_SEQ, getattr(text, "max_position_embeddings", None) or DEFAULT_SEQ)
        inputs = {"input_ids": torch.randint(text.vocab_size, (batch, length), device=device)}
    of_what = next((what for suffix, what in _LABELS.items() if kind.endswith(suffix)), None)
    if of_what and model.training and "labels" in inspect.signature(model.forward).parameters:
        is_token = of_what == "token" and "input_ids" in inputs
        inputs["labels"] = inputs["input_ids"].clone() if is_token else torch.zeros(batch, dtype=torch.int64, device=device)
    return inputs
