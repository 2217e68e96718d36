"""What a `RunConfig` means: which network, which optimizer with which options, at which learning rate when."""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from signstep.lab.errors import BadInput
from signstep.lab.training import gpt, models, own
from signstep.lab.training.batches import AnyBatches
from signstep.lab.training.config import RunConfig
from signstep.lab.training.optimizers import known_optimizer
from signstep.lab.training.tasks import is_own
from signstep.lab.training.text_batches import TextBatches


def step_at(share: float, total_steps: int) -> int:
    """The step nearest to a share of the run: the schedule's milestones and the hybrid's switch fall together."""
    return round(share * total_steps)


def lr_factor(config: RunConfig, step: int, total_steps: int) -> float:
    """What the learning rate is multiplied by when `step` of the run's `total_steps` have been taken.

    Example:
        >>> lr_factor(RunConfig(schedule="step", milestones=(0.5,), gamma=0.1), 5, 10)
        0.1
    """
    progress = step / total_steps
    warmup = min(1.0, progress / config.warmup) if config.warmup > 0 else 1.0
    if config.schedule == "cosine":
        return warmup * 0.5 * (1.0 + math.cos(math.pi * progress))
    if config.schedule == "step":
        return warmup * config.gamma ** sum(step >= step_at(m, total_steps) for m in config.milestones)
    return warmup


def build_model(config: RunConfig, batches: AnyBatches, device: torch.device, batch_size: int) -> nn.Module:
    """The network that `config` names, with its initial weights, for the images or the text of its batches.

    Says so, once, where a bf16 network would be slow on this CPU.

    Args:
        config: the run.
        batches: of the images, whose size, channels and classes it is for, or of a text.
        device: where it goes; the weights are drawn on the CPU, the same for every device.
        batch_size: of one worker.

    Raises:
        BadInput: a bf16 network does not run on this CPU, or a model of the user's cannot be made or does not take
            the data.
    """
    network: dict[str, Any] = {"model": config.model, "width": config.width}
    batch: tuple[int, ...]
    build: Callable[..., nn.Module]
    if isinstance(batches, TextBatches):
        build, batch = gpt.build, (batch_size, batches.context)
        network |= {"context": batches.context}
    else:
        build, batch = models.build, (batch_size, *batches.shape)
        known = {"num_classes": batches.num_classes, "in_channels": batches.shape[0] if len(batch) == 4 else None}
        given = {name: value for name, value in known.items() if value is not None}
        if not is_own(config.model) and len(given) < len(known):
            raise BadInput(
                f"model={config.model!r} is for images [C, H, W] of a data set that has `classes`; "
                f"examples of {config.dataset} have shape {list(batches.shape)}: name a model of your own"
            )
        network |= {**given, "stem": config.stem}
    if config.precision == "bf16" and device.type == "cpu":
        say_slow_bf16()
        if not is_own(config.model):
            require_bf16_on_cpu(batch, json.dumps(network), channels_last=config.channels_last)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if is_own(config.model):
            model = own.build(config.model, given)
            own.tried(config.model, model, batches.training(0, 0)[0][:2].cpu())
        else:
            model = build(**network)
    layout = torch.channels_last if config.channels_last and len(batch) == 4 else torch.contiguous_format
    return model.to(device).to(memory_format=layout)  # type: ignore[call-overload,no-any-return]


