"""The client kit: what the client must know about layers that it does not hold.

For each frozen layer: its shape, fingerprint and scales; the sums of squares and of magnitudes that bound
its products (see `blindtune.protocol.fixed_point`); the verification vectors, and the images of certificate
words. All of it follows from the public checkpoint, but for the verification secret, which is random, belongs
to this kit and is readable by its owner only. It protects integrity, not privacy.

    KIT/blindtune/kit.json              what this is, of which model, and digests
    KIT/blindtune/layers.safetensors    arrays of each layer
    KIT/blindtune/verification.key      32 bytes
    KIT/config.json, tokenizer.json, model.safetensors ...      what ``from_pretrained`` reads

The description has a digest of every file, those that ``from_pretrained`` reads too, and a keyed digest over
all of that. Opening a kit reads all of it: a disk that rots changes no time of a file, so that nothing but
the bytes tells. A process hashes a file once as long as it stays as it is.
"""

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, reduce
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from blindtune.errors import KitError
from blindtune.protocol.certificate.words import CertificateWords
from blindtune.protocol.certificate.words import secret_words as certificate_words
from blindtune.protocol.expansion import KEY_BYTES, derive_key
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import MAX_CONTRACTION, Direction, Product
from blindtune.protocol.verification import CheckVectors, secret_vectors
from blindtune.protocol.weights import SCHEMES, Scheme

__all__ = [
    "KIT_FOLDER",
    "KIT_VERSION",
    "Kit",
    "KitDescription",
    "LayerDescription",
    "file_sha256",
    "is_kit",
    "kit_files",
    "product_outputs",
    "vectors_name",
]

KIT_FOLDER = "blindtune"
KIT_VERSION = 4
DESCRIPTION, ARRAYS, SECRET = "kit.json", "layers.safetensors", "verification.key"
_WORDS = np.uint32, np.uint64


class LayerDescription(BaseModel):
    """A frozen layer in ``kit.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    out_features: int
    in_features: int
    fingerprint: str
    head: bool = False


class KitDescription(BaseModel):
    """The content of ``kit.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[4] = 4
    model: str
    revision: str | None
    scheme: str
    fingerprint: str
    layers: dict[str, LayerDescription]
    head_included: bool
    arrays_sha256: str
    secret_sha256: str
    files: dict[str, str]
    """SHA-256 of each file beside the folder ``blindtune``; none in a kit that a checkpoint goes with."""
    keyed_digest: str = ""

    def digest(self, secret: bytes) -> str:
        """A keyed hash of everything else here, so that no change goes unnoticed."""
        key = derive_key(secret, "kit description")
        content = self.model_copy(update={"keyed_digest": ""}).model_dump_json()
        return hmac.digest(key, content.encode(), "sha256").hex()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex. What was hashed before, and has not been touched since, is known.

    Raises:
        OSError: it can't be read.
    """
    state = path.stat()
    return _sha256(path, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@lru_cache(maxsize=256)
def _sha256(path: Path, *state: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kit_files(folder: Path) -> list[str]:
    """Names beside the folder ``blindtune``, without hidden ones, which nothing reads."""
    return sorted(x.name for x in folder.iterdir() if x.name != KIT_FOLDER and x.name[0] != ".")


def _require_files(folder: Path, said: Mapping[str, str], again: str) -> None:
    try:
        found = kit_files(folder)
        for name in sorted({*said, *found}):
            if name not in said:
                raise KitError(
                    f"the kit in {folder} holds {name[:100]}, which is not its own and could be read in the "
                    "place of what is: remove it"
                )
            if name not in found:
                raise KitError(f"the kit in {folder} lacks {name}; {again}")
            if file_sha256(folder / name) != said[name]:
                raise KitError(f"{folder / name} is damaged: its digest differs; {again}")
    except OSError as error:
        raise KitError(f"the kit in {folder} cannot be read ({error}); {again}") from error


def _version(content: bytes) -> int | float | None:
    """The version that a description says; None where that is not even a number."""
    try:
        found = json.loads(content)["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, int | float) and abs(found) < 1e9 else None


def product_outputs(product: Product, shapes: Mapping[str, tuple[int, int]]) -> int:
    """Columns of a product's results, given the shape [out, in] of each layer."""
    if product.direction is Direction.FORWARD:
        return sum(shapes[span.layer][0] for span in product.spans)
    return shapes[product.spans[0].layer][1]


def vectors_name(direction: Direction, parameters: ParameterSet) -> str:
    """What the array with the vectors v of a layer is called."""
    return f"{direction.name.lower()}_{parameters.name}"


def is_kit(folder: Path) -> bool:
    """Whether a folder holds a kit."""
    return (folder / KIT_FOLDER / DESCRIPTION).is_file()


