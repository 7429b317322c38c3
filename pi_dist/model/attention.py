"""The attention layer: projections, gate, sequence-parallel operator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from pi_dist.config import ModelConfig
from pi_dist.model.rotary import rotate
from pi_dist.ops.dropout import derive_seed
from pi_dist.ops.pattern import PiPattern
from pi_dist.parallel.pi_attention import sequence_parallel_pi_attention


@dataclass(frozen=True)
class SequenceContext:
    """Where the tokens of a forward pass lie in the whole sequence, and who holds the rest.

    Shared by all layers.

    Attributes:
        labels: [B, n] document of every token of the whole sequence, negative for padding; None: one
            document.
        query_start: global position of the first token here. row_start: global number of the first batch row.
        seed: of this step and micro-step, for dropout.
        group: the ranks that share the sequence; None: this one alone.
        fused_exchange: see `sequence_parallel_pi_attention`.
    """

    labels: torch.Tensor | None = None
    query_start: int = 0
    row_start: int = 0
    seed: int = 0
    group: dist.ProcessGroup | None = None
    fused_exchange: bool = False


class Gate(nn.Module):
    """α of eq. (4), one value per token and head, fp32.

    dynamic: `sigmoid(W2·gelu(W1·u + b1) + b2)` with hidden width d/2; static: one learned value per head.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.static = config.gate == "static"
        if self.static:
            self.logit = nn.Parameter(torch.zeros(config.num_heads))
        else:
            self.up = nn.Linear(config.hidden_size, config.hidden_size // 2)
            self.down = nn.Linear(config.hidden_size // 2, config.num_heads)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """[B, T, d] to α [B, T, H]. The pre-activation stays fp32: bf16 would round α to 1 from 7 on."""
        if self.static:
            return torch.sigmoid(self.logit.float()).expand(*u.shape[:2], -1)
        hidden = F.gelu(self.up(u)).float()
        with torch.autocast(u.device.type, enabled=False):
            return torch.sigmoid(F.linear(hidden, self.down.weight.float(), self.down.bias.float()))


class PiAttention(nn.Module):
    """π-attention with rotary positions; q, k and v come from one projection."""

    def __init__(self, config: ModelConfig, layer: int, pattern: PiPattern) -> None:
        super().__init__()
        self.config, self.layer, self.pattern = config, layer, pattern
        kv_size = config.kv_heads * config.head_dim
        self.sizes = [config.hidden_size, kv_size, kv_size]
        self.qkv = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        # with the window or the skips off there is nothing to weigh, and no prior is added
        gated = config.gate != "none" and config.ring and config.skip and config.num_skips > 0
        self.gate = Gate(config) if gated else None

    def forward(
        self, x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], context: SequenceContext
    ) -> torch.Tensor:
        """[B, m, d] to [B, m, d]; `table` as from `rotary_table` for this shard's positions."""
        config = self.config
        query, key, value = self.qkv(x).split(self.sizes, dim=-1)
        gate = None if self.gate is None else self.gate(query if config.gate_input == "query" else x)
        q, k, v = (
            part.unflatten(-1, (-1, config.head_dim)) for part in (query, key, value)
        )  # [B, m, heads, D]
        attended = sequence_parallel_pi_attention(
            rotate(q, table),
            rotate(k, table),
            v,
            gate,
            self.pattern,
            context.group,
            labels=context.labels,
            logit_cap=config.logit_cap,
            dropout_p=config.attention_dropout if self.training else 0.0,
            seed=derive_seed(context.seed, self.layer),
            row_start=context.row_start,
            fused_exchange=context.fused_exchange,
        )
        return self.out(attended.flatten(2))
