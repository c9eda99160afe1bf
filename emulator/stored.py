"""An emulator in a folder: written by its owner, and read by clients, who check all of it before they trust any.

config.json  model.safetensors  tokenizer files  emulator.json
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from farfield.protocols.errors import EmulatorError

from . import backbone
from .assemble import MISMATCH, compare, fill, fixed, skeleton, tensors
from .layout import Layout, Record, read

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = "model.safetensors"

_LARGEST_TABLES = 2**30

_FORMATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def save(emulator: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, record: Record, folder: Path) -> None:
    """Write the emulator to `folder`, which exists: safetensors, configuration, tokenizer and record, nothing else."""
    from safetensors.torch import save_file

    content = {name: one.detach().cpu().contiguous() for name, one in tensors(emulator).items()}
    with backbone.silent_transformers():
        emulator.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    save_file(content, folder / WEIGHTS, metadata={"format": "pt"})
    record.write(folder)


def load(
    folder: Path,
    *,
    task: str,
    dtype: str,
    labels: int | None = None,
    device: str | torch.device = "cpu",
    attention: str | None = None,
) -> tuple[PreTrainedModel, Record]:
    """The frozen emulator in `folder`, in evaluation mode, and its record. Arguments as in `backbone.load_model`.

    Raises:
        BackboneError: the folder's configuration cannot be used, or is not made for the task.
        EmulatorError: its record or its weights do not fit; found out before memory is taken for what does not.
    """
    from safetensors.torch import load_file

    record, header = read(folder), held(folder / WEIGHTS)
    backbone.check(folder)
    config, kind = backbone.model_class(folder, task=task, labels=labels)
    config.dtype = number_format = getattr(torch, dtype)
    compare(outline(folder, config, record.layout, kind), header, folder / WEIGHTS)
    model = skeleton(config, record.layout, kind, attention)
    own_format = fixed(model)
    content = {
        name: tensor.to(device, number_format if tensor.is_floating_point() and name not in own_format else None)
        for name, tensor in load_file(folder / WEIGHTS).items()
    }
    return fill(model, content, folder / WEIGHTS), record


def held(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and number format of each tensor in the file; nothing else of it is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            return {
                name: (torch.Size(one.get_shape()), _FORMATS.get(one.get_dtype(), torch.complex64))
                for name, one in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise EmulatorError(f"no valid safetensors file: {error}", where=path, hint=MISMATCH) from None


def outline(folder: Path, config: PreTrainedConfig, layout: Layout, kind: type[PreTrainedModel]) -> PreTrainedModel:
    """The skeleton with nothing in memory, buffers included. Raises EmulatorError where there can be none."""
    where, layers = folder / "config.json", getattr(config.get_text_config(), "num_hidden_layers", None)
    if layers != len(layout.origins):
        raise EmulatorError(
            f"it says {layers} layers, and the emulator's record says {len(layout.origins)}", where=where, hint=MISMATCH
        )
    try:
        with torch.device("meta"):
            model = cast("PreTrainedModel", skeleton(config, layout, kind, None))
    except EmulatorError as error:
        raise EmulatorError(error.what, where=where, hint=MISMATCH) from None
    except Exception as error:  # a constructor that is given nonsense can fail in any way
        raise EmulatorError(f"no model can be built as it says: {error}", where=where, hint=MISMATCH) from None
    kept = {id(tensor) for tensor in tensors(model).values()}
    tables = sum(buffer.nbytes for buffer in model.buffers() if id(buffer) not in kept)
    if tables > _LARGEST_TABLES:
        raise EmulatorError(f"it asks for tables of {tables:,} bytes", where=where, hint=MISMATCH)
    return model
