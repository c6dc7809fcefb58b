from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Direction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DIRECTION_UNSPECIFIED: _ClassVar[Direction]
    FORWARD: _ClassVar[Direction]
    BACKWARD: _ClassVar[Direction]
DIRECTION_UNSPECIFIED: Direction
FORWARD: Direction
BACKWARD: Direction

class GetManifestRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("protocol_versions", "software_version", "model", "revision", "scheme", "fingerprint", "layers", "parameter_sets", "limits", "product_method", "acknowledges")
    PROTOCOL_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    SCHEME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_SETS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    PRODUCT_METHOD_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGES_FIELD_NUMBER: _ClassVar[int]
    protocol_versions: _containers.RepeatedScalarFieldContainer[int]
    software_version: str
    model: str
    revision: str
    scheme: str
    fingerprint: str
    layers: _containers.RepeatedCompositeFieldContainer[Layer]
    parameter_sets: _containers.RepeatedScalarFieldContainer[str]
    limits: Limits
    product_method: str
    acknowledges: bool
    def __init__(self, protocol_versions: _Optional[_Iterable[int]] = ..., software_version: _Optional[str] = ..., model: _Optional[str] = ..., revision: _Optional[str] = ..., scheme: _Optional[str] = ..., fingerprint: _Optional[str] = ..., layers: _Optional[_Iterable[_Union[Layer, _Mapping]]] = ..., parameter_sets: _Optional[_Iterable[str]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., product_method: _Optional[str] = ..., acknowledges: _Optional[bool] = ...) -> None: ...

class Layer(_message.Message):
    __slots__ = ("name", "out_features", "in_features", "fingerprint")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OUT_FEATURES_FIELD_NUMBER: _ClassVar[int]
    IN_FEATURES_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    name: str
    out_features: int
    in_features: int
    fingerprint: str
    def __init__(self, name: _Optional[str] = ..., out_features: _Optional[int] = ..., in_features: _Optional[int] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_rows", "max_operand_bytes", "max_message_bytes")
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_OPERAND_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_rows: int
    max_operand_bytes: int
    max_message_bytes: int
    def __init__(self, max_rows: _Optional[int] = ..., max_operand_bytes: _Optional[int] = ..., max_message_bytes: _Optional[int] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("layer", "start", "stop")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    layer: str
    start: int
    stop: int
    def __init__(self, layer: _Optional[str] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class Product(_message.Message):
    __slots__ = ("direction", "spans")
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    direction: Direction
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    def __init__(self, direction: _Optional[_Union[Direction, str]] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ...) -> None: ...

class MultiplyHeader(_message.Message):
    __slots__ = ("protocol_version", "fingerprint", "parameter_set", "product", "rows", "columns", "seed")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_SET_FIELD_NUMBER: _ClassVar[int]
    PRODUCT_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    fingerprint: str
    parameter_set: str
    product: Product
    rows: int
    columns: int
    seed: Seed
    def __init__(self, protocol_version: _Optional[int] = ..., fingerprint: _Optional[str] = ..., parameter_set: _Optional[str] = ..., product: _Optional[_Union[Product, _Mapping]] = ..., rows: _Optional[int] = ..., columns: _Optional[int] = ..., seed: _Optional[_Union[Seed, _Mapping]] = ...) -> None: ...

class Seed(_message.Message):
    __slots__ = ("key", "row_offset")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ROW_OFFSET_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    row_offset: int
    def __init__(self, key: _Optional[bytes] = ..., row_offset: _Optional[int] = ...) -> None: ...

class MultiplyRequest(_message.Message):
    __slots__ = ("header", "residues")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    RESIDUES_FIELD_NUMBER: _ClassVar[int]
    header: MultiplyHeader
    residues: bytes
    def __init__(self, header: _Optional[_Union[MultiplyHeader, _Mapping]] = ..., residues: _Optional[bytes] = ...) -> None: ...

class MultiplyResponse(_message.Message):
    __slots__ = ("residues",)
    RESIDUES_FIELD_NUMBER: _ClassVar[int]
    residues: bytes
    def __init__(self, residues: _Optional[bytes] = ...) -> None: ...
