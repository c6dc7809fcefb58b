"""Merging a trained adapter into the original base checkpoint, offline, one tensor at a time."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from blindtune.checkpoint.decoded import open_tensors
from blindtune.checkpoint.decoders import STORAGE
from blindtune.checkpoint.files import TensorFiles, resolve
from blindtune.checkpoint.precision import require_full_precision
from blindtune.checkpoint.skeleton import build_skeleton, checkpoint_keys, supported_config
from blindtune.client.merge.adapter import Changes, read_changes, read_config
from blindtune.client.merge.files import copy_tokenizer, pad_with, padding_token, write_tensors
from blindtune.client.merge.layout import Output, check_complete, layout, untied_parameters
from blindtune.client.process.disk import folder_written_at_once
from blindtune.errors import CheckpointError, ConfigurationError, UnsupportedError

__all__ = ["Merged", "Progress", "merge"]

Progress = Callable[[Iterable[str]], Iterable[str]]
"""Wraps the names of the weight files to show progress as they are written."""

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Merged:
    """What was written.

    Attributes:
        layers: layers that the adapter's products were added to.
        replaced: tensors with a new value from the adapter, such as a trained classifier.
        shards: weight files.
        bytes: of all weight files.
    """

    layers: int
    replaced: int
    shards: int
    bytes: int


def merge(
    adapter: Path,
    checkpoint: str | Path,
    output: Path,
    revision: str | None = None,
    *,
    labels: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    progress: Progress = lambda x: x,
) -> Merged:
    """Writes a stock checkpoint of the tuned model, which needs neither PEFT nor the adapter.

    Deltas are computed and added in float32. Of the base, one tensor at a time is in memory. Each weight
    file of the base becomes one of the same name (a pickled one becomes safetensors), and nothing appears
    at the output before all of it is written. When an adapter makes the output head differ from the
    embedding it was tied to, both are written and the configuration says so. It also says with what the
    adapter's tokenizer pads, since classifiers go by that.

    Args:
        adapter: folder of a PEFT LoRA adapter; its tokenizer and chat template win over the base's.
        checkpoint: folder or hub name of the original base model. If it is quantized, the result is not.
        output: folder to write, new or empty.
        revision: of the base model on the hub.
        labels: the class names of a sequence classifier, in the order of its outputs; none for other models.
        dtype: stores floating-point tensors in this type; by default in the type that the base has, or had
            before it was quantized.
        progress: wraps the names of the weight files.

    Raises:
        ConfigurationError: there is no adapter, labels and adapter contradict each other, or the output
            folder is not empty.
        UnsupportedError: the adapter is more than plain LoRA, or the base is quantized in an unknown way.
        CheckpointError: a file is damaged, or adapter and base don't fit each other.
        ResourceError: the disk is full.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(f"{output} exists and is not empty: choose another output folder")
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigurationError(f"weights cannot be stored as {dtype}: choose a floating-point type")
    lora = read_config(adapter)
    pad = padding_token(adapter)
    classifies = _classifies(adapter, lora.task_type, labels)
    base = resolve(checkpoint, revision)
    config = supported_config(base)
    try:
        settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{base} has no usable config.json: {error}") from error
    if [x for x in STORAGE if settings.pop(x, None)] and dtype is None:
        dtype = config.dtype or torch.float32  # what they were before, and not what they are decoded to
    if labels:
        config.num_labels = len(labels)
    build = _classifier if classifies else build_skeleton
    with open_tensors(base) as tensors:
        require_full_precision(build_skeleton(config), tensors)
        model = build(config)
        stored = checkpoint_keys(model, tensors)
        changes = read_changes(adapter, lora, build(config).float())
        untied = untied_parameters(model, changes, stored)
        check_complete(tensors, model, changes, stored, untied)
        # The head of a language model has no place in a classifier. Tensors of unknown use stay.
        unused = set(checkpoint_keys(build_skeleton(config), tensors).values()) - set(stored.values())
        shards = layout(model, changes, tensors, stored, untied, unused)
        settings["architectures"] = [type(model).__name__]
        if labels:
            settings.pop("num_labels", None)  # it follows from the names
            settings["id2label"] = dict(enumerate(labels))
            settings["label2id"] = {label: i for i, label in enumerate(labels)}
        if untied:
            settings["tie_word_embeddings"] = False
        if dtype is not None:
            settings["torch_dtype" if "torch_dtype" in settings else "dtype"] = str(dtype).split(".")[1]
        with folder_written_at_once(output) as folder:
            copy_tokenizer(base, adapter, folder)
            if pad is not None:
                pad_with(pad, settings, folder)
            (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            source = _Source(tensors, changes, dtype, config.dtype or torch.float32)
            size = _write(folder, shards, source, progress)
    return Merged(
        layers=sum(name.endswith(".weight") for name in changes.deltas),
        replaced=len(changes.replaced),
        shards=len(shards),
        bytes=size,
    )


def _classifies(adapter: Path, task: str | None, labels: Sequence[str]) -> bool:
    """Whether the tuned model is a sequence classifier."""
    if labels and task not in (None, "SEQ_CLS"):
        raise ConfigurationError(
            f"labels are for sequence classifiers, and the adapter in {adapter} is for {task}: leave them out"
        )
    if len(set(labels)) != len(labels):
        raise ConfigurationError("every label names one class: some label was given twice")
    return bool(labels) or task == "SEQ_CLS"


def _classifier(config: PretrainedConfig) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise UnsupportedError(f"transformers has no sequence classifier for {config.model_type}") from error


@dataclass(frozen=True)
class _Source:
    """Makes the tensors of the merged checkpoint.

    Attributes:
        tensors: of the base.
        changes: what the adapter makes of them.
        dtype: that all floating-point tensors are stored in; None for the base's.
        own_dtype: of tensors that the base lacks.
    """

    tensors: TensorFiles
    changes: Changes
    dtype: torch.dtype | None
    own_dtype: torch.dtype

    def describe(self, output: Output) -> torch.Tensor:
        """A tensor's type and shape, on the meta device."""
        replaced = self.changes.replaced.get(output.parameter)
        stored = None if output.source is None else self.tensors.get(output.source)  # mapped, not read
        shaped = stored if replaced is None else replaced
        if shaped is None:
            raise KeyError(output.key)
        dtype = self.own_dtype if stored is None else stored.dtype
        return torch.empty(
            shaped.shape, dtype=self.dtype if self.dtype and dtype.is_floating_point else dtype, device="meta"
        )

    @torch.no_grad()
    def make(self, output: Output, dtype: torch.dtype) -> torch.Tensor:
        """A tensor in the type that it is stored in.

        Raises:
            CheckpointError: the base's tensor has another shape than the model, or the sum is not finite.
        """
        stored = None if output.source is None else self.tensors.get(output.source)
        if not output.parts:
            return self._changed(output.parameter, stored, output, dtype)
        if stored is None or len(stored) != sum(map(len, output.parts.values())):
            shape = None if stored is None else tuple(stored.shape)
            raise CheckpointError(
                f"tensor {output.source} of the base has shape {shape}, and not the rows of "
                f"{', '.join(output.parts)}: name the checkpoint that the adapter was trained on"
            )
        parts = [(name, stored[rows.start : rows.stop]) for name, rows in output.parts.items()]
        return torch.cat([self._changed(name, part, output, dtype) for name, part in parts])

    def _changed(
        self, parameter: str, stored: torch.Tensor | None, output: Output, dtype: torch.dtype
    ) -> torch.Tensor:
        """A parameter with what the adapter makes of it."""
        value = self.changes.replaced.get(parameter, stored)
        if value is None:
            raise KeyError(output.key)
        delta = self.changes.deltas.get(parameter)
        if delta is not None:
            total = delta()
            if total.shape != value.shape:
                raise CheckpointError(
                    f"tensor {output.source} of the base has shape {tuple(value.shape)}, but the adapter's "
                    f"product for it has {tuple(total.shape)}: name the checkpoint that it was trained on"
                )
            value = total.add_(value)
        value = value.to(dtype)
        if parameter in self.changes and not value.isfinite().all():
            raise CheckpointError(
                f"{output.key} is not finite with the adapter in {dtype}: training diverged or a file is "
                "damaged; take an earlier state of the adapter"
            )
        return value


def _write(folder: Path, shards: dict[str, list[Output]], source: _Source, progress: Progress) -> int:
    """Writes the weight files and, for more than one, their index; returns their size in bytes."""
    size = sum(_write_shard(folder / name, shards[name], source) for name in progress(list(shards)))
    if len(shards) > 1:
        weight_map = {x.key: name for name, outputs in shards.items() for x in outputs}
        total = sum(source.describe(x).nbytes for outputs in shards.values() for x in outputs)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return size


def _write_shard(path: Path, outputs: list[Output], source: _Source) -> int:
    by_key = {output.key: output for output in outputs}
    shapes = {key: source.describe(output) for key, output in by_key.items()}
    return write_tensors(path, shapes, lambda key: source.make(by_key[key], shapes[key].dtype))
