"""The rules that keep the code's structure: who imports whom, and generated code that is current."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What each package may import of the others, and of the libraries that say what it is for.
MAY_IMPORT = {
    "protocol": {"protocol"},
    "proto": {"proto"},
    "checkpoint": {"checkpoint", "protocol"},
    "client": {"client", "checkpoint", "protocol", "proto"},
    "server": {"server", "checkpoint", "protocol", "proto"},
}
NO_NETWORK_NO_FILES = {"grpc", "transformers", "peft", "huggingface_hub", "socket", "pathlib", "requests"}


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_dependencies_point_one_way(package: str) -> None:
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        if path.is_relative_to(ROOT / "client" / "demo"):
            continue  # the demo starts both sides
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("blindtune.")}
        if wrong := ours - MAY_IMPORT[package] - {"common"}:
            found[str(path.relative_to(ROOT))] = wrong
    assert not found


def test_the_protocol_touches_no_network_no_files_and_no_models() -> None:
    for path in (ROOT / "protocol").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & NO_NETWORK_NO_FILES, path


def test_a_worker_never_loads_the_client() -> None:
    program = (
        "import sys, blindtune.server.cli, blindtune.server.daemon; "
        "print(*[m for m in sys.modules if m.startswith('blindtune.')])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "blindtune.server.service" in output.stdout
    assert "blindtune.client" not in output.stdout


def test_the_generated_code_is_that_of_the_proto_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Iblindtune/proto=proto"]
    outputs = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run([*command, *outputs, "blindtune/proto/worker.proto"], cwd=ROOT, check=True)
    for name in ("worker_pb2.py", "worker_pb2.pyi", "worker_pb2_grpc.py"):
        generated = (tmp_path / "blindtune" / "proto" / name).read_text()
        assert generated == (ROOT / "proto" / name).read_text(), f"{name} is stale: run make proto"
