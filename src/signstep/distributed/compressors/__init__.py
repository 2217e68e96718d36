"""Gradient compressors behind one DDP hook: what each is good for is in docs/compressors.md."""

from __future__ import annotations

from collections.abc import Callable

from signstep.distributed.compressors.base import BlockCompressor, CompressedGradients, Compressor
from signstep.distributed.compressors.ef_sign import EFSign
from signstep.distributed.compressors.one_bit_adam import OneBitAdam
from signstep.distributed.compressors.one_bit_sgd import OneBitSGD
from signstep.distributed.compressors.qsgd import QSGD
from signstep.distributed.compressors.terngrad import TernGrad
from signstep.distributed.compressors.top_k import TopK

__all__ = [
    "METHODS",
    "QSGD",
    "BlockCompressor",
    "CompressedGradients",
    "Compressor",
    "EFSign",
    "OneBitAdam",
    "OneBitSGD",
    "TernGrad",
    "TopK",
]

METHODS: dict[str, Callable[[], Compressor]] = {
    "ef-sign": EFSign,
    "ef-sign-two-sided": lambda: EFSign(two_sided=True),
    "one-bit-sgd": OneBitSGD,
    "qsgd": QSGD,
    "terngrad": TernGrad,
    "top-k": TopK,
}
"""Every compressor by its key in `signstep bench comm`."""
