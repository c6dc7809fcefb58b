"""What a client counts, and how it shows it."""

import json
import logging
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from support.lies import Rogue
from support.transports import LocalWorker, remote_multiplier
from torch import nn

from blindtune.client.kit.kit import Kit
from blindtune.client.metrics import Collector
from blindtune.client.operators.policy import Failure
from blindtune.client.operators.transport import TransportError
from blindtune.client.process.log import json_formatter
from blindtune.client.rounds.multiplier import RemoteMultiplier
from blindtune.client.runs.monitoring import Monitor
from blindtune.errors import ConfigurationError
from blindtune.protocol.certificate.history import ScaleHistory
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import forward_products
from blindtune.protocol.shares.source import ShareSource

ATTENTION = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
(FORWARD,) = forward_products(ATTENTION, 32)
GONE = TransportError(Failure.UNREACHABLE, "UNAVAILABLE: connection reset")


@pytest.fixture
def used(kit: Kit, honest: Multiplier) -> RemoteMultiplier:
    """A multiplier that was asked twice: alpha's worker failed once, and beta's first one lied."""
    rogue = Rogue(honest)
    rogue.plan("one residue is off by one")
    groups = [[LocalWorker(honest, failures=[GONE])], [LocalWorker(rogue), LocalWorker(honest)]]
    multiplier = remote_multiplier(kit, groups)
    for _ in range(2):
        multiplier.multiply_integers(np.ones((5, FORWARD.contraction), np.int32), FORWARD)
    return multiplier


def figures(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"blindtune_client_{name}", labels)


def test_each_operator_has_the_figures_of_its_requests(used: RemoteMultiplier) -> None:
    registry = CollectorRegistry()
    registry.register(Collector(used))
    statistics = used.statistics()
    for operator in ("alpha", "beta"):
        own = statistics[operator]
        for name, value in {
            "requests_total": 3,
            "retries_total": 1,
            "hedges_total": 0,
            "hedges_won_total": 0,
            "workers_set_aside_total": 0,
            "rows_total": 15,
            "sent_bytes_total": own.bytes_sent,
            "received_bytes_total": own.bytes_received,
            "verified_responses_total": 2,
            "verification_seconds_total": own.verification_seconds,
        }.items():
            assert figures(registry, name, operator=operator) == value, name
    assert figures(registry, "lies_total", operator="alpha") == 0
    assert figures(registry, "lies_total", operator="beta") == 1
    assert figures(registry, "workers_excluded", operator="alpha") == 0
    assert figures(registry, "workers_excluded", operator="beta") == 1
    kinds = {
        (operator, kind.name): figures(registry, "failures_total", operator=operator, kind=kind.name.lower())
        for operator in ("alpha", "beta")
        for kind in Failure
    }
    assert {x for x, value in kinds.items() if value} == {("alpha", "UNREACHABLE"), ("beta", "LIED")}
    assert figures(registry, "rounds_total") == 2
    assert figures(registry, "round_seconds_total") == used.rounds().seconds > 0


def test_registering_asks_for_names_and_not_for_figures(used: RemoteMultiplier) -> None:
    registry = CollectorRegistry()
    registry.register(Collector(used))
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(Collector(used))


def test_figures_handed_out_earlier_do_not_change(used: RemoteMultiplier) -> None:
    before = used.statistics()["alpha"]
    failed = dict(before.failures)
    used._operators[0]._asking._statistics.failures[Failure.BUSY] += 1
    assert dict(before.failures) == failed


def test_a_model_without_remote_layers_has_no_figures() -> None:
    with pytest.raises(ConfigurationError, match="no remote layers"):
        Collector(nn.Linear(2, 2))


def test_the_file_is_what_node_exporter_reads_and_is_replaced_as_a_whole(
    used: RemoteMultiplier, tmp_path: Path
) -> None:
    file = tmp_path / "blindtune.prom"
    monitor = Monitor(file=file)
    assert file.read_text() == "", "a path that can't be written shows before anything is trained"
    monitor.watch(used)
    inode = file.stat().st_ino
    before = file.read_text()
    used.multiply_integers(np.ones((5, FORWARD.contraction), np.int32), FORWARD)
    assert file.read_text() == before
    monitor.close()
    assert file.stat().st_ino != inode, "a reader never sees half of it"
    assert list(tmp_path.iterdir()) == [file]
    samples = {
        (sample.name, sample.labels.get("operator")): sample.value
        for family in text_string_to_metric_families(file.read_text())
        for sample in family.samples
    }
    assert samples["blindtune_client_rounds_total", None] == 3
    assert samples["blindtune_client_requests_total", "alpha"] == 4


