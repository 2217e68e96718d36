"""Gradient compressors behind one DDP hook: what each is good for is in docs/compressors.md."""

from __future__ import annotations

from importlib import import_module

from signstep.distributed.compressors.base import BlockCompressor, Compressor, Offer
from signstep.distributed.compressors.demo import DeMo
from signstep.distributed.compressors.dithered_sign import DitheredSign
from signstep.distributed.compressors.ef_sign import EFSign
from signstep.distributed.compressors.exact import Exact
from signstep.distributed.compressors.gradients import CompressedGradients
from signstep.distributed.compressors.mean import CompressedMean
from signstep.distributed.compressors.one_bit_adam import OneBitAdam
from signstep.distributed.compressors.one_bit_sgd import OneBitSGD
from signstep.distributed.compressors.qsgd import QSGD
from signstep.distributed.compressors.terngrad import TernGrad
from signstep.distributed.compressors.top_k import TopK

__all__ = [
    "COMPRESSORS",
    "QSGD",
    "BlockCompressor",
    "CompressedGradients",
    "CompressedMean",
    "Compressor",
    "DeMo",
    "DitheredSign",
    "EFSign",
    "Exact",
    "Offer",
    "OneBitAdam",
    "OneBitSGD",
    "TernGrad",
    "TopK",
]

_FILES = ("dithered_sign", "ef_sign", "one_bit_sgd", "qsgd", "terngrad", "top_k", "demo")
"""Where compressors are, each with its `OFFERS`: a new file is named here and nowhere else."""

COMPRESSORS: dict[str, Offer] = {
    key: offer for file in _FILES for key, offer in import_module(f"{__name__}.{file}").OFFERS.items()
}
"""What is offered under which key by `signstep train --reduce`, the plan, the benchmarks and docs/compressors.md."""
