"""One bit per coordinate over torch.distributed: majority vote and compressed gradients for DDP and FSDP2."""

from signstep.distributed.compressors import (
    QSGD,
    CompressedGradients,
    Compressor,
    EFSign,
    OneBitAdam,
    OneBitSGD,
    TernGrad,
    TopK,
)
from signstep.distributed.hooks import Bucket, CollectiveError, Entry, GradientHook
from signstep.distributed.vote import MajorityVote
from signstep.distributed.worker import resplit

__all__ = [
    "QSGD",
    "Bucket",
    "CollectiveError",
    "CompressedGradients",
    "Compressor",
    "EFSign",
    "Entry",
    "GradientHook",
    "MajorityVote",
    "OneBitAdam",
    "OneBitSGD",
    "TernGrad",
    "TopK",
    "resplit",
]
