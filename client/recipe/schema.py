"""What a recipe can say, section by section.

Descriptions here become the configuration reference and the JSON schema for editors.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from blindtune.client.config.parameter_sets import NAMES, Precision, set_name
from blindtune.client.kit.head import Head
from blindtune.client.recipe.hf_arguments import TrainingSection
from blindtune.errors import ConfigurationError
from blindtune.protocol.certificate.history import REASKS
from blindtune.protocol.weights import INT8, SCHEMES

__all__ = [
    "AdapterSection",
    "DataFormat",
    "DataSection",
    "MaskingSection",
    "ModelSection",
    "OperatorSection",
    "OutputSection",
    "QuantizationSection",
    "Recipe",
    "RecordSection",
    "Task",
]

Task = Literal["instructions", "classification"]
DataFormat = Literal["auto", "messages", "prompt-completion", "instruction", "question", "text-label"]


def _absolute(value: Any) -> Any:
    """Paths are resolved once, against the current folder, so that a run can go on from another one."""
    if not isinstance(value, str | Path):
        return value
    if not str(value).strip() or any(x < " " for x in str(value)):
        raise ValueError("expected the path of a file or folder, in one line")
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError:
        raise ValueError("there is no such user's home folder") from None


def _absolute_folder(value: Any) -> Any:
    """The same for what may also be a name on the hub: a folder of that name goes first."""
    found = isinstance(value, str) and value.strip() and Path(value).is_dir()
    return str(Path(value).absolute()) if found else value


FilePath = Annotated[Path, BeforeValidator(_absolute)]


class Section(BaseModel):
    """Base of all sections: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ModelSection(Section):
    """The public base model."""

    name: Annotated[str, BeforeValidator(_absolute_folder), Field(min_length=1)] = Field(
        description="A checkpoint folder, a client kit, or a model on the Hugging Face hub."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a model on the hub.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type of what the client computes itself."
    )


class QuantizationSection(Section):
    """How the frozen weights become integers, at the workers and for the client's checks."""

    scheme: Literal[tuple(SCHEMES)] = Field(  # type: ignore[valid-type]
        INT8.name,
        description="int8: one byte for each weight, one scale for each output. nf4, nf4-double: the same of "
        "what QLoRA's four bits leave of the weights, without or with double quantization. Workers are "
        "started with the same --quantization.",
    )
    head: Head = Field(
        "auto",
        description="Where a language model's output head is computed: on the client (local), by the workers "
        "(remote), or on the client when it is the input embedding anyway (auto).",
    )


class MaskingSection(Section):
    """How operands are hidden from the workers, and how long to wait for them."""

    mode: Literal["shares", "lattice", "reference"] = Field(
        "shares",
        description="shares: two or more operators, of which one does not collude; exact. lattice: one "
        "operator, under the Module-LWE assumption. reference: the same integers in this process, without "
        "workers and without masks, for comparisons.",
    )
    parameter_set: Literal[NAMES] | None = Field(  # type: ignore[valid-type]
        None,
        description="Of shares and reference: q31 or q24. Of lattice: mlwe1280, mlwe1536, mlwe1280-q24 or "
        "mlwe1024-q24. With q31, mlwe1280 and mlwe1536, numbers take four bytes instead of three. Unless "
        "given, what precision says.",
    )
    precision: Precision = Field(
        "standard",
        description="standard: q24 or mlwe1280-q24, about as precise as bfloat16, with a check of each row "
        "that nothing wrapped around. full: q31 or mlwe1280, more precise, with a bound that is proven, and "
        "a third more traffic.",
    )
    insecure: bool = Field(False, description="Plaintext connections, to loopback addresses only.")
    allow_one_machine: bool = Field(
        False,
        description="Accept operators that share an address or certificates, or are all on this machine. "
        "Nothing is private then: for trials only.",
    )
    request_timeout: float = Field(300.0, gt=0, description="Seconds that one request may take.")
    retry_seconds: float = Field(
        60.0, ge=0, description="Seconds to keep trying when no worker of an operator answers."
    )
    micro_batches_in_flight: int = Field(
        2,
        ge=1,
        description="Micro-batches of a step that wait for workers side by side, so that network, workers "
        "and client work at once; training.gradient_accumulation_steps at most. What is trained is the same "
        "to the last bit whatever the number. Each keeps its activations in the client's memory, so 1 needs "
        "the least. Where the client computes on a GPU, it is 1.",
    )
    ask_ahead: bool = Field(
        False,
        description="In shares: ask for the product of the next operand's mask, which does not depend on the "
        "operand, while the workers compute the current one and no other micro-batch waits. Over a slow "
        "network steps get shorter; the client computes a little more, and masks whose operand never comes "
        "are traffic beyond what --dry-run says. What is trained is the same to the last bit.",
    )
    most_reasks: int = Field(
        REASKS,
        ge=0,
        description="In certified parameter sets: rows that may be asked for again in a step, since their "
        "results wrapped around the modulus in a way that cannot be taken back. Workers see how many are. "
        "More stop the run.",
    )

    @model_validator(mode="after")
    def _has_the_parameter_set(self) -> "MaskingSection":
        try:
            set_name(self.mode, self.parameter_set, self.precision)
        except ConfigurationError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def chosen_set(self) -> str:
        """The name of the parameter set that is used."""
        return set_name(self.mode, self.parameter_set, self.precision)


