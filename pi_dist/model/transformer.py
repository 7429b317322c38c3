"""The π-Transformer: pre-norm blocks of attention and GELU MLP, tied embeddings.

Compiled, a block is two graphs around the attention operator, which stays as it is with its streams and
collectives. The graphs read no number of a layer, so all layers of a kind share them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from pi_dist.config import ModelConfig
from pi_dist.model.attention import Attention, SequenceContext
from pi_dist.model.loss import summed_cross_entropy
from pi_dist.model.rotary import rotary_table
from pi_dist.ops.pattern import PiPattern, layer_patterns


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`; the MLP is 4d wide with GELU."""

    def __init__(self, config: ModelConfig, layer: int, pattern: PiPattern) -> None:
        super().__init__()
        d = config.hidden_size
        self.attention_norm = nn.LayerNorm(d)
        self.attention = Attention(config, layer, pattern)
        self.mlp_norm = nn.LayerNorm(d)
        self.mlp_up = nn.Linear(d, 4 * d, bias=False)
        self.mlp_down = nn.Linear(4 * d, d, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        table: tuple[torch.Tensor, torch.Tensor],
        context: SequenceContext,
        pieces: Pieces,
    ) -> torch.Tensor:
        before, after = pieces
        if not torch.is_grad_enabled():
            x = x.detach()  # one graph for evaluation and for the first pass of a recomputed block
        return after(self, x, self.attention.attend(*before(self, x, table), context))


def before_attention(block: Block, x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]):
    """x [B, m, d] to what `Attention.attend` takes."""
    return block.attention.project(block.attention_norm(x), table)


def after_attention(block: Block, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """x and what `Attention.attend` returned, [B, m, d], to the next block's x."""
    x = x + block.attention.out(attended)
    return x + block.mlp_down(F.gelu(block.mlp_up(block.mlp_norm(x))))


Pieces = tuple[Callable[..., Any], ...]  # the two functions above, or what stands for them
PIECES: Pieces = (before_attention, after_attention)
PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]


def keeping_products(piece: Callable[..., Any]) -> Callable[..., Any]:
    """`piece`, whose backward pass finds inputs and matrix products, and computes the rest again."""
    contexts = partial(create_selective_checkpoint_contexts, PRODUCTS)
    return partial(checkpoint, piece, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


class PiTransformer(nn.Module):
    """A language model over a shard of a sequence (the whole sequence is a shard of one).

    Args:
        config: the model; `vocab_size` must be set.
        context: training context, which sets the default number of strides of a schedule.
        seed: initialization, equal on every rank: N(0, 0.02), output projections of a block
            N(0, 0.02 / sqrt(2L)).
        activation_checkpointing: what the backward pass computes again: True, every block; "selective", all
            of it but matrix products and attention.
        compiled: compile what is around the attention operator.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: int,
        seed: int = 0,
        activation_checkpointing: bool | Literal["selective"] = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.activation_checkpointing = config, activation_checkpointing
        pieces = map(keeping_products, PIECES) if activation_checkpointing == "selective" else PIECES
        self.pieces: Pieces = tuple(map(torch.compile, pieces) if compiled else pieces)
        self.patterns = layer_patterns(config, context)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(config, layer, pattern) for layer, pattern in enumerate(self.patterns)
        )
        self.norm = nn.LayerNorm(config.hidden_size)
        self._initialize(seed)

    def _initialize(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("attention.out.weight", "mlp_down.weight"))
                std = 0.02 / (2 * self.config.num_layers) ** 0.5 if residual else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, tokens: torch.Tensor, context: SequenceContext) -> torch.Tensor:
        """Final hidden states [B, m, d] of tokens [B, m]."""
        x = self.embedding(tokens)
        table = rotary_table(
            context.starts, tokens.shape[1], self.config.head_dim, self.config.rope_theta, tokens.device
        )
        for block in self.blocks:
            if self.activation_checkpointing is True and torch.is_grad_enabled():
                # nothing in a block draws from a global generator: dropout is keyed by position
                x = checkpoint(
                    block, x, table, context, self.pieces, use_reentrant=True, preserve_rng_state=False
                )
            else:
                x = block(x, table, context, self.pieces)
        return self.norm(x)

    def forward(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor | None = None,
        context: SequenceContext | None = None,
        head: bool = True,
    ) -> torch.Tensor:
        """Logits [B, m, V], or with labels [B, m] (already shifted; -100: none) the summed loss in nats.

        Without the head the final hidden states [B, m, d]: a pass for the keys that it leaves in `context`.
        """
        x = self.hidden(tokens, context or SequenceContext())
        if not head:
            return x
        if labels is None:
            return F.linear(x, self.embedding.weight)
        return summed_cross_entropy(x.flatten(0, 1), self.embedding.weight, labels.flatten())

    def num_parameters(self) -> int:
        """Parameters, tied ones once (also where ZeRO-3 holds only a part here)."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.parameters())
