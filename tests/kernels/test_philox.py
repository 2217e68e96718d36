"""The generator: published vectors, and the integer arithmetic at every edge."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import references
from signstep.kernels.philox import philox4x32

# Random123, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def _philox(counter: list[int], key: list[int]) -> list[int]:
    c = [torch.tensor([w]) for w in counter]
    return [int(w) for w in philox4x32((c[0], c[1], c[2], c[3]), (key[0], key[1]))]


def test_known_answers() -> None:
    for counter, key, expected in KNOWN_ANSWERS:
        assert _philox(_words(counter), _words(key)) == _words(expected)
        assert list(references.philox(tuple(_words(counter)), tuple(_words(key)))) == _words(expected)


WORD = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1]))


@given(st.lists(WORD, min_size=4, max_size=4), st.lists(WORD, min_size=2, max_size=2))
def test_agrees_with_python_integers(counter: list[int], key: list[int]) -> None:
    assert _philox(counter, key) == list(references.philox(tuple(counter), tuple(key)))