class OperatorSection(Section):
    """An organisation that runs workers."""

    name: str = Field(description="What messages call it.")
    workers: list[str] = Field(
        min_length=1,
        description="Addresses of its workers, host:port, an IPv6 address in brackets; they are replicas.",
    )
    ca: FilePath | None = Field(None, description="The operator's certificate authority (PEM).")
    cert: FilePath | None = Field(None, description="Your certificate for this operator (PEM).")
    key: FilePath | None = Field(None, repr=False, description="Its private key (PEM).")
    token: FilePath | None = Field(
        None,
        repr=False,
        description="File of the token that the operator gave you, instead of a certificate.",
    )


def _names(value: Any) -> Any:
    """Names of modules: an empty one would match all of them."""
    if isinstance(value, list) and not all(isinstance(x, str) and x.strip() for x in value):
        raise ValueError("expected names of modules, none of them empty")
    return value


def _names_or_expression(value: Any) -> Any:
    if isinstance(value, str):
        return _expression(value)
    return _names(value)


def _expression(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is no regular expression: {error}") from None
    if not value.strip():
        raise ValueError("expected a regular expression, or a list of names")
    return value


def _patterns(value: Any) -> Any:
    if isinstance(value, dict):
        for name in value:
            _expression(str(name))
    return value


Names = Annotated[list[str], BeforeValidator(_names)]
Ranks = Annotated[dict[str, Annotated[int, Field(ge=1)]], BeforeValidator(_patterns)]
NamesOrExpression = Annotated[str | list[str], BeforeValidator(_names_or_expression)]


class AdapterSection(Section):
    """The LoRA adapter, as in PEFT's LoraConfig."""

    r: int = Field(8, ge=1, description="Rank.")
    lora_alpha: float = Field(16, gt=0, description="Scale: updates are multiplied by lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter.")
    target_modules: NamesOrExpression = Field(
        "all-linear", description="Layers that get an adapter: all-linear, names, or a regular expression."
    )
    exclude_modules: NamesOrExpression | None = Field(None, description="Layers that get none.")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases are trained.")
    use_rslora: bool = Field(False, description="Multiply by lora_alpha / sqrt(r) instead.")
    modules_to_save: Names | None = Field(
        None,
        description="Modules on the client that are trained whole; those that the checkpoint lacks, such as "
        "a classifier's head, always are.",
    )
    layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, min_length=1, description="Numbers of the blocks that get an adapter, from 0."
    )
    rank_pattern: Ranks = Field(
        default_factory=dict, description="Ranks for some layers, by name or regular expression."
    )
    alpha_pattern: Ranks = Field(
        default_factory=dict, description="Alphas for some layers, by name or regular expression."
    )


class DataSection(Section):
    """The private data: JSONL files, or folders that ``datasets.Dataset.save_to_disk`` wrote."""

    task: Task = Field(
        description="instructions: a language model learns to answer. classification: a text gets a label."
    )
    train: FilePath = Field(description="What to train on.")
    validation: FilePath | None = Field(None, description="Measured before and after, never trained on.")
    format: DataFormat = Field(
        "auto", description="Layout of the records; auto recognises it by the first one."
    )
    labels: list[str] | None = Field(
        None,
        description="Class names in order; by default those in train, sorted, whole numbers by their value.",
    )
    system: str | None = Field(
        None, description="System message put before every conversation that has none."
    )
    max_length: int = Field(512, ge=2, description="Tokens of one example; what is longer is cut off.")
    train_examples: int | None = Field(None, ge=1, description="Train on a random sample of so many.")
    validation_examples: int | None = Field(None, ge=1, description="Measure on a random sample of so many.")
    group_by_length: bool = Field(
        True, description="Batches of similar lengths, so that little padding is computed and sent."
    )

    @model_validator(mode="after")
    def _validate_task(self) -> "DataSection":
        if self.labels is not None and self.task != "classification":
            raise ValueError("data.labels belongs to data.task: classification")
        if self.system is not None and self.task != "instructions":
            raise ValueError("data.system belongs to data.task: instructions")
        if self.format == "text-label" and self.task != "classification":
            raise ValueError("data.format: text-label belongs to data.task: classification")
        if self.task == "classification" and self.format not in ("auto", "text-label"):
            raise ValueError(f"data.task: classification takes format text-label, not {self.format}")
        if self.labels is not None and len(set(self.labels)) < max(2, len(self.labels)):
            raise ValueError("data.labels needs two or more names, all different")
        return self


class OutputSection(Section):
    """Where the results go."""

    dir: FilePath = Field(description="A folder of its own: the adapter, its checkpoints, summary.json.")


class RecordSection(Section):
    """A signed record of what was trained, for auditors; it holds nothing of the data."""

    enabled: bool = Field(True, description="Whether record.jsonl is written to the output folder.")
    key: FilePath | None = Field(
        None,
        description="Ed25519 private key (PEM), made at first use, with the salts of records beside it; by "
        "default record.key in your configuration folder.",
    )


class Recipe(Section):
    """One fine-tuning run."""

    model: ModelSection
    quantization: QuantizationSection = Field(default_factory=QuantizationSection)  # type: ignore[arg-type]
    masking: MaskingSection = Field(default_factory=MaskingSection)  # type: ignore[arg-type]
    operators: list[OperatorSection] = Field(default_factory=list)
    adapter: AdapterSection = Field(default_factory=AdapterSection)  # type: ignore[arg-type]
    data: DataSection
    training: TrainingSection = Field(default_factory=TrainingSection)
    output: OutputSection
    record: RecordSection = Field(default_factory=RecordSection)  # type: ignore[arg-type]
