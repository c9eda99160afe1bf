"""What an emulator's folder holds, and what a client needs to train on it, without loading its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias

from farfield.protocols.errors import BackboneError, EmulatorError

from . import backbone, bundle
from .architecture import describe
from .assemble import compare
from .layout import Layout, read
from .stored import WEIGHTS, held, outline

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_STATE_BYTES: Final = 20
"""For each trained parameter, as `MasterWeights` and AdamW have them: five float32 values."""

_TASKS: Final = ("causal-lm", "sequence-classification")

_Held: TypeAlias = "dict[str, tuple[torch.Size, torch.dtype]]"


@dataclass(frozen=True, slots=True)
class Inspection:
    """An emulator, as its files say. Bytes are those of tensors, but for `bundle_bytes`.

    Attributes:
        digest, bundle_bytes: of the bundle that clients download.
        architecture: the class of `transformers` that it is.
        dtype: number format of what is in no 4 bits.
        parameters: of the model as it computes; two in a byte where they are in 4 bits, factors as factors.
        ranks: the lowest and the highest of the stand-in's factors; None where there are none.
        plan: digest of all in a Plan that it depends on.
        distilled, round: see `layout.Record`.
        weight_bytes: of all tensors, and how they are divided between the blocks that are tuned, the stand-in, and
            what is in no block.
        full_state_bytes: an estimate of what training all weights of the tuned blocks takes besides, see `STATE`.
    """

    STATE: ClassVar[str] = (
        "estimated, to train all weights of the tuned blocks with AdamW: a gradient, and for each parameter five "
        "float32 values (where it began and where it is, its gradient, two moments); an adapter with a hundredth of "
        "their parameters takes a hundredth"
    )
    NOT_COUNTED: ClassVar[str] = (
        "Not counted: activations, which grow with the batch and its length, the data, and Python with its libraries."
    )

    digest: str
    bundle_bytes: int
    architecture: str
    dtype: str
    parameters: int
    layout: Layout
    ranks: tuple[int, int] | None
    plan: str
    distilled: int
    round: int
    weight_bytes: int
    outer_bytes: int
    stand_in_bytes: int
    other_bytes: int
    full_state_bytes: int

    def document(self) -> dict[str, Any]:
        """JSON-ready values."""
        needs = {"weight_bytes": self.weight_bytes, "estimated_state_bytes": self.full_state_bytes}
        said = {"estimate": self.STATE, "not_counted": self.NOT_COUNTED}
        return asdict(self) | {"origins": list(self.layout.origins), "to_train": needs | said}


def inspected(folder: Path) -> Inspection:
    """What is in `folder`, after the same checks that a client makes.

    Raises:
        EmulatorError, BackboneError, BundleError: it is no emulator, or its files do not belong together.
    """
    record = read(folder)
    layout = record.layout
    backbone.check(folder)
    header = held(folder / WEIGHTS)
    model = _matching(folder, layout, header)
    path = describe(model).blocks_path
    bytes_of = {"outer": 0, "stand-in": 0, "other": 0}
    trained, parameters = 0, 0
    for name, (shape, dtype) in header.items():
        number = int(name.removeprefix(f"{path}.").partition(".")[0]) if name.startswith(f"{path}.") else None
        part = "other" if number is None else "stand-in" if number in layout.inner else "outer"
        bytes_of[part] += shape.numel() * dtype.itemsize
        packed = name.endswith(".packed") and not dtype.is_floating_point
        scales = name.endswith(".scales") and f"{name.removesuffix('scales')}packed" in header
        parameters += 0 if scales else shape.numel() * (2 if packed else 1)
        trained += shape.numel() if part == "outer" else 0
    manifest = bundle.describe(folder, "emulator")
    dtype = next(dtype for name, (_, dtype) in header.items() if dtype.is_floating_point and ".scales" not in name)
    return Inspection(
        digest=manifest.digest,
        bundle_bytes=manifest.size,
        architecture=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        parameters=parameters,
        layout=layout,
        ranks=(min(layout.ranks.values()), max(layout.ranks.values())) if layout.ranks else None,
        plan=record.plan,
        distilled=record.distilled,
        round=record.round,
        weight_bytes=sum(bytes_of.values()),
        outer_bytes=bytes_of["outer"],
        stand_in_bytes=bytes_of["stand-in"],
        other_bytes=bytes_of["other"],
        full_state_bytes=trained * (_STATE_BYTES + dtype.itemsize),
    )


def _matching(folder: Path, layout: Layout, held: _Held) -> PreTrainedModel:
    """An outline of the model that the tensors belong to; the folder does not say for which task it was made."""
    labels = backbone._config(folder).num_labels
    refused: list[BackboneError | EmulatorError] = []
    for task in _TASKS:
        try:
            config, kind = backbone.model_class(folder, task=task, labels=labels)
            model = outline(folder, config, layout, kind)
            compare(model, held, folder / WEIGHTS)
        except (BackboneError, EmulatorError) as error:
            refused.append(error)
        else:
            return model
    classifies = any("Classification" in one for one in backbone._config(folder).architectures or ())
    raise refused[_TASKS.index("sequence-classification" if classifies else "causal-lm")]
