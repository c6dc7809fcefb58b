"""Does every architecture of transformers that a tiny checkpoint can be made of run on remote layers?

    python -m benchmarks.compatibility.families [--only llama t5 ...] [--processes 2] [--json FILE]

For each model class of the installed transformers a configuration is shrunk, a random checkpoint saved, and
loaded twice: plain, with the weights that workers would hold, and with remote layers (masking "reference",
which "shares" equals bit for bit). Outputs and gradients of both must agree. The table says for each
architecture what share of the weights is remote, the requests of a forward pass, and the requests that it
would take if every tensor that linear layers read were sent once.
"""

import argparse
import json
import logging as standard_logging
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from benchmarks.common.measuring import print_table, write_json
from blindtune import BlindConfig, multiplier_of
from blindtune.checkpoint import Checkpoint
from blindtune.checkpoint.trace import example_inputs
from blindtune.client.model.remote_linear import RemoteLinear
from blindtune.errors import BlindtuneError

__all__ = ["Result", "shrunk", "try_model"]

_MAPPINGS = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)
_SEED = 3
_LARGEST = 20_000_000
# Settings by their names' ends, and what they become.
_SIZES: dict[str, int] = {
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embed_dim": 32,
    "projection_dim": 32,
    "word_embed_proj_dim": 32,
    "embedding_size": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "depth": 2,
    "num_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "n_inner": 48,
    "d_kv": 8,
    "head_dim": 8,
    "dim": 32,
    "hidden_dim": 48,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_source_positions": 32,
    "max_target_positions": 32,
    "image_size": 32,
    "patch_size": 8,
    "num_mel_bins": 16,
    "vocab_size_per_layer_input": 99,
    "hidden_size_per_layer_input": 16,
    "attention_hidden_size": 32,
    "num_kv_shared_layers": 0,
}


@dataclass(frozen=True)
class Result:
    """How a model fared.

    Attributes:
        outcome: ``right``, ``refused``, ``wrong``, ``failed`` (an error that is not ours), or ``not made``.
        note: the error, in short.
        remote: share of the weights of layers that multiply, by numbers.
        requests: products of a forward pass; possible: tensors that remote layers read.
        error: largest relative error of outputs and of gradients.
    """

    model: str
    family: str
    outcome: str
    note: str = ""
    remote: float = 0.0
    requests: int = 0
    possible: int = 0
    error: float = 0.0
    seconds: float = 0.0


