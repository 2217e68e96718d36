"""What a step means: SignSGD, its dither, and the calibrated switch to SGD.

How a step is computed is in `signstep.kernels`.
"""

from signstep.optim.backward import attach_to_backward
from signstep.optim.hybrid import HybridSignSGD
from signstep.optim.signsgd import SignSGD

__all__ = ["HybridSignSGD", "SignSGD", "attach_to_backward"]
