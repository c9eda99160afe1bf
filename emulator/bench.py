"""A bench: a backbone, or an emulator of it, with a tuning method installed; loaded once and used by all work here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from farfield.protocols.errors import MalformedMessage, TuningError
from farfield.protocols.plan import Plan
from farfield.protocols.tensors import Arrays, Made, State

from . import backbone, factors, few_bits, stored
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
        plan: what the coordinator promised; its digest is what tasks refer to.
        local: what is worked by here: the same, or the Plan with one of its alternatives put in.
        method: the tuning method that is installed.
        tuned: the model with the method installed, in evaluation mode.
        record: that of the emulator; None where this is the backbone.
        frozen: digest, hexadecimal, of what the method added and does not train (FFA-LoRA's A, VeRA's projections); ""
            where there is nothing. Each machine draws it from the seed and never sends it, so it must be the same.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        device: torch.device | None = None,
        local: Plan | None = None,
        *,
        plain: bool = False,
    ) -> None:
        """Load the backbone or the emulator in `folder`.

        Args:
            local: `plan.alternative(…)`, where this machine takes one.
            plain: hold the values of a quantised backbone in plain matrices, which can be added to; see `merged`.

        Raises:
            BackboneError, TuningError: the folder or the method cannot be used.
            EmulatorError: the emulator was made for another Plan, or the Plan's split does not fit the backbone.
        """
        self.plan, self.local, self._plain = plan, local or plan, plain
        assert isinstance(self.local.tuning, TuningMethod)
        self.method = self.local.tuning
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer: PreTrainedTokenizerBase = backbone.load_tokenizer(folder)
        model, layout, self.record = loaded(self.local, folder, self.device, promised=plan, plain=plain)
        before = {tensor.data_ptr() for tensor in _tensors(model).values()}
        steps = plan.training.rounds * plan.training.steps if plan.training.steps else None
        path = describe(model).blocks_path

        def named(name: str) -> str:
            return renumbered(name, path, layout.origins) if layout else name

        blocks = layout.outer if layout else None
        original = None if self.record else partial(backbone.matrix, folder)
        setting = Setting(plan.model.task, plan.training.seed, steps, blocks, named, plan.tuning.adapter_rank, original)
        tuned = replace(self.method.install(model, setting), named=named)
        if self.local.training.checkpointing:
            checkpoint_blocks(model)
        self.tuned: Tuned = replace(tuned, head=plain_head(tuned.model))
        self.frozen = _digest(
            {
                named(name): tensor
                for name, tensor in _tensors(self.tuned.model).items()
                if not tensor.requires_grad and tensor.data_ptr() not in before
            }
        )
        at_home = self.method.sharing.is_local
        trained = self.tuned.trainable()
        self._shared = {name: parameter for name, parameter in trained.items() if not at_home(name)}
        self._local = {name: parameter for name, parameter in trained.items() if at_home(name)}
        self._untrained = _values(self._local)
        self._initial = self.tuned.initial

    def under(self, plan: Plan) -> Bench:
        """This bench at work under another Plan with the same model and tuning; they share what is loaded.

        Raises:
            TuningError: the Plan wants another model, method or way to train it.
        """
        for part in ("model", "tuning", "delivery", "emulator"):
            if getattr(plan, part) != getattr(self.plan, part):
                raise TuningError(f"a bench of another [{part}] than the Plan's")
        if plan.training.checkpointing != self.plan.training.checkpointing or self.local is not self.plan:
            raise TuningError("a bench that is worked at in another way than the Plan's")
        other = copy(self)
        other.plan = other.local = plan
        return other

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        assert isinstance(pad, int)
        return pad

    def adapter(self) -> State:
        """The shared parameters as they are now: copies."""
        if self._initial is not None:
            self._initial()
            self._initial = None
        return _values(self._shared)

    def own(self) -> State:
        """What a client that has not trained yet keeps at home; empty where all is shared. Not to be written to."""
        return self._untrained

    def current(self) -> Made:
        """All parameters that are trained here as they are now, each when it is asked for."""
        trained = self._shared | self._local

        def make(name: str) -> NDArray[np.float32]:
            return _value(trained[name])

        return Made(trained, make)

    def part(self, adapter: Arrays) -> Arrays:
        """What of the Plan's `adapter` is trained here: all of it, or of its factors the first of their ranks."""
        whole, rank = self.plan.tuning.adapter_rank, self.method.adapter_rank
        return adapter if whole is None or rank is None else factors.part(adapter, whole, rank)

    def whole(self, update: Arrays) -> Arrays:
        """An update of what is trained here as one of the Plan's adapter: what is not trained here does not change."""
        rank = self.plan.tuning.adapter_rank
        return update if rank is None else factors.padded(update, rank)

    def load(self, adapter: Arrays, local: Arrays | None = None) -> None:
        """Set what is trained, rounded to the model's number format.

        Args:
            adapter: what is trained here, see `part`.
            local: what the client keeps at home; None for one that has not trained yet.

        Raises:
            MalformedMessage: names or shapes are not those of this Plan's adapter.
        """
        own = self._untrained if local is None else local
        # Apart: a sender who may name what stays at home could have it sent back.
        if not (_fits(adapter, self._shared) and _fits(own, self._local)):
            raise MalformedMessage("the adapter's tensors are not those that this Plan's tuning method trains here")
        self._initial = None
        with torch.no_grad():
            for name, parameter in (self._shared | self._local).items():
                parameter.copy_(torch.from_numpy(np.array(own[name] if name in own else adapter[name])))
        if self.tuned.settled is not None:
            self.tuned.settled()

    def merged(self) -> PreTrainedModel:
        """The model with what was trained folded into its weights; the bench is used up.

        What was tuned on a quantised backbone fits the values that its few bits stand for. They are what it is added
        to, and the sum is in the Plan's own number format.

        Raises:
            TuningError: the method has nothing that could be folded in, or the bench is not `plain`.
        """
        if self.local.model.quantization != "none" and not self._plain:
            raise TuningError("nothing can be added to matrices of few bits; a plain bench is wanted")
        return self.method.merge(self.tuned)

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


