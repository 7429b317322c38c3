"""What the fork server of `distributed.py` imports once, so that a rank starts in tens of milliseconds."""

import torch._dynamo  # noqa: F401
import torch.distributed  # noqa: F401
