"""What of an output folder may be given away, in a folder of its own: `package`.

Files are taken from a list and never by exclusion, each is checked for what only this machine should know,
and what a run does not write is refused, so that nobody wonders whether it went along.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from blindtune.client.process.disk import folder_written_at_once
from blindtune.client.record.adapter import digests_of
from blindtune.client.record.chain import Chain, read_chain
from blindtune.client.record.keys import VerificationKey
from blindtune.client.trust.adapter_config import CONFIG, read_plain_lora
from blindtune.errors import CheckpointError, ConfigurationError, RecordError

__all__ = ["Package", "package"]

WEIGHTS, CARD, SUMMARY = "adapter_model.safetensors", "README.md", "summary.json"
RECORD, PUBLIC_KEY = "record.jsonl", "record.pub"
_SETTINGS = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
_TOKENIZER_TEXT = ("chat_template.jinja", "merges.txt", "vocab.txt")
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_GIVEN_AWAY = (CONFIG, WEIGHTS, "tokenizer.json", *_SETTINGS, *_TOKENIZER_TEXT, *_SENTENCEPIECE)
# What a run writes besides, and keeps. The model card is PEFT's, which names folders: it is written anew.
_KEPT = (CARD, RECORD, PUBLIC_KEY, SUMMARY, "recipe.yaml", "run.json", "checkpoints", ".lock")
# Where a tokenizer came from, and how it was read.
_OF_THIS_MACHINE = {
    *("name_or_path", "_name_or_path", "tokenizer_file", "vocab_file", "merges_file"),
    *("is_local", "local_files_only", "cache_dir", "token", "use_auth_token", "_commit_hash"),
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_TENSOR = re.compile(r"base_model\.model\.[A-Za-z0-9_.]+")
_OF_A_TENSOR = {"dtype", "shape", "data_offsets"}
_HOME = f"{Path.home()}/" if len(str(Path.home())) > 1 else "~/"
_PATH = re.compile(r"(/[^/\s]+){2,}/?|~/.*|[A-Za-z]:\\.*|file:.*|\\\\.*")


@dataclass(frozen=True)
class Package:
    """What was written.

    Attributes:
        files: their names, sorted.
        notes: what who gives it away should know.
    """

    files: Sequence[str]
    notes: Sequence[str]


def package(
    run: Path,
    destination: Path,
    *,
    base_model: str | None = None,
    labels: bool = False,
    record: bool = True,
    card: Path | None = None,
) -> Package:
    """Writes the adapter of a finished run, its tokenizer, a model card and its record to a new folder.

    Args:
        run: the output folder.
        destination: new or empty.
        base_model: public name of the base model, where the adapter names a folder of this machine.
        labels: write a classifier's class names to the model card.
        record: take the training record along, if there is one.
        card: a model card to take instead of the one that is made here.

    Raises:
        ConfigurationError: the run is not finished, the folder holds what no run writes, the base model has
            no public name, or the destination is not empty.
        CheckpointError, UnsupportedError: a file is damaged, or holds what no adapter or tokenizer should.
        RecordError: the record is broken or not that of this adapter.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConfigurationError(f"{destination} exists and is not empty: choose another folder")
    if destination.resolve().is_relative_to(run.resolve()):
        raise ConfigurationError(f"{destination} is in the output folder itself: choose another folder")
    found = _files(run)
    settings = read_plain_lora(run)
    name, renamed = _public_name(run, settings, base_model)
    _check_settings(run, settings)
    _check_weights(run / WEIGHTS)
    notes = []
    with folder_written_at_once(destination) as folder:
        shutil.copyfile(run / WEIGHTS, folder / WEIGHTS)
        if renamed:
            _write_json(folder / CONFIG, settings | {"base_model_name_or_path": name})
        else:
            shutil.copyfile(run / CONFIG, folder / CONFIG)  # to the byte, as the record has it
        for file in found:
            if file not in (CONFIG, WEIGHTS):
                _copy(run / file, folder / file)
        if card is not None:
            shutil.copyfile(card, folder / CARD)
        else:
            (folder / CARD).write_text(_card(name, settings, _labels(run) if labels else []), "utf-8")
        if record and (run / RECORD).exists():
            notes += _copy_record(run, folder, renamed)
        if unexpected := {x.name for x in folder.iterdir()} - {*_GIVEN_AWAY, CARD, RECORD, PUBLIC_KEY}:
            raise ConfigurationError(f"{', '.join(sorted(unexpected))} must not be given away")
    return Package(sorted(x.name for x in destination.iterdir()), notes)