def loaded(
    plan: Plan, folder: Path, device: torch.device, *, promised: Plan | None = None, plain: bool = False
) -> tuple[PreTrainedModel, Layout | None, Record | None]:
    """The model in `folder` as the Plan wants it, and the layout of its blocks where not all of them are tuned.

    Of an emulator the blocks that are the backbone's own are quantised as the backbone is; what stands for the others
    is in the format that it was made in.

    Args:
        promised: the Plan that an emulator was made for, where `plan` is an alternative of it.
        plain: hold the values that quantised matrices stand for in plain ones.

    Raises:
        BackboneError: the folder cannot be used.
        EmulatorError: the emulator was made for another Plan, or the Plan's split does not fit the backbone.
    """
    quantization = plan.model.quantization
    settings: Any = {
        "task": plan.model.task,
        "dtype": plan.model.dtype,
        "labels": plan.model.labels,
        "device": device,
        "attention": backbone.attention(device, plan.data.max_length),
    }
    if is_emulator(folder):
        model, record = stored.load(folder, **settings)
        record.check(promised or plan, folder)
        if quantization != "none":
            (few_bits.round_values if plain else few_bits.round_layers)(model, quantization, record.layout.outer)
        return model, record.layout, record
    held = "none" if plain else quantization
    model = backbone.load_model(folder, seed=plan.training.seed, quantization=held, **settings)
    if plain and quantization != "none":
        few_bits.round_values(model, quantization)
    if plan.delivery.ends is None:
        return model, None, None
    parts = split(len(describe(model).blocks), plan.delivery.ends, folder)
    return model, Layout(parts, tuple(parts.middle)), None


def _fits(state: Arrays, parameters: Mapping[str, torch.nn.Parameter]) -> bool:
    return {name: array.shape for name, array in state.items()} == {n: tuple(p.shape) for n, p in parameters.items()}


def _values(parameters: Mapping[str, torch.nn.Parameter]) -> State:
    return {name: _value(parameter) for name, parameter in parameters.items()}


def _value(parameter: torch.nn.Parameter) -> NDArray[np.float32]:
    value: NDArray[np.float32] = parameter.detach().float().cpu().numpy().copy()
    return value


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest() if tensors else ""
