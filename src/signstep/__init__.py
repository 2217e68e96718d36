"""One-bit optimizers for PyTorch."""

from signstep.optim import HybridSignSGD, SignSGD

__all__ = ["HybridSignSGD", "SignSGD", "__version__"]
__version__ = "0.1.0"
