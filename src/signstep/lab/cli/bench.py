"""`signstep bench`: the benchmarks there are, a line for each. A benchmark's options are in its own file."""

from __future__ import annotations

from signstep.lab.cli.commands import Commands

BENCHMARKS = Commands(
    "signstep bench",
    "Measure what a step costs in computation (step) or communication (comm), a training over links (train), and what\n"
    "a Monitor costs (monitor).",
    {
        "step": (
            "signstep.lab.bench.step:BenchStep",
            "Time a step beside other optimizers and the speed of memory, in one process, and compare with the "
            "targets.",
        ),
        "comm": (
            "signstep.lab.bench.comm:BenchComm",
            "Time a step over the network with every way to reduce gradients, and count the bytes that are sent.",
        ),
        "train": (
            "signstep.lab.bench.train:BenchTrain",
            "Train ResNet-8 on CIFAR-10 over a slow network with ways to reduce gradients; needs root.",
        ),
        "monitor": (
            "signstep.lab.bench.monitor:BenchMonitor",
            "Time a training with a Monitor, beside Cockpit if it is installed, and compare with the targets.",
        ),
    },
    default="step",
)
