"""LoKr: the change of a matrix as a Kronecker product of small ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from .method import Setting, register
from .peft_method import Adapter, Alpha, Dropout, PeftMethod, Rank, Targets, names_for_peft, refuse_transposed, select
from .sharing import Sharing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from farfield.emulator.architecture import Architecture


@register
class LoKr(PeftMethod):
    """W + (α / r)·C ⊗ (B·A) (Yeh et al. 2024, section 3.2), after KronA (Edalati et al. 2022).

    C is the left factor w₁; B·A, of rank r, is the right factor w₂, which is kept whole where its rank would be no
    saving.

    Attributes:
        rank: r.
        alpha: α.
        factor: the smaller side of w₁ at most; -1 for the most even split.
        decompose_both: w₁ too as a product of rank r.
        rank_dropout: probability with which rows of the change are dropped in training.
        targets: `all-linear`, or names of linear layers.
    """

    kind: Literal["lokr"] = "lokr"
    rank: Rank = 8
    alpha: Alpha = 8
    factor: Literal[-1] | Annotated[int, Field(ge=2)] = -1
    decompose_both: bool = False
    rank_dropout: Dropout = 0.0
    targets: Targets = "all-linear"

    @property
    def sharing(self) -> Sharing:
        return Sharing(exact=False)

    def adapter(self, model: PreTrainedModel, architecture: Architecture, setting: Setting) -> Adapter:
        from peft import LoKrConfig

        linears = select(self.targets, architecture)
        refuse_transposed(linears, self.kind)
        config = LoKrConfig(
            r=self.rank,
            alpha=self.alpha,
            decompose_factor=self.factor,
            decompose_both=self.decompose_both,
            rank_dropout=self.rank_dropout,
            target_modules=names_for_peft(model, architecture, tuple(linear.path for linear in linears)),
        )
        return Adapter(config)
