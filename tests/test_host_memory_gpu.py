"""Pinned memory and the stream of its copies, on a GPU: bits as without it, and memory that it saves."""

import pytest
import torch

from pi_dist.config import ModelConfig, ParallelConfig
from pi_dist.data.loader import Batch
from pi_dist.model.transformer import PiTransformer
from pi_dist.parallel.host_memory import HostMemory, Movable
from pi_dist.parallel.kept_keys import Placement
from pi_dist.parallel.mesh import Mesh
from pi_dist.training.streaming import streamed_losses

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
LENGTH, CHUNK = 2**17, 2**12
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=256,
    num_heads=4,
    vocab_size=512,
    window=64,
    num_skips=8,
    strides=[65, 600, 4096, 12_000],  # the last ones skip over chunks
)


def train(placement, chunk_tokens, recompute=False, offload=False):
    """(losses, gradients but the embedding's, added up in any order, peak bytes) of a second step."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 512, (1, LENGTH), generator=generator, dtype=torch.int32)
    model = PiTransformer(MODEL, LENGTH, 1, recompute, offload).to(DEVICE, torch.bfloat16)
    batch = Batch(tokens, tokens.roll(-1, 1), None, (0,), 0)
    mesh = Mesh(0, 1, 1, DEVICE, None)
    for _ in range(2):  # the second uses the buffers of the first again
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        losses = []
        for loss in streamed_losses(model, mesh, batch, ParallelConfig(), 0, chunk_tokens, placement):
            losses.append(loss.detach())
            (loss / LENGTH).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "embedding" not in name}
    return torch.stack(losses), gradients, torch.cuda.max_memory_allocated()


def assert_same_bits(found, expected):
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_kept_rows_in_pinned_memory_change_no_bit(spread, recompute):
    device = train(Placement(), CHUNK, recompute)
    host = train(Placement(HostMemory(), spread), CHUNK, recompute)
    assert_same_bits(host, device)
    assert host[2] < device[2]


def test_block_inputs_in_pinned_memory_change_no_bit():
    device = train(Placement(), None, recompute=True)
    host = train(Placement(), None, recompute=True, offload=True)
    assert_same_bits(host, device)
    assert host[2] < device[2]


def test_copies_wait_for_work_and_work_for_copies():
    """Many round trips behind long kernels, each changed in between: a missing wait would show."""
    memory, expected = HostMemory(), []
    busy = torch.randn(4096, 4096, device=DEVICE)
    tensors = [Movable(torch.full((1 << 20,), float(i), device=DEVICE), memory) for i in range(8)]
    for turn in range(4):
        for tensor in tensors:
            busy = busy @ busy * 1e-3
            tensor.get_to_change().add_(1.0 + busy.sum() * 0)
            tensor.save()
            tensor.leave()
        for tensor in reversed(tensors):
            tensor.fetch()
        expected = [i + turn + 1.0 for i in range(8)]
    busy = None
    assert [tensor.get().unique().tolist() for tensor in tensors] == [[value] for value in expected]
