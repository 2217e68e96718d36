"""The monitor inside real Trainers: the records are those of a plain loop, over checkpoints too."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from measured import KeepingSink
from signstep import HybridSignSGD, SignSGD
from signstep.monitor import Monitor
from signstep.monitor.callbacks import begin
from signstep.monitor.sinks import JSONLines, flatten, read

STEPS, MICRO, SIZE = 12, 4, 8


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS * MICRO * SIZE, 5, generator=generator)
    return x, (x.sum(dim=1) > 0).long()


def _network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))


def _optimizer(network: nn.Module) -> SignSGD:
    return HybridSignSGD(network.parameters(), lr=1e-2, dither=1.0, dither_scale="relative", weight_decay=0.1)


def _in_a_plain_loop(every: int, steps: int = STEPS, *, epoch: int = STEPS) -> list[Any]:
    """What a training of the same network on the same data, `epoch` steps of it again and again, has to say."""
    sink = KeepingSink()
    network = _network()
    optimizer = _optimizer(network)
    monitor = Monitor(network, optimizer, every=every, sinks=[sink])
    x, y = _data()
    for k in range(steps):
        optimizer.zero_grad()
        for i in range(MICRO):
            first = (k % epoch * MICRO + i) * SIZE
            at = slice(first, first + SIZE)
            (F.cross_entropy(network(x[at]), y[at]) / MICRO).backward()
        optimizer.step()
    monitor.close()
    return sink.records


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """Those that do not hang on how parameters are called."""
    return {name: value for name, value in flatten(record).items() if ".layers" not in name}


def _same(found: list[Any], expected: list[Any]) -> None:
    """The same numbers but for rounding."""
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    assert all(r["micro_batches"] == MICRO for r in found)
    for one, other in zip(found, expected, strict=True):
        assert _numbers(one) == pytest.approx(_numbers(other), rel=2e-4, abs=1e-7)


def test_a_callback_finds_the_optimizer_inside_its_wrappers_and_the_scaler() -> None:
    network = _network()
    optimizer = _optimizer(network)
    plugin = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: 1024.0))
    wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    sink = KeepingSink()
    monitor = begin(network, wrapped, plugin, {"step": 3}, {"every": 3, "sinks": [sink]})  # type: ignore[arg-type]
    assert monitor.step == 3
    x, y = _data()
    for _ in range(4):
        (1024 * F.cross_entropy(network(x), y) / 4).backward()
    for p in network.parameters():
        p.grad /= 1024
    optimizer.step()
    (record,) = sink.records
    g = torch.cat([p.grad.flatten() for p in network.parameters()])
    assert record["reliability"]["alignment"][0] == pytest.approx(float(g.abs().sum()), rel=1e-4)
    monitor.close()


def test_without_the_packages_the_modules_import_and_the_callbacks_say_what_to_install() -> None:
    code = (
        "import sys\n"
        "missing = ('pytorch_lightning', 'lightning', 'lightning.pytorch', 'transformers')\n"
        "sys.modules.update(dict.fromkeys(missing))\n"
        "from signstep.monitor import huggingface, lightning\n"
        "for module in (huggingface, lightning):\n"
        "    try: module.MonitorCallback()\n"
        "    except ImportError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert [line.count("is not installed: pip install") for line in said.splitlines()] == [1, 1]


# Lightning


def _lightning(tmp_path: Path, callbacks: list[Any], *, hurt: int | None = None, **options: Any) -> Any:
    """A Trainer, its module and its data; at micro-batch `hurt` the module raises."""
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = _network()

        def training_step(self, batch: Any, index: int) -> Tensor:
            if index == hurt:
                raise ArithmeticError("hurt")
            x, y = batch
            return F.cross_entropy(self.network(x), y)

        def configure_optimizers(self) -> Any:
            return _optimizer(self.network)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*_data()), batch_size=SIZE, shuffle=False)
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "accumulate_grad_batches": MICRO,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return lightning.Trainer(callbacks=callbacks, **settings | options), Module(), data


def _lightning_callback(**options: Any) -> Any:
    pytest.importorskip("pytorch_lightning")
    from signstep.monitor.lightning import MonitorCallback

    return MonitorCallback(**options)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_says_what_a_plain_loop_says(tmp_path: Path) -> None:
    sink = KeepingSink()
    callback = _lightning_callback(every=5, sinks=[sink])
    trainer, module, data = _lightning(tmp_path, [callback])
    trainer.fit(module, data)
    _same(sink.records, _in_a_plain_loop(5))
    assert "network.0.weight" in sink.records[0]["dither"]["layers"]
    assert callback.monitor is None
    assert sink.closed == 1
    assert not any(p._backward_hooks for p in module.parameters())
    assert callback.state_dict()["step"] == STEPS


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    checkpoints = pytest.importorskip("pytorch_lightning.callbacks").ModelCheckpoint(tmp_path, save_top_k=-1)
    epochs = {"limit_train_batches": 4 * MICRO, "enable_checkpointing": True}
    callbacks = [_lightning_callback(every=3, sinks=[JSONLines(path)]), checkpoints]
    trainer, module, data = _lightning(tmp_path, callbacks, max_epochs=2, **epochs)
    trainer.fit(module, data)
    assert [r["step"] for r in read(path)] == [0, 3, 6]
    # From the end of the first epoch, of 4 steps: step 6 is taken again.
    (first,) = tmp_path.glob("epoch=0*.ckpt")
    callback = _lightning_callback(every=3, sinks=[JSONLines(path)])
    trainer, module, data = _lightning(tmp_path, [callback], max_epochs=3, **epochs)
    trainer.fit(module, data, ckpt_path=first)
    _same(read(path), _in_a_plain_loop(3, epoch=4))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_measures_a_batch_where_asked(tmp_path: Path) -> None:
    def loss(module: Any, batch: Any) -> Tensor:
        x, y = batch
        assert len(x) == SIZE // 4
        return F.cross_entropy(module.network(x), y)

    ends = []
    for options in ({}, {"loss": loss, "parts": 4}):
        sink = KeepingSink()
        callback = _lightning_callback(every=3, sinks=[sink], **options)
        trainer, module, data = _lightning(tmp_path, [callback], accumulate_grad_batches=1)
        trainer.fit(module, data)
        ends.append([p.detach() for p in module.parameters()])
        assert [r["step"] for r in sink.records] == list(range(0, STEPS * MICRO, 3))
        assert all(r["micro_batches"] == (4 if options else 1) for r in sink.records)
        assert all(("alignment" in r["reliability"]) == bool(options) for r in sink.records)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_measures_once_per_own_step_under_accumulation_and_in_bf16(tmp_path: Path) -> None:
    calls = []

    def loss(module: Any, batch: Any) -> Tensor:
        calls.append(torch.is_autocast_enabled("cpu"))
        return F.cross_entropy(module.network(batch[0]), batch[1])

    sink = KeepingSink()
    callback = _lightning_callback(every=6, sinks=[sink], loss=loss, parts=8)
    trainer, module, data = _lightning(tmp_path, [callback], precision="bf16-mixed")
    trainer.fit(module, data)
    assert len(sink.records) == 2
    assert calls == [True] * 16


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_clean_after_an_exception(tmp_path: Path) -> None:
    sink = KeepingSink()
    callback = _lightning_callback(every=1, sinks=[sink])
    trainer, module, data = _lightning(tmp_path, [callback], hurt=10)
    with pytest.raises(ArithmeticError):
        trainer.fit(module, data)
    assert len(sink.records) == 2
    assert sink.closed == 1
    assert callback.monitor is None
    assert not any(p._backward_hooks for p in module.parameters())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_again_in_a_new_trainer_begins_at_0(tmp_path: Path) -> None:
    sink = KeepingSink()
    callback = _lightning_callback(every=5, sinks=[sink])
    for _ in range(2):
        trainer, module, data = _lightning(tmp_path, [callback])
        trainer.fit(module, data)
    assert [r["step"] for r in sink.records] == [0, 5, 10, 0, 5, 10]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_with_two_optimizers_and_manual_steps(tmp_path: Path) -> None:
    lightning = pytest.importorskip("pytorch_lightning")

    class Two(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.one, self.two = _network(), _network()

        def training_step(self, batch: Any, index: int) -> None:
            x, y = batch
            for network, optimizer in zip((self.one, self.two), self.optimizers(), strict=True):
                optimizer.zero_grad()
                for part in range(MICRO):
                    self.manual_backward(F.cross_entropy(network(x[part::MICRO]), y[part::MICRO]) / MICRO)
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [_optimizer(self.one), torch.optim.Adam(self.two.parameters())]

    sinks = [KeepingSink(), KeepingSink()]
    callbacks = [_lightning_callback(every=10, sinks=[sink], optimizer=i) for i, sink in enumerate(sinks)]
    trainer, _, data = _lightning(tmp_path, callbacks, accumulate_grad_batches=1)
    trainer.fit(Two(), data)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    for sink, name in zip(sinks, ("HybridSignSGD", "Adam"), strict=True):
        assert [r["step"] for r in sink.records] == [0, 10, 20, 30, 40]
        assert sink.records[0]["optimizer"] == name
    states = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]
    assert sorted(key for key in states if "MonitorCallback" in key) == [
        "MonitorCallback{'optimizer': 0}",
        "MonitorCallback{'optimizer': 1}",
    ]


# The Hugging Face Trainer


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = _network()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def _huggingface(folder: Path, callbacks: list[Any], **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class InOrder(transformers.Trainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    x, y = _data()
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": SIZE,
        "gradient_accumulation_steps": MICRO,
        "num_train_epochs": 1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    args = transformers.TrainingArguments(**settings | options)
    model = _Model()
    data = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    return InOrder(model, args, train_dataset=data, optimizers=(_optimizer(model), None), callbacks=callbacks)


def _huggingface_callback(**options: Any) -> Any:
    pytest.importorskip("transformers")
    from signstep.monitor.huggingface import MonitorCallback

    return MonitorCallback(**options)


def test_huggingface_says_what_a_plain_loop_says(tmp_path: Path) -> None:
    sink = KeepingSink()
    callback = _huggingface_callback(every=5, sinks=[sink])
    trainer = _huggingface(tmp_path, [callback])
    trainer.train()
    _same(sink.records, _in_a_plain_loop(5))
    assert "network.0.weight" in sink.records[0]["dither"]["layers"]
    assert callback.monitor is None
    assert sink.closed == 1
    assert not any(p._backward_hooks for p in trainer.model.parameters())
    trainer.train()  # from its beginning, as the Trainer counts
    assert [r["step"] for r in sink.records] == [0, 5, 10] * 2


@pytest.mark.parametrize("restore", [False, True])
def test_huggingface_goes_on_from_a_checkpoint(tmp_path: Path, restore: bool) -> None:
    path = tmp_path / "m.jsonl"
    settings = {"save_strategy": "steps", "save_steps": 7, "restore_callback_states_from_checkpoint": restore}
    trainer = _huggingface(tmp_path, [_huggingface_callback(every=2, sinks=[JSONLines(path)])], max_steps=9, **settings)
    trainer.train()
    assert [r["step"] for r in read(path)] == [0, 2, 4, 6, 8]
    trainer = _huggingface(tmp_path, [_huggingface_callback(every=2, sinks=[JSONLines(path)])], **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    _same(read(path), _in_a_plain_loop(2))


def test_huggingface_goes_on_from_a_checkpoint_without_a_monitor(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4}
    _huggingface(tmp_path, [], max_steps=4, **settings).train()
    sink = KeepingSink()
    trainer = _huggingface(tmp_path, [_huggingface_callback(every=5, sinks=[sink])], **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [r["step"] for r in sink.records] == [5, 10]


def test_huggingface_with_clipping_sees_micro_batches_before_it(tmp_path: Path) -> None:
    sink = KeepingSink()
    trainer = _huggingface(tmp_path, [_huggingface_callback(every=50, sinks=[sink])], max_grad_norm=1e-3)
    trainer.train()
    (record,), (expected,) = sink.records, _in_a_plain_loop(50, steps=1)
    assert record["reliability"]["phi"] == pytest.approx(expected["reliability"]["phi"], rel=1e-4)
    assert record["dither"]["rms"] < 0.1 * expected["dither"]["rms"]


def test_huggingface_on_other_ranks_does_nothing(tmp_path: Path) -> None:
    callback = _huggingface_callback()
    callback.on_train_begin(None, SimpleNamespace(is_world_process_zero=False), None)
    assert callback.monitor is None
    callback.on_step_end(None, SimpleNamespace(), None)
    callback.on_train_end(None, None, None)
