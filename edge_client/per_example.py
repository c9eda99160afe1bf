"""The gradient of each example by itself, from one backward pass over a batch of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from opacus.grad_sample import register_grad_sampler

from farfield.emulator.methods import Tuned
from farfield.kernels import clip
from farfield.protocols.errors import TuningError

_HINT = "Use 'lora' without dora, 'lora-fa', 'fed-sb', 'bottleneck' or 'prefix-tuning'."


# Registered with Opacus, so that its own modes use them too.


@register_grad_sampler(torch.nn.Linear)  # type: ignore[untyped-decorator]
def linear(
    layer: torch.nn.Linear, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[torch.Tensor, torch.Tensor]:
    """Gradients float32[examples, ...] of the weight and the bias; arguments as Opacus gives them, examples first."""
    found: dict[torch.Tensor, torch.Tensor] = {layer.weight: clip.of_linear(activations[0], backprops)}
    if layer.bias is not None:
        found[layer.bias] = backprops.reshape(len(activations[0]), -1, layer.out_features).sum(1, dtype=torch.float32)
    return found


@register_grad_sampler(torch.nn.Embedding)  # type: ignore[untyped-decorator]
def embedding(
    layer: torch.nn.Embedding, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[torch.Tensor, torch.Tensor]:
    """Gradients float32[examples, rows, width] of the weight, as for `linear`."""
    return {layer.weight: clip.of_embedding(activations[0], backprops, layer.num_embeddings)}


_SAMPLERS: Mapping[type[torch.nn.Module], Callable[..., dict[torch.Tensor, torch.Tensor]]] = {
    torch.nn.Linear: linear,
    torch.nn.Embedding: embedding,
}


def check(tuned: Tuned, kind: str) -> None:
    """See whether each trained parameter has a gradient of each example, with a step on two lines of nothing.

    They have where they are weights and biases of linear layers and of embeddings that get their input example by
    example: LoRA and its variants but for DoRA, Fed-SB, prefix tuning, and a classifier's head.

    Args:
        kind: what the tuning method is called.

    Raises:
        TuningError: one has none, or none that shows, or the method wants the gradients of the batch for itself.
    """
    ids = torch.arange(1, 9, device=next(tuned.model.parameters()).device).repeat(2, 1)
    with recording(tuned, repr(kind)) as recorder, torch.enable_grad():
        recorder.gradients(lambda: tuned.model(input_ids=ids, attention_mask=ids > 0).logits.float().sum(), *ids.shape)
        recorder.refuse_unseen()


@contextmanager
def recording(tuned: Tuned, method: str = "this tuning method") -> Iterator[Recorder]:
    """Within it the recorder gives gradients example by example, and backward gives the trained parameters none.

    Opacus' own hooks are not used: they leave the gradient of the batch to be computed beside those of the examples,
    which costs a seventh of a step with LoRA. Here nothing unclipped comes into being that could be mistaken for the
    other, and what reads a parameter past its layer has no part in the update.

    Args:
        method: what a refusal calls the tuning method.

    Raises:
        TuningError: a trained parameter has no gradient of each example, as far as that can be seen without a batch.
    """
    if tuned.after_backward is not None:
        raise TuningError(f"{method} wants the gradient of a batch, in which one example could show", hint=_HINT)
    parameters = tuned.trainable()
    recorder = Recorder(parameters, method)
    layers = []
    for path, layer in tuned.model.named_modules():
        if trained := [name for name, p in layer.named_parameters(recurse=False) if p.requires_grad]:
            if type(layer) not in _SAMPLERS:
                what = f"{method} trains what has no gradient of each example"
                raise TuningError(what, where=f"{path}.{trained[0]}", hint=_HINT)
            layers.append(layer)
    handles = [layer.register_forward_hook(recorder.follow) for layer in layers]
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        yield recorder
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters.values():
            parameter.requires_grad_(True)


class Recorder:
    """Follows a batch through the layers that are trained. Made by `recording`."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], method: str) -> None:
        self._parameters, self._method = parameters, method
        self._names: dict[torch.Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        self._examples = self._length = 0
        self._found: dict[str, torch.Tensor] = {}

    def gradients(self, loss: Callable[[], torch.Tensor], examples: int, length: int) -> dict[str, torch.Tensor]:
        """Gradients of each example's part in a loss.

        Args:
            loss: makes a scalar, the sum of one term for each example, by calling the model.
            examples: how many there are, and `length` how many tokens each has in the batch, padding included.

        Returns:
            float32[examples, ...] by the trained parameter's name; zero where the loss does not depend on it.

        Raises:
            TuningError: a layer gets its input in a form in which examples cannot be told apart.
        """
        self._examples, self._length, self._found = examples, length, {}
        if examples:
            loss().backward()  # type: ignore[no-untyped-call]
        return {
            name: self._found[name] if name in self._found else torch.zeros(examples, *p.shape, device=p.device)
            for name, p in self._parameters.items()
        }

    def refuse_unseen(self) -> None:
        """Raises TuningError if the last batch did not come through a layer that is trained, where that could be seen.

        So it is where blocks are computed out of autograd's sight.
        """
        for name in self._parameters:
            if name not in self._found:
                what = f"{self._method} trains what has no gradient of each example that could be seen"
                raise TuningError(what, where=name, hint=_HINT)

    def follow(self, layer: torch.nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """A forward hook."""
        if not torch.is_grad_enabled():
            return
        inputs = self._by_example(layer, arguments[0].detach())
        if not output.requires_grad:
            output.requires_grad_()  # nothing before this layer is trained

        def sample(gradient: torch.Tensor) -> None:
            for parameter, found in _SAMPLERS[type(layer)](layer, [inputs], gradient).items():
                if (name := self._names.get(parameter)) is not None:
                    # A layer that is called twice, or shares its weight with another, adds up.
                    self._found[name] = self._found[name] + found if name in self._found else found

        output.register_hook(sample)  # type: ignore[no-untyped-call]

    def _by_example(self, layer: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        """`inputs` with one entry for each example; some models string all tokens of a batch together."""
        if len(inputs) == self._examples:
            return inputs
        if len(inputs) == self._examples * self._length:
            return inputs.reshape(self._examples, self._length, *inputs.shape[1:])
        what = f"{self._method} does not take examples one by one: {layer} gets {tuple(inputs.shape)} for"
        raise TuningError(f"{what} {self._examples} examples of {self._length} tokens", hint=_HINT)
