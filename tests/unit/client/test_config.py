"""Configurations that would be unsafe or can't work are refused, in words that say what to change."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blindtune.client.config.blind_config import BlindConfig, Operator
from blindtune.client.tls.certs import OperatorCertificates, issue_operator_certificates
from blindtune.errors import ConfigurationError

Files = Callable[[str], OperatorCertificates]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Certificates of an operator, made when first asked for."""
    issued: dict[str, OperatorCertificates] = {}

    def get(name: str) -> OperatorCertificates:
        if name not in issued:
            issued[name] = issue_operator_certificates(tmp_path, name)
        return issued[name]

    return get


# Each operator is at home at an address of its own, which needs no look-up.
ADDRESSES = {"alpha": "203.0.113.1:7100", "beta": "198.51.100.1:7100"}


def _operator(name: str, files: Files, *workers: str, **changes: Any) -> Operator:
    own = files(name)
    given: dict[str, Any] = {"ca": own.ca, "cert": own.client, "key": own.client_key}
    return Operator(name, workers or (ADDRESSES[name],), **(given | changes))


def test_operators_with_certificates_of_their_own_are_accepted(files: Files) -> None:
    config = BlindConfig(operators=[_operator("alpha", files), _operator("beta", files)])
    assert [operator.name for operator in config.operators] == ["alpha", "beta"]


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_operators_are_refused(files: Files, count: int) -> None:
    with pytest.raises(ConfigurationError, match=f"two or more operators, not {count}"):
        BlindConfig(operators=[_operator("alpha", files)][:count])


def test_two_operators_of_one_name_are_refused(files: Files) -> None:
    twice = [_operator("alpha", files, address) for address in ADDRESSES.values()]
    with pytest.raises(ConfigurationError, match="same name"):
        BlindConfig(operators=twice, allow_one_machine=True)


def test_two_operators_with_one_ca_are_refused(files: Files) -> None:
    operators = [_operator("alpha", files), _operator("beta", files, ca=files("alpha").ca)]
    with pytest.raises(ConfigurationError, match="alpha and beta have the same CA"):
        BlindConfig(operators=operators)


def test_two_operators_with_one_certificate_are_refused(files: Files) -> None:
    alpha = files("alpha")
    same = _operator("beta", files, cert=alpha.client, key=alpha.client_key)
    operators = [_operator("alpha", files), same]
    with pytest.raises(ConfigurationError, match="alpha and beta have the same certificate"):
        BlindConfig(operators=operators)


@pytest.mark.parametrize("kind", ["copy", "comment", "line ends", "bundle"])
def test_one_ca_in_two_files_is_refused_however_the_files_differ(
    files: Files, tmp_path: Path, kind: str
) -> None:
    original = files("alpha").ca.read_bytes()
    other = {
        "copy": original,
        "comment": b"# authority of beta\n" + original,
        "line ends": original.replace(b"\n", b"\r\n"),
        # Whoever holds one of the keys in a bundle can pass for the operator.
        "bundle": files("beta").ca.read_bytes() + original,
    }[kind]
    (tmp_path / "other.pem").write_bytes(other)
    operators = [_operator("alpha", files), _operator("beta", files, ca=tmp_path / "other.pem")]
    with pytest.raises(ConfigurationError, match="alpha and beta have the same CA"):
        BlindConfig(operators=operators)


