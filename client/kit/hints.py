"""Hints on disk: what a lattice mask needs of each product, H = A M, obtained once and verified.

    KIT/blindtune/hints/SET/public.seed     32 bytes that A is expanded from, drawn by this client
    KIT/blindtune/hints/SET/NAME.hint       one product's hint, packed

A hint file is a page with a header of JSON, padded with spaces, and then the array as it lies in memory,
mapped and not read. The header says what the hint belongs to: model fingerprint, product, parameter
set and public seed; and it carries a keyed hash over that and the array, made after the worker's
answer was verified with all vectors for hints. It is checked when the file is opened: verification of later
responses does not cover a hint that rots on disk.

Each file appears when it is complete, so that making hints can be interrupted and goes on where it was.
"""

import hashlib
import hmac
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from blindtune.client.kit.kit import KIT_FOLDER, Kit
from blindtune.client.process.disk import disk_errors_are_clear, file_written_at_once, make_folder
from blindtune.errors import KitError
from blindtune.protocol.expansion import KEY_BYTES
from blindtune.protocol.kernels.process import this_process
from blindtune.protocol.lattice.hint import hint_request, pack_rows, packed_shape
from blindtune.protocol.lattice.parameters import DEGREE, LatticeParameters
from blindtune.protocol.masks import Share
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Centred, Residues

__all__ = ["HintStore", "hint_bytes", "missing_hints"]

_HEADER_BYTES = 4096
_VERSION = 2
_HASHED_AT_ONCE = 1 << 24

Ask = Callable[[Product, Share], Residues]
"""Multiplies a share by a product at an operator, and verifies the answer with all vectors for hints."""


def hint_bytes(parameters: LatticeParameters, outputs: int) -> int:
    """Bytes of the hint of a product with so many outputs, on disk and from the worker."""
    return int(np.prod(packed_shape(parameters, outputs))) * 4


def missing_hints(
    folder: Path | None, parameters: LatticeParameters, products: Iterable[Product]
) -> list[Product]:
    """The products whose hints have to be obtained.

    Args:
        folder: of the kit; None where there is none yet.
        parameters: of the lattice.
        products: of a run.
    """
    return [x for x in products if folder is None or not _path(_folder(folder, parameters), x).exists()]


def _folder(kit: Path, parameters: LatticeParameters) -> Path:
    return kit / KIT_FOLDER / "hints" / parameters.name


def _path(folder: Path, product: Product) -> Path:
    return folder / f"{hashlib.sha256(product.label.encode()).hexdigest()[:40]}.hint"


