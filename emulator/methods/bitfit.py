"""BitFit: only biases are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .method import Setting, register
from .peft_method import Adapter, PeftMethod, Targets, names_for_peft, refuse_transposed, select
from .sharing import Sharing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from farfield.emulator.architecture import Architecture


@register
class BitFit(PeftMethod):
    """The bias b of W·x + b is trained, W is not (Ben Zaken et al. 2022, section 3).

    A frozen bias with a trained term that starts at zero beside it: the same function and the same gradient as a
    trained bias, in a form that `peft` knows (as BEFT) and that can be taken off again. The biases of norms stay.

    Where the model has linear layers with a bias, these are trained. Where it has none at all (Llama), every target
    gets a term; such an adapter cannot be merged, since the architecture has no place for a bias.

    Attributes:
        targets: `all-linear`, or names of linear layers; a named layer gets a term whether or not it has a bias.
    """

    kind: Literal["bitfit"] = "bitfit"
    targets: Targets = "all-linear"

    @property
    def merges(self) -> bool:
        return False  # a model without biases has no place for them

    @property
    def sharing(self) -> Sharing:
        return Sharing(exact=True)

    def adapter(self, model: PreTrainedModel, architecture: Architecture, setting: Setting) -> Adapter:
        from peft import BeftConfig

        linears = select(self.targets, architecture)
        refuse_transposed(linears, self.kind)
        with_bias = tuple(linear for linear in linears if linear.bias)
        if self.targets == "all-linear" and with_bias:
            linears = with_bias
        paths = tuple(linear.path for linear in linears)
        return Adapter(BeftConfig(target_modules=names_for_peft(model, architecture, paths)))
