"""A small GPT over bytes: the decoder of a transformer, with layer norm before each part of a block.

Radford et al., 2019, "Language models are unsupervised multitask learners" (GPT-2): learned positions, the output
layer shares the weights of the byte embedding, GELU, four times the width inside an MLP. Without dropout and without
biases, as Karpathy's nanoGPT trains it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256

SIZES = {"gpt": (4, 128, 4, 128), "gpt2": (12, 768, 12, 1024)}
"""By model: layers, width, heads, and its own context."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)).

    Args:
        width: of a position's vector, a multiple of `heads`.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attention = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] to the same; position t depends on the positions to t alone."""
        batch, length, width = x.shape
        split = self.attention(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each [B, heads, T, width / heads]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        hidden: Tensor = self.mlp_out(F.gelu(self.mlp(self.norm2(x))))
        return x + hidden


class GPT(nn.Module):
    """Embedding of bytes and positions, blocks, norm, and the embedding's transpose.

    Args:
        layers: blocks.
        width: of a position's vector, a multiple of `heads`.
        heads: of the attention.
        context: the longest sequence, in bytes.

    Every weight starts from N(0, 0.02^2), the last one of each part of a block from N(0, 0.02^2 / (2 layers)), so that
    the sum over the blocks begins as wide as one of them; the scales of the norms start at 1.
    """

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                last = 2 * layers if name.endswith("_out") else 1
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(last))

    def forward(self, x: Tensor) -> Tensor:
        """Bytes [B, T], int64 0..255, T at most `context`, to the logits of each next byte, [B, T, 256]."""
        positions = self.positions(torch.arange(x.shape[1], device=x.device))
        return F.linear(self.norm(self.blocks(self.bytes(x) + positions)), self.bytes.weight)


def context_of(model: str, context: int | None) -> int:
    """Bytes of a sequence: `context`, or the model's own."""
    return SIZES[model][3] if context is None else context


def build(model: str, *, width: float = 1.0, context: int | None = None) -> GPT:
    """A freshly initialised GPT; the initial weights come from torch's global CPU generator.

    Args:
        model: "gpt" (4 layers of width 128 with 4 heads, context 128) or "gpt2" (12 of 768 with 12, context 1024).
        width: the width of a head is multiplied by this and rounded, to at least 1.
        context: the longest sequence, in bytes; None: the model's own.

    Raises:
        ValueError: unknown model, or a width or context that is not positive.

    Example:
        >>> sum(p.numel() for p in build("gpt").parameters())
        836736
    """
    if model not in SIZES:
        raise ValueError(f"model={model!r}: expected one of {', '.join(SIZES)}")
    if not width > 0 or (context is not None and context < 1):
        raise ValueError(f"width={width!r}, context={context!r}: expected both above 0")
    layers, base, heads, _ = SIZES[model]
    return GPT(layers, heads * max(1, round(base / heads * width)), heads, context_of(model, context))
