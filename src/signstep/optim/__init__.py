"""What a step means: SignSGD, its dither, the calibrated switch to SGD, and Lion.

How a step is computed is in `signstep.kernels`.
"""

from signstep.optim.backward import attach_to_backward
from signstep.optim.hybrid import HybridSignSGD
from signstep.optim.lion import Lion
from signstep.optim.lr_range import LrRange, find_lr
from signstep.optim.signsgd import SignSGD

__all__ = ["HybridSignSGD", "Lion", "LrRange", "SignSGD", "attach_to_backward", "find_lr"]
