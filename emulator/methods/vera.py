"""VeRA: random matrices that all layers share and nobody trains, and two trained vectors in each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from .method import Setting, register
from .peft_method import Adapter, Dropout, PeftMethod, Rank, Targets, names_for_peft, select, transposed
from .sharing import Sharing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from farfield.emulator.architecture import Architecture


@register
class Vera(PeftMethod):
    """W + Λ_b·B·Λ_d·A, where only the diagonals b (zero at first) and d are trained (Kopiczko et al. 2024, eq. 2).

    A and B are drawn once from the seed, as large as the largest target; a smaller layer uses their first rows and
    columns. They are saved with the adapter, so that it does not depend on how a machine draws numbers, but are no part
    of an update.

    Attributes:
        rank: r; it can be far larger than LoRA's, since only r + d values of a layer are trained.
        d_initial: what d starts at.
        dropout: probability with which values of the input of A are dropped in training.
        targets: `all-linear`, or names of linear layers.
    """

    kind: Literal["vera"] = "vera"
    rank: Rank = 256
    d_initial: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    dropout: Dropout = 0.0
    targets: Targets = "all-linear"

    @property
    def sharing(self) -> Sharing:
        return Sharing(exact=False)

    def adapter(self, model: PreTrainedModel, architecture: Architecture, setting: Setting) -> Adapter:
        from peft import VeraConfig

        linears = select(self.targets, architecture)
        config = VeraConfig(
            r=self.rank,
            d_initial=self.d_initial,
            vera_dropout=self.dropout,
            target_modules=names_for_peft(model, architecture, tuple(linear.path for linear in linears)),
            fan_in_fan_out=transposed(linears),
            projection_prng_key=setting.seed,
            save_projection=True,
        )
        return Adapter(config)
