"""One of the ways in which `step` takes training steps, as a process of its own.

    python -m benchmarks.steps.step_client SETTINGS.json

Settings: ``way``, ``model`` (checkpoint folder, or a kit), ``operators`` (arguments of `Operator`), ``rank``,
``seed``. It loads the model with a LoRA adapter on all linear layers and says so in a line of JSON. Then it
takes a step for each line of its input, and answers with a line of figures, until its input closes.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Before torch is imported: threads that spin while they wait would take the workers' cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.steps.stopwatch import Stopwatch, thread_seconds
from benchmarks.steps.unmasked import connect_unmasked
from blindtune import BlindConfig, Operator
from blindtune.client.model import layer_group, quantizer, remote_linear
from blindtune.client.model.quantizer import multiplier_of
from blindtune.client.rounds.multiplier import PrivateMultiplier
from blindtune.protocol.fixed_point import Float32
from blindtune.protocol.verification import CheckVectors

MASKING = {"unmasked": "lattice", "shares": "shares", "lattice": "lattice"}


class Client:
    """A model with an adapter, its optimizer, and what a step of it takes."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._watch = Stopwatch()
        self._clear_bytes = 0
        self._multiplier: PrivateMultiplier | None = None
        base = self._load(settings)
        torch.manual_seed(settings["seed"])
        adapter = LoraConfig(
            target_modules="all-linear",
            r=settings["rank"],
            lora_alpha=2 * settings["rank"],
            task_type="CAUSAL_LM",
        )
        self._vocabulary = base.config.vocab_size
        self._model = get_peft_model(base, adapter).train()
        self._trained = [x for x in self._model.parameters() if x.requires_grad]
        self.trained = sum(x.numel() for x in self._trained)
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-4)
        self._generator = torch.Generator().manual_seed(settings["seed"])

    def _load(self, settings: dict[str, Any]) -> Any:
        way, folder = settings["way"], settings["model"]
        if way == "local":
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        config = BlindConfig(
            [Operator(**x) for x in settings["operators"]],
            MASKING[way],  # type: ignore[arg-type]
            quantization=settings["quantization"],
            allow_one_machine=True,
            **({} if settings["parameter_set"] is None else {"parameter_set": settings["parameter_set"]}),
        )
        if way == "unmasked":
            quantizer.connect = connect_unmasked  # type: ignore[attr-defined]
        base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
        self._multiplier = multiplier_of(base)
        self._time_parts(self._multiplier)
        return base

    def _time_parts(self, multiplier: PrivateMultiplier) -> None:
        watch, operands = self._watch, set[type]()

        def time_unmasking(masked: Any) -> None:
            if type(masked) not in operands:
                operands.add(type(masked))
                for name in ("reveal_reals", "reveal_reals_with_sums"):
                    watch.watch(type(masked), name, "unmask and rescale")

        watch.watch(layer_group.LayerGroup, "forward", "stack and split")
        watch.watch(layer_group.LayerGroup, "backward", "stack and split")
        watch.watch(remote_linear._GroupProduct, "forward", "to and from float32", static=True)
        watch.watch(remote_linear._GroupProduct, "backward", "to and from float32", static=True)
        hide = "quantize and mask"
        watch.watch(multiplier.source, "hide_reals", hide, then=lambda hidden: time_unmasking(hidden[0]))
        for name in (x for x in dir(CheckVectors) if x.startswith("verify")):
            watch.watch(CheckVectors, name, "verify")
        multiply = layer_group.LayerGroup._multiply

        def counted(group: Any, x: Float32, *arguments: Any) -> Float32:
            y = multiply(group, x, *arguments)
            # In the clear, both would be bfloat16.
            self._clear_bytes += 2 * (x.size + y.size)
            return y

        layer_group.LayerGroup._multiply = counted  # type: ignore[assignment]
        watch.watch(layer_group.LayerGroup, "_multiply", "wait for workers")

    def step(self, sequences: int, length: int) -> dict[str, Any]:
        """Takes a step on random tokens; its figures."""
        tokens = torch.randint(self._vocabulary, (sequences, length), generator=self._generator)
        self._watch.clear()
        self._clear_bytes = 0
        before, threads, used = self._counters(), thread_seconds(), time.process_time()
        started = time.perf_counter()
        with self._watch.part("model forward"):
            output = self._model(input_ids=tokens, labels=tokens, use_cache=False)
        with self._watch.part("model backward"):
            output.loss.backward()
        with self._watch.part("optimizer"):
            torch.nn.utils.clip_grad_norm_(self._trained, 1.0)  # as trainers do
            self._optimizer.step()
            self._optimizer.zero_grad()
        return {
            "seconds": time.perf_counter() - started,
            "core_seconds": time.process_time() - used,
            "loss": float(output.loss),
            "parts": dict(self._watch.main),
            "beside": dict(self._watch.beside),
            "threads": dict(thread_seconds() - threads),
            "clear_bytes": self._clear_bytes,
            "not_timed": self._watch.absent,
        } | {name: after - before[name] for name, after in self._counters().items()}

    def _counters(self) -> dict[str, int]:
        operators = list(self._multiplier.statistics().values()) if self._multiplier else []
        return {
            "rounds": self._multiplier.rounds().count if self._multiplier else 0,
            "requests": sum(x.requests for x in operators),
            "bytes_up": sum(x.bytes_sent for x in operators),
            "bytes_down": sum(x.bytes_received for x in operators),
            "retries": sum(x.retries for x in operators),
        }


def main(settings: dict[str, Any]) -> None:
    """Answers until the input closes."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Whatever a library prints must not come between the lines of figures.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    client = Client(settings)
    print(json.dumps({"trained": client.trained}), file=answers)
    for line in sys.stdin:
        print(json.dumps(client.step(**json.loads(line))), file=answers)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
