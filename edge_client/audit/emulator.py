"""What the owner of a backbone gives away with the emulator that clients get of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final, final

from pydantic import JsonValue

from farfield.emulator import backbone, build, leakage, text
from farfield.emulator.inspection import inspected
from farfield.emulator.text import PublicText
from farfield.protocols.audit.finding import Axis, Figure, Finding, Mark, Plot, Series, Table

from .attack import Attack, Attacker, register
from .subject import Owner, Say, Subject

STEPS: Final = 60
"""Steps of tuning, and of each attack: what a buyer may spend here."""


@dataclass(slots=True)
class _Watched:
    """Says what is being measured."""

    say: Say
    stage: str = ""

    def on_stage(self, what: str) -> None:
        self.stage = what
        self.say(what, 0, STEPS)

    def on_step(self, done: int, steps: int, loss: float) -> None:
        self.say(self.stage, done, steps)


@register
@final
class Emulator(Attack):
    """Trains the emulator as its buyer could, and compares it with the backbone."""

    name: ClassVar[str] = "emulator"
    title: ClassVar[str] = "What the emulator gives away"
    attacker: ClassVar[Attacker] = Attacker.BUYER
    cost: ClassVar[str] = "some minutes, on the owner's machine"
    place: ClassVar[int] = 90

    def unfit(self, subject: Subject) -> str | None:
        if subject.plan.delivery.kind != "emulator":
            return 'the Plan has delivery.kind = "adapter": clients get the backbone itself, and no emulator of it'
        if subject.owner is None:
            return "only the owner of the backbone can compare the emulator with it"
        return None

    def run(self, subject: Subject) -> Finding:
        owner = subject.owner
        assert owner is not None
        made: dict[str, Any] = subject.notes.values("emulator/measured", lambda: _measured(subject, owner))
        return _finding(made)


def _measured(subject: Subject, owner: Owner) -> dict[str, Any]:
    """JSON-ready: what `leakage.measure` finds, and what the emulator's files say."""
    watched = _Watched(subject.say)
    watched.on_stage("reading public text")
    found = leakage.measure(subject.plan, owner.backbone, owner.emulator, _public(subject, owner), STEPS, watched)
    looked = inspected(owner.emulator)
    return {
        **found.document(),
        "protects nothing": bool(found.failures),
        "budget in words": str(found.budget),
        "emulator": looked.digest,
        "parameters": looked.parameters,
        "bundle bytes": looked.bundle_bytes,
    }


def _public(subject: Subject, owner: Owner) -> PublicText:
    """The owner's text: what it gave, or what the emulator was built with."""
    kept = owner.emulator / build.TEXT
    if owner.public is None and kept.exists():
        return PublicText.load(kept)
    documents = text.read(owner.public, subject.plan.model.backbone)
    return build.prepared(subject.plan, documents, backbone.load_tokenizer(owner.backbone))


def _finding(made: dict[str, Any]) -> Finding:
    losses: dict[str, Any] | None = made["losses"]
    return Finding(
        attack=Emulator.name,
        title=Emulator.title,
        attacker=Emulator.attacker,
        verdict="leak" if made["protects nothing"] else "no leak found",
        tried=(
            "The weights of the emulator were held against those of the backbone.",
            *(
                (
                    f"An attacker who has the emulator and never sees the backbone trained all of its weights: "
                    f"{made['budget in words']}. The same was done with a stand-in of random weights, so that the "
                    "difference is what the stand-in gives away.",
                    "The emulator was tuned by the Plan's method, and what was tuned was plugged into the backbone.",
                )
                if losses
                else ()
            ),
        ),
        found=tuple(made["verdict"]),
        limits=(
            f"An attacker with more than {made['budget in words']} may come further; nothing here bounds that. "
            f"`coordinator emulator leakage --steps` measures with more than these {STEPS} steps.",
            "It says nothing of the clients' data: that is what the other attacks are about.",
        ),
        figures=_figures(made, losses),
        plots=() if losses is None else (_plot(losses),),
        tables=() if losses is None else (_table(losses),),
        data={name: _json(value) for name, value in made.items()},
    )


def _json(value: Any) -> JsonValue:
    """Values that were read from the notes, and so are JSON already."""
    made: JsonValue = value
    return made


def _figures(made: dict[str, Any], losses: dict[str, Any] | None) -> tuple[Figure, ...]:
    disclosed = made["disclosed"]
    shares = (
        Figure(
            name="the backbone's parameters that are in the emulator",
            value=disclosed["whole"]["given"],
            unit="%",
            ceiling=1.0,
            note="as they are, or in 4 bits",
        ),
        Figure(
            name="the middle's parameters that are in the emulator",
            value=disclosed["middle"]["given"],
            unit="%",
            ceiling=1.0,
            headline=True,
        ),
    )
    if losses is None:
        return shares
    quality = losses["quality"]
    no = "" if quality["attacked"] is not None else "the text cannot tell the floor from the backbone"
    return (
        *shares,
        Figure(
            name="quality that an attacker comes to with the emulator",
            value=quality["attacked"],
            unit="%",
            chance=0.0,
            note=no or "0 % is a stand-in of random weights after the same attack, 100 % the backbone at its best",
            headline=True,
        ),
        Figure(name="quality of the tuned emulator by itself", value=quality["emulator_tuned"], unit="%", note=no),
        Figure(name="quality of the backbone with the adapter plugged in", value=quality["plug_in"], unit="%", note=no),
        Figure(
            name="R: share of the gain of tuning the backbone itself that plugging in gives",
            value=losses["recovered"],
            unit="%",
            note="" if losses["recovered"] is not None else "tuning the backbone gained nothing in so few steps",
        ),
    )


_LOSSES: Final = {
    "floor": "a stand-in of random weights, after the attack",
    "emulator": "the emulator as it is",
    "emulator_tuned": "the emulator, tuned by the Plan's method",
    "attacked": "the emulator, after the attack",
    "backbone": "the backbone as it is",
    "plug_in": "the backbone with the adapter plugged in",
    "backbone_tuned": "the backbone, tuned itself",
}


def _plot(losses: dict[str, Any]) -> Plot:
    return Plot(
        title="Loss on public text that nothing was trained on",
        x=Axis(label="1: emulator as it is; 2: tuned; 3: after the attack", low=0.5, high=3.5),
        y=Axis(label="loss (nats per token)"),
        series=(
            Series(
                label="the emulator",
                x=(1.0, 2.0, 3.0),
                y=(losses["emulator"], losses["emulator_tuned"], losses["attacked"]),
                style="points",
            ),
        ),
        marks=tuple(Mark(label=_LOSSES[name], y=losses[name]) for name in ("floor", "backbone", "plug_in")),
        caption="Lower is better. A point at or below the backbone's lines is an emulator that replaces the backbone; "
        "one near the floor gives away no more than public text does.",
    )


def _table(losses: dict[str, Any]) -> Table:
    def share(name: str) -> str:
        value = losses["quality"][name]
        return "" if value is None else f"{value:.0%}"

    return Table(
        title="Losses, and quality as a share of the backbone's best",
        columns=("model", "loss (nats per token)", "quality"),
        rows=tuple((said, f"{losses[name]:.4f}", share(name)) for name, said in _LOSSES.items()),
        caption="Quality is (floor − loss) / (floor − best): 0 % is what public text does with a stand-in of random "
        "weights, 100 % the backbone at its best.",
    )
