"""Prompt tuning: trained embeddings before those of the input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .method import Setting, register
from .peft_method import Adapter, PeftMethod, Tokens, prompt_shape, refuse_decoder_classifier, require_tokens
from .sharing import Sharing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from farfield.emulator.architecture import Architecture


@register
class PromptTuning(PeftMethod):
    """P ∈ ℝ^(p×e) before the embedded input X ∈ ℝ^(n×e) (Lester et al. 2021, section 2).

    The logits of a language model are p positions longer than its input. Position ids of the caller are not honoured.

    Attributes:
        tokens: p.
        initial: `vocabulary`, embeddings of tokens drawn at random, which the paper finds better; or `normal`.
    """

    kind: Literal["prompt-tuning"] = "prompt-tuning"
    tokens: Tokens = 20
    initial: Literal["vocabulary", "normal"] = "vocabulary"

    @property
    def merges(self) -> bool:
        return False

    @property
    def sharing(self) -> Sharing:
        return Sharing(exact=True)

    def adapter(self, model: PreTrainedModel, architecture: Architecture, setting: Setting) -> Adapter:
        from peft import PromptTuningConfig
        from peft.tuners.prompt_tuning import PromptTuningInit

        require_tokens(model, self.kind)
        refuse_decoder_classifier(model, setting, self.kind)
        initial = {"vocabulary": PromptTuningInit.SAMPLE_VOCAB, "normal": PromptTuningInit.RANDOM}[self.initial]
        shape = prompt_shape(model, architecture, self.tokens)
        return Adapter(PromptTuningConfig(**shape, prompt_tuning_init=initial))
