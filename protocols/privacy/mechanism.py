"""What a Plan promises, as values that bind what is sampled, clipped, noised and accounted.

Whoever samples, clips or adds noise reads the numbers from here, and so does the accountant; there is no second place
for either to drift from the other.

All speak of neighbours that differ in one unit whose contribution is replaced by zero, with public counts
(`accounting.py`). With `unit` "client" every client counts as taking part in every round, or in each of its turns where
the Plan has turns, which a client enforces (`protocols/turns.py`). Cohorts are drawn from a public seed, and nothing
keeps a coordinator from asking one client each time, so sampling them amplifies nothing.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, TypeAlias, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from farfield.protocols.errors import PrivacyError

from .accounting import Gaussian, Release, SampledGaussian, Skellam, Spent, noise_multiplier, spent
from .clipping import CountedClipping

if TYPE_CHECKING:
    from farfield.protocols.plan import Plan

Unit: TypeAlias = Literal["example", "client"]

_STRICT: Final = ConfigDict(strict=True, extra="forbid")
_Made = TypeVar("_Made", bound="Mechanism")
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Mechanism(ABC):
    """One round of a run, as far as its privacy goes."""

    unit: ClassVar[Unit]

    @property
    @abstractmethod
    def release(self) -> Release:
        """What is let out, in the accountants' terms."""

    @property
    @abstractmethod
    def releases(self) -> int:
        """How many of them one round makes."""


@dataclass(frozen=True, config=_STRICT)
class ExampleMechanism(Mechanism):
    """DP-SGD at a client (Abadi et al. 2016): `steps` sums of clipped gradients of single examples, each with noise.

    Each example is in a step's batch with probability `sampling_rate`, independently of all others and of other steps
    (Poisson sampling), so batches differ in size; a sum is divided by the rate times the number of examples, which is
    public. Gradients are clipped to the L2 norm `clipping_norm`; noise has `noise_multiplier` times that.
    """

    unit: ClassVar[Unit] = "example"

    noise_multiplier: _Positive
    clipping_norm: _Positive
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    steps: Annotated[int, Field(ge=1)]

    @property
    def release(self) -> Release:
        if self.sampling_rate == 1:
            return Gaussian(self.noise_multiplier)
        return SampledGaussian(self.noise_multiplier, self.sampling_rate)

    @property
    def releases(self) -> int:
        return self.steps


@dataclass(frozen=True, config=_STRICT)
class ClientMechanism(Mechanism):
    """Whole updates, clipped by their clients, and one noisy sum of them in each round.

    The noise is added once to the sum (`central`; McMahan et al. 2018), or by the clients in shares before their
    updates are masked (`distributed`; Agarwal et al. 2021). `clipping_norm` is C of the first round. With
    `count_noise` (σ_b) it follows the updates, and the count of those within it is part of the same release.
    """

    unit: ClassVar[Unit] = "client"

    noise: Literal["central", "distributed"]
    noise_multiplier: _Positive
    clipping_norm: _Positive
    count_noise: _Positive | None = None

    @property
    def counted(self) -> CountedClipping | None:
        """How the count of clipped updates is paid for; None when the norm is fixed. Raises PrivacyError."""
        return None if self.count_noise is None else CountedClipping(self.noise_multiplier, self.count_noise)

    def bound(self, norm: float) -> float:
        """The L2 norm of what one client contributes, when `norm` is C: C itself, or C′ with the extra coordinate."""
        counted = self.counted
        return norm if counted is None else counted.bound(norm)

    @property
    def release(self) -> Release:
        return Gaussian(self.noise_multiplier) if self.noise == "central" else Skellam(self.noise_multiplier)

    @property
    def releases(self) -> int:
        return 1


_KINDS: Final[Mapping[str, type[ExampleMechanism] | type[ClientMechanism]]] = {
    "example": ExampleMechanism,
    "client": ClientMechanism,
}


def mechanism(plan: Plan) -> ExampleMechanism | ClientMechanism | None:
    """The mechanism of every round of `plan`; None where it promises nothing.

    `target_epsilon` becomes the smallest noise multiplier, a whole number of ten thousandths, that keeps all rounds of
    a client within it at `delta`: the same for everybody who asks.

    Raises:
        PrivacyError: the target cannot be met, or what the Plan asks for does not fit together.
    """
    wanted = plan.privacy
    if wanted.kind == "none":
        return None
    if wanted.kind == "example":
        rate, steps = wanted.sampling_rate, plan.training.steps
        if rate is None or steps is None:
            raise PrivacyError(
                "privacy by example needs 'privacy.sampling_rate', and 'training.steps' as the budget of a round",
                hint="An epoch has no fixed number of steps when batches are drawn at random.",
            )
        return _resolved(plan, lambda z: ExampleMechanism(z, wanted.clipping_norm, rate, steps))
    count_noise = wanted.count_noise if wanted.clipping == "adaptive" else None
    made = _resolved(plan, lambda z: ClientMechanism(wanted.noise, z, wanted.clipping_norm, count_noise))
    made.bound(made.clipping_norm)  # raises what the noise on the count makes impossible
    return made


def promised(plan: Plan) -> Spent | None:
    """What all rounds of a client spend at the Plan's δ; None where it promises nothing. Raises as `mechanism` does."""
    made = mechanism(plan)
    return None if made is None else spent({made.release: made.releases * plan.participations}, plan.privacy.delta)


def document(mechanism: Mechanism) -> dict[str, Any]:
    """JSON that says all of a mechanism; `restore` reads it."""
    assert isinstance(mechanism, ExampleMechanism | ClientMechanism)
    return {"kind": mechanism.unit, **dataclasses.asdict(mechanism)}


def restore(document: object) -> Mechanism:
    """The mechanism that a `document` says. Raises PrivacyError when it says none that this release knows."""
    kind = document.get("kind") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(kind, str) or kind not in _KINDS:
        raise PrivacyError("no mechanism that this release of Farfield knows", hint="Update Farfield.")
    try:
        return _KINDS[kind](**{name: value for name, value in document.items() if name != "kind"})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise PrivacyError(f"not a mechanism of this release of Farfield: {where}: {first['msg']}") from None


def _resolved(plan: Plan, made: Callable[[float], _Made]) -> _Made:
    wanted = plan.privacy
    if wanted.noise_multiplier is not None:
        return made(wanted.noise_multiplier)
    assert wanted.target_epsilon is not None  # the Plan has one of the two
    count = made(1.0).releases * plan.participations
    return made(noise_multiplier(made(1.0).release, count, wanted.target_epsilon, wanted.delta))
