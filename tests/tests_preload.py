"""What the fork server of `distributed.py` imports once, so that a rank starts in tens of milliseconds."""

import torch._dynamo
import torch._inductor.compile_fx
import torch.distributed  # noqa: F401
from deepspeed.runtime.zero import stage3, stage_1_and_2  # noqa: F401

import pi_dist.model.transformer  # noqa: F401
