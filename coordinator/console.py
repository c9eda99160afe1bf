"""What the coordinator's commands print: a bar and a table on a terminal, plain lines elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import TaskID
from rich.table import Table

from farfield.emulator.methods import TuningMethod, advice
from farfield.protocols.plan import Plan
from farfield.protocols.privacy.mechanism import ExampleMechanism, mechanism, promised
from farfield.protocols.terminal import bar, decimals, plain, size

from . import plans
from .aggregation import traits
from .conductor import improvement
from .emulator_console import BuildLines
from .grouping import fewest
from .results import Result
from .runs import RoundRecord, RunFolder, RunInfo
from .storage import Run

if TYPE_CHECKING:
    from farfield.emulator.distill import Check
    from farfield.emulator.search import Candidate

_COLUMNS = (
    ("round", 5),
    ("clients", 7),
    ("train loss", 10),
    ("held-out", 9),
    ("accuracy", 8),
    ("down", 9),
    ("up", 9),
    ("time", 7),
)


class SimulationConsole:
    """Reports a simulation: rounds as lines of a table, the work within a round as a bar (on a terminal only)."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = bar(console)
        self._whole: TaskID | None = None
        self._part = self._bar.add_task("starting", total=None, visible=False)
        self._build = BuildLines(console, self._show, indent=8)
        self.folder: Path | None = None
        """The run's folder, from the moment that there is one."""

    def __enter__(self) -> SimulationConsole:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def on_folder(self, folder: Path) -> None:
        self.folder = folder

    def on_stage(self, what: str) -> None:
        self._build.on_stage(what)

    def on_candidate(self, candidate: Candidate, done: int, count: int) -> None:
        self._build.on_candidate(candidate, done, count)

    def on_step(self, done: int, steps: int, loss: float) -> None:
        self._build.on_step(done, steps, loss)

    def on_check(self, check: Check) -> None:
        self._build.on_check(check)

    def on_preparing(self, done: int, clients: int) -> None:
        self._show("reading the clients' data", done, clients)

    def on_start(self, folder: Path, info: RunInfo, done: list[RoundRecord], rounds: int) -> None:
        self.folder = folder
        finished = max((record.round for record in done), default=0)
        state = f"resumed after round {finished}" if done else f"{rounds} rounds"
        plain(self._console, f"Run {info.run} in {folder}: {info.clients} clients, {state}")
        self._whole = self._bar.add_task("rounds", total=rounds, completed=finished)
        _line(self._console, *(title for title, _ in _COLUMNS), style="bold")
        for record in done:
            _row(self._console, record)

    def on_client(self, number: int, activity: str, done: int, clients: int) -> None:
        self._show(f"round {number}: {activity}", done, clients)

    def on_round(self, record: RoundRecord) -> None:
        _row(self._console, record)
        if self._whole is not None:
            self._bar.update(self._whole, completed=record.round)

    def on_baseline(self, done: int, steps: int, loss: float) -> None:
        self._show(f"centralised, for comparison (loss {loss:.3f})", done, steps)

    def _show(self, description: str, done: int, total: int) -> None:
        self._bar.update(self._part, description=description, completed=done, total=total, visible=done < total)


class RunConsole:
    """Reports a run that the service does: its rounds as lines of a table, and what it does now beside a spinner.

    Where there is no terminal, what it does now is a line whenever it changes to waiting or to trouble.
    """

    def __init__(self, console: Console, name: str, folder: Path) -> None:
        self._console, self._name, self._folder = console, name, folder
        self._status = console.status("queued")
        self._said = ""

    def __enter__(self) -> RunConsole:
        plain(self._console, f"Run {self._name} in {self._folder}")
        _line(self._console, *(title for title, _ in _COLUMNS), style="bold")
        self._status.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._status.stop()

    def on_state(self, run: Run, serving: bool) -> None:
        detail = run.detail or run.state.value
        if not serving:
            detail = "waiting for the service, which does not run: coordinator serve"
        self._status.update(escape(detail))
        if detail.startswith("waiting") and detail != self._said and not self._console.is_terminal:
            plain(self._console, f"        {detail}")
            self._said = detail

    def on_round(self, record: RoundRecord) -> None:
        _row(self._console, record)


def _row(console: Console, record: RoundRecord) -> None:
    _line(
        console,
        str(record.round) if record.round else "start",
        str(record.clients) if record.round else "",
        decimals(record.train_loss),
        decimals(record.eval_loss),
        "" if record.eval_accuracy is None else f"{record.eval_accuracy:.1%}",
        size(record.bytes_down),
        size(record.bytes_up),
        f"{record.seconds:.1f} s",
    )
    if record.plug_in_loss is not None:
        said = f"{record.emulator_loss:.4f} on the emulator, {record.plug_in_loss:.4f} plugged in"
        plain(console, f"        the owner's text: {said}")
    if record.lost:
        plain(console, f"        {record.lost:.1%} of the combined change did not fit into the adapter's rank")
    for node, problem in record.problems.items():
        plain(console, f"        {node}: {problem}", "yellow")


