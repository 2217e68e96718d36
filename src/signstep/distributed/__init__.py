"""One bit per coordinate over torch.distributed: majority vote and compressed gradients for DDP and FSDP2."""

from signstep.distributed.hooks import Bucket, CollectiveError, Entry, GradientHook
from signstep.distributed.vote import MajorityVote
from signstep.distributed.worker import resplit

__all__ = ["Bucket", "CollectiveError", "Entry", "GradientHook", "MajorityVote", "resplit"]
