"""gRPC ignores an option that it does not know, so a misspelt one would go unnoticed."""

from pathlib import Path

import pytest
from grpc._cython import cygrpc

from blindtune.client.operators import transport
from blindtune.server import daemon


@pytest.mark.parametrize("name", sorted({name for name, _ in (*transport._OPTIONS, *daemon._OPTIONS)}))
def test_grpc_knows_the_option(name: str) -> None:
    assert name.encode() in Path(cygrpc.__file__).read_bytes()
