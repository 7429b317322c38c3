"""The attention layer: projection, gate, sequence-parallel operator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from pi_dist.config import ModelConfig
from pi_dist.model.gate import Gate
from pi_dist.model.rotary import split_projection
from pi_dist.ops.dropout import derive_seed
from pi_dist.ops.pattern import PiPattern
from pi_dist.parallel.kept_keys import KeptKeys
from pi_dist.parallel.pi_attention import keep_keys, sequence_parallel_pi_attention
from pi_dist.parallel.ring_attention import ring_attention
from pi_dist.parallel.ulysses import ulysses_attention


@dataclass(frozen=True)
class SequenceContext:
    """Where the tokens of a forward pass lie in the whole sequence, and who holds the rest.

    Shared by all layers.

    Attributes:
        labels: [B, n] document of every token of the whole sequence, negative for padding; None: one
            document.
        starts: global positions where the equally long runs of tokens here begin: one run, or two, see
            `shard_starts`. row_start: global number of the first batch row.
        seed: of this step and micro-step, for dropout.
        group: the ranks that share the sequence; None: this one alone.
        fused_exchange, overlap: see `sequence_parallel_pi_attention`.
        kept: of each layer, what is kept of earlier chunks; None: the sequence is not in chunks.
        chunk: number of the chunk that the tokens are.
    """

    labels: torch.Tensor | None = None
    starts: tuple[int, ...] = (0,)
    row_start: int = 0
    seed: int = 0
    group: dist.ProcessGroup | None = None
    fused_exchange: bool = False
    overlap: str = "interior"
    kept: Mapping[int, KeptKeys] | None = None
    chunk: int = 0


class Attention(nn.Module):
    """Attention by the layer's method, with rotary positions: `projection`, `attend`, then the matrix `out`.

    q, k, v and what the gate has `projected` come from one matrix.
    """

    def __init__(self, config: ModelConfig, layer: int, pattern: PiPattern) -> None:
        super().__init__()
        self.config, self.layer, self.pattern = config, layer, pattern
        self.method = config.methods[layer]
        gated = config.gated(layer)
        self.gate = Gate(config) if gated else None
        columns = (config.num_heads + 2 * config.kv_heads) * config.head_dim
        columns += self.gate.projected if gated else 0
        self.projection = nn.Linear(config.hidden_size, columns, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def split(
        self, projected: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What `projection` gives to (q [B, m, H, D], k, v [B, m, H_kv, D], gate [B, m, H] or None).

        q and k are rotated; `table` as from `rotary_table` for this shard's positions.
        """
        heads = self.config.num_heads, self.config.kv_heads
        q, k, v, raised = split_projection(projected, table, *heads)
        if self.gate is None:
            return q, k, v, None
        query = projected[..., : self.config.hidden_size]  # before it is rotated
        return q, k, v, self.gate(raised if self.gate.projected else query)

    def attend(
        self, projected: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], context: SequenceContext
    ) -> torch.Tensor:
        """What `projection` gives to [B, m, d]: the operator, and the exchange of keys with other ranks."""
        return self._operator(*self.split(projected, table), context).flatten(2)

    def keep_keys(
        self, projected: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], context: SequenceContext
    ) -> None:
        """Of `attend` what later chunks need."""
        _, k, v, _ = split_projection(projected, table, self.config.num_heads, self.config.kv_heads)
        keep_keys(
            k,
            v,
            self.config.num_heads,
            self.pattern,
            context.group,
            fused_exchange=context.fused_exchange,
            kept=context.kept[self.layer],
            chunk=context.chunk,
        )

    def _operator(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gate: torch.Tensor | None,
        context: SequenceContext,
    ) -> torch.Tensor:
        match self.method:
            case "pi" | "window":
                return sequence_parallel_pi_attention(
                    q,
                    k,
                    v,
                    gate,
                    self.pattern,
                    context.group,
                    labels=context.labels,
                    logit_cap=self.config.logit_cap,
                    dropout_p=self.config.attention_dropout if self.training else 0.0,
                    seed=derive_seed(context.seed, self.layer),
                    row_start=context.row_start,
                    fused_exchange=context.fused_exchange,
                    overlap=context.overlap,
                    kept=None if context.kept is None else context.kept[self.layer],
                    chunk=context.chunk,
                )
            case "dense" | "ring":
                balanced = len(context.starts) == 2
                return ring_attention(q, k, v, context.group, labels=context.labels, balanced=balanced)
            case "ulysses":
                return ulysses_attention(q, k, v, context.group, labels=context.labels)
        raise ValueError(
            f"method ({self.method!r}) in ('pi', 'window', 'dense', 'ring', 'ulysses') does not hold"
        )
