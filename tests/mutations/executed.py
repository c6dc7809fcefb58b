"""Which lines of the client a real training executes: what a mutation changes there can do harm.

    python -m mutations.executed FILE ...

A program of its own: threads that were started before it began to look would be missed. It starts workers,
trains a tiny model through them under each masking, and prints the lines of the files as JSON. Of a compiled
kernel all lines count when it was called by Python or by another kernel that was.
"""

import ast
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType, ModuleType
from typing import Any

from mutations.workplace import ROOT

__all__ = ["executed_by_training"]

_PATIENCE = 600
# Together more tokens than a lattice block has rows.
_RECORDS = [{"prompt": "ab" * 20, "completion": "c" * (1 + i % 4)} for i in range(72)]


def executed_by_training(files: Sequence[str]) -> dict[str, set[int]]:
    """Numbers of the lines of some files of the repository that training executes, by file.

    Raises:
        RuntimeError: the training failed.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mutations.executed", *files]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_PATIENCE
    )
    if done.returncode:
        raise RuntimeError(f"the training that shows what is executed failed:\n{done.stderr[-3000:]}")
    return {file: set(lines) for file, lines in json.loads(done.stdout.splitlines()[-1]).items()}


class _Lines:
    """Collects the lines of some files that Python executes, in threads that start later as well."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.found: dict[str, set[int]] = {str(file): set() for file in files}
        self._by_name: dict[str, set[int] | None] = {}

    def start(self) -> None:
        threading.settrace(self._called)
        sys.settrace(self._called)

    def stop(self) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if name not in self._by_name:
            self._by_name[name] = self.found.get(os.path.realpath(name))
        lines = self._by_name[name]
        if lines is None:
            return None

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            lines.add(frame.f_lineno)
            return line

        lines.add(frame.f_lineno)
        return line


def _kernels(module: ModuleType) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if hasattr(value, "py_func") and hasattr(value, "overloads"):
            yield name, value


def _lines_of_kernels(files: dict[str, set[int]]) -> None:
    """Adds the lines of kernels that were called."""
    modules = [x for x in list(sys.modules.values()) if getattr(x, "__name__", "").startswith("blindtune.")]
    kernels = {id(kernel.py_func): kernel for module in modules for _, kernel in _kernels(module)}
    open_ends = [x for x in kernels.values() if x.overloads]
    called = {id(x.py_func) for x in open_ends}
    while open_ends:
        function = open_ends.pop().py_func
        for name in function.__code__.co_names:
            other = function.__globals__.get(name)
            if hasattr(other, "py_func") and id(other.py_func) not in called:
                called.add(id(other.py_func))
                open_ends.append(other)
    for number in called:
        code = kernels[number].py_func.__code__ if number in kernels else None
        file = code and os.path.realpath(code.co_filename)
        if code is not None and file in files:
            first = code.co_firstlineno
            for node in ast.walk(ast.parse(Path(str(file)).read_text())):
                if isinstance(node, ast.FunctionDef) and first <= node.lineno and node.name == code.co_name:
                    files[str(file)].update(range(node.lineno, (node.end_lineno or node.lineno) + 1))


def _lines_outside_functions(files: dict[str, set[int]]) -> None:
    """Adds what is executed when a module is imported, for those of the client."""
    for module in list(sys.modules.values()):
        file = os.path.realpath(getattr(module, "__file__", None) or "")
        if file in files and not module.__name__.startswith("blindtune.server"):
            text = Path(file).read_text()
            inside = {
                line
                for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.FunctionDef)
                for line in range(node.lineno + 1, (node.end_lineno or node.lineno) + 1)
            }
            files[file].update(set(range(1, text.count("\n") + 2)) - inside)


def _train(folder: Path, lines: _Lines) -> None:
    """Trainings in each masking and precision, in blocks of rows, with workers that lie, hang or go away."""
    from support.checkpoints import save_checkpoint
    from support.operators import running_operators
    from support.recipes import Silent, operator_sections, recipe_of, with_tokenizer, write_lines

    from blindtune.client.runs.run import train_recipe
    from blindtune.errors import UntrustworthyOperatorError

    model = with_tokenizer(save_checkpoint("llama", folder / "made" / "llama"), folder)
    train = write_lines(folder / "train.jsonl", _RECORDS)
    training = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    small = training | {"gradient_accumulation_steps": 2}
    large = training | {"per_device_train_batch_size": len(_RECORDS)}
    with running_operators(folder / "operators", {"llama": model}, (2, 2)) as operators:
        sections = operator_sections(operators, "llama")
        lines.start()
        first, second = operators[0].workers
        lie = "one residue is off by one"
        silent = {first: ("hangs", 20), second: ("unavailable", 3)}
        for name, masking, asked, how, wrong in (
            ("shares", {"mode": "shares"}, sections, small, {first: (lie, 3)}),
            ("ahead", {"mode": "shares", "ask_ahead": True}, sections, large, {}),
            ("lattice", {"mode": "lattice"}, sections[:1], small, {}),
            ("full shares", {"mode": "shares", "precision": "full"}, sections, small, {}),
            ("full lattice", {"mode": "lattice", "precision": "full"}, sections[:1], small, {}),
            ("blocks", {"mode": "lattice"}, sections[:1], large, {}),
            ("silent", {"mode": "shares"}, sections, small, silent),
            ("failing", {"mode": "shares"}, sections, small, {first: (lie, 3), second: (lie, 3)}),
        ):
            for worker, (what, at) in wrong.items():
                worker.lie("llama", what, at=at)
            run = recipe_of(folder / name, model, train, masking=masking, operators=asked, training=how)
            try:
                train_recipe(run, Silent())
                assert name != "failing"
            except UntrustworthyOperatorError:
                assert name == "failing"
        lines.stop()


def main(files: Sequence[str]) -> None:
    with TemporaryDirectory() as folder:
        os.environ["BLINDTUNE_CACHE"] = f"{folder}/cache"
        os.environ["BLINDTUNE_CONFIG"] = f"{folder}/config"
        lines = _Lines([(ROOT / file).resolve() for file in files])
        _train(Path(folder), lines)
    _lines_of_kernels(lines.found)
    _lines_outside_functions(lines.found)
    print(json.dumps({file: sorted(lines.found[str((ROOT / file).resolve())]) for file in files}))


if __name__ == "__main__":
    main(sys.argv[1:])
