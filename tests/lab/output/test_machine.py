"""What a result says of the machine and the source that made it."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from signstep.kernels import native
from signstep.lab.output.machine import caches, environment, machine_kind

CHECKOUT = Path(__file__).parents[3]


@pytest.mark.skipif(not (CHECKOUT / ".git").exists() or not shutil.which("git"), reason="no checkout")
def test_a_result_names_the_commit_of_its_checkout() -> None:
    assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", environment(torch.device("cpu"), 1)["git"])


def test_what_it_ran_on() -> None:
    found = environment(torch.device("cpu"), 3)
    assert (found["torch"], found["device"], found["world_size"]) == (torch.__version__, "cpu", 3)
    assert found["threads"] == torch.get_num_threads()
    assert all(found[name] for name in ("signstep", "python", "cpu"))


@pytest.mark.skipif(native.unavailable() is not None, reason="no native library")
def test_the_instruction_set_is_the_one_that_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIGNSTEP_ISA", raising=False)
    native.best_isa.cache_clear()
    found = environment(torch.device("cpu"), 1)
    assert found["isa"] == native.best_isa()
    monkeypatch.setenv("SIGNSTEP_ISA", "portable")
    native.best_isa.cache_clear()
    try:
        forced = environment(torch.device("cpu"), 1)
    finally:
        native.best_isa.cache_clear()
    assert forced["isa"] == "portable"
    assert forced["isa_best"] == native.machine_isa()
    assert machine_kind(forced).endswith("-portable")


def test_caches_are_those_that_linux_names(tmp_path: Path) -> None:
    assert caches(tmp_path) is None
    given = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2048K")]
    for i, each in enumerate(given):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, value in zip(("level", "type", "size"), each, strict=True):
            (folder / name).write_text(value + "\n")
    (tmp_path / "index3").mkdir()
    assert caches(tmp_path) == "L1d 48K, L1i 32K, L2 2048K"


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({"cpu": "Intel(R) Xeon(R) Processor", "cpu_capability": "AVX512", "device": "cpu"}, "intel-xeon-avx512"),
        ({"cpu": "AMD EPYC 7763 64-Core Processor", "isa": "avx2", "device": "cpu"}, "amd-epyc-7763-avx2"),
        ({"cpu": "Apple M2", "isa": None, "device": "cpu"}, "apple-m2-no-library"),
        ({"cpu": "Apple M2", "isa": None, "device": "NVIDIA H200"}, "nvidia-h200"),
    ],
)
def test_a_machines_kind_is_part_of_a_files_name(environment: dict[str, str | None], kind: str) -> None:
    assert machine_kind(environment) == kind
