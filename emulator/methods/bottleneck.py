"""Bottleneck adapters: a small network after each sub-layer, or beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from farfield.protocols.errors import TuningError
from farfield.protocols.sections import PositiveFloat, PositiveInt
from farfield.protocols.seeds import derive

from .method import Setting, Tuned, TuningMethod, register
from .own import frozen, like, unmergeable, write
from .sharing import Sharing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register
class Bottleneck(TuningMethod):
    """h ← h + s·U·relu(D·h) after a sub-layer (Houlsby et al. 2019, section 2.1), or h ← h + s·U·relu(D·x) beside it.

    h is what the last linear layer of attention, or of the feed-forward network, gives, before dropout and the
    residual. In the parallel form the adapter reads the sub-layer's input x (He et al. 2022, table 1; s is theirs),
    which in a model that norms first is the normed stream. D and U have biases. U and the biases are zero at first, so
    the model begins as it is.

    An adapter is not linear in x, so there is nothing to fold into the weights; and it multiplies U with D, so the mean
    is not exact.

    Attributes:
        placement: `serial`, after the sub-layer, or `parallel`, beside it.
        after: `both` sub-layers of a block, or the `feedforward` network only (Pfeiffer et al. 2021, one a block).
        width: of the bottleneck; 2·width·d values and the biases are trained for each adapter.
        scale: s.
        drop: the first so many of the tuned blocks have no adapters (AdapterDrop, Rücklé et al. 2021, section 3).
            Nothing is computed backwards through them or kept for that, and they are as fast as without.
    """

    kind: Literal["bottleneck"] = "bottleneck"
    placement: Literal["serial", "parallel"] = "serial"
    after: Literal["both", "feedforward"] = "both"
    width: PositiveInt = 32
    scale: PositiveFloat = 1.0
    drop: Annotated[int, Field(ge=0)] = 0

    @property
    def merges(self) -> bool:
        return False

    @property
    def by_example(self) -> bool:
        return True

    @property
    def sharing(self) -> Sharing:
        return Sharing(exact=False)

    def install(self, model: PreTrainedModel, setting: Setting) -> Tuned:
        import torch

        from farfield.emulator import adapters

        architecture = frozen(model, setting)
        sublayers = architecture.sublayers()
        blocks = sorted({one.block for one in sublayers})
        if self.drop >= len(blocks):
            raise TuningError(
                f"without the first {self.drop} of {len(blocks)} blocks no adapter is left",
                where="tuning.drop",
                hint=f"Give {len(blocks) - 1} at most.",
            )
        for one in sublayers:
            if one.block in blocks[: self.drop] or (one.part == "attention" and self.after == "feedforward"):
                continue
            generator = torch.Generator().manual_seed(derive(setting.seed, self.kind, setting.named(one.exit)))
            adapter = adapters.Bottleneck(architecture.hidden_size, self.width, self.scale, generator)
            leaving = model.get_submodule(one.exit)
            if self.placement == "serial":
                adapter.follow(leaving)
            else:
                adapter.accompany(model.get_submodule(one.entry), leaving)
            leaving.add_module("adapter", like(adapter, model, one.exit))
        return Tuned(model)

    def merge(self, tuned: Tuned) -> PreTrainedModel:
        raise unmergeable(self.kind, "an adapter is not linear")

    def save(self, tuned: Tuned, folder: Path) -> None:
        """In the format of `farfield.emulator.methods.own`."""
        write(self, tuned, folder)
