"""The π-Transformer: pre-norm blocks of attention and GELU MLP, tied embeddings.

Compiled, a block is two graphs around the attention operator, which stays as it is with its own kernels,
streams and collectives. The graphs read no number of a layer, so all layers of a kind share them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from pi_dist.config import Config, ModelConfig, compiles
from pi_dist.model.attention import Attention, SequenceContext
from pi_dist.model.loss import summed_cross_entropy
from pi_dist.model.rotary import rotary_table
from pi_dist.model.tiles import in_tiles
from pi_dist.ops.pattern import PiPattern, layer_patterns
from pi_dist.parallel.host_memory import HostMemory, inputs_in_host_memory

GELU_SLOPE = 2 * math.sqrt(2 / math.pi)


class AddedLinear(nn.Linear):
    """x + W·h without bias, of x [B, m, d] and h [B, m, 4d]."""

    def forward(self, x: torch.Tensor, h: torch.Tensor, only_gradients: bool = False) -> torch.Tensor:
        """only_gradients: the values are known, and what is returned stands for them in autograd's graph."""
        if not only_gradients:
            return x + F.linear(h, self.weight)
        device, weight = x.device.type, self.weight
        if torch.is_autocast_enabled(device):
            h, weight = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (h, weight))
        return _OnlyGradients.apply(x, h, weight)


