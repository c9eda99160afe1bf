"""Full fine-tuning of blocks: every weight in them is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from farfield.protocols.errors import TuningError

from .method import Setting, Tuned, TuningMethod, register
from .sharing import Sharing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register
class Full(TuningMethod):
    """All parameters of the blocks that the Plan leaves to be tuned, as in Offsite-Tuning (Xiao et al. 2023).

    With `delivery.first` and `delivery.last` these are the blocks at both ends, else all of them. Embeddings, the final
    norm and the head of a language model stay as they are; a classifier's head is trained.

    The change of the model is the change of what is trained, so the mean is exact. What travels is as large as the
    blocks.
    """

    kind: Literal["full"] = "full"

    @property
    def on_quantised(self) -> bool:
        return False

    @property
    def sharing(self) -> Sharing:
        return Sharing(exact=True)

    def install(self, model: PreTrainedModel, setting: Setting) -> Tuned:
        from farfield.emulator.architecture import describe

        architecture = describe(model)
        if setting.task == "sequence-classification" and not architecture.head:
            raise TuningError("the model has no classification head", where=type(model).__name__)
        model.requires_grad_(False)
        for number, block in enumerate(architecture.blocks):
            if setting.blocks is None or number in setting.blocks:
                block.requires_grad_(True)
        if setting.task == "sequence-classification":
            for path in architecture.head:
                model.get_submodule(path).requires_grad_(True)
        return Tuned(model)

    def merge(self, tuned: Tuned) -> PreTrainedModel:
        return cast("PreTrainedModel", tuned.model.requires_grad_(False))

    def save(self, tuned: Tuned, folder: Path) -> None:
        """Write the trained weights, by their names in the model, as `trained.safetensors`; `peft` has no such file."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: one.detach().cpu().contiguous().clone() for name, one in tuned.trainable().items()}
        save_file(tensors, folder / "trained.safetensors", metadata={"format": "pt"})