def test_one_client_certificate_in_two_files_is_refused_however_the_files_differ(
    files: Files, tmp_path: Path
) -> None:
    (tmp_path / "other.pem").write_bytes(b"certificate of beta\n" + files("alpha").client.read_bytes())
    same = _operator("beta", files, cert=tmp_path / "other.pem", key=files("alpha").client_key)
    operators = [_operator("alpha", files), same]
    with pytest.raises(ConfigurationError, match="alpha and beta have the same certificate"):
        BlindConfig(operators=operators)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("203.0.113.7:7100", "203.0.113.7:7100"),
        ("203.0.113.7:7100", "203.0.113.7:7200"),
        ("203.0.113.7:7100", "[::ffff:203.0.113.7]:7100"),
        ("203.0.113.7:7100", "[64:ff9b::cb00:7107]:7100"),
        ("203.0.113.7:7100", "[2002:cb00:7107::]:7100"),
        ("203.0.113.7:7100", "[64:ff9b:1::203.0.113.7]:7100"),
        ("203.0.113.7:7100", "[::203.0.113.7]:7100"),
        ("203.0.113.7:7100", "[::ffff:0:203.0.113.7]:7100"),
        ("203.0.113.7:7100", "[2001:0:4136:e378:8000:63bf:34ff:8ef8]:7100"),
        ("[2001:db8::1]:7100", "[2001:DB8:0:0:0:0:0:1]:7200"),
        ("[fe80::1%eth0]:7100", "[fe80::1]:7200"),
        ("alpha.invalid:7100", "ALPHA.invalid.:7200"),
    ],
)
def test_two_operators_at_one_address_are_refused(files: Files, first: str, second: str) -> None:
    operators = [_operator("alpha", files, "203.0.113.9:1", first), _operator("beta", files, second)]
    with pytest.raises(ConfigurationError, match="alpha and beta have the same address"):
        BlindConfig(operators=operators)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("127.0.0.1:7100", "127.0.0.2:7100"),
        ("localhost:7100", "LOCALHOST.:7200"),
        ("localhost:7100", "127.255.3.4:7100"),
        ("beta.localhost:7100", "[::1]:7200"),
        ("[::1]:7100", "[0:0:0:0:0:0:0:1]:7100"),
        ("[::ffff:127.0.0.1]:7100", "0.0.0.0:7100"),
        ("[::]:7100", "127.0.0.1:7100"),
    ],
)
def test_two_operators_on_this_machine_are_refused(files: Files, first: str, second: str) -> None:
    operators = [_operator("alpha", files, first), _operator("beta", files, "203.0.113.9:1", second)]
    with pytest.raises(ConfigurationError, match="alpha and beta are all on this machine: .*not independent"):
        BlindConfig(operators=operators)


def test_all_addresses_of_this_machine_are_this_machine(files: Files) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            asked.connect(("203.0.113.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address but loopback")
        own = asked.getsockname()[0]
    operators = [_operator("alpha", files, f"{own}:7100"), _operator("beta", files, "127.0.0.1:7100")]
    with pytest.raises(ConfigurationError, match="alpha and beta are all on this machine"):
        BlindConfig(operators=operators)


def test_one_operator_may_be_on_this_machine(files: Files) -> None:
    BlindConfig(operators=[_operator("alpha", files, "127.0.0.1:7100"), _operator("beta", files)])


def test_names_that_lead_to_one_machine_are_refused(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"alpha.test": ["203.0.113.1", "203.0.113.2"], "beta.test": ["2001:db8::2", "::ffff:203.0.113.2"]}
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, port: [(0, 0, 0, "", (x, 0)) for x in found[host]]
    )
    operators = [_operator(name, files, f"{name}.test:7100") for name in ("alpha", "beta")]
    with pytest.raises(ConfigurationError, match="alpha and beta have the same address 203.0.113.2"):
        BlindConfig(operators=operators)


def test_replicas_of_one_operator_may_share_an_address(files: Files) -> None:
    alpha = _operator("alpha", files, "203.0.113.1:7100", "203.0.113.1:7101")
    BlindConfig(operators=[alpha, _operator("beta", files)])


@pytest.mark.parametrize("masking", ["shares", "lattice", "reference"])
def test_one_machine_is_allowed_when_asked_for_and_then_nothing_is_called_private(
    files: Files, masking: str
) -> None:
    names = {"shares": ("alpha", "beta"), "lattice": ("alpha",), "reference": ()}[masking]
    operators = [_operator(name, files, "127.0.0.1:7100") for name in names]
    config = BlindConfig(operators=operators, masking=masking, allow_one_machine=True)  # type: ignore[arg-type]
    # One operator learns nothing with a lattice, wherever it is.
    assert ("nothing is private" in (config.not_private or "")) is (masking == "shares")
    assert BlindConfig(operators=[_operator("alpha", files), _operator("beta", files)]).not_private is None


@pytest.mark.parametrize("missing", [("ca",), ("cert",), ("key",), ("cert", "key")])
def test_missing_tls_settings_are_named(files: Files, missing: tuple[str, ...]) -> None:
    bare = _operator("alpha", files, **dict.fromkeys(missing))
    with pytest.raises(ConfigurationError, match=f"operator alpha: {', '.join(missing)} missing"):
        BlindConfig(operators=[bare, _operator("beta", files)])


@pytest.mark.parametrize("name", ["ca", "cert", "key"])
def test_tls_files_that_do_not_exist_are_named(files: Files, tmp_path: Path, name: str) -> None:
    absent = _operator("beta", files, **{name: tmp_path / "absent.pem"})
    with pytest.raises(ConfigurationError, match=f"operator beta: {name} file .*absent.pem does not exist"):
        BlindConfig(operators=[_operator("alpha", files), absent])


