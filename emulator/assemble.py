"""Puts an emulator together from the backbone that it is made of.

The way leads over a *skeleton*, the model that a layout describes, without weights: the backbone's own class with
other blocks in its stack. What fills it must have exactly its names and shapes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import nn

from farfield.protocols.errors import EmulatorError

from . import backbone
from .architecture import Linear, describe
from .layers import LowRankLinear, Nf4Linear
from .layout import Layout
from .split import renumbered

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MISMATCH: Final = "Its files do not belong together. Build it again with `coordinator emulator build`."

_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}

_PASSING = re.compile(r"_|training$|gradient_checkpointing$|layer_(idx|id|index|number)$")
"""Attributes of a module that say nothing of what it computes."""


def skeleton(config: PreTrainedConfig, layout: Layout, kind: type[PreTrainedModel], attention: str | None) -> Any:
    """A model of class `kind` with the layout's blocks; its parameters are on the meta device.

    Args:
        config: the emulator's own, see `shortened`.
        attention: as in `backbone.load_model`.

    Raises:
        EmulatorError: the layout has ranks of layers that are not in the model.
    """
    from accelerate import init_empty_weights

    with backbone.silent_transformers(), init_empty_weights(include_buffers=False):
        model = cast("Any", kind)._from_config(copy.deepcopy(config), attn_implementation=attention)
        architecture = describe(model)
        if len(architecture.blocks) != len(layout.origins):
            raise EmulatorError(
                f"{config.model_type} was built with {len(architecture.blocks)} blocks, not {len(layout.origins)}"
            )
        stack = model.get_submodule(architecture.blocks_path)
        for number in layout.inner:
            stack[number] = stack[layout.origins.index(layout.origins[number])]
        ranks = dict(layout.ranks)
        for linear in inner_linears(model, layout):
            if rank := ranks.pop(own_name(linear.path, architecture.blocks_path, layout), None):
                factors = LowRankLinear(linear.in_features, linear.out_features, rank, bias=linear.bias)
                model.set_submodule(linear.path, factors, strict=True)
        if ranks:
            raise EmulatorError(f"it gives a rank to {min(ranks)!r}, and {config.model_type} has no such layer")
        if layout.quantization == "nf4":
            for linear in inner_linears(model, layout):
                quantised = Nf4Linear(linear.in_features, linear.out_features, bias=linear.bias)
                model.set_submodule(linear.path, quantised, strict=True)
    with backbone.silent_transformers():
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False  # keys of a block that runs twice would count as those of earlier tokens
        model.tie_weights()  # not above, where every parameter that is set becomes a new one
    return model


def shortened(config: PreTrainedConfig, layout: Layout) -> PreTrainedConfig:
    """The backbone's configuration with as many layers as the emulator has, and what it says of each layer alike."""
    short, depth = copy.deepcopy(config), layout.split.depth
    settings: Any = short.get_text_config()
    for key, value in list(vars(settings).items()):
        per_layer = isinstance(value, list | tuple) and len(value) == depth
        if per_layer and key != "attention_types" and not key.endswith(("token_id", "token_ids")):
            setattr(settings, key, type(value)(value[number] for number in layout.origins))
    if hasattr(settings, "attention_types"):  # GPT-Neo's way to write a list of layers
        settings.attention_types = [[[one], 1] for one in settings.attention_layers]
    settings.num_hidden_layers = len(layout.origins)
    return short


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that a model's file holds: parameters and kept buffers by name, each once however often it is used."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        kept = {name: one for name, one in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, tensor in (module._parameters | kept).items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{path}.{name}" if path else name] = tensor
    return found


def fill(model: PreTrainedModel, content: Mapping[str, torch.Tensor], where: object = "") -> PreTrainedModel:
    """Give the skeleton these weights, which it takes over, on their device; frozen, in evaluation mode.

    Raises:
        EmulatorError: names or shapes are not those of the skeleton.
    """
    compare(model, {name: (tensor.shape, tensor.dtype) for name, tensor in content.items()}, where)
    whole: Any = model
    whole.load_state_dict(dict(content), strict=False, assign=True)
    with backbone.silent_transformers():
        whole.tie_weights()
    # What is not kept in a file is made by the skeleton, on the CPU.
    device = next(iter(content.values())).device
    return cast("PreTrainedModel", whole.requires_grad_(False).eval().to(device))


def assemble(model: PreTrainedModel, layout: Layout) -> PreTrainedModel:
    """An emulator of the backbone `model`, sharing its memory: write to neither. Nothing in it is compressed.

    Args:
        layout: without ranks and quantization.

    Raises:
        EmulatorError: the family makes blocks that depend on their number, so that none can be left out.
    """
    architecture = describe(model)
    config = shortened(model.config, layout)
    emulator = skeleton(config, layout, type(model), model.config._attn_implementation)
    own = tensors(model)
    names = {name: renumbered(name, architecture.blocks_path, layout.origins) for name in tensors(emulator)}
    _refuse_numbered_blocks(model, emulator, layout)
    # Detached: memory is shared, and yet each of the two can have gradients of its own.
    content = {name: own[there].detach() for name, there in names.items()}
    return fill(emulator, content)


