"""Prefix tuning: trained keys and values before those of the input, in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from farfield.protocols.errors import TuningError

from .method import Setting, register
from .peft_method import Adapter, PeftMethod, Tokens, require_tokens
from .sharing import Sharing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from farfield.emulator.architecture import Architecture


@register
class PrefixTuning(PeftMethod):
    """P_θ, p keys and values before those of the input in each layer (Li & Liang 2021, eq. 3).

    They enter as a key-value cache. Hence decoders only, and no gradient checkpointing, which forbids a cache.

    Attributes:
        tokens: p.
        projection: make them from a smaller matrix with an MLP, as the paper does (section 4.3): steadier, and far more
            to train and to send. A saved adapter then holds its results.
        hidden_size: width of that MLP; None for that of the keys of one layer.
    """

    kind: Literal["prefix-tuning"] = "prefix-tuning"
    tokens: Tokens = 20
    projection: bool = False
    hidden_size: Annotated[int, Field(ge=1)] | None = None

    @property
    def merges(self) -> bool:
        return False

    @property
    def checkpoints(self) -> bool:
        return False

    @property
    def by_example(self) -> bool:
        return True

    @property
    def by_block(self) -> bool:
        return False

    @property
    def sharing(self) -> Sharing:
        return Sharing(exact=not self.projection)

    def adapter(self, model: PreTrainedModel, architecture: Architecture, setting: Setting) -> Adapter:
        from peft import PrefixTuningConfig

        from farfield.emulator.architecture import key_value_cache

        require_tokens(model, self.kind)
        cache = key_value_cache(model)
        if cache is None:
            raise TuningError(
                "a prefix enters as earlier keys and values, and an encoder takes none",
                where=type(model).__name__,
                hint="Use 'prompt-tuning' or 'lora' with this model.",
            )
        config = PrefixTuningConfig(
            num_virtual_tokens=self.tokens,
            num_layers=cache.layers,
            num_attention_heads=cache.heads,
            token_dim=cache.heads * cache.head_width,
            prefix_projection=self.projection,
            encoder_hidden_size=self.hidden_size or cache.heads * cache.head_width,
        )
        return Adapter(config)
