"""Files in deploy/ and what documents say about them agree with the commands and with each other."""

import functools
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from ruamel.yaml import YAML

from blindtune.checkpoint import FrozenLayer
from blindtune.client.cli.main import app as client_app
from blindtune.client.process.exit_codes import ExitCode
from blindtune.client.recipe import load_recipe
from blindtune.errors import ConfigurationError
from blindtune.server.admission.limits import Limits
from blindtune.server.cli import app as worker_app
from blindtune.server.memory import memory_needed
from blindtune.server.reference import BEGIN, END, PAGE, renewed, variables, write_reference
from blindtune.server.rows import workspace_bytes

ROOT = Path(__file__).parents[2]
DEPLOY, DOCS = ROOT / "deploy", ROOT / "docs"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
YAML_FILES = [path for path in FILES if path.suffix in (".yaml", ".yml")]
DOCKERFILES = sorted(DEPLOY.glob("docker/*.Dockerfile"))
UNITS = sorted(DEPLOY.glob("systemd/*.service"))
BASE = DEPLOY / "kubernetes" / "base"
CODE = ("client", "server", "tests", "protocol", "checkpoint", "proto")
_VARIABLE = re.compile(r"\bBLINDTUNE_[A-Z_]*[A-Z]\b")
_SECONDS = {"s": 1, "min": 60, "m": 60, "": 1}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def compose() -> Any:
    return YAML(typ="safe").load((DEPLOY / "compose" / "compose.yaml").read_text())


def kubernetes(file: str) -> Any:
    return YAML(typ="safe").load((BASE / file).read_text())


def pod() -> Any:
    return kubernetes("deployment.yaml")["spec"]["template"]["spec"]


def settings(path: Path) -> dict[str, str]:
    """Variables of a file with one ``NAME=value`` a line, those in comments too."""
    return dict(re.findall(r"^(?:# )?([A-Z][A-Z_]+)=(.*)$", path.read_text(), re.MULTILINE))


class Unit(RawConfigParser):
    """A unit file, whose keys may come more than once: their values are joined by line breaks."""

    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
        self.optionxform = str  # type: ignore[assignment,method-assign]
        seen: dict[str, int] = {}
        lines = []
        for line in path.read_text().replace("\\\n", " ").splitlines():
            key, equals, value = line.partition("=")
            if equals and not line.startswith("#"):
                seen[key] = seen.get(key, 0) + 1
                line = f"{key}@{seen[key]}={value}"
            lines.append(line)
        self.read_string("\n".join(lines))

    def all(self, section: str, key: str) -> list[str]:
        return [value for found, value in self.items(section) if found.partition("@")[0] == key]

    def one(self, section: str, key: str) -> str:
        (value,) = self.all(section, key)
        return value


def seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)(s|min|m|)", text)
    assert match, text
    return int(match[1]) * _SECONDS[match[2]]


def default_of(option: str) -> Any:
    (parameter,) = [x for x in variables()["serve"] if x.opts == [option]]
    return parameter.default


def worker_options() -> dict[str, set[str]]:
    group: Any = typer.main.get_command(worker_app)
    return {x: {o for p in command.params for o in p.opts} for x, command in group.commands.items()}


def client_options() -> dict[str, set[str]]:
    group: Any = typer.main.get_command(client_app)
    return {
        x: {o for p in command.params for o in p.opts}
        for x, command in group.commands.items()
        if not hasattr(command, "commands")
    }


@functools.cache
def known_variables() -> frozenset[str]:
    """Those of the worker's command, and those that stand in code as they are."""
    found = {parameter.envvar for parameters in variables().values() for parameter in parameters}
    for folder in CODE:
        for path in (ROOT / folder).rglob("*.py"):
            if path != Path(__file__):
                found |= {
                    x for x in _VARIABLE.findall(path.read_text()) if not x.startswith("BLINDTUNE_WORKER")
                }
    return frozenset(found)


