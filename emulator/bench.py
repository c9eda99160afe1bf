"""A bench: a backbone with a tuning method installed, loaded once and used by all that work in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from farfield.protocols.errors import MalformedMessage
from farfield.protocols.plan import Plan
from farfield.protocols.tensors import State

from . import backbone
from .methods import Setting, Tuned, TuningMethod

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Bench:
    """The Plan's backbone, its tokenizer, and its tuning method installed.

    Attributes:
        method: the tuning method.
        tuned: the model with the method installed, in evaluation mode.
        frozen: digest, hexadecimal, of what the method added and does not train (FFA-LoRA's A, VeRA's projections); ""
            where there is nothing. Each machine draws it from the seed and never sends it, so it must be the same.
    """

    def __init__(self, plan: Plan, folder: Path, device: torch.device | None = None) -> None:
        """Load the backbone in `folder`.

        Raises:
            BackboneError, TuningError: the folder or the method cannot be used.
        """
        assert isinstance(plan.tuning, TuningMethod)
        self.plan = plan
        self.method = plan.tuning
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer: PreTrainedTokenizerBase = backbone.load_tokenizer(folder)
        model = backbone.load_model(
            folder,
            task=plan.model.task,
            dtype=plan.model.dtype,
            labels=plan.model.labels,
            seed=plan.training.seed,
            device=self.device,
            attention=_attention(self.device, plan.data.max_length),
        )
        before = {tensor.data_ptr() for tensor in _tensors(model).values()}
        steps = plan.training.rounds * plan.training.steps if plan.training.steps else None
        self.tuned: Tuned = self.method.install(model, Setting(plan.model.task, plan.training.seed, steps))
        self.frozen = _digest(
            {
                name: tensor
                for name, tensor in _tensors(self.tuned.model).items()
                if not tensor.requires_grad and tensor.data_ptr() not in before
            }
        )

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        assert isinstance(pad, int)
        return pad

    def adapter(self) -> State:
        """The trained parameters as they are now: float32 copies by name."""
        return {name: p.detach().float().cpu().numpy().copy() for name, p in self.tuned.trainable().items()}

    def load(self, adapter: State) -> None:
        """Set the trained parameters, rounded to the model's number format.

        Raises:
            MalformedMessage: names or shapes are not those of this Plan's adapter.
        """
        parameters = self.tuned.trainable()
        if {name: array.shape for name, array in adapter.items()} != {n: tuple(p.shape) for n, p in parameters.items()}:
            raise MalformedMessage("the adapter's tensors are not those that this Plan's tuning method trains here")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(torch.from_numpy(np.array(adapter[name])))


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest() if tensors else ""


def _attention(device: torch.device, length: int) -> str | None:
    """The faster implementation: on a CPU, torch's fused kernel is a third slower on short sequences (docs/log.md)."""
    return "eager" if device.type == "cpu" and length <= 512 else None
