"""(IA)³: each key, value and hidden feature of the feed-forward networks times a learned scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from farfield.protocols.errors import TuningError

from .method import Setting, register
from .peft_method import Adapter, Names, PeftMethod, named, names_for_peft, select, transposed
from .sharing import Sharing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from farfield.emulator.architecture import Architecture


@register
class Ia3(PeftMethod):
    """Scales l_k, l_v and l_ff, which start at one (Liu et al. 2022, section 3.3).

    Keys and values are scaled where their layers end, the hidden features of a feed-forward network where its second
    matrix begins. A model that makes queries, keys and values with one fused layer has all three scaled.

    Attributes:
        targets: `keys-values-feedforward`; or `all-linear`; or names of linear layers. Second matrices of feed-forward
            networks among them are scaled at their input, all others at their output.
    """

    kind: Literal["ia3"] = "ia3"
    targets: Annotated[
        Literal["keys-values-feedforward", "all-linear"] | Names, named("keys-values-feedforward", "all-linear")
    ] = "keys-values-feedforward"

    @property
    def sharing(self) -> Sharing:
        return Sharing(exact=True)

    def adapter(self, model: PreTrainedModel, architecture: Architecture, setting: Setting) -> Adapter:
        from peft import IA3Config

        feedforward = architecture.feedforward_outputs()
        if self.targets == "keys-values-feedforward":
            if not architecture.keys_and_values():
                raise TuningError(
                    "cannot tell which layers make keys and values",
                    where=type(model).__name__,
                    hint="Name them in tuning.targets.",
                )
            wanted = {*architecture.keys_and_values(), *feedforward}
            linears = tuple(linear for linear in architecture.linears if linear.path in wanted)
        else:
            linears = select(self.targets, architecture)
        paths = tuple(linear.path for linear in linears)
        at_input = tuple(path for path in paths if path in feedforward)
        config = IA3Config(
            target_modules=names_for_peft(model, architecture, paths),
            feedforward_modules=names_for_peft(model, architecture, at_input),
            fan_in_fan_out=transposed(linears),
        )
        return Adapter(config)
