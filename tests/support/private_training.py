"""A stock training script as a program of its own, which notes every address that it contacts.

    python private_training.py SETTINGS.json

Settings: ``model``, ``operators`` (arguments of `Operator`), ``output`` (folder). It pauses in the middle
of training: it prints "paused" and goes on when a line arrives. In the end it prints a line of JSON.
"""

import json
import sys
import threading
from pathlib import Path

contacted: list[tuple[str, str, str]] = []
phase = ["loading"]


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        contacted.append((phase[0], event, str(arguments[1])))
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        contacted.append((phase[0], event, str(arguments[0])))


sys.addaudithook(_note)  # before anything else is imported

import psutil  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from blindtune import BlindConfig, Operator  # noqa: E402


class Connections(threading.Thread):
    """Looks at this process's connections again and again: gRPC's are made outside of Python."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: set[tuple[str, str]] = set()
        self._done = threading.Event()

    def run(self) -> None:
        process = psutil.Process()
        while not self._done.wait(0.01):
            for connection in process.net_connections("inet"):
                if connection.raddr:
                    self.seen.add((phase[0], f"{connection.raddr.ip}:{connection.raddr.port}"))

    def stop(self) -> None:
        self._done.set()
        self.join()


class Pause(TrainerCallback):  # type: ignore[misc]
    """Stops after the second step until it is told to go on."""

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.global_step == 2:  # type: ignore[attr-defined]
            print("paused", flush=True)
            sys.stdin.readline()


def main(settings: dict[str, object]) -> None:
    """Trains three steps and saves the adapter."""
    connections = Connections()
    connections.start()
    output = Path(str(settings["output"]))
    operators = [Operator(**x) for x in settings["operators"]]  # type: ignore[attr-defined]
    config = BlindConfig(operators=operators, allow_one_machine=True, progress=False, retry_seconds=5.0)
    model = AutoModelForCausalLM.from_pretrained(settings["model"], quantization_config=config)
    phase[0] = "training"
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.randint(3, 99, (6, 9), generator=torch.Generator().manual_seed(0))
    examples = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(output), per_device_train_batch_size=2, max_steps=3, logging_steps=1, save_steps=2, use_cpu=True
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, callbacks=[Pause()])
    trainer.train()
    trainer.save_model(str(output / "adapter"))
    model.generate(input_ids=ids[:1], max_new_tokens=2)
    connections.stop()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps({"contacted": contacted, "connections": sorted(connections.seen), "losses": losses}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
