"""MeZO: training by what the loss does along random directions, in the memory of inference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

from pydantic import Field, model_validator

from farfield.protocols.sections import Training
from farfield.protocols.tensors import Arrays

from .full import Full
from .lora import Lora
from .method import Setting, Tuned, TuningMethod, register
from .peft_method import Alpha, Rank, Targets
from .sharing import Sharing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from farfield.emulator.descent import Descent

Epsilon = Annotated[float, Field(gt=0, le=1)]


@register
class Mezo(TuningMethod):
    """θ ← θ - ηgz with g = (L(θ + εz) - L(θ - εz)) / 2ε (Malladi et al. 2023, algorithm 1); z has random signs.

    Two forward passes a step and nothing backward: what is held besides the weights is one block of them, and the
    activations of one. η is `training.learning_rate`, and |g| is clipped to `training.max_grad_norm`, so that no value
    moves by more than their product. The loss of a step is the mean of its two.

    bfloat16 weights are rounded stochastically while they move. The update is not made from them: it is -Σ ηₜgₜzₜ, made
    anew in float32, and as large as what is trained. 'fedkseed' sends the scalars instead.

    Attributes:
        over: `full`, all weights of the blocks as in the method of that name; or `lora`, what LoRA trains.
        epsilon: ε.
        rank: r, of LoRA.
        alpha: α, of LoRA.
        targets: of LoRA: `all-linear`, or names of linear layers.
    """

    kind: Literal["mezo"] = "mezo"
    over: Literal["full", "lora"] = "full"
    epsilon: Epsilon = 1e-3
    rank: Rank = 8
    alpha: Alpha = 16
    targets: Targets = "all-linear"

    @model_validator(mode="after")
    def _settings_of_what_is_trained(self) -> Self:
        for name in ("rank", "alpha", "targets"):
            if self.over == "full" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f'{name!r} goes with over = "lora"')
        return self

    @property
    def by_gradient(self) -> bool:
        return False

    @property
    def on_quantised(self) -> bool:
        return self.over == "lora"

    @property
    def adapter_of(self) -> str:
        return self._trained().adapter_of

    @property
    def adapter_rank(self) -> int | None:
        return self._trained().adapter_rank

    @property
    def sharing(self) -> Sharing:
        return self._trained().sharing

    def install(self, model: PreTrainedModel, setting: Setting) -> Tuned:
        from farfield.emulator.architecture import describe
        from farfield.emulator.zeroth_order import Directions, SlopeDescent, refuse_packed

        architecture = describe(model)
        if self.over == "full":
            refuse_packed(model, architecture.within(setting.blocks).linears, self.kind)
        tuned = self._trained().install(model, setting)
        inner: Any = tuned.model if self.over == "full" else cast("Any", tuned.model).get_base_model()
        modules = [*architecture.blocks, *(inner.get_submodule(path) for path in architecture.head)]

        def descent(start: Arrays, training: Training, seed: int) -> Descent:
            trained = {setting.named(name): one for name, one in tuned.model.named_parameters() if one.requires_grad}
            _set(trained, start)
            directions = Directions(modules, {parameter: name for name, parameter in trained.items()}, seed)
            return SlopeDescent(directions, training, seed, self.epsilon, int, directions.total)

        return Tuned(tuned.model, descent=descent)

    def merge(self, tuned: Tuned) -> PreTrainedModel:
        return self._trained().merge(tuned)

    def save(self, tuned: Tuned, folder: Path) -> None:
        """As the method with gradients does it."""
        self._trained().save(tuned, folder)

    def _trained(self) -> Full | Lora:
        """The method that trains the same with gradients."""
        return Full() if self.over == "full" else Lora(rank=self.rank, alpha=self.alpha, targets=self.targets)


def _set(parameters: dict[str, torch.nn.Parameter], start: Arrays) -> None:
    import numpy as np
    import torch

    for name, parameter in parameters.items():
        parameter.data.copy_(torch.from_numpy(np.array(start[name])))
