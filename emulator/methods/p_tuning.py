"""P-tuning: virtual tokens whose embeddings a small network makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from .method import Setting, register
from .peft_method import Adapter, PeftMethod, Tokens, prompt_shape, refuse_decoder_classifier, require_tokens
from .sharing import Sharing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from farfield.emulator.architecture import Architecture


@register
class PTuning(PeftMethod):
    """Embeddings h_i = MLP(p_i) before those of the input (Liu et al. 2021, section 3.1).

    The network helps only in training: a saved adapter holds the h_i. The logits of a language model are longer than
    its input by `tokens` positions. Position ids of the caller are not honoured.

    Attributes:
        tokens: how many virtual tokens.
        hidden_size: width of the network; None for that of the model.
    """

    kind: Literal["p-tuning"] = "p-tuning"
    tokens: Tokens = 20
    hidden_size: Annotated[int, Field(ge=1)] | None = None

    @property
    def merges(self) -> bool:
        return False

    @property
    def sharing(self) -> Sharing:
        return Sharing(exact=False)

    def adapter(self, model: PreTrainedModel, architecture: Architecture, setting: Setting) -> Adapter:
        from peft import PromptEncoderConfig

        require_tokens(model, self.kind)
        refuse_decoder_classifier(model, setting, self.kind)
        width = self.hidden_size or architecture.hidden_size
        shape = prompt_shape(model, architecture, self.tokens)
        return Adapter(PromptEncoderConfig(**shape, encoder_hidden_size=width))