@pytest.mark.parametrize("path", YAML_FILES, ids=name)
def test_yaml_can_be_read(path: Path) -> None:
    assert all(document is not None for document in YAML(typ="safe").load_all(path.read_text()))


@pytest.mark.parametrize("path", [*FILES, *sorted(DOCS.glob("*.md")), ROOT / "README.md"], ids=name)
def test_every_variable_that_is_named_exists(path: Path) -> None:
    named = set(_VARIABLE.findall(path.read_text()))
    # The beginning of names, as in BLINDTUNE_WORKER_HEALTH_.
    known = known_variables()
    assert {x for x in named if x not in known and not any(y.startswith(f"{x}_") for y in known)} == set()


@pytest.mark.parametrize("path", [*UNITS, *DEPLOY.rglob("*.md"), DOCS / "deployment.md"], ids=name)
def test_every_option_that_is_named_belongs_to_its_command(path: Path) -> None:
    text = re.sub(r"\\\n", " ", path.read_text())
    commands = {
        r"(?:^ *|[`/])blindtune-worker": worker_options(),
        r"(?:^ *|[`/])blindtune|blindtune-client:[0-9.]+|--rm client": client_options(),
    }
    for command, options in commands.items():
        for subcommand, rest in re.findall(rf"(?:{command}) +([a-z-]+)\b([^`\n|;#]*)", text, re.MULTILINE):
            assert subcommand in options, subcommand
            given = set(re.findall(r"(?<!\S)(--[a-z-]+)", rest))
            assert given <= options[subcommand], subcommand


def test_the_tables_of_variables_are_those_of_the_code(tmp_path: Path) -> None:
    page = (DOCS / PAGE).read_text(encoding="utf-8")
    assert page == renewed(page), f"docs/{PAGE} is stale: run make docs"
    for parameters in variables().values():
        for parameter in parameters:
            assert f"| `{parameter.envvar}` | `" in page
    (tmp_path / PAGE).write_text(page.replace("16384", "7"), encoding="utf-8")
    write_reference(tmp_path)
    assert (tmp_path / PAGE).read_text(encoding="utf-8") == page


