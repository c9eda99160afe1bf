"""What the methods that `peft` implements have in common: installing, merging and saving, written once.

A method's own file says what is particular to it, as an `Adapter`; nothing here is overridden.
"""

from __future__ import annotations

import copy
import re
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, final

from pydantic import BeforeValidator, Field

from farfield.protocols.errors import TuningError, did_you_mean

from .method import Setting, Tuned, TuningMethod

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from farfield.emulator.architecture import Architecture, Linear

# TOML has lists only; a tuple keeps the settings immutable.
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1, strict=False)]


def named(*words: str) -> BeforeValidator:
    """Says in one sentence what may stand for targets, where the union's own errors would name its branches."""

    def check(value: object) -> object:
        names = isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value)
        if value not in words and not names:
            choices = " or ".join(f'"{word}"' for word in words)
            raise ValueError(f'give {choices}, or a list of layer names such as ["q_proj", "v_proj"]')
        return value

    return BeforeValidator(check)


Targets = Annotated[Literal["all-linear"] | Names, named("all-linear")]
"""`all-linear` is every linear layer of every block; a name stands for all layers whose path ends with it."""

Rank = Annotated[int, Field(ge=1)]
Alpha = Annotated[int, Field(ge=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Tokens = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, slots=True)
class Adapter:
    """One method, fitted to one model.

    Attributes:
        config: what `peft` is to install.
        frozen: a pattern; adapter parameters whose name it is found in are not trained.
        installed: is handed the model that `peft` has made, before anybody computes with it.
        before_training, after_backward, initial: become those of `Tuned`, with the model that `peft` made as first
            argument.
    """

    config: PeftConfig
    frozen: str | None = None
    installed: Callable[[PeftModel], None] | None = None
    before_training: Callable[[PeftModel], None] | None = None
    after_backward: Callable[[PeftModel, int], None] | None = None
    initial: Callable[[PeftModel], None] | None = None


class PeftMethod(TuningMethod):
    """A tuning method that `peft` implements."""

    @abstractmethod
    def adapter(self, model: PreTrainedModel, architecture: Architecture, setting: Setting) -> Adapter:
        """The method fitted to `model`, which is left as it is.

        Raises:
            TuningError: the method does not fit this model.
        """

    @final
    def install(self, model: PreTrainedModel, setting: Setting) -> Tuned:
        import peft
        import torch

        from farfield.emulator.architecture import describe

        architecture = describe(model).within(setting.blocks)
        if setting.task == "sequence-classification" and not architecture.head:
            raise TuningError("the model has no classification head", where=type(model).__name__)
        adapter = self.adapter(model, architecture, setting)
        config, dtype = cast("Any", adapter.config), model.dtype
        config.task_type = _task_type(model, setting)
        if setting.task == "sequence-classification":
            config.modules_to_save = list(architecture.head)
        # A path of this machine has no place in an adapter, and peft looks names up on the hub.
        config.base_model_name_or_path = None
        model.name_or_path = ""

        model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]), _without_idle_warnings():
            # `torch.manual_seed` would seed the generators of accelerators too, which fork_rng does not restore here.
            torch.default_generator.manual_seed(setting.seed)
            try:
                tuned = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
            except ValueError as error:
                raise TuningError(f"peft cannot install {self.kind!r}: {error}", where=type(model).__name__) from error
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
                parameter.requires_grad_(adapter.frozen is None or re.search(adapter.frozen, name) is None)
        if adapter.installed is not None:
            adapter.installed(tuned)
        before, after, initial = adapter.before_training, adapter.after_backward, adapter.initial
        return Tuned(
            tuned,
            before_training=None if before is None else lambda: before(tuned),
            after_backward=None if after is None else lambda step: after(tuned, step),
            initial=None if initial is None else lambda: initial(tuned),
        )

    @final
    def merge(self, tuned: Tuned) -> PreTrainedModel:
        from peft.utils import ModulesToSaveWrapper

        model = cast("PeftModel", tuned.model)
        if model.active_peft_config.is_prompt_learning:
            raise TuningError(
                f"a prompt has nothing to fold into the weights: {self.kind!r} stands before the input",
                hint="Save the adapter instead and load it with peft beside the backbone.",
            )
        for name, layer in model.named_modules():
            if hasattr(layer, "beft_bias") and layer.get_base_layer().bias is None:
                raise TuningError(
                    "the architecture has no bias here that a trained one could be folded into",
                    where=name.removeprefix("base_model.model."),
                    hint="Save the adapter instead and load it with peft beside the backbone.",
                )
        # `peft` puts a trained head back by its weight; the head of RoBERTa, two layers deep, has none of its own.
        for name, wrapper in list(model.named_modules()):
            if isinstance(wrapper, ModulesToSaveWrapper):
                head = wrapper.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
                model.set_submodule(name, head)
        try:
            # Checking each merged weight before it replaces the old one costs a copy of one layer.
            merged = model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise TuningError(f"the adapter cannot be folded in: {error}") from error
        return cast("PreTrainedModel", merged.requires_grad_(False))

    @final
    def save(self, tuned: Tuned, folder: Path) -> None:
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        model = cast("PeftModel", tuned.model)
        # Not `save_pretrained`: it compares the embeddings with those of the hub and writes a card with local paths.
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        config = copy.deepcopy(model.active_peft_config)
        config.inference_mode, config.base_model_name_or_path = True, None
        for key, value in vars(config).items():
            if isinstance(value, set):  # whose order, and so the file's digest, would change from process to process
                setattr(config, key, sorted(value))
        folder.mkdir(parents=True, exist_ok=True)
        # Contiguous copies: safetensors stores neither views nor one memory under two names.
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(state.items())}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(folder), auto_mapping_dict=_auto_mapping(model, config))


