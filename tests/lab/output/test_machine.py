"""What a result says of the machine and the source that made it."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from signstep.lab.output.machine import environment

CHECKOUT = Path(__file__).parents[3]


@pytest.mark.skipif(not (CHECKOUT / ".git").exists() or not shutil.which("git"), reason="no checkout")
def test_a_result_names_the_commit_of_its_checkout() -> None:
    assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", environment(torch.device("cpu"), 1)["git"])


def test_what_it_ran_on() -> None:
    found = environment(torch.device("cpu"), 3)
    assert (found["torch"], found["device"], found["world_size"]) == (torch.__version__, "cpu", 3)
    assert found["threads"] == torch.get_num_threads()
    assert all(found[name] for name in ("signstep", "python", "cpu"))
