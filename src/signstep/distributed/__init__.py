"""One bit per coordinate over torch.distributed: majority vote and compressed gradients for DDP and FSDP2."""

from typing import TYPE_CHECKING, Any

from signstep.distributed.collectives import CollectiveError
from signstep.distributed.compressors import (
    QSGD,
    CompressedGradients,
    CompressedMean,
    Compressor,
    DeMo,
    DitheredSign,
    EFSign,
    Exact,
    OneBitAdam,
    OneBitSGD,
    TernGrad,
    TopK,
)
from signstep.distributed.ddp import MajorityVote
from signstep.distributed.diloco import DiLoCo
from signstep.distributed.elastic import RoundCheckpoint
from signstep.distributed.hooks import Bucket, Entry, GradientHook
from signstep.distributed.local import LocalVote
from signstep.distributed.simulation import SimulatedLocalVote, SimulatedVote
from signstep.distributed.worker import resplit

if TYPE_CHECKING:
    from signstep.distributed.fsdp import FSDPMajorityVote

__all__ = [
    "QSGD",
    "Bucket",
    "CollectiveError",
    "CompressedGradients",
    "CompressedMean",
    "Compressor",
    "DeMo",
    "DiLoCo",
    "DitheredSign",
    "EFSign",
    "Entry",
    "Exact",
    "FSDPMajorityVote",
    "GradientHook",
    "LocalVote",
    "MajorityVote",
    "OneBitAdam",
    "OneBitSGD",
    "RoundCheckpoint",
    "SimulatedLocalVote",
    "SimulatedVote",
    "TernGrad",
    "TopK",
    "resplit",
]


def __getattr__(name: str) -> Any:
    # torch's FSDP takes a second to import.
    if name == "FSDPMajorityVote":
        from signstep.distributed.fsdp import FSDPMajorityVote

        return FSDPMajorityVote
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
