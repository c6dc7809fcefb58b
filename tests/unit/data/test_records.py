"""Reading records: a broken one is named by its line, and nothing of what it says appears in a message."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.spec import AbstractFileSystem

from blindtune.client.data.reading.records import digest, read_records, sample
from blindtune.errors import DataError

MARK = "PLANTED-SECRET"
GOOD = json.dumps({"text": MARK, "label": MARK})


def problem(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_records(path)
    said = str(caught.value)
    assert MARK not in said
    assert "PLANTED" not in said
    return said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f'{{"text": "{MARK}", "label": "{MARK}"', "this is no JSON: Expecting ',' delimiter"),
        (f'{{"text": "{MARK}}}', "column 26: this is no JSON: Invalid control character"),
        (f'{{"text": {MARK}}}', "column 10: this is no JSON: Expecting value"),
        (f'{{"text": "{MARK}\\q"}}', "this is no JSON: Invalid \\escape"),
        (f'{{"text": "{MARK}\t"}}', "this is no JSON: Invalid control character"),
        (f"{GOOD} {GOOD}", "this is no JSON: Extra data"),
        (f"'{MARK}'", "column 1: this is no JSON"),
        (f'["{MARK}"]', "expected a JSON object, found list"),
        (f'"{MARK}"', "expected a JSON object, found str"),
        ("null", "expected a JSON object, found NoneType"),
        (f'{{"{MARK}": ' + "[" * 100_000 + "]" * 100_000 + "}", "it is nested too deeply"),
        (
            f'{{"text": "{MARK}", "label": NaN}}',
            "a number is infinite, none at all (NaN), or has too many digits",
        ),
        (f'{{"text": "{MARK}", "label": -Infinity}}', "a number is infinite"),
        (f'{{"text": "{MARK}", "label": {"9" * 5000}}}', "or has too many digits"),
        (f'{{"text": "{MARK}\\uD83d"}}', "a text has a \\u escape that is half of a character"),
        (f'{{"text": "{MARK}\\udc00 and"}}', "a text has a \\u escape that is half of a character"),
    ],
)
def test_a_broken_line_is_named_and_not_shown(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([GOOD] * 316 + [line] + [GOOD] * 3), encoding="utf-8")
    found = problem(path)
    assert found.startswith(f"{path}, line 317")
    assert said in found


def test_a_line_that_is_no_utf8_is_named_exactly(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    lines = [GOOD.encode()] * 316 + [b'{"text": "caf\xe9 PLANTED-SECRET"}'] + [GOOD.encode()] * 500
    path.write_bytes(b"\n".join(lines))
    assert problem(path) == f"{path}, line 317: this is no UTF-8: save the file as UTF-8"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            gzip.compress(GOOD.encode(), mtime=0),
            "is compressed with gzip, and no JSONL file: unpack it first",
        ),
        (bz2.compress(GOOD.encode()), "is compressed with bzip2"),
        (lzma.compress(GOOD.encode()), "is compressed with xz"),
        (b"\x28\xb5\x2f\xfd" + MARK.encode(), "is compressed with zstd"),
        (b"PK\x03\x04" + MARK.encode(), "is a zip archive"),
        (b"PAR1\x15\x04" + MARK.encode(), "is a Parquet file"),
        (b"SQLite format 3\0" + MARK.encode(), "is an SQLite database"),
        (bytes(range(256)) * 3, "holds binary data"),
        (GOOD.encode("utf-16-le"), "holds binary data, or text in UTF-16"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n",
            "is not the data, but what stands for it in Git LFS: fetch the file with git lfs pull",
        ),
        (b"/annex/objects/SHA256E-s12--ab.jsonl\n", "git annex get"),
        (f"[\n{GOOD},\n{GOOD}\n]".encode(), "begins with a JSON list"),
        (f"\ufeff [{GOOD}]".encode(), "begins with a JSON list"),
    ],
)
def test_a_file_of_another_kind_is_named_by_what_it_is(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    found = problem(path)
    assert found.startswith(f"{path} ")
    assert said in found


def test_control_characters_in_a_few_texts_do_not_make_a_file_binary(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + GOOD.replace("label", "\x01\x02").encode())
    assert "line 2, column 29: this is no JSON: Invalid control character" in problem(path)


def test_a_pointer_in_a_saved_dataset_is_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": MARK}]).save_to_disk(tmp_path / "set")
    (arrow,) = (tmp_path / "set").glob("*.arrow")
    arrow.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")
    assert problem(tmp_path / "set").startswith(f"{arrow} is not the data")


def test_utf16_is_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD.encode("utf-16"))
    assert "line 1: this is no UTF-8" in problem(path)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c"])
def test_what_else_ends_a_line_may_be_inside_a_string(separator: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    text = f"a{separator}b"
    line = json.dumps({"text": text}, ensure_ascii=False)
    path.write_text(f"{line}\n{line}\n", encoding="utf-8", newline="")
    assert [x.fields for x in read_records(path)] == [{"text": text}] * 2


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": "\xc3\xa9"}\r\n{"a": 2}\r\n',
        b'\xef\xbb\xbf{"a": "\xc3\xa9"}\n{"a": 2}',
        b'{"a": "\\u00e9"}\n{"a": 2}\n',
        b' {"a": "\xc3\xa9"} \n\t{"a":2}\t\n',
    ],
    ids=["crlf", "byte-order-mark", "escapes", "spaces"],
)
def test_how_lines_are_written_does_not_matter(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    assert [x.fields for x in read_records(path)] == [{"a": "é"}, {"a": 2}]


def test_whole_pairs_of_escapes_are_one_character(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"a": "\\ud83d\\ude00"}\n')
    assert read_records(path)[0].fields == {"a": "😀"}


def test_blank_lines_are_no_records_and_count_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('\n{"a": 1}\n\n  \n{"a": 2}\n\n')
    records = read_records(path)
    assert [x.where for x in records] == [f"{path}, line 2", f"{path}, line 5"]


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_a_file_without_records_is_an_error(content: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(content, encoding="utf-8")
    assert problem(path).startswith(f"{path} holds no records")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert problem(tmp_path / "none").startswith(f"there is no data file {tmp_path / 'none'}")


def test_a_saved_dataset_is_read_by_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": "a\nb", "label": 1}, {"text": None, "label": 2}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    records = read_records(tmp_path / "set")
    assert [dict(x.fields) for x in records] == rows
    assert [x.where for x in records] == [f"{tmp_path / 'set'}, row 1", f"{tmp_path / 'set'}, row 2"]


def test_several_splits_are_named_so_that_one_can_be_chosen(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"text": MARK}])
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "sets")
    said = problem(tmp_path / "sets")
    assert f"name one of {tmp_path / 'sets' / 'train'}, {tmp_path / 'sets' / 'test'}" in said
    assert len(read_records(tmp_path / "sets" / "train")) == 1


def test_an_empty_dataset_holds_no_records(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "set")
    assert "holds no records" in problem(tmp_path / "set")


def _damage(folder: Path, what: str) -> None:
    arrow = next(folder.glob("*.arrow"))
    state = json.loads((folder / "state.json").read_text())
    if what == "no dataset":
        for path in folder.iterdir():
            path.unlink()
        (folder / "train.jsonl").write_text(GOOD)
    elif what == "no state":
        (folder / "state.json").unlink()
    elif what == "state of another kind":
        (folder / "state.json").write_text(f'["{MARK}"]')
    elif what == "state without files":
        (folder / "state.json").write_text(json.dumps({x: y for x, y in state.items() if x != "_data_files"}))
    elif what == "broken state":
        (folder / "state.json").write_text(f'{{"{MARK}')
    elif what == "no table":
        arrow.write_bytes(MARK.encode() * 10)
    elif what == "half a table":
        arrow.write_bytes(arrow.read_bytes()[:100])


@pytest.mark.parametrize(
    "what",
    [
        "no dataset",
        "no state",
        "state of another kind",
        "state without files",
        "broken state",
        "no table",
        "half a table",
    ],
)
def test_a_folder_that_is_no_dataset_is_an_error_of_ours(what: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "set"
    datasets.Dataset.from_list([{"text": MARK}]).save_to_disk(folder)
    _damage(folder, what)
    assert problem(folder).startswith(f"{folder} is no folder of datasets.save_to_disk")


def test_a_sample_is_the_same_for_the_same_seed() -> None:
    one = list(sample(1000, 10, 3))
    assert list(sample(1000, 10, 3)) == one
    assert list(sample(1000, 10, 4)) != one
    assert len(set(one)) == 10
    assert one != sorted(one)


@pytest.mark.parametrize("limit", [None, 5, 6])
def test_without_need_there_is_no_sample(limit: int | None) -> None:
    assert list(sample(5, limit, 1)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "other",
    [
        [{"input_ids": [1, 2], "labels": [2]}],
        [{"input_ids": [1], "labels": [3]}],
        [{"input_ids": [1], "labels": [2]}] * 2,
        [],
    ],
)
def test_a_digest_notices_every_change(other: list[dict[str, Any]]) -> None:
    rows = [{"input_ids": [1], "labels": [2]}]
    assert digest(rows) == digest([{"labels": [2], "input_ids": [1]}])
    assert digest(rows) != digest(other)


class _Elsewhere(AbstractFileSystem):
    """Files that are not on this machine, as far as anyone can tell who opens one."""

    protocol = "elsewhere"
    asked: ClassVar[list[str]] = []

    def _open(self, path: str, *arguments: Any, **options: Any) -> Any:
        self.asked.append(path)
        raise FileNotFoundError(path)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["Image", "Audio"])
def test_nothing_that_a_column_names_is_opened_or_fetched(
    kind: str, nested: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(_Elsewhere, "asked", [])
    fsspec.register_implementation("elsewhere", _Elsewhere, clobber=True)
    # As somebody else's folder would hold it: an address in place of content.
    named = {"bytes": None, "path": "elsewhere://host/file"}
    column = [named] if nested else named
    struct = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = {"text": datasets.Value("string"), "extra": datasets.List(struct) if nested else struct}
    row = {"text": "a", "extra": column}
    folder = tmp_path / "set"
    datasets.Dataset.from_list([row], features=datasets.Features(features)).save_to_disk(folder)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["features"]["extra"] = {"_type": "List", "feature": {"_type": kind}} if nested else {"_type": kind}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert kind in str(datasets.load_from_disk(str(folder)).features["extra"])
    (record,) = read_records(folder)
    assert record.fields == row
    assert _Elsewhere.asked == []


def test_a_saved_dataset_of_many_tables_keeps_its_order(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_dict({"n": list(range(2500))})
    saved.set_format("numpy", columns=["n"])
    saved.save_to_disk(tmp_path / "set", num_shards=3)
    assert [x.fields["n"] for x in read_records(tmp_path / "set")] == list(range(2500))
