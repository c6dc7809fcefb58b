"""What is compared with a secret takes a time that tells nothing of it."""

import hmac
from pathlib import Path

import pytest

from blindtune.checkpoint import Checkpoint
from blindtune.client.kit.hints import HintStore
from blindtune.client.kit.kit import Kit
from blindtune.client.kit.prepare import prepare
from blindtune.protocol.lattice.parameters import LatticeParameters
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import forward_products
from blindtune.server.admission.refusals import Unauthenticated
from blindtune.server.admission.tokens import Tokens, add_token

TOY = LatticeParameters(name="toy", rank=1, eta=1, security="none")


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, bytes]]:
    """All that is compared in constant time."""
    pairs: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def watched(a: bytes, b: bytes) -> bool:
        pairs.append((a, b))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    return pairs


def test_a_token_is_compared_with_all_in_constant_time(
    tmp_path: Path, compared: list[tuple[bytes, bytes]]
) -> None:
    names = ("alice", "bob", "carol")
    given = {name: add_token(tmp_path / "tokens", name) for name in names}
    tokens = Tokens(tmp_path / "tokens")
    hashes = [
        bytes.fromhex(line.rpartition(":")[2]) for line in (tmp_path / "tokens").read_text().split("\n")[:3]
    ]
    for name, digest in zip(names, hashes, strict=True):
        compared.clear()
        assert tokens.name_of([("authorization", f"Bearer {given[name]}")]) == name
        assert compared == [(digest, known) for known in hashes]
    compared.clear()
    with pytest.raises(Unauthenticated):
        tokens.name_of([("authorization", "Bearer wrong")])
    assert [known for _, known in compared] == hashes


def test_keyed_digests_are_compared_in_constant_time(
    checkpoint: Checkpoint, honest: Multiplier, tmp_path: Path, compared: list[tuple[bytes, bytes]]
) -> None:
    kit = prepare(checkpoint, tmp_path / "kit")
    compared.clear()
    kit = Kit.open(kit.folder)
    digest = kit.description.keyed_digest.encode()
    assert (digest, digest) in compared
    (product,) = forward_products(["model.layers.0.self_attn.q_proj.weight"], 32)
    store = HintStore(kit, TOY, lambda product, share: honest.multiply(product, share.residues, Q31))
    compared.clear()
    store.get(product)
    ((a, b),) = compared
    assert a == b and len(a) == 64