@dataclass(frozen=True, eq=False)
class Kit:
    """An opened kit.

    Attributes:
        folder: the folder that holds ``blindtune/``.
        description: the content of ``kit.json``.
    """

    folder: Path
    description: KitDescription
    _secret: bytes = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> "Kit":
        """Opens a kit and checks that it is whole.

        Raises:
            KitError: it is missing, damaged, or of another version or quantization scheme.
        """
        inside = folder / KIT_FOLDER
        again = f"remove {folder} and make it again with: blindtune prepare MODEL --output {folder}"
        try:
            content = (inside / DESCRIPTION).read_bytes()
            if (version := _version(content)) not in (None, KIT_VERSION):
                raise KitError(
                    f"the kit in {folder} is of another release (version {version:.0f}, this one reads "
                    f"{KIT_VERSION}); {again}"
                )
            description = KitDescription.model_validate_json(content)
            secret = (inside / SECRET).read_bytes()
            arrays_sha256 = file_sha256(inside / ARRAYS)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise KitError(f"{inside / DESCRIPTION}: {where}: {first['msg']}; {again}") from None
        except OSError as error:
            raise KitError(f"the kit in {folder} cannot be read ({error}); {again}") from error
        if description.scheme not in {x.identifier for x in SCHEMES.values()}:
            raise KitError(f"the kit in {folder} is for {description.scheme}, which is unknown here; {again}")
        if len(secret) != KEY_BYTES or hashlib.sha256(secret).hexdigest() != description.secret_sha256:
            raise KitError(f"{inside / SECRET} is damaged: its digest differs; {again}")
        if not hmac.compare_digest(description.digest(secret).encode(), description.keyed_digest.encode()):
            raise KitError(f"{inside / DESCRIPTION} was changed: its digest differs; {again}")
        if arrays_sha256 != description.arrays_sha256:
            raise KitError(f"{inside / ARRAYS} is damaged: its digest differs; {again}")
        _require_files(folder, description.files, again)
        return cls(folder, description, secret)

    @property
    def scheme(self) -> Scheme:
        """How the weights became integers."""
        return next(x for x in SCHEMES.values() if x.identifier == self.description.scheme)

    @property
    def layers(self) -> dict[str, LayerDescription]:
        return self.description.layers

    @cached_property
    def _arrays(self) -> safe_open:  # memory-mapped; each array is read when asked for
        path = self.folder / KIT_FOLDER / ARRAYS
        try:
            return safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise KitError(f"{path} cannot be opened: {error}") from error

    def _array(self, layer: str, what: str) -> NDArray[np.generic]:
        try:
            return self._arrays.get_tensor(f"{layer}:{what}")
        except SafetensorError as error:
            raise KitError(f"the kit in {self.folder} lacks {what} of layer {layer}: {error}") from error

    def scales(self, layer: str) -> NDArray[np.float32]:
        """float32 [out_features]."""
        return self._array(layer, "scales").astype(np.float32, copy=False)

    def column_square_sum(self, product: Product) -> int:
        """The largest sum of squares of a column of the product's matrix."""
        return self._largest_column(product, "squares")

    def column_absolute_sum(self, product: Product) -> int:
        """The largest sum of magnitudes of a column of the product's matrix."""
        return self._largest_column(product, "magnitudes")

    def _largest_column(self, product: Product, what: str) -> int:
        return int(max(np.max(x) for x in self._columns(product, what)))

    def _columns(self, product: Product, what: str) -> list[NDArray[np.int64]]:
        """Sums over the columns of the product's matrix, of one side by side part after the other."""
        name = "row" if product.direction is Direction.FORWARD else "column"
        parts = [
            self._array(s.layer, f"{name}_{what}")[s.start // MAX_CONTRACTION].astype(np.int64)
            for s in product.spans
        ]
        return parts if product.direction is Direction.FORWARD else [np.sum(parts, axis=0)]

    def outputs(self, product: Product) -> int:
        """Columns of the product's results."""
        return product_outputs(
            product, {name: (x.out_features, x.in_features) for name, x in self.layers.items()}
        )

    def derive_key(self, *label: str) -> bytes:
        """A key for one more purpose of this kit, from its verification secret."""
        return derive_key(self._secret, *label)

    def check_vectors(self, product: Product, parameters: ParameterSet) -> CheckVectors:
        """The secret vectors that verify responses to a product, for one of the parameter sets."""
        first = self.layers[product.spans[0].layer]
        if product.direction is Direction.FORWARD:
            s = np.concatenate(
                [
                    secret_vectors(
                        self._secret,
                        x.layer,
                        Direction.FORWARD,
                        self.layers[x.layer].out_features,
                        parameters,
                    )
                    for x in product.spans
                ],
                axis=1,
            )
            parts = [
                self._array(x.layer, vectors_name(Direction.FORWARD, parameters))[:, x.start : x.stop]
                for x in product.spans
            ]
            v = sum(part.astype(np.uint64) for part in parts) % parameters.modulus
            return CheckVectors(s, np.ascontiguousarray(v, np.uint32), parameters)
        s = secret_vectors(self._secret, "", Direction.BACKWARD, first.in_features, parameters)
        parts = [
            self._array(x.layer, vectors_name(Direction.BACKWARD, parameters))[:, x.start : x.stop]
            for x in product.spans
        ]
        return CheckVectors(s, np.ascontiguousarray(np.concatenate(parts, axis=1), np.uint32), parameters)

    def certificate(self, product: Product) -> CertificateWords:
        """The secret words that tell whether results of a product wrapped."""
        if product.direction is Direction.FORWARD:
            of_layers = [
                certificate_words(self._secret, x.layer, Direction.FORWARD, self.layers[x.layer].out_features)
                for x in product.spans
            ]
            u, long_u = (np.concatenate(words) for words in zip(*of_layers, strict=True))
            image, long_image = (reduce(np.add, self._images(product, x)) for x in _WORDS)
        else:
            in_features = self.layers[product.spans[0].layer].in_features
            u, long_u = certificate_words(self._secret, "", Direction.BACKWARD, in_features)
            image, long_image = (np.concatenate(self._images(product, x)) for x in _WORDS)
        squares = np.concatenate(self._columns(product, "squares"))
        return CertificateWords(u, image, long_u, long_image, squares)

    def _images(self, product: Product, words: type[np.unsignedinteger]) -> list[NDArray[Any]]:
        """M u of each span, for words of this type."""
        name = f"{product.direction.name.lower()}_{words.__name__}"
        return [self._array(x.layer, name)[x.start : x.stop] for x in product.spans]
