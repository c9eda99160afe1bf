"""What a tuning method is, and the registry of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from farfield.emulator import offline  # noqa: F401 - for its effect
from farfield.protocols.sections import Training, TuningSettings
from farfield.protocols.tensors import Arrays

from .sharing import Sharing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from farfield.emulator.descent import Descent


@dataclass(frozen=True, slots=True)
class Setting:
    """What a method must know besides its own settings.

    Attributes:
        task: `causal-lm` or `sequence-classification`; the head of a classifier is new, so it is always trained.
        seed: what the initial values are drawn from, on the CPU, so that every machine draws the same.
        steps: optimiser steps that one client makes over all rounds, for methods that follow a schedule; None where the
            budget is in epochs, so that every client makes as many as its data want.
        blocks: the numbers of the blocks, counted in this model, that may be tuned; None is all.
        named: what a module or parameter of the model is called in the backbone, which may have more blocks.
        of_rank: the rank of the adapter that this one is a part of, so that both are scaled alike; None is its own.
        original: reads the weight of a layer as the backbone's files have it, by its path in the model; None where the
            model is not the backbone.
    """

    task: str
    seed: int
    steps: int | None
    blocks: tuple[int, ...] | None = None
    named: Callable[[str], str] = str
    of_rank: int | None = None
    original: Callable[[str], torch.Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Tuned:
    """A model with a method installed.

    Attributes:
        model: called like the model it was made from. Exactly the parameters that the method trains require gradients.
        before_training: called before the first step of each task. What a task does depends on nothing but the task, so
            a method forgets here whatever it has gathered before; a model may serve many clients in turn.
        after_backward: called with the number of the step (from 0, over all rounds) between backward and the optimiser.
        named: what a parameter of the model is called elsewhere; as in the model, by default.
        optimizer: makes the optimiser of the float32 values that stand behind the trained parameters, by name, where it
            is not the Plan's own.
        descent: makes what takes the steps, from the start, the Plan's section and a seed, where they do not go by
            gradients that autograd finds. The start is read there and then, and not again. The model is in evaluation
            mode.
        initial: sets the values that training begins with, where they are not there yet because finding them takes
            time. Only whoever begins a run needs it: all others are sent them.
        settled: called after the trained parameters were set, where the model has more to do about it.
        head: the frozen output layer of a language model, where its logits are the hidden states times its weight and
            nothing else (`farfield.emulator.head`); whoever loads the model finds out.
    """

    model: torch.nn.Module
    before_training: Callable[[], None] | None = field(default=None, kw_only=True)
    after_backward: Callable[[int], None] | None = field(default=None)
    named: Callable[[str], str] = field(default=str, kw_only=True)
    optimizer: Callable[[Training, Mapping[str, torch.Tensor]], torch.optim.Optimizer] | None = field(
        default=None, kw_only=True
    )
    descent: Callable[[Arrays, Training, int], Descent] | None = field(default=None, kw_only=True)
    initial: Callable[[], None] | None = field(default=None, kw_only=True)
    settled: Callable[[], None] | None = field(default=None, kw_only=True)
    head: torch.nn.Module | None = field(default=None, kw_only=True)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters by name, in the order of the names: what a round sends out and gets back."""
        return dict(sorted((self.named(name), p) for name, p in self.model.named_parameters() if p.requires_grad))


class TuningMethod(TuningSettings, ABC):
    """The settings of one method, which can install it. Immutable; a model is changed, never the method."""

    @property
    @abstractmethod
    def sharing(self) -> Sharing:
        """How the clients' copies become one. Known from the settings alone, without a model."""

    @abstractmethod
    def install(self, model: PreTrainedModel, setting: Setting) -> Tuned:
        """Install the method in `model`, which it takes over. Added weights are in the model's own dtype.

        Raises:
            TuningError: the method does not fit this model.
        """

    @abstractmethod
    def merge(self, tuned: Tuned) -> PreTrainedModel:
        """The backbone with what was trained folded into its own weights; `tuned` is used up.

        Raises:
            TuningError: the method has nothing that could be folded in (a prompt, for instance).
        """

    @abstractmethod
    def save(self, tuned: Tuned, folder: Path) -> None:
        """Write what was trained to `folder`, in the format of `peft` where `peft` has the method; safetensors only."""


_registry: dict[str, type[TuningMethod]] = {}

Method = TypeVar("Method", bound=type[TuningMethod])


def register(method: Method) -> Method:
    """Class decorator: make the method known under the default value of its `kind`."""
    kind = method.__pydantic_fields__["kind"].default
    if kind in _registry:
        raise ValueError(f"two tuning methods are called {kind!r}: {_registry[kind].__name__} and {method.__name__}")
    _registry[kind] = method
    return method


def registered() -> Mapping[str, type[TuningMethod]]:
    """All methods by their `kind`; hand it to `farfield.protocols.plan.parse`."""
    return MappingProxyType(_registry)
