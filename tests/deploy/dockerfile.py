"""Reading Dockerfiles, and the rules that ours keep. A rule yields what is wrong, one line each."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Instruction:
    keyword: str
    text: str


@dataclass(frozen=True, slots=True)
class Dockerfile:
    """Its instructions, continued lines joined and comments left out, and where the build is to take place.

    Attributes:
        context: the folder that COPY reads from.
        ignored: the lines of the file's own .dockerignore.
    """

    instructions: tuple[Instruction, ...]
    context: Path
    ignored: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str, context: Path, ignored: str = "") -> Dockerfile:
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        joined = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
        found = tuple(Instruction(*line.strip().split(None, 1)) for line in joined if line.strip())
        patterns = (line.strip() for line in ignored.splitlines())
        return cls(found, context, tuple(line for line in patterns if line and not line.startswith("#")))

    def stages(self) -> list[list[Instruction]]:
        """The instructions of each stage, its FROM first."""
        stages: list[list[Instruction]] = []
        for one in self.instructions:
            if one.keyword == "FROM":
                stages.append([])
            if stages:
                stages[-1].append(one)
        return stages

    def texts(self, keyword: str) -> list[str]:
        return [one.text for one in self.instructions if one.keyword == keyword]

    def arguments(self) -> dict[str, str]:
        """The defaults of the build's arguments."""
        pairs = (text.partition("=") for text in self.texts("ARG"))
        return {name: value.strip('"') for name, _, value in pairs}

    def variables(self) -> dict[str, str]:
        """Every ENV of every stage; the last one counts."""
        words = (word for text in self.texts("ENV") for word in shlex.split(text))
        return dict(word.split("=", 1) for word in words)

    def copied(self) -> list[str]:
        """What COPY takes from the build's context."""
        words = [shlex.split(text) for text in self.texts("COPY")]
        return [path for one in words if not one[0].startswith("--from=") for path in one[:-1] if path[:2] != "--"]

    def seen(self, path: str) -> bool:
        """Whether the .dockerignore lets the build see this file of the context; the last line that fits decides."""
        parts = path.split("/")
        above = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]
        seen = True
        for line in self.ignored:
            pattern = line.removeprefix("!")
            if pattern.startswith("**/"):
                fits = any(fnmatch.fnmatchcase(part, pattern[3:]) for part in parts)
            else:
                fits = any(pattern.count("/") == one.count("/") and fnmatch.fnmatchcase(one, pattern) for one in above)
            if fits:
                seen = line.startswith("!")
        return seen


Rule = Callable[[Dockerfile], Iterator[str]]

_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|PRIVATE|API_?KEY|ACCESS_?KEY", re.I)


def base_images_are_pinned(file: Dockerfile) -> Iterator[str]:
    arguments, stages = file.arguments(), set()
    for text in file.texts("FROM"):
        image, _, name = text.partition(" AS ")
        image = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], image)
        if image not in stages and not re.search(r":\d+\.\d+\.\d+[\w.-]*$|@sha256:[0-9a-f]{64}$", image):
            yield f"FROM {image} names no version of three numbers and no digest"
        stages.add(name)


def nothing_that_builds_is_left(file: Dockerfile) -> Iterator[str]:
    stages = file.stages()
    if len(stages) < 2 or not any(one.keyword == "COPY" and "--from=" in one.text for one in stages[-1]):
        yield "one stage both builds and runs"
    for one in stages[-1]:
        if one.keyword == "RUN" and re.search(r"\b(pip|apt-get|apt|gcc|make)\b", one.text):
            yield f"the last stage installs: {one.text}"


def it_runs_as_a_fixed_user_without_rights(file: Dockerfile) -> Iterator[str]:
    last = file.stages()[-1]
    users = [index for index, one in enumerate(last) if one.keyword == "USER"]
    if not users:
        yield "no USER: it runs as root"
        return
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", last[users[-1]].text):
        yield f"USER {last[users[-1]].text} is not a fixed number other than root's"
    if any(one.keyword in ("RUN", "COPY") for one in last[users[-1] :]):
        yield "USER is not what comes last: a RUN or COPY follows"


