"""The disk, the libraries and the machine: what is unfit is found, and comes with what to do about it."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement

from blindtune.client.preflight.disk import check_disk
from blindtune.client.preflight.finding import Finding
from blindtune.client.preflight.libraries import check_libraries, check_requirements
from blindtune.client.preflight.machine import check_core_dumps, check_kernels, check_randomness, diagnose


def problems(findings: Iterable[Finding]) -> list[Finding]:
    return [x for x in findings if x.status == "problem"]


def free_bytes(folder: Path) -> int:
    figures = os.statvfs(folder)
    return figures.f_bavail * figures.f_frsize


def test_folders_that_do_not_exist_yet_are_checked_and_not_made(tmp_path: Path) -> None:
    found = list(check_disk({tmp_path / "a" / "b": ("the kit", 10), tmp_path / "c": ("hints", 20)}))
    assert {x.status for x in found} == {"ok"}
    assert [x.check for x in found] == [
        "folder for the kit",
        "folder for hints",
        "space for the kit and hints",
    ]
    assert not list(tmp_path.iterdir())


def test_a_need_larger_than_the_disk_says_how_much_to_free(tmp_path: Path) -> None:
    (finding,) = problems(check_disk({tmp_path / "kit": ("the kit", 1 << 60)}))
    assert finding.check == "space for the kit"
    assert "1,152,921,504.6 GB needed" in finding.detail
    assert "free 1,152," in finding.fix


def test_needs_on_one_disk_that_fit_only_one_by_one_do_not_fit(tmp_path: Path) -> None:
    half = free_bytes(tmp_path) * 6 // 10
    assert not problems(check_disk({tmp_path / "a": ("the kit", half)}))
    (finding,) = problems(check_disk({tmp_path / "a": ("the kit", half), tmp_path / "b": ("hints", half)}))
    assert finding.check == "space for the kit and hints"


def test_a_file_or_a_system_folder_in_the_way_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    for folder in (tmp_path / "taken" / "kit", Path("/proc/kit")):
        (finding,) = check_disk({folder: ("the kit", 1)})
        assert finding.status == "problem"
        assert str(folder) in finding.detail
        assert "choose another folder" in finding.fix


def test_this_machine_is_fit_and_every_check_has_its_own_name() -> None:
    found = list(diagnose())
    assert not problems(found)
    names = [x.check for x in found]
    assert len(set(names)) == len(names)
    assert {"Python", "torch", "transformers", "grpcio", "integer products", "random numbers"} <= set(names)
    by_name = {x.check: x for x in found}
    assert by_name["telemetry"].status == "ok"
    assert "offline" in by_name["hub"].detail


def test_the_cache_folder_of_the_environment_is_the_one_that_is_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BLINDTUNE_CACHE", str(tmp_path / "file" / "cache"))
    (finding,) = problems(diagnose())
    assert str(tmp_path / "file" / "cache") in finding.detail


def test_libraries_are_held_against_the_installed_packages_requirements() -> None:
    found = {x.check: x for x in check_libraries()}
    assert {x.status for x in found.values()} == {"ok"}
    assert torch.__version__ in found["torch"].detail
    assert "peft" in found, "the client extra belongs to it"
    assert "pytest" not in found, "the other extras don't"


@pytest.mark.parametrize(
    ("requirement", "status", "detail"),
    [
        ("numpy>=999", "problem", f"{np.__version__}, and >=999 is needed"),
        ("no-such-library>=1", "problem", "not installed"),
        ('no-such-library>=1; extra == "client"', "warning", "not installed"),
        ('numpy>=999; extra == "client"', "problem", ">=999 is needed"),
    ],
)
def test_a_library_that_is_missing_or_too_old_comes_with_the_command_for_it(
    requirement: str, status: str, detail: str
) -> None:
    parsed = Requirement(requirement)
    (finding,) = check_requirements([parsed])
    assert finding.status == status
    assert detail in finding.detail
    assert finding.fix == f"pip install '{parsed.name}{parsed.specifier}'"


def test_libraries_that_a_client_does_not_need_are_not_missed() -> None:
    others = ['no-such-library>=1; extra == "worker"', 'no-such-library>=1; python_version < "3"']
    assert not list(check_requirements(map(Requirement, others)))


def test_the_systems_random_numbers_work() -> None:
    assert check_randomness().status == "ok"


def test_core_dumps_are_a_warning_while_they_are_on() -> None:
    before = resource.getrlimit(resource.RLIMIT_CORE)
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, before[1]))
        assert check_core_dumps().status == "ok"
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (4096, before[1] if before[1] else 4096))
        except (ValueError, OSError):
            pytest.skip("core dumps can't be turned on here")
        assert check_core_dumps().status == "warning"
        assert "ulimit -c 0" in check_core_dumps().fix
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)


def test_kernels_that_cannot_be_kept_are_a_warning() -> None:
    assert check_kernels().status == "ok"
    program = (
        "from blindtune.client.preflight.machine import check_kernels\n"
        "print(check_kernels().status, check_kernels().fix)"
    )
    # Without the places that numba looks at by itself, and with none given.
    environment = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    environment.pop("NUMBA_CACHE_DIR", None)
    output = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert output.stdout.startswith("warning set NUMBA_CACHE_DIR")