class _OnlyGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h, weight):
        ctx.save_for_backward(h, weight)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        h, weight = ctx.saved_tensors
        flat = dout.flatten(0, -2).to(h.dtype)
        return dout, (flat @ weight).view_as(h), flat.t() @ h.flatten(0, -2)


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`; the MLP is 4d wide with GELU.

    recomputed: a pass with gradients is the second one, whose output nobody reads.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        pattern: PiPattern,
        mlp_tile_tokens: int | None = None,
        recomputed: bool = False,
    ) -> None:
        super().__init__()
        self.mlp_tile_tokens, self.recomputed = mlp_tile_tokens, recomputed
        d = config.hidden_size
        self.attention_norm = nn.LayerNorm(d)
        self.attention = Attention(config, layer, pattern)
        self.mlp_norm = nn.LayerNorm(d)
        self.mlp_up = nn.Linear(d, 4 * d, bias=False)
        self.mlp_down = AddedLinear(4 * d, d, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        table: tuple[torch.Tensor, torch.Tensor],
        context: SequenceContext,
        pieces: Pieces,
        keys_only: bool = False,
    ) -> torch.Tensor:
        """The next block's x; keys_only: nobody reads that, and only the keys of a chunk are wanted."""
        if keys_only:
            self.attention.keep_keys(pieces.before(self, x.detach()), table, context)
            return x
        if self.mlp_tile_tokens is not None:
            return self.feed_forward(self.attend(x, table, context, pieces), pieces)
        only_gradients = self.recomputed and torch.is_grad_enabled()
        return pieces.after(self, *self._attended(x, table, context, pieces), only_gradients)

    def attend(
        self,
        x: torch.Tensor,
        table: tuple[torch.Tensor, torch.Tensor],
        context: SequenceContext,
        pieces: Pieces,
    ) -> torch.Tensor:
        """The first half, of a block whose second half is in tiles."""
        x, attended = self._attended(x, table, context, pieces)
        return x + self.attention.out(attended)

    def feed_forward(self, x: torch.Tensor, pieces: Pieces) -> torch.Tensor:
        """The second half, in tiles, of which the backward pass computes one at a time again."""
        norm = self.mlp_norm
        parameters = (norm.weight, norm.bias, self.mlp_up.weight, self.mlp_down.weight)
        return in_tiles(pieces.second_half, x, parameters, self.mlp_tile_tokens)

    def _attended(
        self,
        x: torch.Tensor,
        table: tuple[torch.Tensor, torch.Tensor],
        context: SequenceContext,
        pieces: Pieces,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, what the attention operator makes of it)."""
        if not torch.is_grad_enabled():
            x = x.detach()  # one graph for evaluation and for the first pass of a recomputed block
        return x, self.attention.attend(pieces.before(self, x), table, context)


def before_attention(block: Block, x: torch.Tensor) -> torch.Tensor:
    """x [B, m, d] to what `Attention.attend` takes."""
    return block.attention.projection(block.attention_norm(x))


def after_attention(
    block: Block, x: torch.Tensor, attended: torch.Tensor, only_gradients: bool = False
) -> torch.Tensor:
    """x and what `Attention.attend` returned, [B, m, d], to the next block's x."""
    x = x + block.attention.out(attended)
    return block.mlp_down(x, gelu(block.mlp_up(block.mlp_norm(x))), only_gradients)


def second_half(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """What `after_attention` does to its sum x [B, m, d]; the parameters are those of norm and MLP."""
    normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
    return x + F.linear(gelu(F.linear(normed, up)), down)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU by tanh: x·(1 + tanh u)/2, u = √(2/π)·(x + 0.044715·x³) (Hendrycks, Gimpel, arXiv 1606.08415).

    Compiled, as x·sigmoid(2u), which is the same: that kernel is as fast as a copy; those of tanh and of erf
    wait for arithmetic.
    """
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    return x * torch.sigmoid(GELU_SLOPE * (x + 0.044715 * x * x * x))


class Pieces(NamedTuple):
    """The functions that a block is made of, or what stands for them."""

    before: Callable[..., Any] = before_attention
    after: Callable[..., Any] = after_attention
    second_half: Callable[..., Any] = second_half


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
        activation_checkpointing: what the backward pass computes again: True, every block; "selective", its
            norms and GELU.
        activation_offload: keep the inputs of recomputed blocks in host memory.
        mlp_tile_tokens: tokens of a tile of the MLP, which is then recomputed by tiles; None: all at once.
        compiled: compile what is around the attention operator.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: int,
        seed: int = 0,
        activation_checkpointing: bool | Literal["selective"] = False,
        activation_offload: bool = False,
        mlp_tile_tokens: int | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.activation_checkpointing = config, activation_checkpointing
        self.host_memory = HostMemory() if activation_offload else None
        self.pieces = Pieces()
        if activation_checkpointing == "selective":
            kept = map(keeping_products, (self.pieces.before, self.pieces.after))
            self.pieces = Pieces(*kept)
        if compiled:
            self.pieces = Pieces(*map(torch.compile, self.pieces))
        self.patterns = layer_patterns(config, context)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(config, layer, pattern, mlp_tile_tokens, activation_checkpointing is True)
            for layer, pattern in enumerate(self.patterns)
        )
        self.norm = nn.LayerNorm(config.hidden_size)
        self._initialize(seed)

    @classmethod
    def of_run(cls, config: Config, device_type: str) -> PiTransformer:
        """The model of a run's configuration, still on the CPU, for a device of this type."""
        t = config.training
        return cls(
            config.model,
            t.context,
            t.seed,
            t.activation_checkpointing,
            t.activation_offload,
            t.mlp_tile_tokens,
            compiles(config, device_type),
        )

    def _initialize(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("attention.out.weight", "mlp_down.weight"))
                std = 0.02 / (2 * self.config.num_layers) ** 0.5 if residual else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, tokens: torch.Tensor, context: SequenceContext, head: bool = True) -> torch.Tensor:
        """Final hidden states [B, m, d] of tokens [B, m]; without the head, what the last block sees."""
        x = self.embedding(tokens)
        table = rotary_table(
            context.starts, tokens.shape[1], self.config.head_dim, self.config.rope_theta, tokens.device
        )
        recompute = self.activation_checkpointing is True and torch.is_grad_enabled()
        offload = recompute and self.host_memory is not None
        with inputs_in_host_memory(self.host_memory) if offload else nullcontext():
            for block in self.blocks:
                arguments = (x, table, context, self.pieces)
                if not recompute:
                    x = block(*arguments, keys_only=not head and block is self.blocks[-1])
                    continue
                tiled = block.mlp_tile_tokens is not None  # then its second half recomputes itself
                # nothing in a block draws from a global generator: dropout is keyed by position
                x = checkpoint(
                    block.attend if tiled else block, *arguments, use_reentrant=True, preserve_rng_state=False
                )
                x = block.feed_forward(x, self.pieces) if tiled else x
        return self.norm(x) if head else x

    def forward(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor | None = None,
        context: SequenceContext | None = None,
        head: bool = True,
    ) -> torch.Tensor:
        """Logits [B, m, V], or with labels [B, m] (already shifted; -100: none) the summed loss in nats.

        Without the head a pass, without gradients, for the keys of a chunk that it leaves in `context`.
        """
        x = self.hidden(tokens, context or SequenceContext(), head)
        if not head:
            return x
        if labels is None:
            return F.linear(x, self.embedding.weight)
        return summed_cross_entropy(x.flatten(0, 1), self.embedding.weight, labels.flatten())

    def num_parameters(self) -> int:
        """Parameters, tied ones once (also where ZeRO-3 holds only a part here)."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.parameters())