def select(targets: Targets, architecture: Architecture) -> tuple[Linear, ...]:
    """The linear layers that `targets` stands for, sorted by path.

    Raises:
        TuningError: a name matches no linear layer of the blocks.
    """
    if targets == "all-linear":
        return architecture.linears
    for wanted in targets:
        if not any(_ends_with(linear.path, wanted) for linear in architecture.linears):
            known = {_within_block(linear.path, architecture) for linear in architecture.linears}
            known |= {path.rpartition(".")[2] for path in known}
            raise TuningError(
                f"no linear layer of the blocks is called {wanted!r}",
                where="tuning.targets",
                hint=did_you_mean(wanted, known),
            )
    return tuple(
        linear for linear in architecture.linears if any(_ends_with(linear.path, wanted) for wanted in targets)
    )


def names_for_peft(model: PreTrainedModel, architecture: Architecture, paths: tuple[str, ...]) -> list[str]:
    """The shortest names by which `peft`, which compares endings, finds exactly `paths`; sorted.

    `q_proj` where that is unambiguous, `output.dense` where a pooler also has a `dense`, full paths as the last resort.
    """
    everything = [path for path, _ in model.named_modules()]
    exactly = set(paths)
    for shorten in (_last_part, _within_block):
        names = {shorten(path, architecture) for path in paths}
        if {path for path in everything if any(_ends_with(path, name) for name in names)} == exactly:
            return sorted(names)
    return sorted(paths)


def transposed(linears: tuple[Linear, ...]) -> bool:
    """Whether the layers store their weight as (in, out): `fan_in_fan_out` of `peft`.

    Raises:
        TuningError: some do and some do not, which one adapter cannot express.
    """
    if len({linear.transposed for linear in linears}) > 1:
        raise TuningError("some targets store their weight as (in, out) and some as (out, in); target one kind only")
    return linears[0].transposed


def refuse_transposed(linears: tuple[Linear, ...], kind: str) -> None:
    """Raises TuningError if a layer is a `Conv1D`, for methods that `peft` implements for `nn.Linear` only."""
    for linear in linears:
        if linear.transposed:
            raise TuningError(
                f"peft implements {kind!r} for nn.Linear only, and this layer is a Conv1D",
                where=linear.path,
                hint="Use 'lora' or 'ia3' with this model.",
            )


def require_tokens(model: PreTrainedModel, kind: str) -> None:
    """Raises TuningError if the model's input is not token ids: virtual tokens need text to stand before."""
    if model.main_input_name != "input_ids":
        raise TuningError(f"{kind!r} puts virtual tokens before the text, and this model reads {model.main_input_name}")


def prompt_shape(model: PreTrainedModel, architecture: Architecture, tokens: int) -> dict[str, Any]:
    """What every prompt configuration must know; `peft` would guess it from keys that not every family has."""
    return {
        "num_virtual_tokens": tokens,
        # Not the hidden size: some models (OPT-350m) embed in fewer dimensions and project.
        "token_dim": int(cast("Any", model.get_input_embeddings()).weight.shape[1]),
        "num_layers": len(architecture.blocks),
        "num_attention_heads": int(model.config.num_attention_heads),
    }


def refuse_decoder_classifier(model: PreTrainedModel, setting: Setting, kind: str) -> None:
    """Raises TuningError for classifiers that read their answer at the last token.

    They find it by looking for padding in the token ids. With virtual tokens they get embeddings instead and take the
    last position whatever it holds: on a padded batch the answer would be that of the padding.
    """
    from farfield.emulator.architecture import key_value_cache

    if setting.task == "sequence-classification" and key_value_cache(model) is not None:
        raise TuningError(
            f"{kind!r} hides the token ids by which a decoder with a classification head finds the last token",
            where=type(model).__name__,
            hint="Use 'prefix-tuning', or a method that works inside the blocks such as 'lora'.",
        )


def _task_type(model: PreTrainedModel, setting: Setting) -> str | None:
    """`peft`'s name of the task; None, its plain wrapper, where the input is not text."""
    if model.main_input_name != "input_ids":
        return None
    return {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}[setting.task]


def _auto_mapping(model: PeftModel, config: PeftConfig) -> Mapping[str, str] | None:
    """What `peft` writes so that an adapter without a task finds the class of its backbone again."""
    if config.task_type is not None:
        return None
    base: type[Any] = type(model.get_base_model())
    return {"base_model_class": base.__name__, "parent_library": base.__module__}


@contextmanager
def _without_idle_warnings() -> Iterator[None]:
    """Two warnings that whoever installs an adapter can do nothing about.

    BEFT says of each layer without a bias that it cannot be merged; `merge` says so when it is asked to. And `peft`
    0.21 asks models for a property by a name that `transformers` 5.23 deprecates.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected that the base layer has no bias term", category=UserWarning)
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _last_part(path: str, _: Architecture) -> str:
    return path.rpartition(".")[2]


def _within_block(path: str, architecture: Architecture) -> str:
    """`model.layers.3.self_attn.q_proj` → `self_attn.q_proj`."""
    return path[len(architecture.blocks_path) + 1 :].split(".", 1)[1]
