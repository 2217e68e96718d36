"""The mathematics of sign steps: it trains nothing and imports nothing else of signstep.

- `bounds`: Gauss's inequality, Theorem 1 and its corollaries
- `stationarity`: the same quantities, estimated from the gradients of micro-batches
- `noise`: laws of noise with the exact chance of a wrong sign
- `problems`: functions whose smoothness, noise and minimum are known, and SignSGD on them
- `vote`: the expected majority vote

Every derivation is in docs/theory.md; `signstep verify` checks the statements.
"""

from signstep.theory import bounds, noise, problems, stationarity, vote

__all__ = ["bounds", "noise", "problems", "stationarity", "vote"]
