"""What the user writes: `BlindConfig` and `Operator`."""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from blindtune.client.config.addresses import THIS_MACHINE, is_loopback, machines, split_address
from blindtune.client.config.parameter_sets import Precision, set_name
from blindtune.client.kit.head import Head, checked_head
from blindtune.client.tls.files import public_keys, read_files, read_token
from blindtune.errors import ConfigurationError
from blindtune.protocol.certificate.history import REASKS
from blindtune.protocol.weights import INT8, scheme_named

__all__ = ["METHOD", "BlindConfig", "Masking", "Operator", "refuse_configuration_of_checkpoint"]

METHOD = "blindtune"
Masking = Literal["shares", "lattice", "reference"]


@dataclass(frozen=True)
class Operator:
    """An organisation that runs workers.

    Args:
        name: what messages call it.
        workers: addresses, ``host:port``. They are replicas: each holds the whole model.
        ca: the operator's certificate authority, a PEM file. Only workers that it signed are trusted.
        cert, key: the client's certificate for this operator and its private key, PEM files.
        token: file of the token that the operator gave the client, instead of a certificate. It is sent over
            TLS alone.
    """

    name: str
    workers: Sequence[str]
    ca: str | os.PathLike[str] | None = None
    cert: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = field(default=None, repr=False)
    token: str | os.PathLike[str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable():
            raise ConfigurationError("an operator needs a name of printable characters, on one line")
        if isinstance(self.workers, str) or not self.workers:
            raise ConfigurationError(f"operator {self.name}: workers is a list of addresses, host:port")
        object.__setattr__(self, "workers", tuple(self.workers))
        for address in self.workers:
            split_address(address, self.name)


@register_quantization_config(METHOD)
class BlindConfig(QuantizationConfigMixin):
    """Passed as ``quantization_config``: the frozen linear layers are multiplied by untrusted workers.

    Args:
        operators: who multiplies. Their order decides who gets which share.
        masking: ``"shares"`` splits every operand among two or more operators, of which at least one
            must not collude with the others. ``"lattice"`` needs one operator and trusts none, under the
            Module-LWE assumption; it obtains a hint for each layer at first use. ``"reference"``
            computes the same integers in this process, without workers, and needs the whole
            checkpoint.
        parameter_set: of ``"shares"``, ``"q24"`` or ``"q31"``; of ``"lattice"``, ``"mlwe1280-q24"``,
            ``"mlwe1024-q24"``, ``"mlwe1280"`` or ``"mlwe1536"``. What ``precision`` says, if None.
        precision: ``"standard"``, three bytes a number, about as precise as bfloat16; or ``"full"``, four
            bytes, with a bound that is proven.
        quantization: of the frozen weights, at the workers as for the client: ``"int8"``, or the integers of
            QLoRA's four bits, ``"nf4"`` and ``"nf4-double"``. Workers must be started with the same.
        head: where the output head of a language model is computed. ``"auto"`` keeps it on the
            client when it is tied to the embedding.
        insecure: allow connections without TLS, to loopback addresses only.
        allow_one_machine: allow operators that share an address or certificates, or are all on this
            machine. They can then not be independent, so nothing is private: for demonstrations and tests
            only, with a warning each time that they are connected to.
        request_timeout: seconds that one request may take.
        retry_seconds: how long to keep trying when no worker of an operator answers.
        ask_ahead: in ``"shares"``, ask for the product of the next operand's mask while the workers compute
            the current one. Steps over slow networks get shorter. Masks whose operand never comes are in
            vain, and a process that ends before the last one has come waits for it.
        most_reasks: in a certified parameter set, how many rows may be asked for again in a step since their
            results wrapped around the modulus. Workers see how many are; more stop the run.
        rows_follow_content: allow what makes numbers of rows depend on a text's content and not on its length
            alone: assisted decoding, prompt lookup, custom and batched ways to generate, sparse prediction.
            Operators then see, for example, how many guessed tokens were right.
        progress: show progress while the kit of a checkpoint is made at first use.
    """

    def __init__(
        self,
        operators: Sequence[Operator | Mapping[str, Any]] = (),
        masking: Masking = "shares",
        parameter_set: str | None = None,
        quantization: str = INT8.name,
        head: Head = "auto",
        insecure: bool = False,
        allow_one_machine: bool = False,
        request_timeout: float = 300.0,
        retry_seconds: float = 60.0,
        ask_ahead: bool = False,
        most_reasks: int = REASKS,
        rows_follow_content: bool = False,
        progress: bool = True,
        precision: Precision = "standard",
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if unknown:
            raise ConfigurationError(f"BlindConfig has no option {', '.join(map(repr, unknown))}")
        self.quant_method = METHOD
        self.operators = tuple(x if isinstance(x, Operator) else Operator(**x) for x in operators)
        self.masking = masking
        self.parameter_set = parameter_set
        self.precision = precision
        self.quantization = quantization
        self.head = head
        self.insecure = insecure
        self.allow_one_machine = allow_one_machine
        self.request_timeout = request_timeout
        self.retry_seconds = retry_seconds
        self.ask_ahead = ask_ahead
        self.most_reasks = most_reasks
        self.rows_follow_content = rows_follow_content
        self.progress = progress
        self._validate()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ``config.json`` and logs. Key files are named, never read."""
        plain = dict(vars(self))
        plain["operators"] = [
            {k: list(v) if k == "workers" else v and os.fspath(v) for k, v in asdict(x).items()}
            for x in self.operators
        ]
        return plain

    @property
    def not_private(self) -> str | None:
        """A warning where nothing would be private; None where it is."""
        if self.masking != "shares" or not self.allow_one_machine:
            return None
        return (
            "nothing is private: allow_one_machine is on, and operators that are one and the same can read "
            "all that is sent"
        )

    @property
    def described(self) -> str:
        """Who gets requests, and where, on one line."""
        if not self.operators:
            return "operators: none, everything is computed in this process"
        return "operators: " + "; ".join(f"{x.name} at {', '.join(x.workers)}" for x in self.operators)

    def __repr__(self) -> str:
        return f"BlindConfig(masking={self.masking!r}, operators={[x.name for x in self.operators]})"

    def _validate(self) -> None:
        if self.masking not in get_args(Masking):
            raise ConfigurationError(
                f"masking is one of {', '.join(get_args(Masking))}, not {self.masking!r}"
            )
        self.parameter_set = set_name(self.masking, self.parameter_set, self.precision)
        scheme_named(self.quantization, "quantization")
        checked_head(self.head)
        if self.request_timeout <= 0 or self.retry_seconds < 0:
            raise ConfigurationError("request_timeout must be positive and retry_seconds not negative")
        if self.most_reasks < 0:
            raise ConfigurationError(f"most_reasks is a number of rows, 0 or more, not {self.most_reasks!r}")
        if self.masking == "reference":
            if self.operators:
                raise ConfigurationError(
                    "masking 'reference' has no mask and computes in this process: remove the operators"
                )
            return
        if self.masking == "lattice" and len(self.operators) != 1:
            raise ConfigurationError(
                f"masking 'lattice' takes one operator, not {len(self.operators)}: list all its workers "
                "there, or use masking 'shares' with several operators"
            )
        if self.masking == "shares" and len(self.operators) < 2:
            raise ConfigurationError(
                f"masking 'shares' needs two or more operators, not {len(self.operators)}: one "
                "operator that held every share could read the data"
            )
        names = [x.name for x in self.operators]
        if len(set(names)) < len(names):
            raise ConfigurationError(f"two operators have the same name: {', '.join(names)}")
        self._validate_connections()
        if not self.allow_one_machine:
            self._require_independence()
        for operator in self.operators:
            if operator.ca:
                read_files(operator.name, operator.ca, operator.cert, operator.key, operator.token)

    def _validate_connections(self) -> None:
        for operator in self.operators:
            files = {"ca": operator.ca, "cert": operator.cert, "key": operator.key, "token": operator.token}
            needed = {"ca", "cert", "key"}
            if operator.token is not None:
                needed = {"ca"} if operator.cert is None and operator.key is None else {"ca", "cert", "key"}
            missing = [name for name, path in files.items() if path is None and name in needed]
            if self.insecure:
                for address in operator.workers:
                    host, _ = split_address(address, operator.name)
                    if not is_loopback(host):
                        raise ConfigurationError(
                            f"operator {operator.name}: insecure=True allows loopback addresses only, "
                            f"and {address} is none"
                        )
            elif missing:
                raise ConfigurationError(
                    f"operator {operator.name}: {', '.join(missing)} missing; TLS needs ca, cert and key, "
                    "or ca and token (for a trial on this machine: blindtune certs)"
                )
            for name, path in files.items():
                if path is not None and not Path(path).is_file():
                    raise ConfigurationError(f"operator {operator.name}: {name} file {path} does not exist")

    def _require_independence(self) -> None:
        """Shares given to operators that are one and the same would protect nothing."""
        users: dict[tuple[str, object], set[str]] = defaultdict(set)
        for operator in self.operators:
            for name, path in (("CA", operator.ca), ("certificate", operator.cert)):
                for key in [] if path is None else public_keys(Path(path), operator.name):
                    users[name, key].add(operator.name)
            if operator.token is not None:
                users["token", read_token(Path(operator.token), operator.name)].add(operator.name)
            for address in operator.workers:
                for machine in machines(split_address(address, operator.name)[0]):
                    users["address", machine].add(operator.name)
        for (what, value), operators in users.items():
            if len(operators) > 1:
                shared = f"have the same {what}{f' {value}' if what == 'address' else ''}"
                if value == THIS_MACHINE:
                    shared = "are all on this machine"
                raise ConfigurationError(
                    f"operators {' and '.join(sorted(operators))} {shared}: operators that are not "
                    "independent can put the shares together and read the data. Use operators of different "
                    "organisations (for a trial, in which nothing is private: allow_one_machine in your own "
                    "configuration, or --set masking.allow_one_machine=true)"
                )


def refuse_configuration_of_checkpoint(found: bool) -> None:
    """Transformers would take the ``quantization_config`` in a checkpoint's config.json and drop the user's.

    Raises:
        ConfigurationError: there is one, and it would say who gets the data.
    """
    if found:
        raise ConfigurationError(
            "the model's config.json has a quantization_config of its own, which would decide who gets your "
            "data: remove it from there, and pass your BlindConfig to from_pretrained. If the weights are "
            "quantized, make a kit, and load that: blindtune prepare MODEL --output KIT"
        )