def commands_are_in_exec_form(file: Dockerfile) -> Iterator[str]:
    forms = [(key, text) for key in ("ENTRYPOINT", "CMD") for text in file.texts(key)]
    if not file.texts("ENTRYPOINT"):
        yield "no ENTRYPOINT"
    for text in file.texts("HEALTHCHECK"):
        forms.append(("HEALTHCHECK CMD", text.partition("CMD ")[2]))
    for key, text in forms:
        try:
            words = json.loads(text)
        except ValueError:
            words = None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            yield f"{key} {text} is not in exec form: a shell would stand between it and its signals"


def its_health_and_its_end_are_declared(file: Dockerfile) -> Iterator[str]:
    if not file.texts("HEALTHCHECK"):
        yield "no HEALTHCHECK"
    if file.texts("STOPSIGNAL") != ["SIGTERM"]:
        yield "STOPSIGNAL is not SIGTERM"


def pip_installs_pinned_and_keeps_nothing(file: Dockerfile) -> Iterator[str]:
    for text in file.texts("RUN"):
        for step in text.split("&&"):
            if not re.search(r"\bpip (install|wheel)\b", step):
                continue
            if "--no-cache-dir" not in step:
                yield f"pip keeps its cache: {step.strip()}"
            options_with_value = ("--index-url", "--constraint", "--wheel-dir", "-c")
            words = shlex.split(step.partition("pip ")[2])[1:]
            wanted = [
                word
                for before, word in zip(["", *words], words, strict=False)
                if not word.startswith("-") and before not in options_with_value
            ]
            for word in wanted:
                if word != "." and "==" not in word and not ("file://" in word and "--constraint" in step):
                    yield f"pip installs any version of {word}"
            if "--extra-index-url" in step:
                yield f"a package may come from either of two indexes: {step.strip()}"


def apt_leaves_no_lists(file: Dockerfile) -> Iterator[str]:
    for text in file.texts("RUN"):
        if re.search(r"apt(-get)? install", text):
            if "--no-install-recommends" not in text:
                yield f"apt installs what is only recommended: {text}"
            if "rm -rf /var/lib/apt/lists/*" not in text:
                yield f"apt's lists stay in the layer: {text}"


def nothing_is_fetched_unverified(file: Dockerfile) -> Iterator[str]:
    for text in file.texts("ADD"):
        yield f"ADD {text}: use COPY, and fetch nothing that is not verified"
    for text in file.texts("RUN"):
        if re.search(r"\b(curl|wget)\b", text):
            yield f"fetched unverified: {text}"


def no_secret_is_baked_in(file: Dockerfile) -> Iterator[str]:
    for name in {**file.arguments(), **file.variables()}:
        if _SECRET.search(name):
            yield f"{name} would be read from the image's history"


def what_is_copied_is_there(file: Dockerfile) -> Iterator[str]:
    for path in file.copied():
        if not (file.context / path).exists():
            yield f"COPY {path}: there is no such file"
        elif not file.seen(path):
            yield f"COPY {path}: the .dockerignore hides it"
        elif path in (".", "./"):
            yield "COPY . takes whatever lies there"


def the_environment_is_on_the_path(file: Dockerfile) -> Iterator[str]:
    found = [text for one in file.stages()[-1] if one.keyword == "ENV" for text in [one.text]]
    if not any("PATH=/opt/farfield/bin:" in text for text in found):
        yield "the SuperLink would not find flower-superexec: its folder is not on PATH"


RULES: tuple[Rule, ...] = (
    base_images_are_pinned,
    nothing_that_builds_is_left,
    it_runs_as_a_fixed_user_without_rights,
    commands_are_in_exec_form,
    its_health_and_its_end_are_declared,
    pip_installs_pinned_and_keeps_nothing,
    apt_leaves_no_lists,
    nothing_is_fetched_unverified,
    no_secret_is_baked_in,
    what_is_copied_is_there,
    the_environment_is_on_the_path,
)