def _line(console: Console, *cells: str, style: str = "") -> None:
    padded = (cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
    console.print("  ".join(padded), style=style, highlight=False)


def print_result(console: Console, result: Result) -> None:
    """The end of a run: what it changed, what it is measured against, and where it is."""
    console.print()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    gain = improvement(result.eval_loss_before, result.eval_loss_after)
    table.add_row("Held-out loss before", decimals(result.eval_loss_before), "text that no client trained on")
    table.add_row("Federated", decimals(result.eval_loss_after), "" if gain is None else f"{gain:.1%} lower")
    if result.centralised is not None:
        central = improvement(result.eval_loss_before, result.centralised.eval_loss)
        text = (
            "" if central is None else f"{central:.1%} lower, with {result.centralised.steps} steps on the pooled data"
        )
        if gain is not None and central:
            text += f"; federated reaches {gain / central:.0%} of that"
        table.add_row("Centralised", decimals(result.centralised.eval_loss), text)
    if (offsite := result.offsite) is not None:
        table.add_row("Backbone before", decimals(offsite.zero_shot), "zero-shot")
        table.add_row("Emulator, tuned", decimals(offsite.emulator), "what the clients have")
        table.add_row(
            "Backbone, plugged in", decimals(offsite.plug_in), f"{offsite.recovered:.1%} of what is to be gained"
        )
        table.add_row("Backbone, tuned itself", decimals(offsite.full), "by the same federation, with the backbone")
        if offsite.emulator <= offsite.plug_in:
            table.add_row("", "", "The tuned emulator is as good as the backbone: for this task it protects nothing.")
    console.print(table, highlight=False)
    folder = escape(str(result.folder))
    adapter = f"{folder}/adapter"
    if result.document()["adapter"] is None:
        adapter = f"each client has its own: coordinator export {folder} OUT --client NAME"
    console.print(f"\n[bold]Adapter[/]  {adapter}", highlight=False, soft_wrap=True)
    console.print(f"[bold]Digest[/]   {result.adapter_digest}", highlight=False, soft_wrap=True)
    console.print(f"[bold]Plot[/]     {folder}/loss.png", highlight=False, soft_wrap=True)
    plan = plans.parse(RunFolder.open(result.folder).plan_text, where=result.folder / "plan.toml")
    if plan.tuning.merges:
        console.print(
            f"Merge it into the backbone with: coordinator export {folder} OUT --merged",
            highlight=False,
            soft_wrap=True,
        )


def _delivery(plan: Plan) -> str:
    ends, emulator, distillation = plan.delivery.ends, plan.emulator, plan.distillation
    if ends is None:
        return "clients get the backbone, and tune all of its blocks"
    tuned = f"the first {ends[0]} and the last {ends[1]} blocks are tuned"
    if plan.delivery.kind == "adapter":
        return f"clients get the backbone; {tuned}"
    made = [
        f"{emulator.blocks or 'some'} blocks by {emulator.select}",
        *([f"low rank, {emulator.low_rank:.0%} of the parameters"] if emulator.low_rank else []),
        *([emulator.quantization] if emulator.quantization != "none" else []),
        f"distilled for up to {distillation.steps} steps" if distillation.steps else "not distilled",
    ]
    return f"clients get an emulator, and never the backbone; {tuned}; between them: {', '.join(made)}"


_APART = ("kind", "alternatives")

_PROTECTION = {
    "none": "none: whoever carries an update can read it; for simulations only",
    "sealed": "sealed: the coordinator can read each client's update, and nobody on the way",
    "secagg": "secagg: the coordinator learns the sum, and no client's update unless the others work with it",
}


def _protection(plan: Plan) -> str:
    assert plan.protection.kind is not None
    return _PROTECTION[plan.protection.kind]


def _privacy(plan: Plan) -> dict[str, str]:
    """What is promised, and on which terms, by title. Raises PrivacyError where it cannot be kept."""
    made, spent, wanted = mechanism(plan), promised(plan), plan.privacy
    if made is None or spent is None:
        return {"privacy": "none: no differential privacy"}
    other = "" if spent.epsilon_pld is None else f"; by RDP {spent.epsilon_rdp:.4g}"
    rounds = (
        f"{plan.participations} of {plan.training.rounds}" if wanted.participations else f"all {plan.training.rounds}"
    )
    if isinstance(made, ExampleMechanism):
        counted = (
            f"{made.steps} steps in each of {rounds} rounds; each example is in a step's batch with probability "
            f"{made.sampling_rate:g}, drawn by its client, which adds the noise"
        )
    else:
        by_whom = "by the coordinator, once" if made.noise == "central" else "by the clients, in shares"
        counted = f"a client that takes part in {rounds} rounds; noise is added {by_whom}"
    norm = f"{wanted.clipping_norm:g}"
    if wanted.clipping == "adaptive":
        norm += f" at first, then by the {wanted.target_quantile:.0%} quantile"
    epsilon = f"ε = {spent.epsilon:.4g} at δ = {spent.delta:g} for one {wanted.kind}"
    return {
        "privacy": f"{epsilon}, by {spent.accountant}{other}",
        "counted": counted,
        "noise": f"multiplier {made.noise_multiplier:g}, clipping norm {norm}",
        "not covered": "held-out losses, which are released without noise" if wanted.exact_evaluation else "",
    }


def _rule(plan: Plan) -> str:
    """The rule, with the keys that the Plan gives it and no other rule has."""
    keys = sorted(traits()[plan.aggregation.rule].asks.keys - {"groups"})
    told = {key: getattr(plan.aggregation, key) for key in keys}
    given = ", ".join(f"{key} {value}" for key, value in told.items() if value is not None)
    return plan.aggregation.rule + (f" ({given})" if given else "")


def _groups(plan: Plan) -> dict[str, str]:
    """What it takes to add up in groups, by title; nothing where there are none."""
    groups, least = plan.aggregation.groups, plan.smallest_cohort
    if groups is None:
        return {}
    each = f"{groups}, each with a sum of its own over {least} clients or more"
    return {"groups": f"{each}: a round takes {groups * least} clients, and counts when {fewest(groups)} groups do"}


def _alternatives(plan: Plan) -> dict[str, str]:
    """What clients may do instead, and what that means for the aggregation, by title."""
    listed = [
        " and ".join(f"{key} {value}" for key, value in one.model_dump().items() if value is not None) or "the same"
        for one in plan.tuning.alternatives
    ]
    if not plan.ranks or plan.tuning.adapter_rank is None:
        return {"instead": "; or ".join(listed)}
    ranks = ", ".join(map(str, sorted({plan.tuning.adapter_rank, *plan.ranks}, reverse=True)))
    if traits()[plan.aggregation.rule].factors:
        meaning = f"{plan.aggregation.rule} combines updates of these ranks by what their factors are"
    else:
        when = ", before it masks" if plan.protection.kind == "secagg" else ""
        meaning = f"a client adds zeros for the ranks that it does not train{when}, so these move by the others' work"
    return {"instead": "; or ".join(listed), "ranks": f"{ranks}: {meaning}"}


def print_plan(console: Console, plan: Plan, fits: str) -> None:
    """`coordinator plan check`: the digest, what the Plan will do, in words, and how its method fits its backbone."""
    training, cohort, rule = plan.training, plan.cohort, plan.aggregation
    budget = f"{training.steps} steps" if training.steps else f"{training.epochs} epochs"
    batch = f"{training.batch_size * training.gradient_accumulation}"
    if plan.privacy.sampling_rate is not None:
        batch = f"{plan.privacy.sampling_rate:.3g} of its"
    asked = (
        f"{cohort.size} clients" if cohort.size
        else f"{cohort.fraction:.0%} of the clients present" if cohort.fraction
        else "every client present"
    )  # fmt: skip
    tuning = ", ".join(f"{key} {value}" for key, value in plan.tuning.model_dump().items() if key not in _APART)
    optimizer = "" if rule.server_optimizer == "none" else f", then server {rule.server_optimizer}"
    proximal = f", FedProx with μ {training.proximal_mu:g}" if training.proximal_mu else ""
    rows = {
        "backbone": f"{plan.model.backbone}, {plan.model.task}, {plan.model.dtype}",
        "tuning": f"{plan.tuning.kind} ({tuning})",
        "rounds": f"{training.rounds}, each with {asked}, at least {plan.smallest_round}",
        "a client's work": f"{budget} of {batch} examples of at most {plan.data.max_length} tokens, "
        f"{training.optimizer} at {training.learning_rate:g} ({training.schedule}){proximal}",
        "aggregation": f"{_rule(plan)}, weighted by {rule.weighting}{optimizer}",
        "evaluation": f"every {plan.evaluation.every} round(s), on {plan.data.held_out:.0%} of the examples of up to "
        f"{plan.evaluation.clients} clients"
        if plan.measures
        else "none: the Plan's privacy does not allow it",
        "delivery": _delivery(plan),
        "on the wire": f"adapter tensors in {plan.delivery.dtype}",
        "protection": _protection(plan),
    } | {title: text for title, text in (_groups(plan) | _alternatives(plan) | _privacy(plan)).items() if text}
    rows["fit"] = fits
    assert isinstance(plan.tuning, TuningMethod)
    advised = advice(plan.tuning)
    if advised and (plan.protection.kind == "secagg" or plan.privacy.kind != "none"):
        rows["advice"] = advised
    console.print(f"[bold]digest[/]           {plan.digest}", highlight=False, soft_wrap=True)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True, min_width=15)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console.print(table, highlight=False)
