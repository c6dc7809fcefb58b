"""The rules that keep the code's structure: who imports whom, and generated code that is current."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What each package may import of the others.
MAY_IMPORT = {
    "protocol": {"protocol", "errors"},
    "proto": {"proto"},
    "common": {"common", "errors"},
    "checkpoint": {"checkpoint", "protocol", "errors"},
    "client": {"client", "checkpoint", "protocol", "proto", "common", "errors"},
    "server": {"server", "checkpoint", "protocol", "proto", "common", "errors"},
}
# Rooms from the ground up. A room imports only what stands above it in this list.
ROOMS = """
    errors
    protocol.kernels protocol protocol.certificate protocol.multiplication protocol.shares protocol.lattice
    proto checkpoint common
    server.admission server
    client.process client.tls client.kit client.config client.operators client.rounds client.model client
    client.recipe client.data.reading client.data.templates client.data
    client.trust client.record client.training client.plan client.preflight client.runs
    client.merge client.demo client.audit client.cli
""".split()
MOST_LINES = 450
NO_NETWORK_NO_FILES = {"grpc", "transformers", "peft", "huggingface_hub", "socket", "pathlib", "requests"}


def modules() -> dict[str, Path]:
    """Files of the package by their names without ``blindtune.``; folders by theirs."""
    found = {"errors": ROOT / "blindtune" / "errors.py"}
    for package in MAY_IMPORT:
        folder = (ROOT / "blindtune" / package).resolve()
        for path in folder.rglob("*.py"):
            inside = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *inside)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    """Where a module stands: its folder, unless it is one itself."""
    is_room = MODULES[module].name == "__init__.py" or module == "errors"
    return module if is_room else module.rpartition(".")[0]


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports, ``module.name`` where it takes a name out of a module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, without ``blindtune.``"""
    ours = {name.removeprefix("blindtune.") for name in imports(path) if name.startswith("blindtune.")}
    return {name if name in MODULES else name.rpartition(".")[0] for name in ours} & MODULES.keys()


def test_packages_import_what_they_may_alone() -> None:
    found = {}
    for name, path in MODULES.items():
        package = name.partition(".")[0]
        if package != "errors" and not name.startswith("client.demo."):  # the demo starts both sides
            found[name] = {x.partition(".")[0] for x in imported(path)} - MAY_IMPORT[package]
    assert not {name: wrong for name, wrong in found.items() if wrong}


def test_no_room_imports_one_that_stands_higher() -> None:
    assert {room(name) for name in MODULES} == set(ROOMS), "a room is missing from the list, or gone"
    assert not {
        (name, other)
        for name, path in MODULES.items()
        for other in imported(path)
        if ROOMS.index(room(other)) > ROOMS.index(room(name))
    }


def test_every_room_says_what_it_is() -> None:
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), name


def test_files_are_short() -> None:
    written = {name: path for name, path in MODULES.items() if not name.startswith("proto.worker_pb2")}
    lines = {name: len(path.read_text().splitlines()) for name, path in written.items()}
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}


def test_a_package_is_not_imported_under_another_name() -> None:
    """Loaded twice, every stock of masks would be there twice."""
    for package in ("checkpoint", "client", "proto", "protocol", "server"):
        command = [sys.executable, "-c", f"import {package}"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert ended.returncode and f"import this as blindtune.{package}" in ended.stderr


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
