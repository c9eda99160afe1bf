"""FedKSeed: all weights of the blocks, moved along a pool of directions that everybody knows; scalars travel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, cast

from pydantic import Field

from farfield.protocols.sections import Training
from farfield.protocols.seeds import derive
from farfield.protocols.tensors import Arrays, State

from .full import Full
from .method import Setting, Tuned, TuningMethod, register
from .mezo import Epsilon
from .sharing import Sharing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from farfield.emulator.descent import Descent
    from farfield.emulator.seed_pool import SeedPool

_PATH: Final = "pool"
_NAME: Final = "pool.scalars"


@register
class FedKSeed(TuningMethod):
    """W = W₀ - Σⱼ aⱼ·zⱼ with K directions zⱼ of random signs; the scalars a ∈ ℝ^K travel (Qin et al. 2024).

    A step is one of MeZO (Malladi et al. 2023, algorithm 1) along a direction that is drawn from the pool: a
    client's update of aⱼ is the sum of its η·g along zⱼ, with g = (L(W + εz) - L(W - εz)) / 2ε and |g| clipped to
    `training.max_grad_norm`. Whoever gets the scalars makes W from them and W₀, always from the beginning, so that it
    is the same wherever it is made. The pool follows from the seed. A witness of it is part of the digest of what is
    frozen: a machine that makes other directions is told so before a round begins.

    The change is linear in a, so the mean is exact. Trained are the same weights as with 'full'. A copy of them is kept
    as they were at first, in the model's dtype.

    Attributes:
        pool: K.
        epsilon: ε.
    """

    kind: Literal["fedkseed"] = "fedkseed"
    pool: Annotated[int, Field(ge=1, le=65536)] = 4096
    epsilon: Epsilon = 1e-3

    @property
    def by_gradient(self) -> bool:
        return False

    @property
    def on_quantised(self) -> bool:
        return False

    @property
    def sharing(self) -> Sharing:
        return Sharing(exact=True)

    def install(self, model: PreTrainedModel, setting: Setting) -> Tuned:
        import numpy as np
        import torch

        from farfield.emulator.architecture import describe
        from farfield.emulator.seed_pool import SeedPool
        from farfield.emulator.zeroth_order import Directions, SlopeDescent, refuse_packed

        architecture = describe(model)
        refuse_packed(model, architecture.within(setting.blocks).linears, self.kind)
        modules = [*architecture.blocks, *(model.get_submodule(path) for path in architecture.head)]
        moved = Full().install(model, setting).model
        names = {one: setting.named(name) for name, one in moved.named_parameters() if one.requires_grad}
        model.requires_grad_(False)
        seed = derive(setting.seed, self.kind)
        directions = Directions(modules, names, seed)
        pool = SeedPool(directions, self.pool, seed)
        # Behind all else: a model takes the dtype of its first parameter for its own.
        model.add_module(_PATH, pool)

        def descent(start: Arrays, training: Training, seed: int) -> Descent:
            pool.begin(torch.from_numpy(np.array(start[_NAME])))

            def choose(step: int) -> int:
                return derive(seed, "direction", step) % self.pool

            def update(moved: Mapping[int, float]) -> State:
                return {_NAME: pool.gone(moved).numpy()}

            return SlopeDescent(directions, training, seed, self.epsilon, choose, update)

        return Tuned(model, descent=descent, settled=pool.settle)

    def merge(self, tuned: Tuned) -> PreTrainedModel:
        _pool(tuned).settle()
        delattr(tuned.model, _PATH)
        return cast("PreTrainedModel", tuned.model.requires_grad_(False))

    def save(self, tuned: Tuned, folder: Path) -> None:
        """Write the scalars and the seed of the pool as `scalars.safetensors`; `peft` has no such file."""
        from safetensors.torch import save_file

        pool = _pool(tuned)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"scalars": pool.scalars.detach().cpu().clone()}
        save_file(tensors, folder / "scalars.safetensors", metadata={"format": "pt", "seed": str(pool.seed)})


def _pool(tuned: Tuned) -> SeedPool:
    return cast("SeedPool", tuned.model.get_submodule(_PATH))
