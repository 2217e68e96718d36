"""Every example runs by the command in its docstring and prints what it promises."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))
COMMANDS = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}


def command(name: str) -> list[str]:
    """What the docstring of an example says to run."""
    said = ast.get_docstring(ast.parse((EXAMPLES / name).read_text("utf-8")))
    assert said is not None
    (line,) = re.findall(r"^Run: (.+)$", said, re.MULTILINE)
    program, *arguments = line.split()
    assert arguments[-1] == f"examples/{name}"
    return [*COMMANDS[program], *arguments]


def run(name: str, *needs: str) -> str:
    for module in needs:
        pytest.importorskip(module)
    ran = subprocess.run(command(name), cwd=EXAMPLES.parent, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def found(pattern: str, printed: str) -> list[float]:
    """The numbers of the one line that the pattern fits."""
    matches = re.findall(rf"^{pattern}$", printed, re.MULTILINE)
    assert len(matches) == 1, f"{pattern!r} in:\n{printed}"
    return [float(number) for number in ([matches[0]] if isinstance(matches[0], str) else matches[0])]


NUMBER = r"(-?\d+(?:\.\d+)?)"


def test_each_stands_in_the_table_once_and_nothing_else() -> None:
    links = re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text("utf-8"))
    assert sorted(links) == NAMES
    assert all(command(name) for name in NAMES)


@pytest.mark.slow
def test_plain_loop() -> None:
    printed = run("plain_loop.py", "sklearn")
    assert found(rf"epoch 8: test accuracy {NUMBER}%", printed)[0] > 95
    assert printed.endswith("resumed from the checkpoint: the same bits: True\n")


@pytest.mark.slow
def test_huggingface_trainer() -> None:
    printed = run("huggingface_trainer.py", "transformers", "accelerate")
    (before,) = found(rf"before: {NUMBER} bits per byte", printed)
    (signs,) = found(rf"SignSGD: {NUMBER} bits per byte", printed)
    (hybrid,) = found(rf"HybridSignSGD, in the end in its phase 'sgd': {NUMBER} bits per byte", printed)
    assert max(signs, hybrid) < 5 < 7 < before
    assert "\nresumed from the checkpoint: the same bits: True\n" in printed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning_module() -> None:
    printed = run("lightning_module.py", "pytorch_lightning", "sklearn")
    assert found(rf"steps {NUMBER}, looks of the monitor {NUMBER}", printed) == [360, 8]
    assert found(rf"test accuracy {NUMBER}%", printed)[0] > 93


@pytest.mark.slow
def test_accelerate_accumulation() -> None:
    printed = run("accelerate_accumulation.py", "accelerate", "sklearn")
    assert found(rf"batches {NUMBER}, steps {NUMBER}", printed) == [2160, 270]
    looked = found(rf"reliability .* last look: {NUMBER} \({NUMBER} to {NUMBER}\)", printed)
    assert looked[1] < looked[0] < looked[2] <= 1
    assert found(rf"test accuracy {NUMBER}%", printed)[0] > 93


@pytest.mark.slow
def test_torchrun_vote() -> None:
    printed = run("torchrun_vote.py", "sklearn")
    ranks, accuracy = found(rf"ranks {NUMBER}, test accuracy {NUMBER}%", printed)
    assert ranks == 2
    assert accuracy > 93
    assert printed.endswith("the same bits on all ranks: True\n")


@pytest.mark.slow
def test_elastic() -> None:
    printed = run("elastic.py", "sklearn")
    rounds, workers, accuracy = found(rf"rounds {NUMBER}, workers {NUMBER}, test accuracy {NUMBER}%", printed)
    assert (rounds, workers) == (100, 2)
    assert accuracy > 93
    assert printed.endswith("the same bits on all ranks: True\n")


@pytest.mark.slow
def test_fsdp2() -> None:
    printed = run("fsdp2.py", "sklearn")
    _, held, whole = found(rf"ranks {NUMBER}, rank 0 holds {NUMBER} of {NUMBER} elements of the momentum", printed)
    assert held == whole / 2
    assert found(rf"test accuracy {NUMBER}%", printed)[0] > 93
    assert printed.endswith("resumed from the checkpoint: the same bits: True\n")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak as Linux tells it")
def test_finetune_without_state() -> None:
    printed = run("finetune_without_state.py", "sklearn")
    _, turned = found(rf"pretrained: accuracy {NUMBER}% upright, {NUMBER}% turned", printed)
    adamw, all_of_it = found(rf"AdamW: accuracy {NUMBER}%, peak {NUMBER} MiB", printed)
    accuracy, peak = found(rf"SignSGD in backward: accuracy {NUMBER}%, peak {NUMBER} MiB", printed)
    assert turned < 30 < 50 < min(adamw, accuracy)
    weights = 4 * (2 * 2048**2 + 64 * 2048) / 2**20
    assert peak < 2 * weights  # less than weights and all gradients
    assert all_of_it > 4 * weights


@pytest.mark.slow
def test_grad_scaler() -> None:
    printed = run("grad_scaler.py", "sklearn")
    skipped, scale = found(rf"steps skipped {NUMBER}, scale at the end {NUMBER}", printed)
    assert skipped > 0
    assert scale == 2 ** (24 - skipped)
    assert found(rf"test accuracy {NUMBER}%", printed)[0] > 93