def rebuilt(
    emulator: PreTrainedModel, layout: Layout, parts: Mapping[str, Mapping[str, torch.Tensor]]
) -> PreTrainedModel:
    """The emulator with other layers in its stand-in, sharing the memory of all that stays.

    Args:
        layout: with what the other layers are.
        parts: by path of a linear layer the tensors that it has instead.
    """
    bare = skeleton(emulator.config, layout, type(emulator), emulator.config._attn_implementation)
    wanted = tensors(bare)
    content = {name: tensor.detach() for name, tensor in tensors(emulator).items() if name in wanted}
    content |= {f"{path}.{name}": tensor for path, put in parts.items() for name, tensor in put.items()}
    return fill(bare, content)


def with_middle(emulator: PreTrainedModel, other: PreTrainedModel, layout: Layout) -> PreTrainedModel:
    """`emulator` with the stand-in of `other`; both are of this layout, and all three share memory."""
    path = describe(emulator).blocks_path
    inside = tuple(f"{path}.{number}." for number in layout.inner)
    given = tensors(other)
    content = {
        name: (given[name] if name.startswith(inside) else tensor).detach()
        for name, tensor in tensors(emulator).items()
    }
    bare = skeleton(emulator.config, layout, type(emulator), emulator.config._attn_implementation)
    return fill(bare, content)


def own_middle(emulator: PreTrainedModel, layout: Layout) -> None:
    """Give the stand-in memory of its own, so that it can be trained."""
    blocks = describe(emulator).blocks
    for parameter in {one for number in layout.inner for one in blocks[number].parameters()}:
        parameter.data = parameter.data.clone()


def own_name(path: str, blocks_path: str, layout: Layout) -> str:
    """A layer of the stand-in as `Layout.ranks` calls it: the backbone's block, and the path within it."""
    return renumbered(path, blocks_path, layout.origins).removeprefix(f"{blocks_path}.")


def inner_linears(model: PreTrainedModel, layout: Layout) -> tuple[Linear, ...]:
    """The linear layers of the stand-in; of blocks that share their weights those of the first."""
    firsts = {layout.origins.index(layout.origins[number]) for number in layout.inner}
    return describe(model).within(firsts).linears


def compare(model: nn.Module, held: Mapping[str, tuple[torch.Size, torch.dtype]], where: object) -> None:
    """Raises EmulatorError unless these are the names, shapes and kinds of number of the model's tensors."""
    wanted, own_format = tensors(model), fixed(model)
    if surplus := sorted(held.keys() ^ wanted.keys()):
        what = "has a tensor too many" if surplus[0] in held else "lacks a tensor"
        raise EmulatorError(f"it {what}: {surplus[0]!r}", where=where, hint=MISMATCH)
    for name, (shape, dtype) in held.items():
        if shape != wanted[name].shape:
            raise EmulatorError(
                f"{name!r} is of shape {list(shape)}, and its configuration wants {list(wanted[name].shape)}",
                where=where,
                hint=MISMATCH,
            )
        exact = name in own_format or not wanted[name].is_floating_point()
        if dtype != wanted[name].dtype if exact else dtype not in _FLOATS:
            raise EmulatorError(f"{name!r} holds numbers of the kind {dtype}", where=where, hint=MISMATCH)


def fixed(model: nn.Module) -> set[str]:
    """The tensors whose number format is their meaning: indices and scales of 4 bits."""
    found = [path for path, module in model.named_modules() if isinstance(module, Nf4Linear)]
    return {f"{path}.{name}" for path in found for name in ("packed", "scales")}


def _refuse_numbered_blocks(model: PreTrainedModel, emulator: PreTrainedModel, layout: Layout) -> None:
    """Raises EmulatorError where a block would be another one because it has another number in the emulator."""
    theirs = describe(model).blocks
    for number, block in enumerate(describe(emulator).blocks):
        one, other = _nature(theirs[layout.origins[number]]), _nature(block)
        if one != other:
            differing = min(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
            raise EmulatorError(
                f"block {layout.origins[number]} would be another one as block {number}: {differing} depends on it",
                where=type(model).__name__,
                hint="Keep all blocks: leave emulator.blocks out, and use emulator.low_rank or quantization.",
            )


def _nature(block: nn.Module) -> dict[str, object]:
    """What a block is besides its weights' values: their shapes, and all plain settings but its number."""
    found: dict[str, object] = {name: tensor.shape for name, tensor in tensors(block).items()}
    for path, module in block.named_modules():
        found |= {
            f"{path}.{key}".lstrip("."): value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and not _PASSING.match(key)
        }
    return found
