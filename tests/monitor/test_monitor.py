"""`Monitor` on the loops that people have: batch norm, tied weights, accumulation, GradScaler, DDP, votes."""

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from measured import KeepingSink, micro_gradients
from signstep import HybridSignSGD, Monitor, SignSGD
from signstep.lab.training import models
from signstep.optim import attach_to_backward
from signstep.theory import stationarity


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


def test_accumulation_needs_no_line_and_gives_the_rows_of_the_slow_way() -> None:
    torch.manual_seed(0)
    model = resnet()
    x, y = images(64)
    slow = _slow(model, x, y, 8)
    optimizer = SignSGD(model.parameters(), lr=1e-3, dither=1e-4)
    sink = KeepingSink()
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
        sink = KeepingSink()
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
    sink = KeepingSink()
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
    sink = KeepingSink()
    monitor = Monitor(model, optimizer, every=3, sinks=[sink])
    for step in range(4):
        assert bool(monitor._sampler._hooks) == (step % 3 == 0)
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    other = Monitor(model, optimizer, every=3)
    other.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert (other.step, other.due) == (4, False)
    monitor.close()
    other.close()
    assert not monitor._sampler._hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("options", "said"),
    [({"every": 0}, "every=0"), ({"coordinates": 0}, "coordinates=0"), ({"every": 2.5}, "every=2.5")],
)
def test_options_out_of_range(options: dict[str, Any], said: str) -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(ValueError, match=said):
        Monitor(model, SignSGD(model.parameters()), **options)


def test_parameters_frozen_and_unfrozen_between_own_steps() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sink = KeepingSink()
    monitor = Monitor(model, optimizer, every=1, sinks=[sink])
    for step in range(2):
        for _ in range(4):
            model(torch.randn(5, 3)).square().mean().backward()
        if step == 0:
            model[1].requires_grad_(True)
            model[0].requires_grad_(False)
        optimizer.step()
        optimizer.zero_grad()
    first, second = (r["reliability"]["layers"] for r in sink.records)
    assert (first["0.weight"]["zeros"], first["1.weight"]["zeros"]) == (0, 1)
    assert (second["0.weight"]["zeros"], second["1.weight"]["zeros"]) == (1, 0)
    monitor.close()


def test_gradients_that_are_asked_for_are_no_micro_batches() -> None:
    """A gradient penalty takes torch.autograd.grad of the parameters; nothing is added to p.grad."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer)
    for _ in range(4):
        loss = model(torch.randn(5, 3)).square().mean()
        (g,) = torch.autograd.grad(loss, model.weight, create_graph=True)
        (loss + g.square().sum()).backward()
    optimizer.step()
    assert monitor.last is not None
    assert monitor.last["micro_batches"] == 4


def test_a_backward_pass_that_raises_is_forgotten() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer)

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Tensor:
            raise MemoryError("no memory")

    with pytest.raises(MemoryError):
        model[1](Broken.apply(model[0](torch.randn(5, 3)))).mean().backward()
    optimizer.zero_grad()
    for _ in range(4):
        model(torch.randn(5, 3)).mean().backward()
    optimizer.step()
    assert monitor.last is not None
    assert monitor.last["micro_batches"] == 4


def test_micro_batches_without_a_gradient_count() -> None:
    """Fully masked ones, first and last."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer)
    for micro in range(8):
        (model(torch.randn(5, 3)).mean() * (micro % 7 > 2)).backward()
    optimizer.step()
    assert monitor.last is not None
    assert monitor.last["micro_batches"] == 8


def test_a_gan_has_a_monitor_per_optimizer() -> None:
    generator, critic = nn.Linear(2, 3), nn.Linear(3, 1)
    both = nn.ModuleDict({"generator": generator, "critic": critic})
    ours = SignSGD(generator.parameters(), lr=1e-3)
    other = SignSGD(critic.parameters(), lr=1e-3)
    sink = KeepingSink()
    Monitor(both, ours, every=2, sinks=[sink])
    for _ in range(3):
        for _ in range(5):
            critic(generator(torch.randn(4, 2)).detach()).mean().backward()
        other.step()
        other.zero_grad()
        for _ in range(4):
            critic(generator(torch.randn(4, 2))).mean().backward()
        ours.step()
        ours.zero_grad()
    assert [r["micro_batches"] for r in sink.records] == [4, 4]
    assert set(sink.records[0]["reliability"]["layers"]) == {"generator.weight", "generator.bias"}


def test_a_short_last_batch_is_not_measured_and_said() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = SignSGD(model.parameters(), lr=1e-3)
    sink = KeepingSink()
    monitor = Monitor(model, optimizer, every=1, sinks=[sink])
    for size in (32, 9, 32):
        x = torch.randn(size, 3)
        monitor.measure(lambda x: model(x).square().mean(), x)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [r["micro_batches"] for r in sink.records] == [8, 1, 8]
    assert "a batch of 9" in sink.records[1]["reliability"]["reason"]


def test_a_fused_step_that_a_scaler_skips_is_measured_again() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    sink = KeepingSink()
    monitor = Monitor(model, optimizer, every=10, sinks=[sink], scaler=scaler)
    for step in range(2):
        for _ in range(4):
            loss = model(torch.randn(5, 3)).square().mean() * (math.inf if step == 0 else 1.0)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert [(r["step"], r["micro_batches"]) for r in sink.records] == [(0, 4)]
    assert monitor.step == 1


def test_a_sink_that_fails_stops_the_run_once() -> None:
    class Full(KeepingSink):
        def write(self, record: Mapping[str, Any]) -> None:
            raise OSError("no space left on device")

    model = nn.Linear(3, 1)
    optimizer = SignSGD(model.parameters(), lr=1e-3)
    monitor = Monitor(model, optimizer, every=2, sinks=[Full()])
    for step in range(2):
        model(torch.randn(2, 3)).sum().backward()
        with pytest.raises(OSError, match="no space") if step == 0 else nullcontext():
            optimizer.step()
    assert monitor.step == 2


def test_what_cannot_be_monitored_is_refused() -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(ValueError, match="attach_to_backward"):
        Monitor(model, attach_to_backward(model, {"lr": 1e-3, "momentum": 0.0}))
    frozen = nn.Linear(3, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        Monitor(frozen, SignSGD(model.parameters()))
    for parts, batch in ((3, torch.ones(8, 3)), (8, "text")):
        with pytest.raises(ValueError, match="at least 4 parts and a tensor"):
            Monitor(model, SignSGD(model.parameters())).measure(lambda x: x.sum(), batch, parts=parts)


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
