"""The Hugging Face Trainer: SignSGD by its class, HybridSignSGD as an object, and resuming from a checkpoint.

Run: python examples/huggingface_trainer.py

A small GPT-2, made from a configuration and not downloaded, learns to predict the bytes of Python's own help texts.
With `optimizer_cls_and_kwargs` the Trainer makes the param_groups, so that biases and norms have no weight decay. With
`optimizers` you make the optimizer; the Trainer makes its schedule where you give None. It prints the loss on texts
that it has not seen, and whether a Trainer that goes on from a checkpoint ends with the same bits.
"""

import math
import tempfile
from pydoc_data.topics import topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from signstep import HybridSignSGD, SignSGD

CONTEXT = 32

text = torch.tensor(list("".join(topics.values()).encode()[: 1100 * CONTEXT]))
examples = [{"input_ids": piece, "labels": piece} for piece in text.split(CONTEXT)]
train_set, test_set = examples[:960], examples[960:]

folder = tempfile.mkdtemp()
args = TrainingArguments(
    folder,
    num_train_epochs=2,
    per_device_train_batch_size=32,
    per_device_eval_batch_size=70,
    weight_decay=0.1,
    save_strategy="epoch",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
)


def build() -> GPT2LMHeadModel:
    set_seed(0)
    size = {"vocab_size": 256, "n_positions": CONTEXT, "n_embd": 64, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**size, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def trainer(model: GPT2LMHeadModel, **options) -> Trainer:
    return Trainer(model, args, train_dataset=train_set, eval_dataset=test_set, **options)


def bits_per_byte(trainer: Trainer) -> float:
    return trainer.evaluate()["eval_loss"] / math.log(2)


by_class = {"optimizer_cls_and_kwargs": (SignSGD, {"lr": 3e-3, "weight_decay": 0.1})}
first = trainer(build(), **by_class)
print(f"before: {bits_per_byte(first):.2f} bits per byte")
first.train()
print(f"SignSGD: {bits_per_byte(first):.2f} bits per byte")

resumed = trainer(build(), **by_class)
resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-30")  # after one of two epochs
pairs = zip(first.model.parameters(), resumed.model.parameters(), strict=True)
print(f"resumed from the checkpoint: the same bits: {all(torch.equal(a, b) for a, b in pairs)}")

model = build()
optimizer = HybridSignSGD(model.parameters(), lr=3e-3, switch_step=30, sgd_momentum=0.9)
hybrid = trainer(model, optimizers=(optimizer, None))
hybrid.train()
print(f"HybridSignSGD, in the end in its phase {optimizer.phase!r}: {bits_per_byte(hybrid):.2f} bits per byte")