@pytest.mark.parametrize("one_machine", [False, True])
@pytest.mark.parametrize("content", [b"", b"not a certificate"], ids=["empty", "text"])
@pytest.mark.parametrize("name", ["ca", "cert", "key"])
def test_tls_files_that_hold_nothing_usable_are_named(
    files: Files, tmp_path: Path, name: str, content: bytes, one_machine: bool
) -> None:
    """With an empty CA gRPC trusts every public CA; an empty certificate or key aborts the process."""
    (tmp_path / "broken.pem").write_bytes(content)
    broken = _operator("beta", files, **{name: tmp_path / "broken.pem"})
    with pytest.raises(ConfigurationError, match="operator beta: .*broken.pem"):
        BlindConfig(operators=[_operator("alpha", files), broken], allow_one_machine=one_machine)


def test_a_key_that_is_not_the_certificates_is_refused(files: Files) -> None:
    mixed = _operator("beta", files, key=files("alpha").client_key)
    with pytest.raises(ConfigurationError, match="operator beta: .*key"):
        BlindConfig(operators=[_operator("alpha", files), mixed])


@pytest.mark.parametrize(
    "address",
    [
        "worker.invalid:7100",
        "10.0.0.1:7100",
        "0.0.0.0:7100",
        "[::]:7100",
        "a.localhost:7100",
        "[64:ff9b::7f00:1]:7100",  # a gateway's idea of 127.0.0.1
        "[2002:7f00:1::]:7100",
    ],
)
def test_plaintext_beyond_this_machine_is_refused(address: str) -> None:
    operators = [Operator("alpha", ["127.0.0.1:7100"]), Operator("beta", ["127.0.0.2:7100", address])]
    with pytest.raises(
        ConfigurationError, match="operator beta: insecure=True allows loopback addresses only"
    ):
        BlindConfig(operators=operators, insecure=True, allow_one_machine=True)


def test_plaintext_on_loopback_needs_the_flag() -> None:
    operators = [
        Operator("alpha", ["127.0.0.1:7100", "localhost:7101", "[::1]:7102"]),
        Operator("beta", ["127.0.0.2:7100"]),
    ]
    BlindConfig(operators=operators, insecure=True, allow_one_machine=True)
    with pytest.raises(ConfigurationError, match="TLS needs ca, cert and key"):
        BlindConfig(operators=operators, allow_one_machine=True)


def test_the_reference_cannot_be_combined_with_operators(files: Files) -> None:
    operators = [_operator("alpha", files), _operator("beta", files)]
    with pytest.raises(ConfigurationError, match="computes in this process: remove the operators"):
        BlindConfig(operators=operators, masking="reference")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masking": "none"}, "masking is one of shares, lattice, reference, not 'none'"),
        ({"masking": "reference", "head": "away"}, "head is one of auto, local, remote, not 'away'"),
        ({"masking": "reference", "request_timeout": 0}, "request_timeout must be positive"),
        ({"masking": "reference", "retry_seconds": -1}, "retry_seconds not negative"),
        ({"masking": "reference", "mask": "x"}, "BlindConfig has no option 'mask'"),
        ({"masking": "reference", "precision": "half"}, "precision is one of standard, full, not 'half'"),
        (
            {"masking": "reference", "precision": "full", "parameter_set": "q24"},
            "precision full goes with parameter_set q31, not q24: leave out one of the two",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        BlindConfig(**options)


@pytest.mark.parametrize(
    ("masking", "options", "chosen"),
    [
        ("shares", {}, "q24"),
        ("reference", {}, "q24"),
        ("lattice", {}, "mlwe1280-q24"),
        ("shares", {"precision": "full"}, "q31"),
        ("lattice", {"precision": "full"}, "mlwe1280"),
        ("lattice", {"precision": "full", "parameter_set": "mlwe1536"}, "mlwe1536"),
    ],
)
def test_masking_and_precision_choose_the_parameter_set(
    masking: Any, options: dict[str, Any], chosen: str
) -> None:
    count = {"shares": 2, "lattice": 1}.get(masking, 0)
    named = [Operator(f"operator {i}", [f"127.0.0.{i}:1"]) for i in range(1, count + 1)]
    config = BlindConfig(named, masking, insecure=count > 0, allow_one_machine=count > 1, **options)
    assert config.parameter_set == chosen


NO_ADDRESSES = (
    *(
        "",
        "worker",
        "worker:",
        ":7100",
        "worker:port",
        "worker:0",
        "worker:65536",
        "worker:-1",
        "worker:\uff17",
    ),
    # What gRPC takes for something else than a host.
    *("dns:///worker:1", "dns:worker:1", "ipv4:127.0.0.1:1", "ipv6:[::1]:1", "unix:/tmp/socket:1"),
    *("unix-abstract:x:1", "xds:///worker:1", "passthrough:///worker:1", "vsock:1:2", "a:1,b:1"),
    # What some resolvers take for 127.0.0.1.
    *("127.1:1", "2130706433:1", "0x7f000001:1", "0x7f.0.0.1:1", "0177.0.0.1:1", "127.0.0.01:1"),
    *("\uff1127.0.0.1:1", "127.0.0.1.:1", "worker.7:1", "worker.0x7:1"),
    *("::1:1", "[127.0.0.1]:1", "[::1:1", "::1]:1", "[[::1]]:1", "[::1]a:1", "[]:1", "[fe80::1%a/b]:1"),
    *("user@worker:1", "worker/path:1", "a b:1", "a:1 ", "a\n:1", "a:1\n", "-a:1", "a-:1", "a..b:1"),
    "w\xf6rker:1",
)


@pytest.mark.parametrize("address", NO_ADDRESSES)
def test_an_address_that_is_no_host_and_port_is_refused(address: str) -> None:
    with pytest.raises(ConfigurationError, match="operator alpha: worker address .* is not host:port"):
        Operator("alpha", [address])


@pytest.mark.parametrize(
    "address",
    ["a:1", "A-1.b_2.example.:65535", "10.0.0.1:1", "[::1]:1", "[fe80::1%eth0.1]:1", "unix:1", "1a:1"],
)
def test_an_address_of_a_host_and_a_port_is_taken(address: str) -> None:
    assert Operator("alpha", [address]).workers == (address,)


def test_one_address_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="workers is a list"):
        Operator("alpha", "127.0.0.1:7100")
    with pytest.raises(ConfigurationError, match="workers is a list"):
        Operator("alpha", [])
    for name in ("", "al\npha", "al\x1b[2Jpha"):
        with pytest.raises(ConfigurationError, match="needs a name"):
            Operator(name, ["127.0.0.1:7100"])


