"""`Monitor` on the loops that people have: batch norm, tied weights, accumulation, GradScaler, DDP, votes."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gang import gang
from signstep import HybridSignSGD, Monitor, SignSGD
from signstep.distributed import MajorityVote
from signstep.lab import models
from signstep.monitor.sampling import Sampler
from signstep.optim import attach_to_backward
from signstep.theory import stationarity


class Kept:
    """A sink that keeps records, as JSON would."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.closed = False

    def write(self, record: Mapping[str, Any]) -> None:
        self.records.append(json.loads(json.dumps(record, allow_nan=False)))

    def close(self) -> None:
        self.closed = True


class GPT(nn.Module):
    """A small GPT whose embedding is its output layer too."""

    def __init__(self, vocabulary: int = 50, width: int = 32, length: int = 16) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.token.weight

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        h = self.token(x) + self.position(torch.arange(x.shape[1]))
        logits: Tensor = self.head(self.blocks(h, mask=mask, is_causal=True))
        return logits


def resnet() -> nn.Module:
    return models.build("resnet8", num_classes=10, width=0.25)


def images(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 16, 16), torch.randint(10, (n,))


def image_loss(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: F.cross_entropy(model(x), y)


def micro_gradients(model: nn.Module, losses: Iterator[Tensor]) -> Tensor:
    """The slow way: one backward after the other, gradients copied whole."""
    rows = []
    for loss in losses:
        model.zero_grad()
        loss.backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    model.zero_grad()
    return torch.stack(rows)


def test_accumulation_needs_no_line_and_gives_the_rows_of_the_slow_way() -> None:
    torch.manual_seed(0)
    model = resnet()
    x, y = images(64)
    slow = _slow(model, x, y, 8)
    optimizer = SignSGD(model.parameters(), lr=1e-3, dither=1e-4)
    sink = Kept()
    monitor = Monitor(model, optimizer, every=2, sinks=[sink], coordinates=10**6)
    for step in range(3):
        for loss in _losses(model, x, y, 8):
            (loss / 8).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            found = sink.records[0]["reliability"]
            expected = stationarity.alignment(slow)
            assert found["alignment"] == pytest.approx([float(v) for v in vars(expected).values()], rel=1e-4)
    assert [r["step"] for r in sink.records] == [0, 2]
    first = sink.records[0]
    assert first["micro_batches"] == 8
    assert first["optimizer"] == "SignSGD"
    assert set(first["reliability"]["layers"]) == {name for name, _ in model.named_parameters()}
    assert sum(first["reliability"]["snr_histogram"]) == pytest.approx(1, abs=1e-3)
    monitor.close()
    assert sink.closed


def _slow(model: nn.Module, x: Tensor, y: Tensor, parts: int) -> Tensor:
    other = copy.deepcopy(model)
    return micro_gradients(other, _losses(other, x, y, parts))


def _losses(model: nn.Module, x: Tensor, y: Tensor, parts: int) -> Iterator[Tensor]:
    for piece, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
        yield F.cross_entropy(model(piece), labels)


def test_measure_leaves_training_bit_for_bit_as_it_was() -> None:
    """Batch norm's statistics, dropout's generator, gradients and steps; and it sees what the slow way sees."""
    finals = []
    for monitored in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(resnet(), nn.Dropout(0.5), nn.Linear(10, 10))
        optimizer = HybridSignSGD(model.parameters(), lr=1e-3, switch_step=3)
        loss = image_loss(model)
        sink = Kept()
        monitor = Monitor(model, optimizer, every=2, sinks=[sink]) if monitored else None
        for _ in range(5):
            x, y = images(32)
            if monitor is not None:
                monitor.measure(loss, x, y, parts=8)
            optimizer.zero_grad()
            loss(x, y).backward()
            if monitor is not None:  # also with gradients there
                monitor.measure(loss, x, y, parts=8)
            optimizer.step()
        finals.append([*model.state_dict().values(), torch.rand(3)])
        if monitored:
            assert [r["micro_batches"] for r in sink.records] == [8, 8, 8]
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


def test_rows_of_measure_are_micro_batch_gradients() -> None:
    torch.manual_seed(0)
    model = resnet()
    x, y = images(40)
    slow = _slow(model, x, y, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, coordinates=10**6)
    monitor.measure(image_loss(model), x, y, parts=5)
    image_loss(model)(x, y).backward()
    optimizer.step()
    assert monitor.last is not None
    found = monitor.last["reliability"]
    for name in ("alignment", "phi", "margin", "reliability", "snr"):
        estimate = getattr(stationarity, name)(slow)
        assert found[name] == pytest.approx([float(v) for v in vars(estimate).values()], rel=1e-3), name


def test_gpt_with_tied_embeddings() -> None:
    """The tied weight is one layer; its gradient is the sum over both uses."""
    torch.manual_seed(0)
    model = GPT().eval()  # no dropout, so that the slow way draws nothing
    x = torch.randint(50, (24, 16))

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    slow = micro_gradients(model, (loss(piece) for piece in x.chunk(6)))
    optimizer = SignSGD(model.parameters(), lr=1e-3, dither=1.0, dither_decay=0.0, dither_scale="relative")
    monitor = Monitor(model, optimizer, coordinates=10**6)
    for piece in x.chunk(6):
        (loss(piece) / 6).backward()
    optimizer.step()
    assert monitor.last is not None
    found = monitor.last["reliability"]
    assert "head.weight" not in found["layers"]
    assert found["alignment"][0] == pytest.approx(float(stationarity.alignment(slow).value), rel=1e-4)


def _scaled_loop(scaled: bool, skip: bool) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = SignSGD(model.parameters(), lr=1e-3, dither=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) if scaled else None
    sink = Kept()
    Monitor(model, optimizer, every=1, sinks=[sink], scaler=scaler)
    generator = torch.Generator().manual_seed(5)
    for step in range(4):
        overflow = skip and step == 1
        for _ in range(6):
            x = torch.randn(4, 8, generator=generator)
            with torch.autocast("cpu", torch.bfloat16) if scaled and skip else nullcontext():
                loss = model(x).float().square().mean() / 6
            loss = loss * float("inf") if overflow else loss
            (scaler.scale(loss) if scaler is not None else loss).backward()
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
    return sink.records


def test_grad_scaler_is_divided_out() -> None:
    plain, scaled = _scaled_loop(False, False), _scaled_loop(True, False)
    assert len(plain) == len(scaled) == 4
    for a, b in zip(plain, scaled, strict=True):
        assert a["reliability"]["alignment"] == pytest.approx(b["reliability"]["alignment"], rel=1e-5)
        assert a["dither"]["rms"] == pytest.approx(b["dither"]["rms"], rel=1e-5)
        assert b["micro_batches"] == 6


def test_a_step_that_the_scaler_skips_is_measured_again() -> None:
    """Under autocast; the rows of the skipped step are not mixed with those of the next, whose scale is half."""
    records = _scaled_loop(True, True)
    assert [r["step"] for r in records] == [0, 1, 2]
    assert [r["micro_batches"] for r in records] == [6, 6, 6]
    assert all(r["reliability"]["alignment"][0] is not None for r in records)


def test_infinite_gradients_are_left_out_and_said() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    monitor = Monitor(model, optimizer, every=1)
    for micro in range(8):
        loss = model(torch.randn(4, 8)).square().mean()
        (loss * (float("nan") if micro == 3 else 1)).backward()
    optimizer.step()
    assert monitor.last is not None
    assert monitor.last["micro_batches"] == 7
    assert "1 of 8 micro-batches had gradients that are not finite" in monitor.last["alarms"]
    json.dumps(monitor.last, allow_nan=False)


def test_microbatch_holds_several_backward_passes() -> None:
    """Two losses, and reentrant checkpointing, whose inner backward is a pass of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, coordinates=1000)
    total = []
    for _ in range(5):
        x = torch.randn(6, 4, requires_grad=True)
        before = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
        with monitor.microbatch():
            checkpoint(model, x, use_reentrant=True)[:, 0].sum().backward()
            model(x)[:, 1].square().sum().backward()
        total.append(
            torch.cat([(p.grad - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])  # type: ignore[operator]
        )
    optimizer.step()
    assert monitor.last is not None
    assert monitor.last["micro_batches"] == 5
    expected = stationarity.alignment(torch.stack(total) * 5)
    assert monitor.last["reliability"]["alignment"][0] == pytest.approx(float(expected.value), rel=1e-4)
    with monitor.microbatch(), monitor.microbatch():
        pass  # not an own step
    with pytest.raises(RuntimeError, match="inside"), Monitor(model, optimizer) as due, due.microbatch():
        with due.microbatch():
            pass


def test_one_micro_batch_says_what_to_do() -> None:
    model = nn.Linear(3, 1)
    optimizer = SignSGD(model.parameters(), lr=1e-3)
    monitor = Monitor(model, optimizer)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert monitor.last is not None
    assert "monitor.measure" in monitor.last["reliability"]["reason"]
    assert monitor.last["dither"]["rms"] > 0


def test_a_closure_that_does_backward_inside_step() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    monitor = Monitor(model, optimizer)
    x = torch.randn(5, 4, 3)

    def closure() -> float:
        optimizer.zero_grad()
        for piece in x:
            model(piece).square().mean().backward()
        return 0.0

    optimizer.step(closure)
    assert monitor.last is not None
    assert monitor.last["micro_batches"] == 5


def test_unused_parameters_and_sparse_gradients() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 1), "unused": nn.Linear(4, 1), "rows": nn.Embedding(9, 4, sparse=True)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer)
    for _ in range(4):
        (model["used"](model["rows"](torch.randint(9, (3,)))).square().mean() / 4).backward()
    optimizer.step()
    assert monitor.last is not None
    layers = monitor.last["reliability"]["layers"]
    assert layers["unused.weight"]["zeros"] == 1
    assert layers["rows.weight"]["zeros"] < 1


def test_other_steps_have_no_hooks_and_resume_keeps_count() -> None:
    model = nn.Linear(3, 1)
    optimizer = SignSGD(model.parameters(), lr=1e-3)
    sink = Kept()
    monitor = Monitor(model, optimizer, every=3, sinks=[sink])
    for step in range(4):
        assert bool(model.weight._backward_hooks) == (step % 3 == 0)
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    other = Monitor(model, optimizer, every=3)
    other.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert (other.step, other.due) == (4, False)
    monitor.close()
    other.close()
    assert not model.weight._backward_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("options", "said"),
    [({"every": 0}, "every=0"), ({"coordinates": 0}, "coordinates=0"), ({"every": 2.5}, "every=2.5")],
)
def test_options_out_of_range(options: dict[str, Any], said: str) -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(ValueError, match=said):
        Monitor(model, SignSGD(model.parameters()), **options)


def test_what_cannot_be_monitored_is_refused() -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(ValueError, match="attach_to_backward"):
        Monitor(model, attach_to_backward(model, {"lr": 1e-3, "momentum": 0.0}))
    frozen = nn.Linear(3, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        Monitor(frozen, SignSGD(model.parameters()))
    with pytest.raises(ValueError, match="at least 4 parts"):
        Monitor(nn.Linear(3, 1), SignSGD(model.parameters())).measure(lambda x: x.sum(), torch.ones(3, 3))


def test_sample_is_spread_over_layers_and_stays() -> None:
    named = {
        "big": nn.Parameter(torch.zeros(500, 500)),
        "small": nn.Parameter(torch.zeros(7)),
        "c": nn.Parameter(torch.zeros(40, dtype=torch.complex64)),
    }
    one, two = Sampler(named, 200, 3, lambda: 1.0), Sampler(named, 200, 3, lambda: 1.0)
    assert one.width <= 200
    by_name = {c.name: c for c in one.columns}
    assert by_name["small"].sampled == 7
    assert by_name["c"].numel == 80
    assert abs(by_name["big"].sampled - 113) <= 1
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(one.columns, two.columns, strict=True))
    grad = torch.arange(250_000.0).reshape(500, 500).t()  # not contiguous
    assert torch.equal(one._taken(0, grad), grad.reshape(-1)[by_name["big"].indices])


def _ddp_records(vote: bool) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    model = DistributedDataParallel(net)
    optimizer = SignSGD(model.parameters(), lr=1e-3, dither=1e-6)
    voted = MajorityVote(model, optimizer) if vote else None
    sink = Kept()
    monitor = Monitor(model, optimizer, every=1, sinks=[sink], vote=voted)
    generator = torch.Generator().manual_seed(7)
    data = torch.randn(2, 6, 10, 6, generator=generator)  # steps, micro-batches, elements
    for step in range(2):
        mine = data[step, dist.get_rank() * 3 :][:3]
        for i, x in enumerate(mine):
            with model.no_sync() if i < 2 else nullcontext():
                (model(x).square().mean() / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    monitor.close()
    if voted is not None:
        voted.close()
    return sink.records


@pytest.mark.parametrize("vote", [False, True])
def test_ddp_gathers_the_micro_batches_of_all_ranks(vote: bool) -> None:
    first, second = gang(2).run(_ddp_records, vote)
    assert second == []
    assert [r["micro_batches"] for r in first] == [6, 6]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    data = torch.randn(2, 6, 10, 6, generator=torch.Generator().manual_seed(7))
    slow = micro_gradients(net, (net(x).square().mean() for x in data[0]))
    estimate = stationarity.alignment(slow)
    assert first[0]["reliability"]["alignment"] == pytest.approx([float(v) for v in vars(estimate).values()], rel=1e-4)


def _ddp_measure() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    model = DistributedDataParallel(net)
    optimizer = SignSGD(model.parameters(), lr=1e-3)
    sink = Kept()
    monitor = Monitor(model, optimizer, every=2, sinks=[sink])
    for step in range(3):
        torch.manual_seed(10 * step + dist.get_rank())
        x = torch.randn(32, 6)
        monitor.measure(lambda x: model(x).square().mean(), x, parts=4)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [r["micro_batches"] for r in sink.records], float(net[0].weight.sum())


def test_ddp_measures_without_reducing() -> None:
    (counts, one), (none, two) = gang(2).run(_ddp_measure)
    assert (counts, none) == ([8, 8], [])
    assert one == two


def test_alarm_where_the_theorem_fails() -> None:
    """Gradients Exp(1) - 1 + 0.2: signs go the wrong way, and the record says so."""
    torch.manual_seed(0)
    model = nn.Linear(2000, 1, bias=False)
    optimizer = SignSGD(model.parameters(), lr=1e-3)
    monitor = Monitor(model, optimizer)
    for _ in range(32):
        (model.weight * (0.2 - torch.rand(1, 2000).log() - 1) / 32).sum().backward()
    optimizer.step()
    assert monitor.last is not None
    alarms = " ".join(monitor.last["alarms"])
    assert "inequality (7) is violated" in alarms
    assert "uphill" in alarms
    aligned = monitor.last["reliability"]["alignment"][0]
    assert aligned == pytest.approx(2000 * 0.2 * (2 * math.exp(-0.8) - 1), rel=0.25)
