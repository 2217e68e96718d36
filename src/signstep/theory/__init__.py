"""The mathematics of sign steps, without training.

- `bounds`: Gauss's inequality, Theorem 1 and its corollaries
- `stationarity`: the same quantities, estimated from micro-batch gradients
- `noise`: laws of noise with the exact chance of a wrong sign
- `problems`: functions whose smoothness, noise and minimum are known, and SignSGD on them
- `vote`: the expected majority vote
"""

from signstep.theory import bounds, noise, problems, stationarity, vote

__all__ = ["bounds", "noise", "problems", "stationarity", "vote"]
