"""The Helm chart, rendered with its own values and with others, and checked as Kubernetes and Helm would."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import commands
import go_template
import pytest
import schema
import yaml
from dockerfile import Dockerfile

ROOT = Path(__file__).parents[2]
CHART_FOLDER = ROOT / "deploy" / "helm" / "farfield-coordinator"
TEMPLATES = sorted((CHART_FOLDER / "templates").glob("*.yaml"))
PORTS = {"fleet": 9092, "federation": 9093, "enrolment": 9094}

Resource = dict[str, Any]


def read(name: str) -> Any:
    return yaml.safe_load((CHART_FOLDER / name).read_text(encoding="utf-8"))


CHART, VALUES = read("Chart.yaml"), read("values.yaml")
SCHEMA = json.loads((CHART_FOLDER / "values.schema.json").read_text(encoding="utf-8"))


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """As Helm lays the user's values over the chart's: maps are merged, everything else is replaced."""
    result = dict(base)
    for key, value in over.items():
        result[key] = merged(result[key], value) if isinstance(value, dict) and key in result else value
    return result


def context(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "Values": merged(VALUES, values),
        "Release": {"Name": "clinics", "Namespace": "research", "Service": "Helm"},
        "Chart": {"Name": CHART["name"], "Version": CHART["version"], "AppVersion": CHART["appVersion"]},
    }


def rendered(values: Mapping[str, Any]) -> list[Resource]:
    """Every resource of the chart."""
    texts = [go_template.render(path.read_text(encoding="utf-8"), context(values)) for path in TEMPLATES]
    return [resource for text in texts for resource in yaml.safe_load_all(text) if resource]


def of_kind(resources: list[Resource], kind: str) -> Resource:
    (found,) = (resource for resource in resources if resource["kind"] == kind)
    return found


EVERYTHING: dict[str, Any] = {
    "hostnames": ["fed.example.org", '"; reboot; "', "192.0.2.1"],
    "database": {"existingSecret": "db", "key": "uri"},
    "image": {"tag": "0.1.0-cuda", "repository": "registry.example.org/farfield-coordinator"},
    "imagePullSecrets": [{"name": "registry"}],
    "service": {
        "type": "LoadBalancer",
        "annotations": {"example.org/internal": "true"},
        "loadBalancerSourceRanges": ["192.0.2.0/24"],
    },
    "persistence": {"storageClass": "fast", "size": "1Ti"},
    "runtimeClassName": "nvidia",
    "resources": {"limits": {"nvidia.com/gpu": 1}},
    "nodeSelector": {"zone": "a"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "podAnnotations": {"example.org/team": "research"},
    "serviceAccount": {"name": "farfield", "annotations": {"example.org/role": "none"}},
    "networkPolicy": {
        "from": [{"ipBlock": {"cidr": "192.0.2.0/24"}}],
        "egress": [{"to": [{"podSelector": {"matchLabels": {"app": "postgresql"}}}], "ports": [{"port": 5432}]}],
    },
    "podDisruptionBudget": {"enabled": True},
}
NOTHING: dict[str, Any] = {"serviceAccount": {"create": False, "name": "other"}, "networkPolicy": {"enabled": False}}
CASES = {"default": {}, "everything": EVERYTHING, "nothing": NOTHING}


# --- what Kubernetes asks of resources ------------------------------------------------------------

REQUIRED = {
    ("apps/v1", "StatefulSet"): ("spec.selector.matchLabels", "spec.serviceName", "spec.template.spec.containers"),
    ("v1", "Service"): ("spec.selector", "spec.ports", "spec.type"),
    ("v1", "ServiceAccount"): ("automountServiceAccountToken",),
    ("networking.k8s.io/v1", "NetworkPolicy"): ("spec.podSelector.matchLabels", "spec.policyTypes"),
    ("policy/v1", "PodDisruptionBudget"): ("spec.selector.matchLabels", "spec.maxUnavailable"),
}


def at(resource: Mapping[str, Any], path: str) -> Any:
    value: Any = resource
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def problems(resources: list[Resource]) -> Iterator[str]:
    """What is wrong, one line each."""
    for resource in resources:
        known = REQUIRED.get((resource.get("apiVersion", ""), resource.get("kind", "")))
        if known is None:
            yield f"no such kind: {resource.get('apiVersion')} {resource.get('kind')}"
            continue
        for path in ("metadata.name", "metadata.namespace", "metadata.labels", *known):
            if at(resource, path) is None:
                yield f"{resource['kind']}: no {path}"
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", resource["metadata"]["name"]):
            yield f"{resource['kind']}: its name is no DNS label"
        labels = [*resource["metadata"]["labels"].values(), *(at(resource, "metadata.annotations") or {}).values()]
        if not all(isinstance(value, str) for value in labels):
            yield f"{resource['kind']}: a label or annotation is no text"
    stateful = of_kind(resources, "StatefulSet")
    pod = stateful["spec"]["template"]
    yield from selecting(resources, pod["metadata"]["labels"])
    yield from in_pod(pod["spec"], stateful)
    (container,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    if ports != PORTS:
        yield f"the container's ports are {ports}"
    service = of_kind(resources, "Service")
    if stateful["spec"]["serviceName"] != service["metadata"]["name"]:
        yield "the StatefulSet's Service is another one"
    for port in service["spec"]["ports"]:
        if ports.get(port["targetPort"]) != port["port"]:
            yield f"port {port['port']} of the Service leads to {port['targetPort']}"
    if {port["name"] for port in service["spec"]["ports"]} != set(PORTS):
        yield "the Service leaves a port out, or has one more"
    for policy in (resource for resource in resources if resource["kind"] == "NetworkPolicy"):
        admitted = [port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]]
        if admitted != list(PORTS) or policy["spec"]["policyTypes"] != ["Ingress", "Egress"]:
            yield f"the NetworkPolicy lets in {admitted}"
    for name, probe in container.items():
        if name.endswith("Probe") and "tcpSocket" in probe and probe["tcpSocket"]["port"] not in ports:
            yield f"{name} asks a port that is not there"


def selecting(resources: list[Resource], labels: Mapping[str, str]) -> Iterator[str]:
    paths = {"Service": "spec.selector", "NetworkPolicy": "spec.podSelector.matchLabels"}
    for resource in resources:
        if resource["kind"] != "ServiceAccount":
            selector = at(resource, paths.get(resource["kind"], "spec.selector.matchLabels"))
            if not selector or not selector.items() <= labels.items():
                yield f"{resource['kind']} does not select the pod"


def in_pod(pod: Mapping[str, Any], stateful: Resource) -> Iterator[str]:
    volumes = {volume["name"] for volume in pod["volumes"]}
    volumes |= {claim["metadata"]["name"] for claim in stateful["spec"]["volumeClaimTemplates"]}
    security = {**pod["securityContext"]}
    if security.pop("seccompProfile", None) != {"type": "RuntimeDefault"}:
        yield "any system call is allowed"
    if security != {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10001,
        "fsGroup": 10001,
        "fsGroupChangePolicy": "OnRootMismatch",
    }:
        yield f"it runs as {security}"
    for key, wanted in {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "shareProcessNamespace": True,
    }.items():
        if pod.get(key) is not wanted:
            yield f"{key} is not {wanted}"
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if key in pod:
            yield f"{key} is set"
    for container in (*pod["initContainers"], *pod["containers"]):
        if container.get("securityContext") != {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }:
            yield f"{container['name']} has rights: {container.get('securityContext')}"
        if not {mount["name"] for mount in container["volumeMounts"]} <= volumes:
            yield f"{container['name']} mounts what is not there"
        if [mount["mountPath"] for mount in container["volumeMounts"]] != ["/var/lib/farfield", "/tmp"]:
            yield f"{container['name']} does not mount its home and /tmp"
        if not re.search(r":\d+\.\d+\.\d+[\w.-]*$", container["image"]):
            yield f"{container['name']} has an image of no version: {container['image']}"
        if not container.get("resources"):
            yield f"{container['name']} may use all there is"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if probe not in pod["containers"][0]:
            yield f"no {probe}"


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_wrong_with_what_is_rendered(case: str) -> None:
    resources = rendered(CASES[case])
    assert list(problems(resources)) == []
    kinds = {"StatefulSet", "Service", "ServiceAccount", "NetworkPolicy"}
    wanted = {"default": kinds, "everything": kinds | {"PodDisruptionBudget"}, "nothing": {"StatefulSet", "Service"}}
    assert {resource["kind"] for resource in resources} == wanted[case]
    assert len(resources) == len(wanted[case])


def _set(kind: str, path: str, value: Any) -> Callable[[list[Resource]], None]:
    def change(resources: list[Resource]) -> None:
        target: Any = of_kind(resources, kind)
        *way, last = (int(name) if name.isdigit() else name for name in path.split("."))
        for name in way:
            target = target[name]
        if value is None:
            del target[last]
        else:
            target[last] = value

    return change


POD = "spec.template.spec"
CHANGES: dict[str, Callable[[list[Resource]], None]] = {
    "an old API": _set("StatefulSet", "apiVersion", "apps/v1beta1"),
    "no name": _set("Service", "metadata.name", "Clinics!"),
    "another Service": _set("StatefulSet", "spec.serviceName", "other"),
    "no selector": _set("StatefulSet", "spec.selector", None),
    "a selector that misses": _set("Service", "spec.selector", {"app": "other"}),
    "a policy that misses": _set("NetworkPolicy", "spec.podSelector.matchLabels", {"app": "other"}),
    "a budget that misses": _set("PodDisruptionBudget", "spec.selector.matchLabels", {"app": "other"}),
    "a port that leads nowhere": _set("Service", "spec.ports.0.targetPort", "http"),
    "ports crossed": _set("Service", "spec.ports.0.targetPort", "enrolment"),
    "the control port": _set("StatefulSet", f"{POD}.containers.0.ports.0", {"name": "fleet", "containerPort": 9091}),
    "one port less": _set("Service", "spec.ports.2", None),
    "a port more let in": _set("NetworkPolicy", "spec.ingress.0.ports.0.port", 9091),
    "a probe of no port": _set("StatefulSet", f"{POD}.containers.0.readinessProbe.tcpSocket.port", "http"),
    "no probe": _set("StatefulSet", f"{POD}.containers.0.livenessProbe", None),
    "root": _set("StatefulSet", f"{POD}.securityContext.runAsUser", 0),
    "keys opened to the group": _set("StatefulSet", f"{POD}.securityContext.fsGroupChangePolicy", "Always"),
    "any system call": _set("StatefulSet", f"{POD}.securityContext.seccompProfile", None),
    "writable": _set("StatefulSet", f"{POD}.containers.0.securityContext.readOnlyRootFilesystem", False),
    "capabilities": _set("StatefulSet", f"{POD}.initContainers.0.securityContext.capabilities", None),
    "a token of the cluster": _set("StatefulSet", f"{POD}.automountServiceAccountToken", True),
    "the host's network": _set("StatefulSet", f"{POD}.hostNetwork", True),
    "nobody reaps": _set("StatefulSet", f"{POD}.shareProcessNamespace", False),
    "a mount of nothing": _set("StatefulSet", f"{POD}.volumes.0.name", "temporary"),
    "any version": _set("StatefulSet", f"{POD}.containers.0.image", "farfield-coordinator:latest"),
    "no limits": _set("StatefulSet", f"{POD}.containers.0.resources", None),
    "a label that is no text": _set("Service", "metadata.annotations", {"example.org/internal": True}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_for_the_worse_is_found(change: str) -> None:
    resources = copy.deepcopy(rendered(EVERYTHING))
    CHANGES[change](resources)
    assert list(problems(resources))


# --- what the values do ---------------------------------------------------------------------------


def test_every_value_that_a_template_names_is_there_and_every_one_that_is_there_is_named() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (*TEMPLATES, CHART_FOLDER / "templates" / "NOTES.txt")]
    named = set().union(*(go_template.fields(text, "Values") for text in texts))

    def names(values: Mapping[str, Any], above: str = "") -> Iterator[str]:
        for name, value in values.items():
            path = f"{above}{name}"
            if path not in named and isinstance(value, dict) and value:
                yield from names(value, f"{path}.")
            else:
                yield path

    assert set(names(VALUES)) == named


def test_the_values_arrive() -> None:
    resources = rendered(EVERYTHING)
    pod = of_kind(resources, "StatefulSet")["spec"]["template"]["spec"]
    (init,), (container,) = pod["initContainers"], pod["containers"]
    assert init["image"] == container["image"] == "registry.example.org/farfield-coordinator:0.1.0-cuda"
    assert pod["serviceAccountName"] == of_kind(resources, "ServiceAccount")["metadata"]["name"] == "farfield"
    assert init["args"][4:] == [word for name in EVERYTHING["hostnames"] for word in ("--hostname", name)]
    assert pod["runtimeClassName"] == "nvidia"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["resources"]["requests"] == VALUES["resources"]["requests"]
    assert pod["imagePullSecrets"] == EVERYTHING["imagePullSecrets"]
    assert (pod["nodeSelector"], pod["tolerations"], pod["affinity"]) == tuple(
        EVERYTHING[key] for key in ("nodeSelector", "tolerations", "affinity")
    )
    (environment,) = init["env"]
    assert environment["valueFrom"]["secretKeyRef"] == {"name": "db", "key": "uri"}
    assert "env" not in container
    (claim,) = of_kind(resources, "StatefulSet")["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["storageClassName"] == "fast"
    assert claim["spec"]["resources"]["requests"]["storage"] == "1Ti"
    service = of_kind(resources, "Service")
    assert service["spec"]["type"] == "LoadBalancer"
    assert service["spec"]["loadBalancerSourceRanges"] == ["192.0.2.0/24"]
    policy = of_kind(resources, "NetworkPolicy")["spec"]
    assert policy["ingress"][0]["from"] == EVERYTHING["networkPolicy"]["from"]
    assert policy["egress"] == EVERYTHING["networkPolicy"]["egress"]
    assert of_kind(rendered({}), "NetworkPolicy")["spec"]["egress"] == []
    other = of_kind(rendered(NOTHING), "StatefulSet")["spec"]["template"]["spec"]
    assert other["serviceAccountName"] == "other"


def test_the_chart_agrees_with_the_project_and_its_image() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert CHART["version"] == CHART["appVersion"] == project["version"]
    assert (CHART["apiVersion"], CHART["type"], CHART["name"]) == ("v2", "application", CHART_FOLDER.name)
    text = (ROOT / "deploy" / "docker" / "coordinator.Dockerfile").read_text(encoding="utf-8")
    file = Dockerfile.parse(text, ROOT)
    pod = of_kind(rendered({}), "StatefulSet")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert file.texts("USER") == [f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"]
    assert [container["volumeMounts"][0]["mountPath"]] == file.texts("VOLUME")
    assert pod["initContainers"][0]["command"][-1] == file.variables()["FARFIELD_COORDINATOR_HOME"]
    assert "command" not in container
    assert [json.dumps(container["args"])] == file.texts("CMD")
    health = container["livenessProbe"]["exec"]["command"]
    assert json.dumps(health) == file.texts("HEALTHCHECK")[0].partition("CMD ")[2]


def test_the_first_start_makes_the_home_and_later_ones_leave_it(tmp_path: Path) -> None:
    """The init container's own script, run with the command as it is."""
    values = {"hostnames": ["fed.example.org", "192.0.2.1"]}
    (init,) = of_kind(rendered(values), "StatefulSet")["spec"]["template"]["spec"]["initContainers"]
    home, database = tmp_path / "volume" / "coordinator", tmp_path / "elsewhere.db"
    (tmp_path / "volume").mkdir()
    commands.install(tmp_path)
    words = [*init["command"][:-1], str(home), *init["args"]]
    environment = {**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin", "DATABASE_URL": f"sqlite:///{database}"}
    subprocess.run(words, check=True, env=environment, capture_output=True)
    settings = tomllib.loads((home / "coordinator.toml").read_text(encoding="utf-8"))
    assert settings["service"]["hostnames"] == ["clinics", "clinics.research.svc", "fed.example.org", "192.0.2.1"]
    assert settings["database"]["url"] == f"sqlite:///{database}"
    made = {path: path.stat().st_mtime_ns for path in (home / "coordinator.toml", home / "keys" / "ca.key")}
    subprocess.run(words, check=True, env=environment, capture_output=True)
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_the_notes_name_commands() -> None:
    text = go_template.render((CHART_FOLDER / "templates" / "NOTES.txt").read_text(encoding="utf-8"), context({}))
    named = commands.in_shell("\n".join(line for line in text.splitlines() if line.startswith("  ")))
    assert named == [["coordinator", "invite"], ["coordinator", "status"]]
    assert [commands.problem(words) for words in named] == [None, None]


# --- values.schema.json ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["default", "nothing"])
def test_the_schema_admits_the_values(case: str) -> None:
    assert list(schema.problems(merged(VALUES, CASES[case]), SCHEMA)) == []
    assert set(VALUES) | {"global"} == set(SCHEMA["properties"])
    for name, value in VALUES.items():
        if "additionalProperties" in SCHEMA["properties"][name] and isinstance(value, dict) and value:
            assert set(value) == set(SCHEMA["properties"][name]["properties"])


@pytest.mark.parametrize(
    "values",
    [
        {"hostname": ["x"]},
        {"hostnames": "x"},
        {"hostnames": ['"; reboot; "']},
        {"image": {"tag": "a b"}},
        {"image": {"repository": ""}},
        {"image": {"pullPolicy": "Sometimes"}},
        {"image": {"digest": "x"}},
        {"imagePullSecrets": ["registry"]},
        {"service": {"type": "ExternalName"}},
        {"service": {"annotations": {"example.org/internal": True}}},
        {"persistence": {"size": "twenty"}},
        {"persistence": {"size": 20}},
        {"terminationGracePeriodSeconds": 0},
        {"terminationGracePeriodSeconds": True},
        {"serviceAccount": {"create": False}},
        {"serviceAccount": {"create": "yes"}},
        {"podDisruptionBudget": {"maxUnavailable": 2}},
        {"replicas": 2},
    ],
    ids=json.dumps,
)
def test_the_schema_refuses(values: dict[str, Any]) -> None:
    assert list(schema.problems(merged(VALUES, values), SCHEMA))


def test_a_schema_with_an_unknown_keyword_is_not_passed_over() -> None:
    with pytest.raises(KeyError, match="maxLength"):
        list(schema.problems("text", {"maxLength": 2}))


# --- the renderer itself --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("a {{ .x }} b", "a 1 b"),
        ("a\n  {{- .x }}", "a1"),
        ("{{ .x -}}\n  b", "1b"),
        ("{{ if .yes }}a{{ else }}b{{ end }}", "a"),
        ("{{ if .no }}a{{ else }}b{{ end }}", "b"),
        ("{{ if .no }}{{ if .yes }}a{{ else }}b{{ end }}{{ .missing }}{{ end }}", ""),
        ("{{ if .yes }}{{ if .no }}a{{ else }}b{{ end }}{{ else }}{{ .missing }}{{ end }}", "b"),
        ("{{ range .list }}[{{ . | quote }}]{{ end }}", '["p"]["q"]'),
        ("{{ range .none }}{{ .missing }}{{ end }}.", "."),
        ('{{ .empty | default "d" }}{{ .name | default "d" }}', "dn"),
        ("{{ .x | quote }}{{ .yes }}", '"1"true'),
        ("k:\n  {{- toYaml .map | nindent 2 }}", "k:\n  a: 1\n  b:\n  - 2"),
        ("k: {{- toYaml .none | nindent 2 }}", "k:\n  []"),
    ],
)
def test_the_renderer(template: str, text: str) -> None:
    values = {
        "x": 1,
        "yes": True,
        "no": False,
        "list": ["p", "q"],
        "none": [],
        "empty": "",
        "name": "n",
        "map": {"b": [2], "a": 1},
    }
    assert go_template.render(template, values) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ .missing }}",
        "{{ if .x }}",
        "{{ end }}",
        "{{ .x | upper }}",
        "{{ include .x }}",
        "{{ range .x }}{{ end }}",
        "{{ .map }}",
        "{{ with .x }}{{ end }}",
    ],
)
def test_the_renderer_refuses_what_it_does_not_know(template: str) -> None:
    with pytest.raises(go_template.TemplateError):
        go_template.render(template, {"x": 1, "map": {}})
