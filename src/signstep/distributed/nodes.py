"""The ranks of a node as one worker of a vote: each of them votes on some of the parameters, for all of the node.

A parameter is owned by one rank of each node, the same in all nodes. A vote on a bucket's gradients takes four
exchanges: inside a node every rank sends each owner what it owns, and the owner adds up; the owners of a parameter
vote with each other, one of each node; inside a node every owner sends the result, as bits, to all.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from signstep.distributed.collectives import own_group, start_all_to_all
from signstep.distributed.hooks import Entry
from signstep.distributed.vote import Ballot, Election, Vote, cast_entries, flags_of, voters_of, words_of
from signstep.distributed.worker import Gradient, Worker, in_memory_order
from signstep.kernels.bits import word_count

__all__ = ["Node", "owners"]


def owners(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Which of a node's ranks owns which parameter, so that all have about as many elements.

    Args:
        sizes: elements by parameter name, in an order that all ranks agree on.
        ranks: of a node.

    Returns:
        By name, in [0, ranks): the largest first, each to whoever has least.

    Example:
        >>> owners({"a": 5, "b": 9, "c": 3}, 2)
        {'b': 0, 'a': 1, 'c': 1}
    """
    loads = [0] * ranks
    out = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        out[name] = loads.index(min(loads))
        loads[out[name]] += sizes[name]
    return out


