"""What a step means: SignSGD, its dither, and the calibrated switch to SGD."""

from signstep.optim.hybrid import HybridSignSGD
from signstep.optim.signsgd import SignSGD, signsgd

__all__ = ["HybridSignSGD", "SignSGD", "signsgd"]