class HintStore:
    """The hints of a kit under one parameter set.

    Args:
        kit: where they are kept, and what they belong to.
        parameters: of the lattice.
        ask: obtains rows that are missing.
    """

    def __init__(self, kit: Kit, parameters: LatticeParameters, ask: Ask) -> None:
        self._kit = kit
        self._parameters = parameters
        self._ask = ask
        self._folder = _folder(kit.folder, parameters)
        self._lock = (this_process(), threading.Lock())
        self._open: dict[Product, Centred] = {}
        self.public_seed = self._public_seed()

    def missing(self, products: Iterable[Product]) -> list[Product]:
        """Those that have to be obtained."""
        return [x for x in products if x not in self._open and not self._path(x).exists()]

    def total_bytes(self, products: Iterable[Product]) -> int:
        """Bytes of the hints of these products."""
        return sum(hint_bytes(self._parameters, self._kit.outputs(x)) for x in products)

    def get(self, product: Product) -> Centred:
        """A product's hint, obtained if it is not there, and checked when it is first opened.

        Raises:
            KitError: the file is damaged, or belongs to something else.
            ResourceError: the disk is full.
            ProtocolError: the operator cannot answer.
        """
        if product in self._open:
            return self._open[product]
        with self._lock_of_this_process():
            if product not in self._open:
                if not self._path(product).exists():
                    self._make(product)
                self._open[product] = self._read(product)
            return self._open[product]

    def _lock_of_this_process(self) -> threading.Lock:
        """A lock that another thread held when this process was forked would never be released here."""
        if self._lock[0] is not this_process():
            self._lock = (this_process(), threading.Lock())
        return self._lock[1]

    def _public_seed(self) -> bytes:
        path = self._folder / "public.seed"
        with disk_errors_are_clear(self._folder):
            make_folder(self._folder)
            if not path.exists():
                file_written_at_once(path, lambda file: file.write(os.urandom(KEY_BYTES)), replace=False)
        seed = path.read_bytes()
        if len(seed) != KEY_BYTES:
            raise KitError(f"{path} is damaged: delete the folder {self._folder}, and hints are made again")
        return seed

    def _path(self, product: Product) -> Path:
        return _path(self._folder, product)

    def _binding(self, product: Product) -> "_Binding":
        return _Binding(
            version=_VERSION,
            fingerprint=self._kit.description.fingerprint,
            product=product.label,
            parameter_set=self._parameters.name,
            public_seed=self.public_seed.hex(),
            shape=packed_shape(self._parameters, self._kit.outputs(product)),
        )

    def _digest(self, binding: "_Binding", packed: Centred) -> str:
        key = self._kit.derive_key("hint", self._parameters.name)
        digest = hmac.new(key, binding.model_dump_json().encode(), "sha256")
        flat = packed.reshape(-1).view(np.uint8)
        for start in range(0, flat.size, _HASHED_AT_ONCE):
            digest.update(flat[start : start + _HASHED_AT_ONCE].data)
        return digest.hexdigest()

    def _make(self, product: Product) -> None:
        """Obtains a hint and writes its file."""
        packed = np.empty(packed_shape(self._parameters, self._kit.outputs(product)), np.int32)
        for first in range(0, self._parameters.dimension, DEGREE):
            share = hint_request(self._parameters.residues, self.public_seed, product, first, DEGREE)
            pack_rows(self._ask(product, share), packed, first, self._parameters.residues)
        binding = self._binding(product)
        header = _Header(binding=binding, keyed_digest=self._digest(binding, packed)).model_dump_json()
        if len(header.encode()) > _HEADER_BYTES:
            raise KitError(f"the layer names of a hint take more than {_HEADER_BYTES} bytes: {product.label}")

        def write(file: BinaryIO) -> None:
            file.write(header.encode().ljust(_HEADER_BYTES))
            file.write(packed.data)

        file_written_at_once(self._path(product), write)

    def _read(self, product: Product) -> Centred:
        path = self._path(product)
        remedy = f"delete {path}, and it is made again"
        binding = self._binding(product)
        try:
            with open(path, "rb") as file:
                header = _Header.model_validate_json(file.read(_HEADER_BYTES))
        except (OSError, ValidationError) as error:
            raise KitError(f"hint {path} cannot be read, its header is damaged: {remedy}") from error
        if differing := [name for name, value in binding if getattr(header.binding, name) != value]:
            raise KitError(f"hint {path} belongs to another {', '.join(differing)}: {remedy}")
        try:
            packed = np.memmap(path, np.int32, "r", _HEADER_BYTES, binding.shape)
        except (OSError, ValueError) as error:
            raise KitError(f"hint {path} is damaged, it cannot be mapped ({error}): {remedy}") from error
        whole = path.stat().st_size == _HEADER_BYTES + packed.nbytes
        expected = self._digest(binding, packed).encode()
        if not (whole and hmac.compare_digest(header.keyed_digest.encode(), expected)):
            raise KitError(f"hint {path} is damaged, its digest differs: {remedy}")
        return packed


class _Binding(BaseModel):
    """What a hint belongs to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int
    fingerprint: str
    product: str
    parameter_set: str
    public_seed: str
    shape: tuple[int, int, int, int]


class _Header(BaseModel):
    """The first page of a hint file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    binding: _Binding
    keyed_digest: str
