"""Nothing that comes from outside becomes code: neither by what the sources call, nor by what runs."""

import ast
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recipes import Silent, recipe_of, with_tokenizer, write_lines

from blindtune.checkpoint import Checkpoint
from blindtune.client.kit.prepare import prepare
from blindtune.client.merge.checkpoint import merge
from blindtune.client.recipe import Recipe
from blindtune.client.record.digests import write_digests
from blindtune.client.runs.evaluation import tuned_model
from blindtune.client.runs.run import train_recipe
from blindtune.errors import BlindtuneError, CheckpointError
from blindtune.server.store import LayerStore

ROOT = Path(__file__).parents[2]
SOURCES = [
    path for name in ("client", "server", "protocol", "checkpoint") for path in (ROOT / name).rglob("*.py")
]
MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
YAML_LOADS = {"load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"}


def _findings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (x.name for x in node.names if x.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in MODULES:
                yield str(node.module)
            if (node.module or "").split(".")[0] in ("torch", "numpy", "yaml") and any(
                x.name == "load" for x in node.names
            ):
                yield f"{node.module}.load under a name of its own"
        elif isinstance(node, ast.Call):
            yield from _of_call(node)


def _of_call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    given = {x.arg: ast.unparse(x.value) for x in node.keywords}
    if name in BUILTINS:
        yield name
    if name in ("torch.load", "torch.serialization.load") and given.get("weights_only") != "True":
        yield f"{name} without weights_only=True"
    if name == "yaml.load" or (name.startswith("yaml.") and name.split(".")[-1] in YAML_LOADS):
        yield name
    if name.split(".")[-1] == "YAML" and "unsafe" in given.get("typ", ""):
        yield "YAML(typ='unsafe')"
    if given.get("allow_pickle", "False") != "False":
        yield f"{name} with allow_pickle"
    if given.get("trust_remote_code", "False") != "False":
        yield f"{name} with trust_remote_code"


@pytest.mark.parametrize("path", SOURCES, ids=lambda x: str(x.relative_to(ROOT)))
def test_no_source_makes_code_of_data(path: Path) -> None:
    assert not list(_findings(path.read_text()))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "import shelve as s",
        "import dill.source",
        "from joblib import load",
        "eval('1')",
        "exec(text)",
        "compile(text, '', 'exec')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "YAML(typ='unsafe').load(text)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=trust)",
    ],
)
def test_what_makes_code_of_data_would_be_found(source: str) -> None:
    assert list(_findings(source))


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str, int, bool]]:
        return os.makedirs, (str(self.mark), 0o777, True)


def _pickled(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content))


FORMS = pytest.mark.parametrize("write", [torch.save, _pickled], ids=["zipped", "bare"])
Write = Callable[..., None]


def plant(write: Write, path: Path, mark: Path) -> None:
    content = {"state": Evil(mark), "lm_head.weight": Evil(mark)}
    write(path, content) if write is _pickled else write(content, path)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """Is there when code of a file has run."""
    path = tmp_path / "code-has-run"
    yield path
    assert not path.exists()


@FORMS
def test_the_pickles_of_these_tests_do_run_code(write: Write, tmp_path: Path) -> None:
    """Or else the tests below would pass whatever the code does."""
    mark = tmp_path / "ran"
    plant(write, tmp_path / "evil.bin", mark)
    try:
        torch.load(tmp_path / "evil.bin", weights_only=False)
    except RuntimeError:  # torch looks at what it has unpickled, and misses its own header
        assert write is _pickled
    assert mark.exists()


@pytest.fixture(scope="module")
def model(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(checkpoints["llama"], tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A complete run with its checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    train = write_lines(
        folder / "train.jsonl", [{"prompt": "ab" * i, "completion": "c"} for i in range(1, 5)]
    )
    training = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    # A record would tell of every change before anything is read.
    recipe = recipe_of(folder, model, train, training=training, record={"enabled": False})
    train_recipe(recipe, Silent())
    return recipe


@pytest.fixture
def unfinished(trained: Recipe, tmp_path: Path) -> Recipe:
    """A copy of that run which can be resumed from its first step."""
    output = Path(shutil.copytree(trained.output.dir, tmp_path / "output"))
    (output / "summary.json").unlink()
    shutil.rmtree(output / "checkpoints" / "checkpoint-2")
    return trained.model_copy(update={"output": trained.output.model_copy(update={"dir": output})})


def test_a_run_resumes_from_a_checkpoint_that_nobody_touched(unfinished: Recipe) -> None:
    assert train_recipe(unfinished, Silent(), resume=True)["steps"] == 2


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "pytorch_model.bin"]
)
def test_resuming_runs_no_code_of_what_it_reads(unfinished: Recipe, mark: Path, name: str) -> None:
    checkpoint = unfinished.output.dir / "checkpoints" / "checkpoint-1"
    plant(torch.save, checkpoint / name, mark)
    write_digests(checkpoint)  # as a stranger would, so that it is read at all
    with pytest.raises(CheckpointError, match=r"checkpoint-1 is damaged \("):
        train_recipe(unfinished, Silent(), resume=True)


