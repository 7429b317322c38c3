"""What is computed, on one device: the π-attention operator, its pattern and its oracle."""

from pi_dist.ops.pattern import PiPattern
from pi_dist.ops.pi_attention import pi_attention

__all__ = ["PiPattern", "pi_attention"]