def build_optimizer(config: RunConfig, model: nn.Module, total_steps: int) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over all parameters of `model`; weight decay applies to every one of them.

    A field left at None keeps the optimizer's default, but for SGD's momentum, whose default here is 0.9.
    The hybrid switches after `switch` of `total_steps`, and after one step at the earliest.

    Raises:
        BadInput: an option out of its range.
    """
    known = known_optimizer(config.optimizer)
    if is_own(config.optimizer):
        return own.optimizer(config.optimizer, model, config.lr)
    given = {name: value for name in known.options if (value := getattr(config, name)) is not None}
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, **known.defaults, **given}
    if known.seeded:
        options["seed"] = config.seed
    if "switch" in options:
        options["switch_step"] = max(1, step_at(options.pop("switch"), total_steps))
    elif "switch" in known.options:
        options["switch_step"] = "auto"
    module, _, name = known.place.rpartition(".")
    try:
        optimizer: torch.optim.Optimizer = getattr(importlib.import_module(module), name)(model.parameters(), **options)
    except ValueError as error:
        raise BadInput(f"{error}, for optimizer {config.optimizer}") from error
    return optimizer


def likely_cause(config: RunConfig, phase: str | None) -> str:
    """Why the loss of such a run is usually not finite, for one that switches by its phase ("sgd" or another)."""
    if phase == "sgd" and "sgd_lr" in known_optimizer(config.optimizer).options:
        rate = config.lr if config.sgd_lr is None else config.sgd_lr
        return f"likely cause: the rate {rate:g} is too high for SGD after the switch; lower sgd_lr"
    if phase == "sgd":
        other = ", or set calibration to ratio" if "calibration" in known_optimizer(config.optimizer).options else ""
        return f"likely cause: the calibrated rate is too high for SGD; lower lr{other}"
    if known_optimizer(config.optimizer).signs:
        return f"likely cause: lr={config.lr:g}, by which every weight moves in each step, is too high; try a tenth"
    return f"likely cause: lr={config.lr:g} is too high for {config.optimizer}; try a tenth, or a longer warmup"


_BF16_ARITHMETIC = {"avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16", "svebf16"}
"""Names of x86's and ARM's instructions on bfloat16, as torch and Linux spell them."""
_CPUINFO = Path("/proc/cpuinfo")


def has_bf16_arithmetic() -> bool:
    """Whether this CPU has instructions that multiply bfloat16; True where nobody can say."""
    if hasattr(torch.cpu, "get_capabilities"):
        found = {name for name, there in torch.cpu.get_capabilities().items() if there}
    elif _CPUINFO.exists():  # torch before 2.10, on Linux
        found = set(_CPUINFO.read_text().split())
    else:
        return True
    return not found.isdisjoint(_BF16_ARITHMETIC)


@functools.cache
def say_slow_bf16() -> None:
    """Say on stderr, once for all workers, that bf16 is slow on this CPU, if it has no arithmetic for it."""
    if not has_bf16_arithmetic() and os.environ.get("RANK", "0") == "0":
        print(
            "bf16 will be many times slower than fp32: this CPU has no bfloat16 arithmetic (AVX512-BF16, AMX, ARM's); "
            "train with --precision fp32, with a --scale other than full, or on a GPU",
            file=sys.stderr,
        )


_BF16_TRIAL = """
import json, sys, torch
from signstep.lab.training import gpt, models
(shape, layout), network = json.loads(sys.argv[1]), json.loads(sys.argv[2])
layout = torch.channels_last if layout else torch.contiguous_format
x = torch.ones(shape)
x = x.long() if network["model"] in gpt.SIZES else x.to(memory_format=layout)
network = (models.build if x.is_floating_point() else gpt.build)(**network).to(memory_format=layout)
with torch.autocast("cpu", torch.bfloat16):
    network(x).sum().backward()
"""


@functools.lru_cache
def require_bf16_on_cpu(shape: tuple[int, ...], network: str, *, channels_last: bool) -> None:
    """Try one bfloat16 step of a network in a process of its own.

    Args:
        shape: of the batch, [B, C, H, W] of images or [B, T] of a text.
        network: the arguments of `models.build` or `gpt.build`, as JSON.
        channels_last: memory layout of images and weights.

    Raises:
        BadInput: the trial died, as oneDNN's bfloat16 kernels do on some CPUs (illegal instruction).
    """
    command = [sys.executable, "-c", _BF16_TRIAL, json.dumps([shape, channels_last]), network]
    code = subprocess.run(command, capture_output=True, check=False).returncode
    if code:
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise BadInput(
            f"precision='bf16': this CPU cannot train this network in it (a trial step ended with {how}); use fp32, "
            "or set the environment variable ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"
        )


@functools.lru_cache
def require_compiler(device: str) -> None:
    """Try torch.compile on one addition.

    Args:
        device: type of the device, as "cpu".

    Raises:
        BadInput: it fails, most often for want of a C++ compiler or of Python's headers.
    """
    try:
        torch.compile(torch.neg, dynamic=False)(torch.ones(1, dtype=torch.float32, device=device))
    except Exception as error:  # what a missing tool raises differs from one version of torch to the next
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(
            f"compile=True: torch.compile does not work on this machine ({reason}); install a C++ compiler and "
            "Python's headers, or set compile to False"
        ) from error
