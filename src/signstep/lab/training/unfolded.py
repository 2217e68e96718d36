"""How large the values of a pickle are when what they share is counted wherever it is."""

from __future__ import annotations

import pickletools

_MOST = 10_000
"""Values in a tuple. Those of a checkpoint are shapes, strides and arguments."""


def refuse_large_tuples(raw: bytes) -> None:
    """Raise ValueError for a pickle with a tuple that unfolds to thousands of values.

    ``t = (); t = (t, t); t = (t, t); ...`` takes 5 bytes a line, and no time at all until a dictionary asks for its
    hash, which goes through every leaf. torch.load(weights_only=True) runs nothing, but it does not look for this.

    >>> import pickle
    >>> refuse_large_tuples(pickle.dumps({"shape": (3, 4)}))
    """
    stack: list[int] = []
    below: list[list[int]] = []
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else int(argument)] = stack[-1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        elif opcode.name == "MARK":
            below.append(stack)
            stack = []
        else:
            takes, size = opcode.stack_before, 1
            if pickletools.markobject in takes:
                size += sum(stack)
                stack = below.pop()
                takes = takes[: takes.index(pickletools.markobject)]
            size += sum(stack.pop() for _ in takes)
            if pickletools.pylist in opcode.stack_after or pickletools.pydict in opcode.stack_after:
                size = 1  # these have no hash
            elif size > _MOST:
                raise ValueError("it has a tuple of more values than a checkpoint needs")
            stack += [size] * len(opcode.stack_after)
