"""A run with metrics and logs on: what it shows is right, and none of it is private."""

import base64
import json
import os
import socket
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.recipes import recipe_of, with_tokenizer, write_lines

from blindtune.client.recipe import write_recipe
from blindtune.client.tls.certs import OperatorCertificates, issue_operator_certificates
from blindtune.server.admission.tokens import add_token

pytestmark = pytest.mark.hf

PATIENCE = 240
TEXT, LABEL = "zzmarkertextzz", "zzmarkerlabelzz"
TESTS = Path(__file__).parents[1]


def page(url: str, context: ssl.SSLContext | None = None) -> str:
    handlers = [urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)]
    with urllib.request.build_opener(*handlers).open(url, timeout=PATIENCE) as answer:
        return str(answer.read().decode())


def samples(text: str) -> dict[tuple[str, str], float]:
    """Sums over all labels but one: by name, and by reason, operator or direction."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            label = next((sample.labels[x] for x in ("reason", "operator") if x in sample.labels), "")
            key = sample.name.removeprefix("blindtune_"), label
            found[key] = found.get(key, 0) + sample.value
    return found


def core_file_size(pid: int) -> list[str]:
    """Soft and hard limit of a process's core dumps."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(x for x in lines if x.startswith("Max core file size")).split()[4:6]


class Daemon:
    """``blindtune-worker serve`` with metrics, in a process of its own."""

    def __init__(self, model: Path, host: str, metrics: str, log: Path, *options: str | Path) -> None:
        self._log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "blindtune.server", "serve", "--model", model, "--threads", "1"),
                    *("--listen", f"{host}:0", "--metrics-listen", metrics, *options),
                ],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=dict(os.environ),
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, log.read_text()
        self.listening = json.loads(line)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def close(self) -> None:
        self.process.terminate()
        assert self.process.wait(PATIENCE) == 0
        self.process.communicate()


@dataclass
class Shown:
    """All that anybody could see of the runs, and what must not be in it."""

    texts: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, bytes] = field(default_factory=dict)

    def leaks(self) -> list[str]:
        return [
            f"{what} in {where}"
            for where, text in self.texts.items()
            for what, secret in self.secrets.items()
            if secret in text.encode()
        ]

    def key(self, what: str, pem: Path) -> None:
        """A private key: its lines, and its bytes in hexadecimal."""
        lines = [x for x in pem.read_text().splitlines() if not x.startswith("-----")]
        for number, line in enumerate(x for x in lines if len(x) > 20):
            self.secrets[f"{what}, line {number}"] = line.encode()
        raw = base64.b64decode("".join(lines))
        self.secrets[f"{what} in hexadecimal"] = raw[-32:].hex().encode()


@pytest.fixture
def certificates(tmp_path: Path) -> dict[str, OperatorCertificates]:
    folder = tmp_path / "certificates"
    hosts = {"alpha": "127.0.0.1", "beta": "127.0.0.2"}
    return {name: issue_operator_certificates(folder, name, [host]) for name, host in hosts.items()}


