"""One-bit optimizers for PyTorch."""

from typing import TYPE_CHECKING, Any

from signstep.optim import HybridSignSGD, SignSGD

if TYPE_CHECKING:
    from signstep.monitor import Monitor

__all__ = ["HybridSignSGD", "Monitor", "SignSGD", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch.distributed, which the monitor needs, takes its time to import.
    if name == "Monitor":
        from signstep.monitor import Monitor

        return Monitor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
