"""FLOPs of a training step, the pattern's pairs only: no tiles, no dense equivalent, no recomputation."""

from __future__ import annotations

from pi_dist.config import ModelConfig
from pi_dist.ops.pattern import layer_patterns


def mean_pairs(config: ModelConfig, context: int) -> float:
    """Query-key pairs of one query in a sequence of one document: mean over positions, heads and layers."""
    return sum(_pairs(config, context)) / config.num_layers


def _pairs(config: ModelConfig, context: int) -> list[float]:
    """Of each layer."""
    found = []
    for pattern in layer_patterns(config, context):
        window = min(pattern.window, context - 1)
        back = window * context - window * (window + 1) // 2  # Σ over offsets o, 1 to k, of n - o
        ring = (back if pattern.causal else 2 * back) + (context if pattern.include_self else 0)
        strides = pattern.head_strides(config.num_heads)
        skips = sum(max(0, context - abs(o)) for stride in strides for o in pattern.skip_offsets(stride))
        found.append((ring + skips / config.num_heads) / context)
    return found


def recomputed_flops_per_token(config: ModelConfig, context: int) -> float:
    """What the backward pass computes once more where all blocks are recomputed.

    Their forward pass but for the MLP's second product, whose output nobody needs again.
    """
    return forward_flops_per_token(config, context) - 8.0 * config.num_layers * config.hidden_size**2


def forward_flops_per_token(config: ModelConfig, context: int) -> float:
    """Of all blocks."""
    head = 6.0 * config.hidden_size * config.vocab_size
    return (training_flops_per_token(config, context) - head) / 3


def keys_flops_per_token(config: ModelConfig, context: int) -> float:
    """Of a chunk's pass for its keys: all blocks, but of the last one only its projection."""
    d, last = config.hidden_size, config.num_layers - 1
    left_out = 18.0 * d * d + 4.0 * d * _pairs(config, context)[last]
    if config.gated(last) and config.gate == "dynamic":
        raises = 0 if config.gate_input == "hidden" else d  # else that is part of the projection
        left_out += 2.0 * (d // 2) * (raises + config.num_heads)
    return forward_flops_per_token(config, context) - left_out


def matmul_parameters(config: ModelConfig) -> int:
    """Elements of every matrix that a token is multiplied with: blocks, the gate, the (tied) head once."""
    d, kv = config.hidden_size, config.kv_heads * config.head_dim
    block = d * (d + 2 * kv) + d * d + 8 * d * d
    gate = d * (d // 2) + (d // 2) * config.num_heads if config.gate == "dynamic" else 0
    gates = sum(config.gated(layer) for layer in range(config.num_layers))
    return config.num_layers * block + gates * gate + d * config.vocab_size


def training_flops_per_token(config: ModelConfig, context: int) -> float:
    """`6·N_matmul + 12·H·head_dim·Σ_l pairs_l`: forward 2 FLOP a multiply-add, backward twice that."""
    pairs = config.num_layers * mean_pairs(config, context)
    return 6.0 * matmul_parameters(config) + 12.0 * config.hidden_size * pairs