def _files(run: Path) -> list[str]:
    """The files to take; none is a link, and nothing else is there than what a run writes."""
    if not (run / SUMMARY).is_file() or not (run / CONFIG).is_file() or not (run / WEIGHTS).is_file():
        raise ConfigurationError(f"{run} is not the output folder of a finished run: name output.dir of one")
    entries = sorted(run.iterdir())
    unknown = [x.name for x in entries if x.name not in (*_GIVEN_AWAY, *_KEPT)]
    if unknown:
        raise ConfigurationError(
            f"{run} holds {', '.join(unknown[:5])}, which no run writes: move it elsewhere, so that it is "
            "plain that it is not given away"
        )
    taken = [x for x in entries if x.name in (*_GIVEN_AWAY, RECORD, PUBLIC_KEY)]
    for path in taken:
        if path.is_symlink() or not path.is_file():
            raise ConfigurationError(f"{path} is no plain file: put the file itself there")
    return [x.name for x in taken if x.name in _GIVEN_AWAY]


def _public_name(run: Path, settings: Mapping[str, Any], given: str | None) -> tuple[str, bool]:
    """The base model's name for others, and whether the adapter says another one."""
    said = settings.get("base_model_name_or_path")
    name = said if given is None else given
    if not isinstance(name, str) or not _HUB_NAME.fullmatch(name) or (given is None and Path(name).exists()):
        raise ConfigurationError(
            f"{run / CONFIG} names the base model by a folder of this machine: say its public name, with "
            "--base-model OWNER/NAME"
        )
    return name, name != said


def _check_settings(run: Path, settings: Mapping[str, Any]) -> None:
    """Checks that the adapter's configuration has known settings only, and no path in them."""
    _json(run / CONFIG)  # copied to the byte, so that what a reader passes over would go along
    known = LoraConfig().to_dict()
    for name, value in settings.items():
        if name not in known or (name == "auto_mapping" and value is not None):
            raise CheckpointError(f"{run / CONFIG} sets {name[:60]}, which no run writes: restore it")
        if name != "base_model_name_or_path":
            _require_no_path(run / CONFIG, name, value)


