"""One-bit optimizers for PyTorch.

The public names are imported when they are first used: torch takes a second to import, and `signstep --help` needs none
of it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from signstep.monitor import Monitor
    from signstep.optim import HybridSignSGD, Lion, SignSGD, find_lr

__all__ = ["HybridSignSGD", "Lion", "Monitor", "SignSGD", "__version__", "find_lr"]
__version__ = "0.1.0"

_HOMES = dict.fromkeys(("HybridSignSGD", "Lion", "SignSGD", "find_lr"), "signstep.optim") | {
    "Monitor": "signstep.monitor"
}


def __getattr__(name: str) -> Any:
    if name in ("kernels", "optim"):  # which `import signstep` has always made available
        return importlib.import_module(f"signstep.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
