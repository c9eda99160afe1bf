"""A bench: a backbone, or an emulator of it, with a tuning method installed; loaded once and used by all work here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from farfield.protocols.errors import MalformedMessage
from farfield.protocols.plan import Plan
from farfield.protocols.tensors import State

from . import backbone, stored
from .architecture import checkpoint_blocks, describe
from .head import plain_head
from .layout import Layout, Record, is_emulator
from .methods import Setting, Tuned, TuningMethod
from .split import renumbered, split

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Bench:
    """The Plan's backbone or an emulator of it, its tokenizer, and its tuning method installed.

    What is trained is in two parts: the adapter, which all clients share, and what each keeps at home, which most
    methods do not have. Both are named float32 arrays. Blocks are numbered as in the backbone, so that what is trained
    on an emulator is at home in the backbone as it is.

    Attributes:
        method: the tuning method.
        tuned: the model with the method installed, in evaluation mode.
        record: that of the emulator; None where this is the backbone.
        frozen: digest, hexadecimal, of what the method added and does not train (FFA-LoRA's A, VeRA's projections); ""
            where there is nothing. Each machine draws it from the seed and never sends it, so it must be the same.
    """

    def __init__(self, plan: Plan, folder: Path, device: torch.device | None = None) -> None:
        """Load the backbone or the emulator in `folder`.

        Raises:
            BackboneError, TuningError: the folder or the method cannot be used.
            EmulatorError: the emulator was made for another Plan, or the Plan's split does not fit the backbone.
        """
        assert isinstance(plan.tuning, TuningMethod)
        self.plan = plan
        self.method = plan.tuning
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer: PreTrainedTokenizerBase = backbone.load_tokenizer(folder)
        model, layout, self.record = loaded(plan, folder, self.device)
        before = {tensor.data_ptr() for tensor in _tensors(model).values()}
        steps = plan.training.rounds * plan.training.steps if plan.training.steps else None
        path = describe(model).blocks_path

        def named(name: str) -> str:
            return renumbered(name, path, layout.origins) if layout else name

        setting = Setting(plan.model.task, plan.training.seed, steps, layout.outer if layout else None, named)
        tuned = replace(self.method.install(model, setting), named=named)
        if plan.training.checkpointing:
            checkpoint_blocks(model)
        self.tuned: Tuned = replace(tuned, head=plain_head(tuned.model))
        self.frozen = _digest(
            {
                named(name): tensor
                for name, tensor in _tensors(self.tuned.model).items()
                if not tensor.requires_grad and tensor.data_ptr() not in before
            }
        )
        local = self.method.sharing.is_local
        trained = self.tuned.trainable()
        self._shared = {name: parameter for name, parameter in trained.items() if not local(name)}
        self._local = {name: parameter for name, parameter in trained.items() if local(name)}
        self._untrained = _values(self._local)

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        assert isinstance(pad, int)
        return pad

    def adapter(self) -> State:
        """The shared parameters as they are now: copies."""
        return _values(self._shared)

    def local(self) -> State:
        """What a client that has not trained yet keeps at home; empty where all is shared. Not to be written to."""
        return self._untrained

    def load(self, adapter: State, local: State | None = None) -> None:
        """Set what is trained, rounded to the model's number format.

        Args:
            local: what the client keeps at home; None for one that has not trained yet.

        Raises:
            MalformedMessage: names or shapes are not those of this Plan's adapter.
        """
        own = self._untrained if local is None else local
        # Apart: a sender who may name what stays at home could have it sent back.
        if not (_fits(adapter, self._shared) and _fits(own, self._local)):
            raise MalformedMessage("the adapter's tensors are not those that this Plan's tuning method trains here")
        with torch.no_grad():
            for name, parameter in (self._shared | self._local).items():
                parameter.copy_(torch.from_numpy(np.array(own[name] if name in own else adapter[name])))
        if self.tuned.settled is not None:
            self.tuned.settled()

    @contextmanager
    def round(self, number: int) -> Iterator[None]:
        """Within it only what the method trains in round `number` requires gradients."""
        parameters = self._shared | self._local
        try:
            for name, parameter in parameters.items():
                parameter.requires_grad_(self.method.sharing.trained_in(name, number))
            yield
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(True)


def loaded(plan: Plan, folder: Path, device: torch.device) -> tuple[PreTrainedModel, Layout | None, Record | None]:
    """The model in `folder` as the Plan wants it, and the layout of its blocks where not all of them are tuned.

    Raises:
        BackboneError: the folder cannot be used.
        EmulatorError: the emulator was made for another Plan, or the Plan's split does not fit the backbone.
    """
    settings: Any = {
        "task": plan.model.task,
        "dtype": plan.model.dtype,
        "labels": plan.model.labels,
        "device": device,
        "attention": backbone.attention(device, plan.data.max_length),
    }
    if is_emulator(folder):
        model, record = stored.load(folder, **settings)
        record.check(plan, folder)
        return model, record.layout, record
    model = backbone.load_model(folder, seed=plan.training.seed, **settings)
    if plan.delivery.ends is None:
        return model, None, None
    parts = split(len(describe(model).blocks), plan.delivery.ends, folder)
    return model, Layout(parts, tuple(parts.middle)), None


def _fits(state: State, parameters: Mapping[str, torch.nn.Parameter]) -> bool:
    return {name: array.shape for name, array in state.items()} == {n: tuple(p.shape) for n, p in parameters.items()}


def _values(parameters: Mapping[str, torch.nn.Parameter]) -> State:
    return {name: parameter.detach().float().cpu().numpy().copy() for name, parameter in parameters.items()}


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest() if tensors else ""
