"""Workers that come and go: which files are gone on from, what each worker gets of them, and kills under torchrun."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ddp_cases import equal_everywhere
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gang import gang, on_ranks
from signstep.distributed import DiLoCo, LocalVote, RoundCheckpoint
from signstep.distributed.elastic import Restored, Saved, newest
from signstep.distributed.rounds import Schedule

EVERY = 3


def worker(folder: Path, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, LocalVote, RoundCheckpoint]:
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    local = LocalVote(model, optimizer, every=EVERY, outer_momentum=0.9, error_feedback=True, dither=0.1, **options)
    return model, optimizer, local, RoundCheckpoint(folder, model, optimizer, local)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, local: LocalVote, position: int) -> bool:
    """Whether a round has ended."""
    generator = torch.Generator().manual_seed(1000 * dist.get_rank() + position)
    x = torch.randn(8, 5, generator=generator)
    optimizer.zero_grad()
    F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
    optimizer.step()
    return local.step()


def train(
    folders: list[Path], rounds: int, options: dict[str, Any], unsaved: list[int]
) -> tuple[Restored | None, dict[str, Tensor], dict[str, Tensor]]:
    """To so many rounds, from what is in this rank's folder; some ranks do not live to save the last round.

    Returns what was restored, what was taken of it, and the weights at the end.
    """
    rank = dist.get_rank()
    model, optimizer, local, checkpoint = worker(folders[rank % len(folders)], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        restored = checkpoint.restore()
    taken = {"second moment": optimizer.state_dict()["state"][0]["exp_avg_sq"]} if restored else {}
    taken |= {name: kept["exp_avg"].clone() for name, kept in local.state_dict()["state"].items()}
    position = 0 if restored is None else restored.extra["position"]
    if not options:
        assert equal_everywhere(model)
    while position < rounds * EVERY:
        position += 1
        if one_step(model, optimizer, local, position):
            checkpoint.save(position=position, rank=rank)
    if rank in unsaved:
        (last,) = checkpoint.folder.glob(f"round-{checkpoint.round:08d}-worker-{rank}-*")
        last.unlink()
    dist.barrier()
    return restored, taken, {name: x.clone() for name, x in model.state_dict().items()}


def run(size: int, folders: list[Path], rounds: int, unsaved: tuple[int, ...] = (), **options: Any) -> Any:
    return gang(size).run(train, folders, rounds, options, list(unsaved))


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


def folders_of(tmp_path: Path, shared: bool, size: int) -> list[Path]:
    return [tmp_path / "all"] if shared else [tmp_path / f"of-{i}" for i in range(size)]


@pytest.mark.parametrize("options", [{}, {"delay": 1}, {"delay": 2, "fragments": 2}], ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_as_many_workers_go_on_bit_by_bit(shared: bool, options: dict[str, Any], tmp_path: Path) -> None:
    """Also where a round was saved by some alone, and where ranks on machines with folders are numbered anew."""
    whole = run(3, [tmp_path / "whole"], 5, **options)
    folders = folders_of(tmp_path, shared, 3)
    first = run(3, folders, 3, (1,), **options)
    assert [each[0] for each in first] == [None] * 3
    again = run(3, folders[::-1], 5, **options)
    for rank, ((restored, _, end), (_, _, expected)) in enumerate(zip(again, whole, strict=True)):
        assert restored.workers == 3
        assert options or (restored.round, restored.extra["position"]) == (2, 2 * EVERY)
        assert restored.extra["rank"] == rank
        assert equal(end, expected)


def _killed_in_a_save(folder: Path) -> None:
    """Rank 1 does not live to save what has ended after step 22; rank 0 goes on as far as it can without it."""
    rank = dist.get_rank()
    model, optimizer, local, checkpoint = worker(folder, delay=1, fragments=2)
    assert checkpoint.restore() is None
    for position in range(1, 24 - rank):
        if one_step(model, optimizer, local, position) and (rank, position) != (1, 22):
            checkpoint.save(position=position, rank=rank)
    dist.barrier()


def test_a_worker_may_be_two_rounds_ahead(tmp_path: Path) -> None:
    """Three steps do not divide into two fragments: what departs after step 22 arrives after 23, as the round before
    has arrived after 22.
    """
    whole = run(2, [tmp_path / "whole"], 10, delay=1, fragments=2)
    folder = tmp_path / "killed"
    gang(2).run(_killed_in_a_save, folder)
    left = {(saved.round, saved.worker) for path in folder.iterdir() if (saved := Saved.of(path.name))}
    assert {(r, 0) for r in (13, 14, 15)} <= left
    assert max(r for r, w in left if w == 1) == 13
    for (restored, _, end), (_, _, expected) in zip(run(2, [folder], 10, delay=1, fragments=2), whole, strict=True):
        assert (restored.round, restored.extra["position"]) == (13, 20)
        assert equal(end, expected)


def most_ahead(every: int, delay: int, fragments: int) -> int:
    """How many rounds a worker may have saved that another one has not, by a walk along the schedule.

    To save after a step, a worker needs what all the others have sent until then. So they have come to the last step at
    which something was sent, and have saved what ended at earlier steps.
    """
    schedule, ahead, most = Schedule(every, delay, fragments), 0, 0
    for _ in range(6 * every):
        arriving, departing = schedule.step()
        ahead = (0 if departing else ahead) + bool(arriving if delay > 0 else departing)
        most = max(most, ahead)
    return most


@on_ranks(1)
def test_a_round_is_kept_that_all_have_saved(tmp_path: Path) -> None:
    model, optimizer, local, _ = worker(tmp_path)
    most = dict.fromkeys((2, 3), 0)
    for every in range(1, 13):
        for delay in range(every):
            for fragments in range(1, every + 1):
                local.schedule = Schedule(every, delay, fragments)
                kept = RoundCheckpoint(tmp_path, model, optimizer, local).keep
                most[kept] = max(most[kept], most_ahead(every, delay, fragments))
    assert most == {2: 1, 3: 2}


def test_files_are_those_of_the_last_rounds(tmp_path: Path) -> None:
    (tmp_path / "data.pt").touch()
    (tmp_path / "round-00000001-worker-0-of-3-ab.tmp").touch()
    run(2, [tmp_path], 4)
    run(3, [tmp_path], 7)
    found = sorted(saved for path in tmp_path.iterdir() if (saved := Saved.of(path.name)))
    assert [(saved.round, saved.worker) for saved in found] == [(r, w) for r in (6, 7) for w in range(3)]
    assert len({saved.run for saved in found}) == 1
    assert len(list(tmp_path.iterdir())) == 1 + 6


def mean(taken: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([each[name].double() for each in taken]).mean(0).float()


@pytest.mark.parametrize(("old", "new"), [(3, 2), (2, 3), (1, 4), (4, 1)])
@pytest.mark.parametrize("shared", [True, False])
def test_another_number_of_workers(shared: bool, old: int, new: int, tmp_path: Path) -> None:
    """All have the model of one and the mean of the momenta; who sees a file of the round goes on with its moments."""
    folders = folders_of(tmp_path, shared, max(old, new))
    run(old, folders[:old], 3)
    before = run(old, folders[:old], 3)
    places = list(range(new))
    if not shared:  # the machine of the first rank comes last
        folders, places = folders[new - 1 :: -1], places[::-1]
    after = run(new, folders, 3)
    seen = [taken for _, taken, _ in (before if shared else before[:new])]
    for place, (restored, taken, end) in zip(places, after, strict=True):
        assert (restored.round, restored.workers, restored.extra) == (3, old, {"position": 9, "rank": 0})
        assert equal(end, before[0][2])
        for name, x in taken.items():
            if name == "second moment":
                assert torch.equal(x, before[place if place < old else 0][1][name])
            else:
                torch.testing.assert_close(x, torch.stack([each[name].double() for each in seen]).mean(0).float())
    again = run(new, folders, 5)
    assert all(restored.workers == old and equal(end, again[0][2]) for restored, _, end in again)


def test_a_lost_machine_takes_its_momentum_with_it(tmp_path: Path) -> None:
    folders = folders_of(tmp_path, False, 3)
    run(3, folders, 3, (2,))
    for path in folders[1].iterdir():
        path.unlink()
    after = run(3, folders, 4)
    for restored, taken, end in after:
        assert (restored.round, restored.workers, restored.extra["rank"]) == (3, 3, 0)
        assert equal(end, after[0][2])
        assert torch.equal(taken["0.weight"], after[0][1]["0.weight"])


@pytest.mark.parametrize("damage", ["torn", "foreign", "empty", "gone"])
def test_a_file_that_cannot_be_read_is_passed_over(damage: str, tmp_path: Path) -> None:
    whole = run(2, [tmp_path / "whole"], 6)
    folder = tmp_path / "all"
    run(2, [folder], 4)
    (last,) = folder.glob("round-00000004-worker-1*")
    if damage == "torn":
        last.write_bytes(last.read_bytes()[:-1000])
    elif damage == "foreign":
        torch.save({"model": 1}, last)
    elif damage == "empty":
        last.write_bytes(b"")
    else:
        last.unlink()
    said = gang(2).run(_warned, folder)
    assert [len(each) for each in said] == [0, int(damage != "gone")]
    assert damage == "gone" or f"{last} is passed over: " in said[1][0]
    for (restored, _, end), (_, _, expected) in zip(run(2, [folder], 6), whole, strict=True):
        assert restored.round == 3
        assert equal(end, expected)
    for path in folder.iterdir():
        path.write_bytes(b"PK")
    assert run(2, [folder], 1)[0][0] is None


def _warned(folder: Path) -> list[str]:
    *_, checkpoint = worker(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint.restore()
    return [str(each.message) for each in caught]


@on_ranks(1)
def test_what_cannot_be_is_refused_at_once(tmp_path: Path) -> None:
    model, optimizer, local, checkpoint = worker(tmp_path / "new" / "folder")
    with pytest.raises(RuntimeError, match="save before restore: call restore"):
        checkpoint.save()
    assert checkpoint.restore() is None
    with pytest.raises(TypeError, match="could not be loaded again with weights_only=True: pass numbers"):
        checkpoint.save(path=Path("x"))
    assert checkpoint.round == 0
    with pytest.raises(ValueError, match="Invalid keep: 1, expected at least 2"):
        RoundCheckpoint(tmp_path, model, optimizer, local, keep=1)
    with pytest.raises(
        TypeError, match="Invalid local: a DiLoCo, expected a LocalVote, as only its state can be split"
    ):
        RoundCheckpoint(tmp_path, model, optimizer, DiLoCo(model, optimizer, every=3))  # type: ignore[arg-type]


SAVED = st.builds(Saved, st.integers(0, 5), st.integers(1, 3), st.integers(0, 2), st.sampled_from("ab"))


@given(st.sets(SAVED.filter(lambda saved: saved.worker < saved.workers)))
def test_what_is_chosen_fits_together_and_is_the_newest(files: set[Saved]) -> None:
    """The newest of the complete rounds; of all, if none is complete."""
    chosen = newest(files)
    assert set(chosen) <= files
    assert bool(chosen) == bool(files)
    assert len({(saved.round, saved.workers, saved.run) for saved in chosen}) <= 1
    assert [saved.worker for saved in chosen] == sorted({saved.worker for saved in chosen})
    rivals = {saved for saved in files if {saved._replace(worker=w) for w in range(saved.workers)} <= files} or files
    assert set(chosen) <= rivals
    assert all(saved.round <= chosen[0].round for saved in rivals)
    assert all(Saved.of(saved.name) == saved for saved in files)


def test_what_is_left_of_another_training_does_not_take_over(tmp_path: Path) -> None:
    old, complete = Saved(100, 2, 1, "aa"), [Saved(40, 2, 0, "bb"), Saved(40, 2, 1, "bb")]
    assert newest([old, *complete]) == complete
    assert newest([old, complete[0]]) == [old]
    folders = folders_of(tmp_path, False, 2)
    run(2, [tmp_path / "other"], 8)
    first = run(2, folders, 4)
    (file,) = (tmp_path / "other").glob("round-00000008-worker-1-*")
    file.rename(folders[1] / file.name)
    for (restored, _, end), (_, _, expected) in zip(run(2, folders, 4), first, strict=True):
        assert restored.round == 4
        assert equal(end, expected)


@given(
    kills=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.sets(st.integers(0, 3))), min_size=1, max_size=9)
)
def test_no_more_than_a_round_is_lost_however_often_workers_are_killed(
    kills: list[tuple[int, int, set[int]]],
) -> None:
    """Each time some workers save some rounds, the last one perhaps not all of them."""
    files: set[Saved] = set()
    reached = 0
    for run_index, (workers, rounds, unsaved) in enumerate(kills):
        chosen = newest(files)
        begin = chosen[0].round if chosen else 0
        assert begin >= reached - 1
        for r in range(begin + 1, begin + rounds + 1):
            last = r == begin + rounds
            files |= {Saved(r, workers, w, f"{run_index:x}") for w in range(workers) if not (last and w in unsaved)}
            files = {saved for saved in files if saved.round > r - 2 or last}
        reached = max((saved.round for saved in files), default=0)
