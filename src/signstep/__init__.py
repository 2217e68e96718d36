"""One-bit optimizers for PyTorch."""

from signstep.optim import HybridSignSGD, SignSGD, signsgd

__all__ = ["HybridSignSGD", "SignSGD", "__version__", "signsgd"]
__version__ = "0.1.0"