@FORMS
def test_resuming_looks_at_no_pickle_that_it_has_no_use_for(
    unfinished: Recipe, mark: Path, write: Write
) -> None:
    checkpoint = unfinished.output.dir / "checkpoints" / "checkpoint-1"
    for name in ("training_args.bin", "adapter_model.bin"):
        plant(write, checkpoint / name, mark)
    write_digests(checkpoint)
    assert train_recipe(unfinished, Silent(), resume=True)["steps"] == 2


def pickled_only(model: Path, folder: Path, write: Write, mark: Path) -> Path:
    """A model whose weights are a pickle that runs code."""
    copy = Path(shutil.copytree(model, folder / "evil-model"))
    (copy / "model.safetensors").unlink()
    plant(write, copy / "pytorch_model.bin", mark)
    return copy


@FORMS
def test_serving_and_preparing_run_no_code_of_a_model(
    model: Path, tmp_path: Path, mark: Path, write: Write
) -> None:
    evil = pickled_only(model, tmp_path, write, mark)
    for act in (
        lambda: LayerStore.load(Checkpoint.open(evil)),
        lambda: prepare(Checkpoint.open(evil), tmp_path / "kit"),
    ):
        with pytest.raises(CheckpointError, match="pytorch_model.bin"):
            act()


@FORMS
def test_training_and_evaluating_run_no_code_of_a_model(
    model: Path, trained: Recipe, tmp_path: Path, mark: Path, write: Write
) -> None:
    evil = pickled_only(model, tmp_path, write, mark)
    train = trained.data.train
    with pytest.raises(BlindtuneError):
        train_recipe(recipe_of(tmp_path, evil, train), Silent())
    output = Path(shutil.copytree(trained.output.dir, tmp_path / "tuned"))
    with pytest.raises(BlindtuneError), tuned_model(output, [f"model.name={evil}"]):
        raise AssertionError("loaded")


@FORMS
def test_merging_runs_no_code_of_a_base_or_of_an_adapter(
    model: Path, trained: Recipe, tmp_path: Path, mark: Path, write: Write
) -> None:
    with pytest.raises(CheckpointError):
        merge(trained.output.dir, pickled_only(model, tmp_path, write, mark), tmp_path / "merged")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copyfile(trained.output.dir / "adapter_config.json", adapter / "adapter_config.json")
    plant(write, adapter / "adapter_model.bin", mark)
    with pytest.raises(CheckpointError):
        merge(adapter, model, tmp_path / "merged")


@FORMS
def test_a_pickle_beside_safetensors_is_not_looked_at(
    model: Path, trained: Recipe, tmp_path: Path, mark: Path, write: Write
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"):
        plant(write, copy / name, mark)
    LayerStore.load(Checkpoint.open(copy))
    prepare(Checkpoint.open(copy), tmp_path / "kit")
    adapter = Path(shutil.copytree(trained.output.dir, tmp_path / "adapter"))
    plant(write, adapter / "adapter_model.bin", mark)
    plant(write, adapter / "training_args.bin", mark)
    merge(adapter, copy, tmp_path / "merged")
    with tuned_model(adapter):
        pass


def test_no_code_of_a_model_runs_even_when_its_configuration_names_it(
    model: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, trained: Recipe
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    (copy / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((copy / name).read_text())
        settings["auto_map"] = {
            "AutoConfig": "evil.Config",
            "AutoModelForCausalLM": "evil.Model",
            "AutoTokenizer": ["evil.Tokenizer", None],
        }
        (copy / name).write_text(json.dumps(settings))
    LayerStore.load(Checkpoint.open(copy))
    prepare(Checkpoint.open(copy), tmp_path / "kit")
    train_recipe(recipe_of(tmp_path, copy, trained.data.train, training={"max_steps": 1}), Silent())
