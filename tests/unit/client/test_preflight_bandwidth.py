"""Measuring workers: every answer is verified, every liar named, and no operand used twice."""

from collections.abc import Iterable

import pytest
from support.lies import LIES, Rogue
from support.standard import SHARES
from support.transports import LocalWorker, manifest_of

from blindtune.client import BlindConfig, Operator
from blindtune.client.kit.kit import Kit
from blindtune.client.operators.transport import Transport
from blindtune.client.preflight.bandwidth import measure
from blindtune.client.preflight.finding import Finding
from blindtune.client.rounds.connect import expectations
from blindtune.client.tls.certs import OperatorCertificates, issue_operator_certificates
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import Q31


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OperatorCertificates]:
    folder = tmp_path_factory.mktemp("certificates")
    return {name: issue_operator_certificates(folder, name) for name in ("alpha", "beta")}


def problems(findings: Iterable[Finding]) -> list[Finding]:
    return [x for x in findings if x.status == "problem"]


def measured(
    kit: Kit, files: dict[str, OperatorCertificates], workers: dict[str, LocalWorker]
) -> list[Finding]:
    """Two operators with one or two workers each, at addresses that tests name."""
    addresses = {name: [x for x in workers if x.startswith(name)] for name in ("alpha", "beta")}
    config = BlindConfig(
        [
            Operator(name, addresses[name], files[name].ca, files[name].client, files[name].client_key)
            for name in addresses
        ],
        retry_seconds=0.0,
    )

    def reach(one: Operator, address: str, insecure: bool) -> Transport:
        return workers[address]

    return list(measure(config, kit, size=40_000, transport=reach))


def test_rates_of_every_worker_are_of_verified_answers(
    kit: Kit, honest: Multiplier, certificates: dict[str, OperatorCertificates]
) -> None:
    names = ("alpha-0.invalid:1", "alpha-1.invalid:1", "beta-0.invalid:1")
    workers = {name: LocalWorker(honest, manifest_of(kit)) for name in names}
    found = measured(kit, certificates, workers)
    assert {x.status for x in found} == {"ok"}
    assert [x.check for x in found] == [
        f"{name.split('-')[0]} {name} {what}"
        for name in names
        for what in ("round trip", "upload", "download")
    ]
    assert all("MB/s, verified" in x.detail for x in found if "load" in x.check)
    for worker in workers.values():
        assert worker.closed
        up, down = (x for x in worker.requests if x.share.residues.shape[0] > 1)
        assert up.share.seed is None
        assert up.payload_bytes == pytest.approx(40_000, rel=0.02)
        assert down.share.seed is not None
        assert SHARES.word_bytes * down.share.residues.shape[0] * down.outputs == pytest.approx(
            40_000, rel=0.02
        )


def test_no_operand_of_a_measurement_is_sent_twice(
    kit: Kit, honest: Multiplier, certificates: dict[str, OperatorCertificates]
) -> None:
    workers = {name: LocalWorker(honest, manifest_of(kit)) for name in ("alpha.invalid:1", "beta.invalid:1")}
    for _ in range(2):
        measured(kit, certificates, workers)
    sent = [x.share.residues[0].tobytes()[:64] for worker in workers.values() for x in worker.requests]
    assert len(sent) == 16
    assert len(set(sent)) == len(sent)
    assert {x.share.recipient for x in workers["alpha.invalid:1"].requests} == {0}
    assert {x.share.recipient for x in workers["beta.invalid:1"].requests} == {1}


@pytest.mark.parametrize("lie", ["one residue is off by one", "y + q", "a row too few"])
def test_a_worker_that_lies_while_it_is_measured_is_named(
    kit: Kit, honest: Multiplier, certificates: dict[str, OperatorCertificates], lie: str
) -> None:
    assert lie in LIES
    liar = Rogue(honest)
    liar.plan(lie, at=2)
    workers = {
        "alpha-0.invalid:1": LocalWorker(honest, manifest_of(kit)),
        "alpha-1.invalid:1": LocalWorker(liar, manifest_of(kit)),
        "beta-0.invalid:1": LocalWorker(honest, manifest_of(kit)),
    }
    (finding,) = problems(measured(kit, certificates, workers))
    assert finding.detail == "worker alpha-1.invalid:1 of operator alpha gave a wrong answer"
    assert "do not train with it" in finding.fix


def test_a_worker_that_is_gone_or_serves_another_model_does_not_stop_the_measurement(
    kit: Kit, honest: Multiplier, certificates: dict[str, OperatorCertificates]
) -> None:
    other = manifest_of(kit)
    other.fingerprint = "0" * 64
    workers = {
        "alpha-0.invalid:1": LocalWorker(honest, None),
        "alpha-1.invalid:1": LocalWorker(honest, other),
        "beta-0.invalid:1": LocalWorker(honest, manifest_of(kit)),
    }
    found = measured(kit, certificates, workers)
    gone, another = problems(found)
    assert "alpha-0.invalid:1" in gone.detail
    assert "serves another model" in another.detail
    assert another.fix == "start it with the same checkpoint and revision"
    assert [x.status for x in found if x.check.startswith("beta")] == ["ok"] * 3


def test_a_kits_expectations_are_those_of_its_layers(kit: Kit) -> None:
    expected = expectations(kit, Q31)
    assert expected.fingerprint == kit.description.fingerprint
    assert expected.layers == {name: x.fingerprint for name, x in kit.layers.items()}
