"""Files that are no JSON lines, known by how they begin, and what to do about each."""

from pathlib import Path

from blindtune.checkpoint.pointers import pointer_of
from blindtune.errors import DataError

__all__ = ["require_lines", "require_no_pointer"]

_HEAD = 512
_UNPACK = "unpack it first"
_CONVERT = "write it as JSONL, or as a folder with datasets.Dataset.save_to_disk"
_KINDS = {
    b"\x1f\x8b": ("compressed with gzip", _UNPACK),
    b"BZh": ("compressed with bzip2", _UNPACK),
    b"\xfd7zXZ\0": ("compressed with xz", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", _UNPACK),
    b"\x04\x22\x4d\x18": ("compressed with lz4", _UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _UNPACK),
    b"PK\x03\x04": ("a zip archive, or a file of an office program", f"{_UNPACK}, or export it as JSONL"),
    b"PAR1": ("a Parquet file", _CONVERT),
    b"ARROW1": ("an Arrow file", _CONVERT),
    b"\xff\xff\xff\xff": ("an Arrow stream", _CONVERT),
    b"SQLite format 3\0": ("an SQLite database", _CONVERT),
    b"\x89HDF\r\n": ("an HDF5 file", _CONVERT),
    b"Obj\x01": ("an Avro file", _CONVERT),
    b"%PDF": ("a PDF file", _CONVERT),
}
# No text has these, and bytes by chance one in nine.
_CONTROL = bytes(range(9)) + bytes(range(14, 32))
_UNICODE = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")


def require_lines(path: Path) -> None:
    """Checks that a file may be one of text lines.

    Raises:
        DataError: it stands for another file, or is of another kind.
    """
    require_no_pointer(path)
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    for begin, (kind, what_to_do) in _KINDS.items():
        if head.startswith(begin):
            raise DataError(f"{path} is {kind}, and no JSONL file: {what_to_do}")
    if sum(head.count(x) for x in _CONTROL) > len(head) // 16 and not head.startswith(_UNICODE):
        raise DataError(f"{path} holds binary data, or text in UTF-16: {_CONVERT}, in UTF-8")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        raise DataError(f"{path} begins with a JSON list: a JSONL file has one JSON object on each line")


def require_no_pointer(path: Path) -> None:
    """Checks that a file is not what a version control system puts in the place of a large one.

    Raises:
        DataError: it is.
    """
    pointer = pointer_of(path)
    if pointer is not None:
        raise DataError(
            f"{path} is not the data, but what stands for it in {pointer.system}: fetch the file with "
            f"{pointer.command}"
        )
