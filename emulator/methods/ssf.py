"""SSF: a learned scale and shift of what each layer gives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from farfield.protocols.errors import TuningError

from .method import Setting, Tuned, TuningMethod, register
from .own import frozen, like, write
from .peft_method import Targets, select
from .sharing import Sharing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register
class Ssf(TuningMethod):
    """y = γ ⊙ x + β for the output x of each layer (Lian et al. 2022, eq. 3), with γ one and β zero at first.

    The layers are those of the blocks, linear ones and norms; the paper also has embeddings and the final norm. Once
    trained they go into the layer: W ← diag(γ)·W and b ← γ ⊙ b + β (section 3.3), which is linear in γ and β, so the
    mean is exact. Where a layer has no bias β has no place: such a model can be merged if it was trained with
    `shift = "with-bias"`.

    For the gradient of γ each x is kept, so this trains few values but saves no memory.

    Attributes:
        targets: `all-linear`, or names of linear layers.
        norms: whether the norms of the blocks are scaled too.
        shift: `everywhere` has a β at each of them, `with-bias` only where the layer has a bias.
    """

    kind: Literal["ssf"] = "ssf"
    targets: Targets = "all-linear"
    norms: bool = True
    shift: Literal["everywhere", "with-bias"] = "everywhere"

    @property
    def merges(self) -> bool:
        return False  # a shift needs a bias

    @property
    def sharing(self) -> Sharing:
        return Sharing(exact=True)

    def install(self, model: PreTrainedModel, setting: Setting) -> Tuned:
        from farfield.emulator.adapters import Scaled

        architecture = frozen(model, setting)
        widths = {
            linear.path: (linear.out_features, linear.transposed) for linear in select(self.targets, architecture)
        }
        if self.norms:
            widths |= dict.fromkeys(architecture.norms(), (architecture.hidden_size, False))
        for path, (width, transposed) in widths.items():
            layer = model.get_submodule(path)
            shift = self.shift == "everywhere" or getattr(layer, "bias", None) is not None
            scaled = like(Scaled(layer, width, shift=shift, transposed=transposed), model, path)
            model.set_submodule(path, scaled)
        return Tuned(model)

    def merge(self, tuned: Tuned) -> PreTrainedModel:
        from farfield.emulator.adapters import Scaled

        model = cast("PreTrainedModel", tuned.model)
        found = {path: module for path, module in model.named_modules() if isinstance(module, Scaled)}
        for path, scaled in found.items():
            if not scaled.fits():
                raise TuningError(
                    "the architecture has no bias here that a shift could be folded into",
                    where=path,
                    hint='Train with tuning.shift = "with-bias", or export the adapter instead, without --merged.',
                )
        for path, scaled in found.items():
            model.set_submodule(path, scaled.folded())
        return model.requires_grad_(False)

    def save(self, tuned: Tuned, folder: Path) -> None:
        """In the format of `farfield.emulator.methods.own`."""
        write(self, tuned, folder)
