"""What a live training run says of the assumptions behind sign steps."""

from signstep.monitor.monitor import Monitor

__all__ = ["Monitor"]
