"""The Plan: one public, immutable document that says everything about a run.

A Plan is TOML; `parse` turns it into frozen, validated values. Its canonical bytes are the JSON of those values with
all defaults filled in and keys sorted, so two files that mean the same have the same digest, however they are written.

Tuning methods and aggregation rules are not known here: each is one file, of `farfield.emulator.methods` and of
`farfield.coordinator.aggregation`, and whoever parses a Plan passes in those that it has.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self, TypeAlias

from pydantic import Field, SerializeAsAny, ValidationError, ValidationInfo, field_validator, model_validator

from . import rules as asked
from .complaints import complaint
from .errors import PlanError, did_you_mean
from .rules import Rule, Rules
from .sections import (
    SMALLEST_SUM,
    Aggregation,
    Cohort,
    Data,
    Delivery,
    Distillation,
    Emulator,
    Evaluation,
    Model,
    Privacy,
    Protection,
    Settings,
    Training,
    TuningSettings,
)


class Plan(Settings):
    """One run, whole. Made by `parse` or `load`, never by hand."""

    model: Model
    tuning: SerializeAsAny[TuningSettings]
    training: Training
    data: Data = Data()
    cohort: Cohort = Cohort()
    aggregation: Aggregation = Aggregation()
    evaluation: Evaluation = Evaluation()
    delivery: Delivery = Delivery()
    emulator: Emulator = Emulator()
    distillation: Distillation = Distillation()
    protection: Annotated[Protection, Field(validate_default=True)] = Protection()
    privacy: Privacy = Privacy()

    @field_validator("tuning", mode="before")
    @classmethod
    def _settings_of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.context is not None
        kinds: TuningKinds = info.context["tuning_kinds"]
        if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
            raise ValueError(f"'kind' (a string) is missing; known are: {', '.join(sorted(kinds))}")
        kind = value["kind"]
        if kind not in kinds:
            raise ValueError(f"no tuning method {kind!r}. {did_you_mean(kind, kinds)}")
        settings = kinds[kind].model_validate(value)
        for number in range(len(settings.alternatives)):
            _check_alternative(settings, number, kinds)
        return settings

    @field_validator("aggregation")
    @classmethod
    def _known_rule(cls, value: Aggregation, info: ValidationInfo) -> Aggregation:
        assert info.context is not None
        rules: Rules | None = info.context["rules"]
        if rules is not None and value.rule not in rules:
            raise ValueError(f"no aggregation rule {value.rule!r}. {did_you_mean(value.rule, rules)}")
        return value

    @field_validator("delivery")
    @classmethod
    def _ends_that_are_said(cls, value: Delivery) -> Delivery:
        if value.kind == "emulator" and value.ends is None:
            return value.model_copy(update={"first": 2, "last": 2})
        return value

    @field_validator("protection")
    @classmethod
    def _protection_that_fits(cls, value: Protection, info: ValidationInfo) -> Protection:
        cohort, aggregation = info.data.get("cohort"), info.data.get("aggregation")
        if cohort is None or aggregation is None:  # what is wrong with them is said anyway
            return value
        assert info.context is not None
        views = (info.context["rules"] or {}).get(aggregation.rule, Rule()).views
        small = cohort.size is not None and cohort.size < SMALLEST_SUM
        if value.kind is None:
            return value.model_copy(update={"kind": "sealed" if views or small else "secagg"})
        if value.kind == "secagg" and views:
            raise ValueError(
                f'aggregation.rule = {aggregation.rule!r} must see each update, and with kind = "secagg" nobody can; '
                'use a rule that needs sums only, such as "mean", or kind = "sealed"'
            )
        if value.kind == "secagg" and small:
            raise ValueError(
                f'a sum of {cohort.size} hides nobody: kind = "secagg" wants cohort.size to be {SMALLEST_SUM} or more'
            )
        return value

    @model_validator(mode="after")
    def _weights_that_its_method_can_train(self) -> Self:
        quantization, tuning = self.model.quantization, self.tuning
        if quantization != "none" and not tuning.on_quantised:
            raise ValueError(
                f"tuning.kind = {tuning.kind!r} trains the backbone's own weights, and with "
                f"model.quantization = {quantization!r} they are fixed; use 'lora', for instance, or 'none'"
            )
        if not tuning.corrects_rounding:
            return self
        if quantization == "none":
            raise ValueError("tuning.initial = 'loftq' corrects what model.quantization takes away, and that is 'none'")
        if self.delivery.kind == "emulator":
            raise ValueError(
                "tuning.initial = 'loftq' needs the backbone as it was, and with delivery.kind = 'emulator' what is "
                "tuned is an emulator; use 'zero'"
            )
        if any(other.quantization not in (None, quantization) for other in tuning.alternatives):
            raise ValueError(
                f"tuning.initial = 'loftq' corrects model.quantization = {quantization!r} and no other: leave "
                "quantization out of tuning.alternatives"
            )
        return self

    @model_validator(mode="after")
    def _keeps_what_is_its_owners(self) -> Self:
        if self.model.owner_only and self.delivery.kind != "emulator":
            raise ValueError(
                "model.owner_only = true: the backbone never leaves its owner, and "
                f'delivery.kind = "{self.delivery.kind}" ships it; use "emulator"'
            )
        if self.delivery.ends and not self.tuning.by_block:
            raise ValueError(
                f"tuning.kind = {self.tuning.kind!r} reaches into every block, and with delivery.first and "
                "delivery.last only the blocks at the ends are tuned; use 'lora' or 'full', for instance"
            )
        return self

    @model_validator(mode="after")
    def _steps_that_its_method_makes(self) -> Self:
        training, possible = self.training, self.tuning.optimizers
        if possible is not None and training.optimizer not in possible:
            raise ValueError(
                f"tuning.kind = {self.tuning.kind!r} has a step of its own, which training.optimizer = "
                f"{training.optimizer!r} cannot make; use {' or '.join(map(repr, possible))}"
            )
        if training.checkpointing and not self.tuning.checkpoints:
            raise ValueError(
                f"tuning.kind = {self.tuning.kind!r} keeps what each block made for those after it, so none can be "
                "computed once more: leave training.checkpointing out"
            )
        if self.tuning.by_gradient:
            return self
        if training.optimizer != "sgd" or training.momentum or training.weight_decay or training.proximal_mu:
            raise ValueError(
                f'tuning.kind = {self.tuning.kind!r} makes plain steps of its own: use training.optimizer = "sgd", '
                "without momentum, weight_decay and proximal_mu"
            )
        return self

    @model_validator(mode="after")
    def _all_that_its_rule_asks_for(self, info: ValidationInfo) -> Self:
        assert info.context is not None
        rules: Rules | None = info.context["rules"]
        if rules is None:
            return self
        asked.check(self.aggregation, self.cohort, rules)
        name = self.aggregation.rule
        if not rules.get(name, Rule()).groups:
            return self
        if self.protection.kind != "secagg":
            raise ValueError(
                f"aggregation.rule = {name!r} works on sums that hide their parts, and with protection.kind = "
                f'"{self.protection.kind}" there are none: use "secagg", or a rule that sees each update, such as '
                '"median"'
            )
        if self.privacy.kind == "client":
            raise ValueError(
                f'privacy.kind = "client" adds noise to one sum of the whole cohort, and aggregation.rule = {name!r} '
                'makes one of each group; use "mean"'
            )
        return self

    @model_validator(mode="after")
    def _updates_that_its_rule_takes(self, info: ValidationInfo) -> Self:
        name, private = self.aggregation.rule, self.privacy.kind == "client"
        if private and self.ranks:
            raise ValueError(
                'privacy.kind = "client" adds noise for updates of one shape: leave other ranks out of '
                "tuning.alternatives"
            )
        assert info.context is not None
        rule = (info.context["rules"] or {}).get(name, Rule())
        if private and rule.views:
            raise ValueError(
                f'privacy.kind = "client" adds noise to a sum, and aggregation.rule = {name!r} makes none; use "mean"'
            )
        if rule.factors and self.tuning.adapter_rank is None:
            raise ValueError(
                f"aggregation.rule = {name!r} combines LoRA's two factors, and this tuning.kind = {self.tuning.kind!r} "
                "does not send both in every round; use 'lora' without freeze_a, alternate and local_b, or "
                'rule = "mean"'
            )
        if self.ranks and (rule.views or rule.groups) and not rule.factors:
            raise ValueError(
                f"aggregation.rule = {name!r} holds updates against each other, so they must have one rank: leave "
                "other ranks out of tuning.alternatives"
            )
        return self

    @model_validator(mode="after")
    def _alternatives_that_keep_what_it_promises(self, info: ValidationInfo) -> Self:
        """An alternative's own Plan must be one, too."""
        assert info.context is not None
        for number in range(len(self.tuning.alternatives)):
            other = self.alternative(number, info.context["tuning_kinds"])
            for check in (
                other._weights_that_its_method_can_train,
                other._keeps_what_is_its_owners,
                other._steps_that_its_method_makes,
                other._can_keep_its_privacy,
            ):
                try:
                    check()  # type: ignore[operator]
                except ValueError as error:
                    raise ValueError(f"tuning.alternatives[{number}]: {error}") from None
        return self

    @model_validator(mode="after")
    def _can_be_added_up(self) -> Self:
        if self.protection.kind == "secagg" and self.evaluation.clients < self.smallest_cohort:
            raise ValueError(
                f'protection.kind = "secagg" adds up {self.smallest_cohort} clients or more, in evaluations too: '
                f"evaluation.clients is {self.evaluation.clients}"
            )
        if self.protection.kind == "secagg" and self.value_range is None:
            raise ValueError(
                "nothing says how large the values of an update can be: give protection.clip_range, "
                "or training.max_grad_norm above 0"
            )
        return self

    @model_validator(mode="after")
    def _can_keep_its_privacy(self) -> Self:
        privacy = self.privacy
        if privacy.kind == "client":
            if self.aggregation.weighting != "uniform":
                raise ValueError(
                    'privacy.kind = "client" bounds what one client adds: use aggregation.weighting = "uniform"'
                )
            if privacy.noise == "distributed" and self.protection.kind != "secagg":
                raise ValueError('privacy.noise = "distributed" hides in a sum: use protection.kind = "secagg"')
        if privacy.kind == "example":
            if not self.tuning.by_example:
                raise ValueError(
                    f'privacy.kind = "example" clips the gradient of each example, and not all that '
                    f"{self.tuning.kind!r} trains has one; use 'lora' (without dora), 'lora-fa', 'fed-sb' or "
                    "'prefix-tuning'"
                )
            if self.model.task == "causal-lm" and not self.data.truncate:
                raise ValueError(
                    'privacy.kind = "example" protects one record, so each must be one example: '
                    "use data.packing = false and data.truncate = true"
                )
            if self.training.steps is None:
                raise ValueError('privacy.kind = "example" counts its steps: use training.steps, not epochs')
            if self.training.gradient_accumulation > 1:
                raise ValueError(
                    'privacy.kind = "example" draws the batch of a step by privacy.sampling_rate and works through it '
                    "in parts of training.batch_size: leave training.gradient_accumulation out"
                )
        return self

    @property
    def value_range(self) -> float | None:
        """Values of an update beyond ± this are clipped before they are masked."""
        if self.privacy.kind == "example" and self.training.optimizer == "sgd":
            return self.protection.clip_range  # noise makes its steps longer than any norm says
        return self.protection.clip_range or self.training.update_range

    @property
    def participations(self) -> int:
        """In how many rounds a client trains, at most."""
        return min(self.privacy.participations or self.training.rounds, self.training.rounds)

    @property
    def measures(self) -> bool:
        """Whether held-out losses are measured: not where that would give away what the Plan promises to hide."""
        return self.privacy.kind == "none" or self.privacy.exact_evaluation

    @property
    def smallest_cohort(self) -> int:
        """How many clients are asked together at least: in a round, or in each of its groups where it has some."""
        return max(self.cohort.minimum, SMALLEST_SUM if self.protection.kind == "secagg" else 1)

    @property
    def smallest_round(self) -> int:
        """How many clients must be there for a round to begin."""
        return self.smallest_cohort * (self.aggregation.groups or 1)

    @property
    def ranks(self) -> frozenset[int]:
        """The ranks of updates that its alternatives allow besides its own."""
        own = self.tuning.adapter_rank
        return frozenset(one.rank for one in self.tuning.alternatives if one.rank not in (None, own))

    def alternative(self, number: int, kinds: TuningKinds) -> Plan:
        """What a client works by that takes this one of `tuning.alternatives`: the Plan with that put in."""
        wanted = self.tuning.alternatives[number].quantization
        model = self.model if wanted is None else self.model.model_copy(update={"quantization": wanted})
        return self.model_copy(update={"tuning": _instead(self.tuning, number, kinds), "model": model})

    def canonical(self) -> bytes:
        """The bytes that are digested: sorted, compact UTF-8 JSON with every default written out."""
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False
        ).encode()

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes, in hexadecimal."""
        return hashlib.sha256(self.canonical()).hexdigest()

    @property
    def emulator_digest(self) -> str:
        """SHA-256, in hexadecimal, of all in the Plan that an emulator depends on; Plans alike in it can share one."""
        parts = {
            "model": self.model.model_dump(mode="json"),
            "ends": self.delivery.ends,
            "emulator": self.emulator.model_dump(mode="json"),
            "distillation": self.distillation.model_dump(mode="json"),
            "length": self.data.max_length,
            "seed": self.training.seed,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


TuningKinds: TypeAlias = Mapping[str, type[TuningSettings]]
"""Settings by `kind`, as `farfield.emulator.methods.registered()` gives them."""


def parse(text: str, tuning_kinds: TuningKinds, rules: Rules | None, *, where: object = "Plan") -> Plan:
    """The Plan that `text` (TOML) describes.

    Args:
        rules: the aggregation rules that may be asked for; None, at a client, leaves that to the coordinator.
        where: what an error message calls the text.

    Raises:
        PlanError: the text is no TOML or no valid Plan; names the key's path and, for an unknown key, the nearest one.
    """
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"not valid TOML: {error}", where=where) from None
    try:
        return Plan.model_validate(document, context={"tuning_kinds": tuning_kinds, "rules": rules})
    except ValidationError as error:
        raise _explained(error, tuning_kinds, document, where) from None


def restore(canonical: bytes, tuning_kinds: TuningKinds, *, where: object = "Plan") -> Plan:
    """The Plan whose canonical bytes these are.

    Raises:
        PlanError: they are not, or this version of Farfield writes them differently and so does not understand them.
    """
    hint = "The two sides run different versions of Farfield; bring them to the same one."
    try:
        document = json.loads(canonical)
        plan = Plan.model_validate(document, context={"tuning_kinds": tuning_kinds, "rules": None})
    except ValidationError as error:
        raise _explained(error, tuning_kinds, document, where) from None
    except (ValueError, RecursionError):
        raise PlanError("not the canonical bytes of a Plan", where=where) from None
    if plan.canonical() != canonical:
        raise PlanError("a Plan with other keys or defaults than this version's", where=where, hint=hint)
    return plan


def load(path: Path, tuning_kinds: TuningKinds, rules: Rules | None) -> Plan:
    """The Plan in the file `path`. Raises PlanError as `parse` does, and when the file cannot be read."""
    return parse(read(path), tuning_kinds, rules, where=path)


def read(path: Path) -> str:
    """The text of a Plan's file. Raises PlanError when there is none that can be read."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = "Give the path of a Plan, for example examples/quickstart.toml."
        raise PlanError("no such file", where=path, hint=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot be read as UTF-8 text: {error}", where=path) from None


def _instead(tuning: TuningSettings, number: int, kinds: TuningKinds) -> TuningSettings:
    """The settings of alternative `number`. Raises ValueError where there are none such."""
    other, where = tuning.alternatives[number], f"alternatives[{number}]"
    kind = tuning.kind if other.kind is None else other.kind
    if kind not in kinds:
        raise ValueError(f"{where}: no tuning method {kind!r}. {did_you_mean(kind, kinds)}")
    known = kinds[kind].model_fields
    if other.rank is not None and "rank" not in known:
        raise ValueError(f"{where}: {kind!r} has no rank")
    own = tuning.model_dump(mode="json", exclude={"alternatives", "kind"})
    kept = {key: value for key, value in own.items() if key in known}
    if lost := [key for key, value in own.items() if key not in known and value != _default(tuning, key)]:
        raise ValueError(f"{where}: {kind!r} has no {lost[0]!r}, which this Plan sets")
    rank = {} if other.rank is None else {"rank": other.rank}
    return kinds[kind].model_validate({"kind": kind, **kept, **rank})


def _check_alternative(tuning: TuningSettings, number: int, kinds: TuningKinds) -> None:
    """Raises ValueError where updates of alternative `number` could not be taken together with the Plan's own."""
    other, where = _instead(tuning, number, kinds), f"alternatives[{number}]"
    if other.adapter_of != tuning.adapter_of:
        raise ValueError(
            f"{where}: {other.kind!r} does not train the same tensors as this {tuning.kind!r}, and updates of one "
            "round are of the same ones"
        )
    rank = tuning.alternatives[number].rank
    if rank is None:
        return
    if tuning.adapter_rank is None:
        raise ValueError(
            f"{where}: clients can differ in rank only where LoRA's two factors are both sent in every round, and this "
            f"{tuning.kind!r} does not send them"
        )
    if rank > tuning.adapter_rank:
        raise ValueError(f"{where}: rank = {rank} is more than what clients are sent, which has {tuning.adapter_rank}")


def _default(tuning: TuningSettings, key: str) -> object:
    return type(tuning).model_fields[key].default


def _explained(error: ValidationError, kinds: TuningKinds, document: dict[str, Any], where: object) -> PlanError:
    """The first complaint of pydantic as one sentence about one key."""
    known = partial(_known_keys, kinds=kinds, document=document)
    what, hint = complaint(error, known, whole="Plan", missing="docs/plan.md lists every key.")
    return PlanError(what, where=where, hint=hint)


def _known_keys(path: list[str], kinds: TuningKinds, document: dict[str, Any]) -> set[str]:
    if not path:
        return set(Plan.model_fields)
    if path[0] == "tuning":
        return set(kinds[document["tuning"]["kind"]].model_fields)
    section = Plan.model_fields[path[0]].annotation
    assert isinstance(section, type) and issubclass(section, Settings)
    return set(section.model_fields)
