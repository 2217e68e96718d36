"""How gradients become blocks, blocks words, and words messages."""

import numpy as np
import torch
from compressor_cases import CPU
from hypothesis import given
from hypothesis import strategies as st

from signstep.distributed.compressors.blocks import BLOCK, Layout, own_blocks, pack, unpack


@given(bits=st.sampled_from([1, 2, 4, 8]), rows=st.integers(0, 3), data=st.data())
def test_pack_puts_the_first_code_in_the_low_bits(bits: int, rows: int, data: st.DataObject) -> None:
    codes = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=24 * rows, max_size=24 * rows)), np.uint8)
    per_byte = 8 // bits
    expected = sum(codes.reshape(-1, per_byte)[:, i].astype(int) << (bits * i) for i in range(per_byte))
    packed = pack(torch.from_numpy(codes).view(rows, 24), bits)
    assert packed.flatten().tolist() == list(expected)
    values = tuple(float(v) * 1.5 - 7 for v in range(2**bits))
    assert unpack(packed, values).flatten().tolist() == [values[c] for c in codes]


@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=6),
    workers=st.integers(1, 5),
    bits=st.sampled_from([1, 2, 4, 8]),
    scales=st.integers(1, 2),
    data=st.data(),
)
def test_words_reach_their_owner_and_come_back(
    sizes: list[int], workers: int, bits: int, scales: int, data: st.DataObject
) -> None:
    firsts = [data.draw(st.integers(0, 9)) for _ in sizes]
    layouts = [Layout(sizes, firsts, workers, rank, CPU) for rank in range(workers)]
    wires = [layout.wire(scales, bits, dealt=True) for layout in layouts]
    rows = torch.randint(-(2**31), 2**31 - 1, (layouts[0].rows, wires[0].width), dtype=torch.int32)
    meant = torch.zeros_like(rows, dtype=torch.bool)
    row_sizes = [min(BLOCK, size - j) for size in sizes for j in range(0, size, BLOCK)]
    for row, size in enumerate(row_sizes):
        meant[row, : scales + -(-size * bits // 32)] = True

    messages = wires[0].send(rows)
    assert messages.shape == (workers, wires[0].length)
    owners = [
        (j + first) % workers for size, first in zip(sizes, firsts, strict=True) for j in range(-(-size // BLOCK))
    ]
    returned = []
    for rank, (layout, wire) in enumerate(zip(layouts, wires, strict=True)):
        own = torch.tensor([o == rank for o in owners])
        assert sum(layout.own_counts) == int(own.sum())
        received = wire.place_own(messages[rank])
        assert torch.equal(received[meant[own]], rows[own][meant[own]])
        returned.append(wire.send_own(received))
    assert torch.equal(wires[0].place(torch.cat(returned))[meant], rows[meant])
    # No owner's message is padded by more than what the others' blocks differ in number, nor is anything sent twice.
    assert int(meant.sum()) <= workers * wires[0].length
    everything = layouts[0].wire(scales, bits, dealt=False)
    assert everything.length == int(meant.sum())
    assert torch.equal(everything.place(everything.send(rows))[meant], rows[meant])


@given(size=st.integers(0, 9000), first=st.integers(0, 7), workers=st.integers(1, 6))
def test_every_block_has_one_owner(size: int, first: int, workers: int) -> None:
    owned = [j for rank in range(workers) for j in own_blocks(size, first, workers, rank)]
    assert sorted(owned) == list(range(-(-size // BLOCK)))
