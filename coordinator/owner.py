"""The owner of a backbone in a run that ships an emulator of it: judges the adapter, and distils the emulator anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from farfield.emulator import layout
from farfield.emulator.layout import is_emulator
from farfield.emulator.methods import TuningMethod
from farfield.protocols.errors import EmulatorError, PlanError, RunError
from farfield.protocols.plan import Plan
from farfield.protocols.tensors import State

from .runs import RunFolder, RunInfo, writing

if TYPE_CHECKING:
    from farfield.emulator.bench import Bench
    from farfield.emulator.build import Progress


class BackboneOwner:
    """Has the backbone, text of its own, and the emulators that the run has shipped."""

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        info: RunInfo,
        deliver: Callable[[Path], None],
        progress: Progress,
        bench: Callable[[Path], Bench],
    ) -> None:
        """
        Args:
            deliver: has clients get the emulator in a folder from now on; they have the one of `info` already.
            progress: told how a distillation goes on.
            bench: gives a bench with the backbone or the emulator in a folder, whenever one is needed.
        """
        assert info.emulator is not None
        self._plan, self._folder, self._backbone = plan, folder, Path(info.backbone)
        self._first = self._current = Path(info.emulator)
        self._deliver, self._progress, self._bench = deliver, progress, bench

    def ready(self, number: int, adapter: State) -> None:
        """Distil anew where it is time to, or go on with a distillation that was interrupted.

        Called before each round, so a process that begins in the middle of a run finds what the one before it made.

        Raises:
            RunError: an emulator that the run has used is gone.
        """
        last, turns = self._last(number), self._plan.emulator.turns
        if last and last == number - 1:
            for turn in range(turns):
                if not is_emulator(self._made(last, turn)):
                    self._distil(last, turn, adapter)
        folder = self._made(last, (number - 1) % turns)
        if folder == self._current:
            return
        if not is_emulator(folder):
            raise RunError("an emulator of this run is gone", where=folder, hint="Put it back.")
        self._current = folder
        self._deliver(folder)

    def measure(self, adapter: State) -> tuple[float, float] | None:
        if self._plan.model.task != "causal-lm" or not self._folder.text.exists():
            return None
        from farfield.emulator import plugin
        from farfield.emulator.text import PublicText

        own = PublicText.load(self._folder.text)
        emulator, plug_in = plugin.measure(map(self._bench, (self._current, self._backbone)), adapter, own)
        return emulator, plug_in

    def _distil(self, number: int, turn: int, adapter: State) -> None:
        from farfield.emulator import plugin
        from farfield.emulator.text import PublicText

        own, before = PublicText.load(self._folder.text), self._made(self._last(number), turn)
        out = self._made(number, turn)
        plugin.redistilled(self._plan, self._backbone, before, adapter, number, own, out, self._progress)

    def _last(self, number: int) -> int:
        """The round before `number` after which it was last time to distil anew; 0 where it never was."""
        every = self._plan.delivery.redistill_every
        return (number - 1) // every * every if every else 0

    def _made(self, number: int, turn: int) -> Path:
        """The emulator of a turn, as it was distilled after round `number`."""
        return layout.at_turn(self._folder.emulators_folder / f"round-{number:04d}" if number else self._first, turn)


def check_pluggable(plan: Plan) -> None:
    """Raises PlanError where clients would keep a part of the adapter that no owner could plug in."""
    assert isinstance(plan.tuning, TuningMethod)
    if plan.tuning.sharing.local:
        raise PlanError("each client of this Plan keeps a part of its adapter at home, so none can be plugged in")


def check_emulator(plan: Plan, emulator: Path, fingerprint: str) -> None:
    """Make sure that what was tuned on an emulator will fit its backbone.

    Args:
        fingerprint: of the backbone.

    Raises:
        EmulatorError: there is none in `emulator`, or it was made for another Plan or from another backbone.
    """
    for turn in range(plan.emulator.turns):
        folder = layout.at_turn(emulator, turn)
        record = layout.read(folder)
        record.check(plan, folder)
        if record.backbone != fingerprint:
            raise EmulatorError("made from another backbone", where=folder, hint="Build it again from this one.")


def keep_text(plan: Plan, info: RunInfo, folder: RunFolder, public: Path | None) -> None:
    """Put the owner's own text into the run's folder: `public`, or what the emulator was built with, if it is there.

    Raises:
        DataError: the text cannot be used.
        EmulatorError: the Plan wants the emulator distilled anew, and there is no text to do it with.
    """
    import shutil

    from farfield.emulator import backbone, build, text

    assert info.emulator is not None
    built = Path(info.emulator) / build.TEXT
    if public is not None:
        documents = text.read(public, plan.model.backbone)
        tokenizer = backbone.load_tokenizer(Path(info.backbone))
        build.prepared(plan, documents, tokenizer).save(folder.text)
    elif built.exists():
        with writing(folder.text):
            shutil.copyfile(built, folder.text)
    elif plan.delivery.redistill_every:
        raise EmulatorError(
            "the Plan has the emulator distilled anew, and there is no public text beside it",
            where=info.emulator,
            hint="Give some with --public TEXT.",
        )