@pytest.mark.parametrize("page", ["", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{BEGIN}\n{END}\n"])
def test_a_page_without_its_marks_is_refused(page: str) -> None:
    with pytest.raises(ConfigurationError, match="once each"):
        renewed(page)


def test_every_variable_of_the_client_is_documented() -> None:
    page = (DOCS / PAGE).read_text()
    used = {
        x
        for path in (ROOT / "client").rglob("*.py")
        for x in _VARIABLE.findall(path.read_text())
        if "environ" in path.read_text() or "envvar" in path.read_text()
    }
    assert {"BLINDTUNE_CACHE", "BLINDTUNE_CONFIG", "BLINDTUNE_LOG_FORMAT"} <= used
    assert {x for x in used if f"`{x}`" not in page} == set()


def worker_ports() -> Iterator[tuple[str, str, str]]:
    """Where a port of the worker stands, of what, and which."""
    dockerfile = (DEPLOY / "docker" / "worker.Dockerfile").read_text()
    sources = {
        "Dockerfile": dict(re.findall(r"(BLINDTUNE_WORKER_\w+)=(\S+)", dockerfile)),
        "compose": compose()["x-worker-environment"],
        "systemd": settings(DEPLOY / "systemd" / "worker.env.example"),
        "kubernetes": settings(BASE / "worker.env"),
    }
    for where, variables_ in sources.items():
        for variable, kind in (("LISTEN", "grpc"), ("HEALTH_ADDRESS", "grpc"), ("METRICS_LISTEN", "metrics")):
            if value := variables_.get(f"BLINDTUNE_WORKER_{variable}"):
                yield f"{where} {variable}", kind, value.rpartition(":")[2]
    yield "EXPOSE", "grpc", re.findall(r"^EXPOSE (\d+)", dockerfile, re.MULTILINE)[0]
    for port in pod()["containers"][0]["ports"]:
        yield "container", port["name"], str(port["containerPort"])
    for port in kubernetes("service.yaml")["spec"]["ports"]:
        yield "service", port["targetPort"], str(port["port"])
    grpc, metrics = kubernetes("networkpolicy.yaml")["spec"]["ingress"]
    yield "policy", "grpc", str(grpc["ports"][0]["port"])
    yield "policy", "metrics", str(metrics["ports"][0]["port"])
    for operator in load_recipe(DEPLOY / "compose" / "blindtune.yaml").operators:
        for worker in operator.workers:
            yield "recipe", "grpc", worker.rpartition(":")[2]
    for path in (DEPLOY / "compose" / "prometheus.yml", DEPLOY / "prometheus" / "prometheus.yml"):
        for job in YAML(typ="safe").load(path.read_text())["scrape_configs"]:
            for group in job["static_configs"] if job.get("scheme") == "https" else ():
                for target in group["targets"]:
                    yield name(path), "metrics", target.rpartition(":")[2]
    table = (DOCS / "deployment.md").read_text().partition("## The network")[2]
    numbers = re.findall(r"^\| (\d+) \|", table, re.MULTILINE)
    yield from zip(("document",) * 2, ("grpc", "metrics"), numbers[:2], strict=True)


def test_ports_agree() -> None:
    ports = list(worker_ports())
    assert len(ports) >= 18
    expected = {"grpc": "7100", "metrics": "9464"}
    assert [x for x in ports if x[2] != expected[x[1]]] == []


def test_what_ends_a_worker_waits_longer_than_it_drains() -> None:
    drain = default_of("--drain-seconds")
    service = Unit(DEPLOY / "systemd" / "blindtune-worker@.service")
    assert seconds(service.one("Service", "TimeoutStopSec")) > drain
    assert seconds(compose()["x-worker"]["stop_grace_period"]) > drain
    set_here = float(settings(BASE / "worker.env")["BLINDTUNE_WORKER_DRAIN_SECONDS"])
    pause = float(pod()["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod()["terminationGracePeriodSeconds"] > pause + max(set_here, drain)
    assert f"`--drain-seconds`, {drain:g} by default" in (DOCS / "deployment.md").read_text()


def test_no_image_is_named_without_a_version() -> None:
    images = [
        *re.findall(r"^ARG PYTHON_IMAGE=(\S+)", "\n".join(x.read_text() for x in DOCKERFILES), re.MULTILINE),
        *(re.sub(r"\$\{\w+:-(.*)\}", r"\1", service["image"]) for service in compose()["services"].values()),
        *(f"{x['newName']}:{x['newTag']}" for x in kubernetes("kustomization.yaml")["images"]),
    ]
    assert len(images) >= 7
    for image in images:
        assert re.fullmatch(r"[a-z0-9./-]+:v?\d+\.\d+\.\d+[a-z0-9.-]*", image), image
    for path in FILES:
        assert ":latest" not in path.read_text(), path


def test_images_carry_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for path in FILES:
        for found in re.findall(r"blindtune-(?:worker|client):(\d[\d.]*\d)", path.read_text()):
            assert found == version, path
    for path in DOCKERFILES:
        assert f"ARG VERSION={version}\n" in path.read_text()
    assert kubernetes("kustomization.yaml")["images"][0]["newTag"] == version


def test_no_secret_is_in_a_file() -> None:
    for path in FILES:
        text = path.read_text()
        assert "PRIVATE KEY-----" not in text, path
        assert not re.search(r"\bhf_[A-Za-z0-9]{8,}", text), path
        for variable, value in re.findall(
            r"^\W*(\w*(?:PASSWORD|SECRET|TOKEN)\w*)[=:] *(\S+)", text, re.MULTILINE
        ):
            assert variable.startswith("BLINDTUNE_WORKER_TOKENS"), f"{path}: {variable}={value}"
    assert not [x for x in YAML_FILES if re.search(r"^kind: Secret$", x.read_text(), re.MULTILINE)]


def test_a_build_sees_the_package_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    package = ROOT / "blindtune"
    folders = {package.name, *(x.name for x in package.iterdir() if x.is_symlink())}
    files = {"LICENSE", "README.md", "pyproject.toml", "constraints.txt"}
    assert rules[0] == "*"
    assert {x[1:].rstrip("/") for x in rules if x.startswith("!")} == folders | files
    # Rules that come later win.
    last = max(i for i, rule in enumerate(rules) if rule.startswith("!"))
    assert {"**/*.pem", "**/*.key", "**/.env"} <= set(rules[last + 1 :])


@pytest.mark.parametrize("path", DOCKERFILES, ids=name)
def test_an_image_runs_as_nobody_in_particular(path: Path) -> None:
    text = path.read_text()
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    final = stages[-1] if "USER" in stages[-1] else next(x for x in stages if " AS worker\n" in x)
    users = re.findall(r"^USER (\S+)", final, re.MULTILINE)
    assert users[-1] == "10001:10001"
    for stage in stages:
        assert re.findall(r"^USER (\S+)", stage, re.MULTILINE)[-1:] in ([], ["10001:10001"])
    assert "\nSTOPSIGNAL SIGTERM\n" in text
    assert re.search(r'^ENTRYPOINT \["tini", "--", "blindtune(-worker)?"\]$', text, re.MULTILINE)
    assert text.count("pip --python") == text.count("-c constraints.txt")
    for extra in re.findall(r"'\.\[(\w+)\]'", text):
        assert extra == ("client" if "client" in path.name else "worker")


def test_a_worker_s_image_asks_the_worker_whether_it_is_well() -> None:
    text = (DEPLOY / "docker" / "worker.Dockerfile").read_text()
    assert re.search(r'^HEALTHCHECK .* CMD \["blindtune-worker", "health"\]$', text, re.MULTILINE)
    container = pod()["containers"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["exec"]["command"] == ["blindtune-worker", "health"]
        (patience,) = [x.default for x in variables()["health"] if x.opts == ["--seconds"]]
        assert container[probe]["timeoutSeconds"] > patience


def test_containers_of_compose_are_hardened_and_operators_do_not_meet() -> None:
    services = compose()["services"]
    for which, service in services.items():
        assert service["read_only"] is True, which
        assert service["cap_drop"] == ["ALL"], which
        assert service["security_opt"] == ["no-new-privileges:true"], which
        assert service["ulimits"] == {"core": 0}, which
        assert service["mem_limit"] and service["cpus"], which
        assert service["user"].startswith("${RUN_AS"), which
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), which
    assert not set(services["alpha"]["networks"]) & set(services["beta"]["networks"])
    assert set(services["client"]["networks"]) == {"alpha", "beta"}
    for operator in ("alpha", "beta"):
        assert compose()["networks"][operator] == {"internal": True}
        assert all(x["source"].startswith(f"{operator}-") for x in services[operator]["secrets"])
    for service in services.values():
        assert {x["source"] for x in service.get("secrets", ())} <= compose()["secrets"].keys()
        assert not any(x["source"].endswith("ca-key") for x in service.get("secrets", ()))


def test_files_that_compose_names_are_there_and_its_variables_have_an_example() -> None:
    folder = DEPLOY / "compose"
    for service in compose()["services"].values():
        if "build" in service:
            assert (folder / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        for volume in service.get("volumes", ()):
            if isinstance(volume, str):
                assert (folder / volume.partition(":")[0]).is_file(), volume
    text = (folder / "compose.yaml").read_text()
    asked = set(re.findall(r"\$\{(\w+)", text)) - {"CLIENT_IMAGE"}
    assert asked == set(settings(folder / ".env.example"))
    for variable, value in re.findall(r"\$\{(\w+_(?:MEMORY|CPUS)):-(\w+)\}", text):
        assert settings(folder / ".env.example")[variable] == value


def test_secrets_that_a_container_reads_are_mounted() -> None:
    services = compose()["services"]
    for operator in ("alpha", "beta"):
        targets = {f"/run/secrets/{x['target']}" for x in services[operator]["secrets"]}
        paths = {x for x in services[operator]["environment"].values() if x.startswith("/run/secrets/")}
        assert len(paths) >= 5
        assert paths <= targets
    recipe = load_recipe(DEPLOY / "compose" / "blindtune.yaml")
    targets = {f"/run/secrets/{x['target']}" for x in services["client"]["secrets"]}
    assert recipe.masking.allow_one_machine
    assert {str(x) for o in recipe.operators for x in (o.ca, o.cert, o.key)} == targets
    assert {w.partition(":")[0] for o in recipe.operators for w in o.workers} <= services.keys()
    mounts = {x["name"]: x["mountPath"] for x in pod()["containers"][0]["volumeMounts"]}
    assert mounts.keys() == {x["name"] for x in pod()["volumes"]}
    for value in settings(BASE / "worker.env").values():
        if value.startswith("/"):
            assert any(value == x or value.startswith(f"{x}/") for x in mounts.values()), value


def test_a_pod_is_hardened_and_told_apart_by_labels_that_the_others_select() -> None:
    container = pod()["containers"][0]
    assert pod()["securityContext"]["runAsNonRoot"] is True
    assert pod()["securityContext"]["runAsUser"] == 10001
    assert pod()["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert (
        kubernetes("deployment.yaml")["spec"]["replicas"]
        > kubernetes("poddisruptionbudget.yaml")["spec"]["minAvailable"]
    )
    assert kubernetes("networkpolicy.yaml")["spec"]["egress"] == []
    listed = kubernetes("kustomization.yaml")["resources"]
    assert {*listed, "kustomization.yaml"} == {x.name for x in BASE.glob("*.yaml")}


@pytest.mark.parametrize("path", UNITS, ids=name)
def test_a_unit_is_hardened(path: Path) -> None:
    unit = Unit(path)
    expected = {
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "PrivateTmp": "yes",
        "CapabilityBoundingSet": "",
        "LimitCORE": "0",
        "KillSignal": "SIGTERM",
        "MemoryDenyWriteExecute": "no",
        "ProcSubset": "all",
        "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
    }
    assert {key: unit.one("Service", key) for key in expected} == expected
    assert unit.all("Service", "SystemCallFilter") == ["@system-service", "~@privileged"]
    assert unit.one("Service", "User") != "root"


def test_credentials_of_the_worker_s_unit_are_those_that_it_reads() -> None:
    unit = Unit(DEPLOY / "systemd" / "blindtune-worker@.service")
    loaded = {x.partition(":")[0] for x in unit.all("Service", "LoadCredential")}
    read = {x.rpartition("%d/")[2] for x in unit.all("Service", "Environment") if "=%d/" in x}
    assert loaded == read and len(loaded) == 3


def test_a_run_is_tried_again_where_that_can_help() -> None:
    unit = Unit(DEPLOY / "systemd" / "blindtune-train@.service")
    prevented = {int(x) for x in unit.one("Service", "RestartPreventExitStatus").split()}
    stopped = {int(x) for x in unit.one("Service", "SuccessExitStatus").split()}
    assert unit.one("Service", "Restart") == "on-failure"
    assert stopped == {ExitCode.INTERRUPTED}
    assert {int(x) for x in ExitCode} - prevented - stopped == {ExitCode.DONE, ExitCode.UNAVAILABLE}
    assert "output/run.json" in unit.one("Service", "ExecStart")


def llama(
    hidden: int, inner: int, depth: int, heads: int, kv_heads: int, vocabulary: int
) -> list[FrozenLayer]:
    """Shapes of a Llama model's frozen layers."""
    wide = hidden // heads * kv_heads
    shapes = [(hidden, hidden)] * 2 + [(wide, hidden)] * 2 + [(inner, hidden)] * 2 + [(hidden, inner)]
    layers = [FrozenLayer(f"{i}.{j}", "", *shape) for i in range(depth) for j, shape in enumerate(shapes)]
    return [*layers, FrozenLayer("lm_head", "", vocabulary, hidden, head=True)]


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        ("Llama-3.2-1B", (2048, 8192, 16, 32, 8, 128256)),
        ("Llama-3.2-3B", (3072, 8192, 28, 24, 8, 128256)),
        ("Llama-3.1-8B", (4096, 14336, 32, 32, 8, 128256)),
        ("Llama-3.1-70B", (8192, 28672, 80, 64, 8, 128256)),
    ],
)
def test_the_memory_that_the_document_states_is_what_a_worker_asks_for(model: str, shapes: Any) -> None:
    layers = llama(*shapes)
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    figures = [sum(x.out_features * x.in_features for x in layers)]
    for most in (Limits().max_concurrent, 2):
        workspace = workspace_bytes(layers, Limits(max_concurrent=most))
        needed = memory_needed(layers, gpu, workspace)
        on_cpu = memory_needed(layers, cpu, workspace)
        assert list(on_cpu) == [cpu] and 0 <= on_cpu[cpu] - needed[gpu] <= 0.03 * figures[0]
        figures += [needed[gpu], needed[cpu]]
    held, all_, host, few, few_host = (f"{x / 2**30:.2f}" for x in figures)
    row = f"| {model} | {held} | {all_} | {host} | {few} and {few_host} |"
    assert row in (DOCS / "deployment.md").read_text()


@pytest.mark.parametrize("path", [*DEPLOY.rglob("*.md"), DOCS / "deployment.md", DOCS / PAGE], ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target


def required(tool: str) -> str:
    found = shutil.which(tool)
    if found is None:
        pytest.skip(f"{tool} is not installed")
    return found


@pytest.mark.parametrize("path", UNITS, ids=name)
def test_systemd_understands_a_unit(path: Path, tmp_path: Path) -> None:
    command = required("systemd-analyze")
    # It wants the program to be there, and an instance's name.
    text = path.read_text()
    program = tmp_path / "bin" / "program"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / path.name.replace("@.", "@alpha.")
    unit.write_text(re.sub(r"/opt/blindtune/bin/[a-z-]+", str(program), text))
    done = subprocess.run(
        [command, "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=120
    )
    if "Failed to connect to bus" in done.stderr or "Failed to initialize manager" in done.stderr:
        pytest.skip(f"systemd-analyze cannot verify here: {done.stderr.strip()}")
    assert (done.returncode, done.stderr) == (0, "")


def test_compose_understands_its_file() -> None:
    docker = required("docker")
    if subprocess.run([docker, "compose", "version"], capture_output=True, timeout=60).returncode:
        pytest.skip("docker has no compose plugin")
    folder = DEPLOY / "compose"
    command = [docker, "compose", "--env-file", str(folder / ".env.example"), "--profile", "*"]
    for file in ("compose.yaml", "compose.cuda.yaml"):
        command += ["-f", str(folder / file)]
    done = subprocess.run([*command, "config", "--quiet"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=name)
def test_hadolint_finds_nothing(path: Path) -> None:
    done = subprocess.run([required("hadolint"), str(path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("folder", ["base", "cuda"])
def test_kustomize_builds_the_manifests(folder: str) -> None:
    command = [required("kubectl"), "kustomize", str(DEPLOY / "kubernetes" / folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (deployment,) = [x for x in YAML(typ="safe").load_all(done.stdout) if x["kind"] == "Deployment"]
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    suffix = "-cuda" if folder == "cuda" else ""
    assert container["image"].endswith(f":{kubernetes('kustomization.yaml')['images'][0]['newTag']}{suffix}")
    assert {x["name"]: x["value"] for x in container.get("env", ())} == (
        {"BLINDTUNE_WORKER_DEVICE": "cuda"} if folder == "cuda" else {}
    )