class Node:
    """The ranks of this node, and their counterparts on the others. A collective: every rank makes one.

    Args:
        everyone: all ranks of the model.
        replicate_group: those that vote with this rank, one of each node.
        device: where gradients are.

    Attributes:
        group: the ranks of this node; rank and size: in it.
        voters: the ranks of `replicate_group`, one of each node.
        owners: local rank by parameter name, see `share_out`.

    Raises:
        ValueError: on all ranks: the groups are not the columns of a table with a row for each node.
    """

    def __init__(self, everyone: dist.ProcessGroup, replicate_group: dist.ProcessGroup, device: torch.device) -> None:
        # Who is not in a group has something else in its place.
        column: tuple[int, ...] = ()
        if isinstance(replicate_group, dist.ProcessGroup):
            column = tuple(sorted(dist.get_process_group_ranks(replicate_group)))
        told: list[tuple[int, ...]] = [()] * dist.get_world_size(everyone)
        dist.all_gather_object(told, column, group=everyone)
        columns = sorted(set(told))
        ranks = dist.get_process_group_ranks(everyone)
        if sorted(r for each in columns for r in each) != sorted(ranks) or len({len(each) for each in columns}) > 1:
            raise ValueError(
                f"replicate_group is {' and '.join(str(list(each)) for each in columns)} on the model's ranks "
                f"{sorted(ranks)}, expected groups of the same size that have each rank once: pass the group of the "
                "first dimension of a mesh of nodes and ranks"
            )
        self.voters = own_group(replicate_group, device)
        own = [each[column.index(dist.get_rank())] for each in columns]
        self.group = own_group(everyone, device, own)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.owners: dict[str, int] = {}

    def share_out(self, worker: Worker) -> None:
        """Give every rank of the node its parameters among those that a worker votes on, and drop others' momentum."""
        sizes = {name: p.numel() for p, name in worker.names.items() if name in worker.groups}
        self.owners = owners(sizes, self.size)
        self.keep_own(worker)

    def keep_own(self, worker: Worker) -> None:
        """Drop what a worker keeps of parameters that another rank of the node owns."""
        worker.state = {
            name: kept for name, kept in worker.state.items() if self.owners.get(name, self.rank) == self.rank
        }

    def close(self) -> None:
        """End the process groups of this node and of its counterparts."""
        for group in (self.voters, self.group):
            dist.destroy_process_group(group)

    def by_owner(self, entries: Sequence[Entry]) -> list[Entry]:
        """A bucket's entries, those of the node's first rank before those of its second."""
        return sorted(entries, key=lambda entry: self.owners[entry.name])

    def elect(self, vote: Vote, entries: Sequence[Entry]) -> Generator[None, None, tuple[Ballot, Election]]:
        """One vote of all nodes on the means of their ranks' gradients; every rank calls it with the same parameters.

        It yields when a collective is on its way, see `signstep.distributed.vote.in_turns`.

        Args:
            vote: its rules.
            entries: this rank's gradients, `by_owner`; what this rank owns becomes the mean of the node's.

        Returns:
            For `Vote.accept` on all entries: a ballot that abstains on what this rank does not own, and the result.
        """
        worker = vote.first
        parts = [[e for e in entries if self.owners[e.name] == rank] for rank in range(self.size)]
        own = yield from self._average(parts)
        ballot = Ballot(torch.zeros(0, dtype=torch.int64, device=entries[0].flat.device), b"", [])
        if own:
            whole = torch.cat([e.flat for e in own])
            ballot = cast_entries(worker, own, finite=bool(whole.dot(whole).isfinite()))
        # Who owns nothing here goes along, so that the collectives of all ranks are in one order.
        election = yield from vote.hold(ballot, [e.name for e in own], self.voters)
        election = yield from self._share(vote, parts, election)
        before, after = (sum(map(len, some)) for some in (parts[: self.rank], parts[self.rank + 1 :]))
        sums = None
        if ballot.sums is not None:
            sums = torch.nn.functional.pad(ballot.sums, (0, 0, before, after))
        gradients = [Gradient(e.name, in_memory_order(e.param), e.flat) for e in entries]
        flags = bytes(before) + ballot.flags + bytes(after)
        return Ballot(election.words, flags, worker.slots(gradients)[0], sums), election

    def _average(self, parts: Sequence[Sequence[Entry]]) -> Generator[None, None, list[Entry]]:
        """What this rank owns, with the mean of the node's gradients, to which a rank without one adds 0."""
        flat = next(e.flat for part in parts for e in part)
        outgoing, lengths = [], []
        for part in parts:
            present = flat.new_tensor([float(e.present) for e in part])
            outgoing += [*(e.flat if e.present else torch.zeros_like(e.flat) for e in part), present]
            lengths.append(sum(e.flat.numel() for e in part) + len(part))
        incoming = flat.new_empty(self.size * lengths[self.rank])
        sending = start_all_to_all(incoming, torch.cat(outgoing), self.group, [lengths[self.rank]] * self.size, lengths)
        yield
        sending.wait()
        own = parts[self.rank]
        mean = incoming.view(self.size, -1).div_(self.size).sum(0)
        *means, present = torch.split(mean, [*(e.flat.numel() for e in own), len(own)])
        for entry, its_mean in zip(own, means, strict=True):
            entry.flat.copy_(its_mean)
        return [e._replace(present=there > 0) for e, there in zip(own, present.tolist(), strict=True)]

    def _share(
        self, vote: Vote, parts: Sequence[Sequence[Entry]], election: Election
    ) -> Generator[None, None, Election]:
        """The results of all owners of the node, side by side."""
        device, nodes = election.words.device, dist.get_world_size(self.voters)
        bits = [sum(word_count(e.flat.numel()) for e in part) for part in parts]
        flags = [len(words_of(bytes(len(part)), device)) for part in parts]
        rows = 2 if vote.keep_ties else 1
        lengths = [rows * b + nodes * f for b, f in zip(bits, flags, strict=True)]
        results = [election.words] if election.ties is None else [election.words, election.ties]
        said = torch.cat(
            [*(x[: bits[self.rank]] for x in results), *(words_of(each, device) for each in election.flags)]
        )
        incoming = said.new_empty(sum(lengths))
        sending = start_all_to_all(incoming, said.repeat(self.size), self.group, lengths, [len(said)] * self.size)
        yield
        sending.wait()
        words: list[Tensor] = []
        everyones = [b""] * nodes
        for part, b, f, message in zip(parts, bits, flags, torch.split(incoming, lengths), strict=True):
            words.append(message[: rows * b].view(rows, b))
            theirs = flags_of(message[rows * b :].view(nodes, f), len(part))
            everyones = [known + own for known, own in zip(everyones, theirs, strict=True)]
        return vote.election(torch.cat(words, dim=1), everyones, voters_of(everyones))
