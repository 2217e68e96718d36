"""Lightning: SignSGD in a LightningModule, with a learning rate schedule, and the monitor as a callback.

Run: python examples/lightning_module.py

It trains a small network on scikit-learn's handwritten digits and prints the test accuracy and how often the monitor
looked. The monitor's records go to monitor.jsonl in a temporary folder.
"""

import tempfile
from pathlib import Path

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from signstep import SignSGD
from signstep.monitor.lightning import MonitorCallback
from signstep.monitor.sinks import JSONLines, read

EPOCHS = 8


class Classifier(pl.LightningModule):
    def __init__(self, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return loss(self, batch)

    def test_step(self, batch: list[Tensor], index: int) -> None:
        x, y = batch
        self.log("test_accuracy", (self.network(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        optimizer = SignSGD(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loss(module: Classifier, batch: list[Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(module.network(x), y)


pl.seed_everything(0, verbose=False)
digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.2, random_state=0)
train = DataLoader(TensorDataset(train_x, train_y), batch_size=32, shuffle=True)
test = DataLoader(TensorDataset(test_x, test_y), batch_size=256)

folder = Path(tempfile.mkdtemp())
records = folder / "monitor.jsonl"
trainer = pl.Trainer(
    max_epochs=EPOCHS,
    accelerator="cpu",
    callbacks=[MonitorCallback(every=50, sinks=[JSONLines(records)], loss=loss)],
    default_root_dir=folder,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
model = Classifier()
trainer.fit(model, train)
(scores,) = trainer.test(model, test, verbose=False)
print(f"steps {trainer.global_step}, looks of the monitor {len(read(records))}")
print(f"test accuracy {scores['test_accuracy']:.1%}")
