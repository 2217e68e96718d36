"""How a step is computed: the reference that defines the result, and the engines that must agree with it.

What a step means is in `signstep.optim`.
"""