def test_a_file_that_can_no_longer_be_written_ends_no_run(
    used: RemoteMultiplier, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    monitor = Monitor(file=folder / "x.prom")
    (folder / "x.prom").unlink()
    folder.rmdir()
    monitor.watch(used)
    monitor.close()
    assert len([x for x in caplog.records if "cannot write the metrics" in x.message]) == 1


def test_a_file_that_can_not_be_written_at_all_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--metrics-file .*: cannot write it: No such file"):
        Monitor(file=tmp_path / "nowhere" / "x.prom")


def test_the_page_is_on_loopback_and_shows_the_metrics_alone(used: RemoteMultiplier) -> None:
    monitor = Monitor("127.0.0.1:0")
    try:
        monitor.watch(used)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{monitor.address}/metrics", timeout=60) as answer:
            assert 'blindtune_client_lies_total{operator="beta"} 1.0' in answer.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            opener.open(f"http://{monitor.address}/", timeout=60)
        with pytest.raises(ConfigurationError, match="cannot listen there"):
            Monitor(monitor.address)
    finally:
        monitor.close()


@pytest.mark.parametrize(
    ("listen", "message"),
    [
        ("0.0.0.0:0", "can be reached from other machines"),
        ("[::]:0", "can be reached from other machines"),
        ("9465", "is no address"),
        ("127.0.0.1:http", "is no address"),
    ],
)
def test_a_page_for_others_is_refused(listen: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        Monitor(listen)


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Path]:
    """Where records of the loggers below blindtune go as JSON."""
    file = tmp_path / "log"
    handler = logging.FileHandler(file)
    handler.setFormatter(json_formatter())
    logger = logging.getLogger("blindtune")
    logger.addHandler(handler)
    yield file
    logger.removeHandler(handler)
    handler.close()


def test_a_record_is_a_line_of_json_and_a_traceback_shows_no_values(lines: Path) -> None:
    def fails() -> None:
        private = "".join(["zz", "private", "zz"])
        raise KeyError(len(private))

    try:
        fails()
    except KeyError:
        logging.getLogger("blindtune.client").exception("it failed in %s", "here", extra={"step": 3})
    (line,) = lines.read_text().splitlines()
    record = json.loads(line)
    assert (record["event"], record["level"], record["step"]) == ("it failed in here", "error", 3)
    assert record["logger"] == "blindtune.client"
    assert "KeyError: 11" in record["exception"]
    assert "zzprivatezz" not in line


@pytest.mark.parametrize("how", ["option", "environment"])
def test_the_command_logs_its_error_as_json_when_told_so(how: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "blindtune.client.cli"]
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    if how == "option":
        command += ["--log-format", "json"]
    else:
        environment["BLINDTUNE_LOG_FORMAT"] = "json"
    ended = subprocess.run(
        [*command, "train", "nothing.yaml"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert ended.returncode == 3
    (line,) = ended.stderr.splitlines()
    record = json.loads(line)
    assert (record["level"], record["code"]) == ("error", 3)
    assert "cannot read the configuration nothing.yaml" in record["event"]
    assert ended.stdout == ""


UNFORESEEN = """
import sys
from blindtune.client.cli import main, recipes
def fails(*arguments):
    private = "".join(["zz", "private", "zz"])
    raise KeyError(len(private))
import blindtune.client.recipe
blindtune.client.recipe.load_recipe = fails
sys.argv = ["blindtune", *sys.argv[1:], "train", "x.yaml"]
main()
"""


def test_an_error_that_nobody_foresaw_is_json_too() -> None:
    command = [sys.executable, "-c", UNFORESEEN]
    ended = subprocess.run([*command, "--log-format", "json"], capture_output=True, text=True)
    assert ended.returncode == 1
    *_, line = ended.stderr.splitlines()  # what was imported above may have said something before
    assert "KeyError: 11" in json.loads(line)["exception"]
    assert "zzprivatezz" not in line
    plain = subprocess.run(command, capture_output=True, text=True)
    assert plain.returncode == 1
    assert plain.stderr.rstrip().endswith("KeyError: 11")
    assert "zzprivatezz" not in plain.stderr


def test_a_certified_multiplier_shows_what_wrapped_and_how_fine_its_scales_are(
    kit: Kit, honest: Multiplier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ScaleHistory, "level", lambda self, product: 9)
    source = ShareSource(2, replace(Q31, certified=True))
    groups = [[LocalWorker(honest)], [LocalWorker(honest)]]
    multiplier = remote_multiplier(kit, groups, source=source, most_reasks=1000)
    x = np.random.default_rng(0).standard_normal((30, FORWARD.contraction)).astype(np.float32)
    multiplier.multiply_certified(x, FORWARD, None, None, True)
    registry = CollectorRegistry()
    registry.register(Collector(multiplier))
    assert multiplier.certified is not None
    found = multiplier.certified.certificates()
    assert figures(registry, "wrapped_rows_total") == found.wraps > 0
    assert figures(registry, "rows_asked_again_total") == found.reasks > 0
    assert figures(registry, "decoding_seconds_total") == found.decoding_seconds > 0
    assert figures(registry, "scale_part", product=FORWARD.label) == 2.0 ** (-9 / 4)
    error = figures(registry, "expected_error", product=FORWARD.label)
    assert error is not None and 0 < error < 2.0**-15
