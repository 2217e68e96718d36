"""`signstep study`: the studies there are, a line for each. A study's options are in its own file."""

from __future__ import annotations

from signstep.lab.cli.commands import Commands

STUDIES = Commands(
    "signstep study",
    "Measure what a vote is worth, against Byzantine workers (byzantine, byzantine-local) and by dither\n"
    "(vote-curve), how far signs can be trusted in the paper's trainings (monitor), where dither helps (dither),\n"
    "what ways to train over slow links reach (frontier), and how far workers' momenta come apart (momenta).",
    {
        "byzantine": (
            "signstep.lab.studies.byzantine:ByzantineStudy",
            "Measure accuracy against the share of Byzantine workers, for majority vote and for the mean.",
        ),
        "byzantine-local": (
            "signstep.lab.studies.byzantine_local:LocalByzantineStudy",
            "Measure accuracy against the share of Byzantine workers, for a local vote and for the mean of the ways.",
        ),
        "dither": (
            "signstep.lab.studies.dither_map:DitherStudy",
            "Map accuracy over the noise's size and the learning rate, under what the paper leaves open.",
        ),
        "frontier": (
            "signstep.lab.studies.frontier:FrontierStudy",
            "Compare ways to train over slow links: final loss, bytes sent, and time over links of a rate and latency.",
        ),
        "momenta": (
            "signstep.lab.studies.momenta:MomentaStudy",
            "Measure how far workers' momenta come apart under a vote, and what averaging them brings.",
        ),
        "monitor": (
            "signstep.lab.studies.monitored:MonitorStudy",
            "Train the paper's methods at the cpu scale under the monitor, and draw what it saw.",
        ),
        "vote-curve": (
            "signstep.lab.studies.vote_curve:VoteCurveStudy",
            "Measure the expected vote against m / sigma through the kernels, beside the formula.",
        ),
    },
)
