"""What the methods that `peft` does not have share: freezing the rest, and what they are saved as."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from farfield.protocols.errors import TuningError

from .method import Setting, Tuned, TuningMethod, registered

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from farfield.emulator.architecture import Architecture

WEIGHTS, SETTINGS = "trained.safetensors", "method.json"


def frozen(model: PreTrainedModel, setting: Setting) -> Architecture:
    """Have nothing in `model` require gradients but a classifier's head, and tell its parts, of the tuned blocks only.

    Raises:
        TuningError: a classifier without a head.
    """
    from farfield.emulator.architecture import describe

    architecture = describe(model)
    model.requires_grad_(False)
    if setting.task == "sequence-classification":
        if not architecture.head:
            raise TuningError("the model has no classification head", where=type(model).__name__)
        for path in architecture.head:
            model.get_submodule(path).requires_grad_(True)
    return architecture.within(setting.blocks)


def like(module: torch.nn.Module, model: PreTrainedModel, beside: str) -> torch.nn.Module:
    """`module` in the number format of `model`, where the layer `beside` is."""
    layer = model.get_submodule(beside)
    device = next(chain(layer.parameters(), layer.buffers())).device  # one of few bits has buffers only
    return module.to(device=device, dtype=model.dtype)


def unmergeable(kind: str, reason: str) -> TuningError:
    """What `merge` raises where a method stands beside the weights."""
    return TuningError(
        f"{kind!r} has nothing to fold into the weights: {reason}",
        hint="Export the adapter instead, without --merged, and install it beside the backbone.",
    )


def write(method: TuningMethod, tuned: Tuned, folder: Path) -> None:
    """Write `trained.safetensors`, the trained tensors by their names in the backbone, in the model's number format;
    and `method.json`, the method's settings as they stand in a Plan's section `[tuning]`.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: one.detach().cpu().contiguous().clone() for name, one in tuned.trainable().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    settings = method.model_dump(mode="json", exclude={"alternatives"})
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def restore(folder: Path, model: PreTrainedModel, setting: Setting) -> Tuned:
    """Install in `model` what `write` wrote to `folder`.

    Raises:
        TuningError: the folder holds none of these, or what it holds was trained in another model.
    """
    from safetensors.torch import load_file

    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        method = registered()[settings["kind"]].model_validate(settings)
        held = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError) as error:
        raise TuningError(f"no saved tuning method could be read: {error}", where=folder) from error
    tuned = method.install(model, setting)
    trained = tuned.trainable()
    if {name: one.shape for name, one in held.items()} != {name: one.shape for name, one in trained.items()}:
        raise TuningError("what is saved here was not trained in this model", where=folder)
    for name, parameter in trained.items():
        parameter.data.copy_(held[name])
    if tuned.settled is not None:
        tuned.settled()
    return tuned
