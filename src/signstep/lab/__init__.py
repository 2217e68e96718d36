"""The experiments: data, models, training, sweeps and reports; needs the extra `signstep[lab]`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from signstep.lab.paper.comparison import compare

__all__ = ["compare"]


def __getattr__(name: str) -> Any:
    if name != "compare":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from signstep.lab.paper.comparison import compare

    return compare