def test_a_configuration_survives_being_written_down(files: Files) -> None:
    config = BlindConfig(
        operators=[_operator("alpha", files), _operator("beta", files)], head="local", retry_seconds=7
    )
    written = json.loads(json.dumps(config.to_dict()))
    assert BlindConfig(**written).to_dict() == config.to_dict()
    assert BlindConfig.from_dict(written).to_dict() == config.to_dict()


def test_what_is_printed_or_written_names_key_files_but_never_holds_keys(files: Files) -> None:
    config = BlindConfig(operators=[_operator("alpha", files), _operator("beta", files)])
    key = files("alpha").client_key.read_text().splitlines()[1]
    assert key not in json.dumps(config.to_dict())
    assert "key" not in repr(config) + repr(config.operators)


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("t0ps3cret\n")
    return path


def test_a_token_stands_in_for_certificate_and_key(files: Files, token: Path) -> None:
    with_token = _operator("alpha", files, cert=None, key=None, token=token)
    config = BlindConfig(operators=[with_token, _operator("beta", files)])
    plain = config.to_dict()
    assert plain["operators"][0]["token"] == str(token)
    again = BlindConfig(**{key: value for key, value in plain.items() if key != "quant_method"})
    assert again.operators[0].token == str(token)
    shown = repr(config) + repr(config.operators) + str(plain)
    assert "t0ps3cret" not in shown
    assert str(token) not in repr(config.operators)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [({"ca": None, "cert": None, "key": None}, "ca"), ({"key": None}, "key"), ({"cert": None}, "cert")],
)
def test_a_token_needs_the_authority_and_a_certificate_its_key(
    files: Files, token: Path, changes: dict[str, None], missing: str
) -> None:
    bare = _operator("alpha", files, token=token, **changes)
    with pytest.raises(ConfigurationError, match=f"operator alpha: {missing} missing"):
        BlindConfig(operators=[bare, _operator("beta", files)])


@pytest.mark.parametrize("content", ["", "two t0ps3cret words\n", "t0ps3cret\nt0ps3cret\n", "tópsecret"])
def test_a_file_that_holds_no_token_is_named_and_not_shown(files: Files, token: Path, content: str) -> None:
    token.write_text(content)
    with_token = _operator("alpha", files, cert=None, key=None, token=token)
    with pytest.raises(ConfigurationError, match=f"operator alpha: token file {token} holds no") as caught:
        BlindConfig(operators=[with_token, _operator("beta", files)])
    assert "secret" not in str(caught.value)


def test_two_operators_with_one_token_are_refused(files: Files, token: Path) -> None:
    operators = [_operator(name, files, cert=None, key=None, token=token) for name in ("alpha", "beta")]
    with pytest.raises(ConfigurationError, match="have the same token") as caught:
        BlindConfig(operators=operators)
    assert "t0ps3cret" not in str(caught.value)
