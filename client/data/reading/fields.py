"""The fields of a record: those that a format reads, those that change what it means, and all others.

A record may have columns of any kind beside those of its format, such as a number or where it came from.
They are left alone, and counted, so that it can be said. A field that is known to change what a record
means, or what of it is to be learned, is read by its format or refused.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from blindtune.client.data.reading.records import Record
from blindtune.errors import DataError

__all__ = ["LEARNING", "EmptyRecordError", "given", "is_absent", "require_understood", "unused_fields"]


class EmptyRecordError(DataError):
    """A record says nothing in a place where it must: it can be left out."""


# What each format reads.
_READ = {
    "messages": {"messages", "system", "tools"},
    "prompt-completion": {"prompt", "completion", "system", "tools"},
    "instruction": {"instruction", "context", "input", "response", "output", "system", "history"},
    "question": {"question", "context", "answer", "rationale", "system", "history"},
    "text-label": {"text", "text_pair", "label"},
}

LEARNING = frozenset({"loss", "train", "training", "weight"})
"""Whether something is learned, where that is a matter of yes and no."""

_VERDICTS = "a verdict on the answer: leave out what should not be learned, and remove the field"
_MORE_TEXT = "more that the model should read: write it into a field of the format, and remove this one"
_SHARES = "how much of it is to be learned: only all or nothing can be, by message and with format messages"
_SECOND = "a second text: call it text_pair, and the first one text"
_THOUGHTS = (
    "what is thought before the answer: write it into the answer, or call it rationale in format question"
)
_NO_TEXT = "no text, and only texts are trained on"

# Names from the formats of common data sets and trainers, and what each adds.
_MEANING = {
    **dict.fromkeys(("chosen", "label", "labels", "preference", "rejected", "reward"), _VERDICTS),
    **dict.fromkeys(("context", "contexts", "documents", "history", "input", "passage"), _MORE_TEXT),
    **dict.fromkeys(("instruction", "prefix", "suffix", "system", "system_prompt"), _MORE_TEXT),
    **dict.fromkeys(("function_call", "functions", "tool_calls", "tools"), _MORE_TEXT),
    **dict.fromkeys(("loss_mask", "loss_weight", "mask", "sample_weight", *LEARNING), _SHARES),
    **dict.fromkeys(("hypothesis", "premise", "sentence1", "sentence2", "sentence_b", "text2"), _SECOND),
    **dict.fromkeys(("text_b", "text_pair", "question2", "sentence_pair"), _SECOND),
    **dict.fromkeys(("chain_of_thought", "cot", "rationale", "reasoning", "reasoning_content"), _THOUGHTS),
    **dict.fromkeys(("think", "thinking", "thought"), _THOUGHTS),
    **dict.fromkeys(("audio", "audios", "image", "images", "video", "videos"), _NO_TEXT),
}


def is_absent(value: Any) -> bool:
    """Whether a field of this value says nothing: tables fill gaps with null, and lists with nothing."""
    return value is None or (isinstance(value, str | list | Mapping) and not value)


def given(record: Record, *names: str) -> list[str]:
    """Those of some names that a record has a value for, be it an empty one."""
    return [name for name in names if record.fields.get(name) is not None]


def require_understood(record: Record, layout: str) -> None:
    """Checks that no field changes what a record means without its format reading it.

    Raises:
        DataError: naming the field, which is one that formats use, and so none that is private.
    """
    for name in _others(record, layout):
        known = _plain(name)
        if known not in _MEANING or (known in LEARNING and record.fields[name] in (1, True)):
            continue
        raise DataError(
            f"{record.where}: format {layout} does not read the field {known!r}, which may be "
            f"{_MEANING[known]}; or rename it if it is neither"
        )


def unused_fields(record: Record, layout: str) -> list[str]:
    """Names of the fields that a format leaves alone."""
    return [name for name in _others(record, layout) if _plain(name) not in _MEANING]


def _others(record: Record, layout: str) -> Iterator[str]:
    for name, value in record.fields.items():
        if name not in _READ[layout] and not is_absent(value):
            yield name


def _plain(name: str) -> str:
    return name.strip().casefold().replace("-", "_").replace(" ", "_")