def _check_weights(path: Path) -> None:
    """Checks that a file of weights holds tensors of an adapter, and nothing that only looks like it."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
        with open(path, "rb") as content:
            header = content.read(int.from_bytes(content.read(8), "little"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {str(error)[:200]}") from None
    tensors = _read(path, lambda: json.loads(header, object_pairs_hook=_once))
    tensors.pop("__metadata__", None)
    if any(x.keys() != _OF_A_TENSOR for x in tensors.values()):
        raise CheckpointError(f"{path} says more of a tensor than its type, shape and place: save it again")
    if set(metadata.items()) - {("format", "pt")}:
        raise CheckpointError(f"{path} carries notes ({', '.join(sorted(metadata))[:100]}): save it without")
    odd = [x for x in names if not _TENSOR.fullmatch(x)]
    if odd:
        raise CheckpointError(f"{path} holds {odd[0][:100]!r}, which is no tensor of an adapter: restore it")


def _copy(path: Path, copy: Path) -> None:
    """Copies a file of the tokenizer, without what it says of this machine."""
    if path.name == "tokenizer.json":
        _copy_tokenizer(path, copy)
    elif path.name in _SETTINGS:
        content = _json(path)
        if path.name == "tokenizer_config.json":
            if content.get("auto_map") is not None:
                raise CheckpointError(f"{path} names code of its own (auto_map): remove it")
            content = {name: x for name, x in content.items() if name not in _OF_THIS_MACHINE}
        if path.name != "vocab.json":  # whose tokens may look like anything
            for name, value in content.items():
                _require_no_path(path, name, value)
        _write_json(copy, content)
    elif path.name in _TOKENIZER_TEXT:
        content = _read(path, lambda: path.read_bytes().decode("utf-8"))
        copy.write_bytes(content.encode())
    else:
        if path.read_bytes()[:1] != b"\x0a":  # the first field of its protocol buffer
            raise CheckpointError(f"{path} is no SentencePiece model: restore it")
        shutil.copyfile(path, copy)


def _copy_tokenizer(path: Path, copy: Path) -> None:
    """How texts were cut and padded while training stays here."""
    tokenizer = _read(path, lambda: Tokenizer.from_file(str(path)))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.save(str(copy))


def _copy_record(run: Path, folder: Path, renamed: bool) -> list[str]:
    chain = read_chain(run / RECORD, VerificationKey.read(run / PUBLIC_KEY))
    _require_recorded(chain, run)
    for name in (RECORD, PUBLIC_KEY):
        shutil.copyfile(run / name, folder / name)
    notes = [
        f"{RECORD} tells how many records the data has, when you trained and who the operators were: "
        "--no-record leaves it out"
    ]
    if renamed:
        notes.append(
            f"{CONFIG} differs from the recorded one in the base model's name, and verify-record --output "
            "will say so: the weights are as recorded"
        )
    return notes


def _require_recorded(chain: Chain, run: Path) -> None:
    if not chain.complete:
        raise RecordError(f"{run / RECORD} is open: finish the run, or leave it out with --no-record")
    if digests_of(run) != dict(chain.entries[-1].body["adapter"]):
        raise RecordError(f"the adapter in {run} is not the one that {run / RECORD} names: it was changed")


def _labels(run: Path) -> list[str]:
    labels = _json(run / "run.json").get("labels")
    if not isinstance(labels, list) or not all(isinstance(x, str) for x in labels) or not labels:
        raise ConfigurationError(f"{run} is of no classifier, and has no class names: leave out --labels")
    return labels


def _card(base_model: str, settings: Mapping[str, Any], labels: Sequence[str]) -> str:
    classifies = settings.get("task_type") == "SEQ_CLS"
    lines = [
        "---",
        f"base_model: {base_model}",
        "library_name: peft",
        f"pipeline_tag: {'text-classification' if classifies else 'text-generation'}",
        "tags:",
        f"- base_model:adapter:{base_model}",
        "- lora",
        "---",
        "",
        f"# LoRA adapter for {base_model}",
        "",
        f"Trained with Blindtune. It loads with stock PEFT on {base_model}.",
    ]
    if labels:
        lines += ["", "Classes, in the order of the outputs:", ""]
        lines += [f"{i}. {json.dumps(x, ensure_ascii=False)}" for i, x in enumerate(labels)]
    return "\n".join(lines) + "\n"


def _require_no_path(path: Path, name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _require_no_path(path, f"the names in {name}", key)
            _require_no_path(path, f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _require_no_path(path, name, inner)
    elif isinstance(value, str) and (_PATH.fullmatch(value) or _HOME in f"{value}/"):
        raise CheckpointError(
            f"{path} names a path of this machine in {name[:100]}: remove it there, then package again"
        )


def _json(path: Path) -> dict[str, Any]:
    content = _read(path, lambda: json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once))
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds no object; restore it")
    return content


def _read(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # tokenizers raises Exception itself
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}): restore it") from None


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON in which every name stands once: of two values, readers take the last one."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name stands twice")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_bytes(_read(path, text.encode))  # half of a surrogate pair has no encoding