def shrunk(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration with small sizes, its parts too; what else depends on sizes follows."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            shrunk(value)
        elif isinstance(value, int) and not isinstance(value, bool) and name in _SIZES:
            setattr(config, name, min(value, _SIZES[name]))
        elif name in ("layer_types", "layers_block_type", "mlp_layer_types") and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            setattr(config, name, (kinds * 2)[:2])
        elif name.endswith("token_id") and isinstance(value, int):
            setattr(config, name, value if value < 90 else 90)
        elif name.endswith("token_id") and isinstance(value, list):
            setattr(config, name, value[0] if value[0] < 90 else 90)
    return config


def candidates() -> Iterator[tuple[str, str]]:
    """Families and the first class of each that has a head, then a plain one."""
    seen = set()
    there = set(dir(transformers))  # asking for an attribute would import its module
    for mapping in _MAPPINGS:
        for family, names in getattr(modeling_auto, mapping, {}).items():
            for name in (names,) if isinstance(names, str) else names[:1]:
                if family not in seen and name in there:
                    seen.add(family)
                    yield family, name


def try_model(family: str, name: str, folder: Path) -> Result:
    """Makes a checkpoint of a class, and compares its forward and backward pass with the plain model's."""
    started = time.perf_counter()
    cls = getattr(transformers, name)
    try:
        make(cls, folder)
        stock = cls.from_pretrained(folder, dtype=torch.float32).eval()
        working = working_inputs(stock)
    except Exception as error:
        return Result(name, family, "not made", _short(error))
    try:
        config = BlindConfig(masking="reference", precision="full", progress=False)
        model = cls.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()
    except BlindtuneError as error:
        return Result(name, family, "refused", _short(error), seconds=time.perf_counter() - started)
    except Exception as error:
        return Result(name, family, "failed", f"loading: {_short(error)}")
    try:
        result = _compared(family, name, folder, model, stock, working)
    except BlindtuneError as error:
        return Result(name, family, "refused", f"running: {_short(error)}")
    except Exception as error:
        return Result(name, family, "failed", f"running: {_short(error)}")
    return Result(**asdict(result) | {"seconds": time.perf_counter() - started})


def make(cls: type[PreTrainedModel], folder: Path) -> None:
    """Saves a random checkpoint with biases that are not zero."""
    torch.manual_seed(_SEED)
    config = shrunk(cls.config_class())
    config.use_cache = False  # some caches are written in place, which no gradient survives
    with torch.device("meta"):
        size = sum(x.numel() for x in cls(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"it cannot be shrunk by its settings' names: {size:,} parameters are left")
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter += 0.05 * torch.randn(parameter.shape, dtype=parameter.dtype)
    model.save_pretrained(folder)


def working_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The first inputs that the plain model takes."""
    error: Exception = ValueError("no inputs are known for it")
    for inputs in example_inputs(model):
        try:
            with torch.no_grad():
                model(**inputs)
            return inputs
        except Exception as failed:
            error = failed
    raise error


def _compared(
    family: str,
    name: str,
    folder: Path,
    model: PreTrainedModel,
    stock: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
) -> Result:
    remote = {n: m for n, m in model.named_modules() if isinstance(m, RemoteLinear)}
    reads: dict[tuple[int, int], torch.Tensor] = {}
    _take_over(folder, model, stock, remote)
    for layer in remote:
        stock.get_submodule(layer).register_forward_pre_hook(
            lambda _, args: reads.setdefault((id(args[0]), args[0]._version), args[0])
        )
    multiplier = multiplier_of(model)
    ask, asked = multiplier._ask, []

    def counted(masked: Any, product: Any, decode: Any) -> Any:
        asked.append(product)
        return ask(masked, product, decode)

    multiplier._ask = counted
    outputs = []
    for each in (stock, model):
        torch.manual_seed(_SEED)
        outputs.append(_floats(each(**inputs)))
    requests = len(asked)
    expected, found = (_gradients(*pair) for pair in zip((stock, model), outputs, strict=True))
    if missing := (set(expected) ^ set(found)) - {f"{layer}.weight" for layer in remote}:
        raise RuntimeError(f"gradients of {sorted(missing)[:3]} on one side alone")
    shared = [name for name in expected if name in found]
    error = max(_error(outputs[1], outputs[0]), _error(*([g[n] for n in shared] for g in (found, expected))))
    share = sum(m.weight.numel() for m in remote.values()) / _multiplying(stock)
    outcome = "right" if error < 1e-3 else "wrong"
    return Result(name, family, outcome, "", share, requests, len(reads), error)


def _take_over(
    folder: Path, model: PreTrainedModel, stock: PreTrainedModel, remote: Mapping[str, RemoteLinear]
) -> None:
    """Puts the integers that workers hold into the plain model."""
    checkpoint = Checkpoint.open(folder)
    layers = {x.name: x for x in checkpoint.layers}
    with checkpoint.reader() as reader, torch.no_grad():
        for name, module in remote.items():
            for key in module._group._singles[module._member].names:
                layer = reader.read(layers[key])
                weight = layer.integers.float() * torch.from_numpy(layer.scales)[:, None]
                target = stock.get_submodule(name).weight
                if target.data_ptr() in _embeddings(stock):
                    target = nn.Parameter(target.clone())  # a tied head: the embedding stays as it is
                    stock.get_submodule(name).weight = target
                target.copy_(weight.t() if layers[key].transposed else weight)


def _embeddings(model: nn.Module) -> set[int]:
    return {x.weight.data_ptr() for x in model.modules() if isinstance(x, nn.Embedding)}


def _multiplying(model: nn.Module) -> int:
    """Numbers of all weights with two dimensions and more that are no embedding."""
    embeddings = _embeddings(model)
    return max(
        1, sum(x.numel() for x in model.parameters() if x.dim() > 1 and x.data_ptr() not in embeddings)
    )


def _floats(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    parts = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else []
    )
    return [x for part in parts for x in _floats(part)]


def _gradients(model: nn.Module, outputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in outputs if x.requires_grad)
    if not isinstance(loss, torch.Tensor):
        return {}
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    scale = max((float(x.detach().norm()) for x in expected), default=1.0) or 1.0
    return max(
        (float((a - b).detach().norm()) / scale for a, b in zip(found, expected, strict=True)), default=0.0
    )


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _quiet() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity(standard_logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    standard_logging.getLogger("blindtune").setLevel(standard_logging.CRITICAL)


def _in_folder(family: str, name: str) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        return try_model(family, name, Path(folder))


def _each(chosen: list[tuple[str, str]], processes: int, seconds: float) -> Iterator[Result]:
    """Results as they come; a model that takes too long, or takes its process with it, is not made."""
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(chosen))
    running: dict[Any, tuple[str, str, float, Any]] = {}
    pools = [ProcessPoolExecutor(1, context, _quiet) for _ in range(processes)]
    free: list[ProcessPoolExecutor] = list(pools)
    while waiting or running:
        while waiting and free:
            family, name = waiting.pop()
            pool = free.pop()
            running[pool.submit(_in_folder, family, name)] = (family, name, time.monotonic() + seconds, pool)
        time.sleep(0.05)
        for future, (family, name, deadline, pool) in list(running.items()):
            late = time.monotonic() > deadline
            if not (future.done() or late):
                continue
            del running[future]
            error = None if late else future.exception()
            if late or error:
                yield Result(
                    name, family, "not made", f"takes more than {seconds:.0f} s" if late else _short(error)
                )
                for process in list(pool._processes.values()):
                    process.kill()
                pool.shutdown(wait=False)
                pool = ProcessPoolExecutor(1, context, _quiet)
            else:
                yield future.result()
            free.append(pool)
    for pool in free:
        pool.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="FAMILY")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=120, help="for one model")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chosen = [
        (f, n) for f, n in candidates() if not arguments.only or f in arguments.only or n in arguments.only
    ]
    results = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["BLINDTUNE_CACHE"] = cache
        for result in _each(chosen, arguments.processes, arguments.seconds):
            results.append(result)
            print(json.dumps(asdict(result)), flush=True)
    results.sort(key=lambda x: x.model.lower())
    print()
    print_table(
        ["model", "outcome", "weights remote", "requests", "possible", "error"],
        [
            [x.model, x.outcome, f"{x.remote:.0%}", x.requests, x.possible, f"{x.error:.0e}"]
            if x.outcome in ("right", "wrong")
            else [x.model, f"{x.outcome}: {x.note}" if x.note else x.outcome, "", "", "", ""]
            for x in results
            if x.outcome != "not made"
        ],
    )
    outcomes = ("right", "refused", "wrong", "failed", "not made")
    print({name: sum(x.outcome == name for x in results) for name in outcomes})
    if arguments.json:
        write_json(arguments.json, [asdict(x) for x in results], transformers=transformers.__version__)


if __name__ == "__main__":
    main()