@pytest.fixture
def model(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return with_tokenizer(checkpoints["bert"], tmp_path)


@pytest.fixture
def token(tmp_path: Path) -> str:
    """The client's token at beta."""
    return add_token(tmp_path / "tokens", "hospital")


@pytest.fixture
def daemons(
    model: Path, certificates: dict[str, OperatorCertificates], token: str, tmp_path: Path
) -> Iterator[dict[str, Daemon]]:
    """Alpha lets clients in by their certificates and shows metrics to them alone; beta uses tokens."""
    alpha, beta = certificates["alpha"], certificates["beta"]
    with ExitStack() as stack:
        started = {
            "alpha": Daemon(
                model,
                "127.0.0.1",
                "0.0.0.0:0",
                tmp_path / "alpha.log",
                *("--tls-cert", alpha.worker, "--tls-key", alpha.worker_key, "--tls-client-ca", alpha.ca),
            )
        }
        stack.callback(started["alpha"].close)
        started["beta"] = Daemon(
            model,
            "127.0.0.2",
            "127.0.0.1:0",
            tmp_path / "beta.log",
            *("--tls-cert", beta.worker, "--tls-key", beta.worker_key, "--tokens", tmp_path / "tokens"),
        )
        stack.callback(started["beta"].close)
        yield started


def command(numbers: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """The client's command with JSON logs."""
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "support.watched_command", numbers, "--log-format", "json", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.slow
def test_metrics_and_logs_of_a_run_say_how_it_went_and_hold_nothing_private(
    daemons: dict[str, Daemon],
    model: Path,
    certificates: dict[str, OperatorCertificates],
    token: str,
    tmp_path: Path,
) -> None:
    shown = Shown(secrets={"text": TEXT.encode(), "label": LABEL.encode()})
    unknown_token = "zz" + "unknowntokenzz" * 3
    (tmp_path / "token").write_text(f"{token}\n")
    shown.secrets |= {"token": token.encode(), "unknown token": unknown_token.encode()}
    for name, files in certificates.items():
        shown.key(f"client's key for {name}", files.client_key)
        shown.key(f"worker's key of {name}", files.worker_key)

    records = [{"text": f"{TEXT} {i}", "label": ("x", "y", LABEL)[i % 3]} for i in range(16)]
    alpha, beta = certificates["alpha"], certificates["beta"]
    # Nobody listens at the second address: the client warns, and goes on.
    addresses = [daemons["alpha"].listening["address"], "127.0.0.1:9"]
    sections: list[dict[str, Any]] = [
        {
            "name": "alpha",
            "workers": addresses,
            "ca": str(alpha.ca),
            "cert": str(alpha.client),
            "key": str(alpha.client_key),
        },
        {
            "name": "beta",
            "workers": [daemons["beta"].listening["address"]],
            "ca": str(beta.ca),
            "token": str(tmp_path / "token"),
        },
    ]
    recipe = recipe_of(
        tmp_path,
        model,
        write_lines(tmp_path / "train.jsonl", records),
        masking={"mode": "shares", "retry_seconds": 1},
        operators=sections,
        data={"task": "classification", "validation": str(tmp_path / "train.jsonl")},
        training={"num_train_epochs": 1, "save_strategy": "epoch"},
    )
    write_recipe(recipe, tmp_path / "recipe.yaml")

    file, port = tmp_path / "metrics" / "blindtune.prom", free_port()
    file.parent.mkdir()
    options = ["train", tmp_path / "recipe.yaml", "--json", "--metrics-file", file]
    process = command(tmp_path / "numbers.1", *options, "--metrics-listen", f"127.0.0.1:{port}")
    assert process.stdout is not None
    events = []
    for line in process.stdout:
        events.append(json.loads(line))
        if events[-1]["event"] == "step" and "page" not in shown.texts:
            shown.texts["page"] = page(f"http://127.0.0.1:{port}/metrics")
            assert core_file_size(process.pid) == ["0", "0"]
    _, shown.texts["log"] = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, shown.texts["log"]
    summary = events[-1]
    # The program that reads the summary gets the names of the classes as well.
    shown.texts["events"] = json.dumps([*events[:-1], {**summary, "labels": None}])
    shown.texts["file"] = file.read_text()

    (tmp_path / "token").write_text(f"{unknown_token}\n")
    elsewhere = f"output.dir={tmp_path / 'refused'}"
    refused = command(tmp_path / "numbers.2", *options, "--set", elsewhere)
    shown.texts["events of the refused run"], shown.texts["log of the refused run"] = refused.communicate(
        timeout=PATIENCE
    )
    assert refused.returncode == 7, shown.texts["log of the refused run"]

    context = ssl.create_default_context(cafile=str(alpha.ca))
    context.load_cert_chain(alpha.client, alpha.client_key)
    url = daemons["alpha"].listening["metrics"].replace("0.0.0.0", "127.0.0.1")
    shown.texts["alpha's page"] = page(url, context)
    shown.texts["beta's page"] = page(daemons["beta"].listening["metrics"])
    for name, daemon in daemons.items():
        shown.texts[f"{name}'s log"] = daemon.log
        assert core_file_size(daemon.process.pid) == ["0", "0"]

    # It says how the run went.
    client = samples(shown.texts["file"])
    assert client["client_rounds_total", ""] == summary["rounds"] > 20
    per_operator = [
        sum(client[f"client_{x}_total", y] for y in ("alpha", "beta"))
        for x in ("requests", "sent_bytes", "received_bytes", "verified_responses")
    ]
    assert per_operator == [summary[x] for x in ("requests", "bytes_up", "bytes_down", "verified_responses")]
    during = samples(shown.texts["page"])
    assert 0 < during["client_rounds_total", ""] < client["client_rounds_total", ""]
    for name in daemons:
        worker = samples(shown.texts[f"{name}'s page"])
        assert worker["worker_rows_total", ""] == client["client_rows_total", name]
        assert worker["worker_sent_bytes_total", ""] > client["client_received_bytes_total", name]
    assert samples(shown.texts["beta's page"])["worker_rejected_total", "unauthenticated"] >= 1
    plain = {
        x
        for name, text in shown.texts.items()
        if "log" in name
        for x in text.splitlines()
        if not x.startswith("{")
    }
    assert plain == set()
    logs = {
        name: [json.loads(line) for line in text.splitlines()]
        for name, text in shown.texts.items()
        if "log" in name
    }
    assert any("127.0.0.1:9" in x["event"] for x in logs["log"] if x["level"] == "warning")
    assert any(x["level"] == "error" and x["code"] == 7 for x in logs["log of the refused run"])
    requests = [x for x in logs["beta's log"] if x["event"] == "multiply"]
    assert {x["client"] for x in requests if x["status"] == "OK"} == {"hospital"}

    # And it holds nothing private.
    produced = [*(tmp_path / "output").rglob("*"), *Path(os.environ["BLINDTUNE_CACHE"]).rglob("*")]
    assert len(produced) > 10
    shown.texts["file names"] = "\n".join(map(str, produced))
    for part in ("numbers.1", "numbers.2"):
        for line in (tmp_path / part).read_text().splitlines():
            what, value = json.loads(line)
            shown.secrets[f"{part}: {what} ({value[:16]})"] = bytes.fromhex(value)
    assert sum("scale" in x for x in shown.secrets) > 50
    assert sum("seed" in x for x in shown.secrets) > 50
    assert all(len(secret) >= 6 for secret in shown.secrets.values())
    assert "loss" not in "".join(shown.texts[x] for x in ("page", "file"))
    assert Shown({"a log": f"it holds {token}"}, shown.secrets).leaks() == ["token in a log"]
    assert shown.leaks() == []
    kept = {
        path.name
        for path in (tmp_path / "output").rglob("*")
        if path.is_file()
        for what, secret in shown.secrets.items()
        if ("key" in what or "token" in what) and secret in path.read_bytes()
    }
    assert kept == set()
