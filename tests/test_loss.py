"""The tiled loss and its kernel: against PyTorch's own, in Triton's interpreter or on a GPU."""

import os

import pytest
import torch
import torch.nn.functional as F

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"  # see kernel_calls.py

from pi_dist.kernels import cross_entropy
from pi_dist.model import loss
from pi_dist.model.loss import IGNORE, summed_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter computes bf16 wrongly
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32, torch.float16]


def draw(rows, vocab, width=8, seed=0, dtype=torch.float32):
    """hidden [rows, width], weight [vocab, width], labels [rows], every third one absent."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, width, generator=generator).to(dtype) for n in (rows, vocab))
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[::3] = IGNORE
    return hidden.to(DEVICE), weight.to(DEVICE), labels.to(DEVICE)


@pytest.mark.parametrize("rows", [1, 50, 5000])
def test_summed_cross_entropy_and_its_gradients(rows):
    """Against PyTorch's own, in several tiles (5000 rows, a vocabulary of 30,000), some labels absent."""
    hidden, weight, labels = draw(rows, 30_000 if rows == 5000 else 37)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    found = summed_cross_entropy(*leaves, labels)
    expected = F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(0.3 * found, leaves), torch.autograd.grad(0.3 * expected, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_adds_weight_gradients_up_in_fp32(autocast, monkeypatch):
    """In 20 tiles, with bf16 parameters or with fp32 ones under autocast: as exact as one product in fp32."""
    monkeypatch.setattr(loss, "_PLAIN_ELEMENTS", 128 * 37)
    monkeypatch.setattr(loss, "KERNEL_ELEMENTS", 128 * 37)
    hidden, weight, labels = draw(20 * 128, 37, dtype=torch.bfloat16)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    if autocast:
        hidden, weight = hidden.float(), weight.float()
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        found = summed_cross_entropy(*leaves, labels)
    expected = F.cross_entropy(exact[0] @ exact[1].T, labels, ignore_index=IGNORE, reduction="sum")
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=1e-3)
    gradients = torch.autograd.grad(found, leaves)
    assert [g.dtype for g in gradients] == [x.dtype for x in leaves]
    for a, b in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        assert (a - b).norm() < 0.005 * b.norm()


def test_no_gradient_is_formed_where_none_is_wanted(monkeypatch):
    asked = []
    monkeypatch.setattr(
        loss, "cross_entropy_", lambda logits, *rest: asked.append(rest[-1]) or logits.new_zeros(len(logits))
    )
    monkeypatch.setattr(cross_entropy, "cross_entropy_", loss.cross_entropy_)
    hidden, weight, labels = draw(4, 7)
    summed_cross_entropy(hidden, weight.requires_grad_(), labels)
    with torch.no_grad():
        summed_cross_entropy(hidden, weight, labels)
    assert asked == [True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 37, 64, 100, 257])
@pytest.mark.parametrize("block", [16, 64, 8192])
def test_the_kernel_is_the_plain_version(vocab, block, dtype, monkeypatch):
    """Losses and the gradient in place, rows in one piece and in many; large logits do not overflow."""
    monkeypatch.setattr(cross_entropy, "BLOCK", block)
    generator = torch.Generator().manual_seed(vocab)
    logits = (30 * torch.randn(9, vocab, generator=generator)).to(dtype).to(DEVICE)
    targets = torch.randint(0, vocab, (9,), generator=generator).to(DEVICE)
    targets[::4] = IGNORE
    for with_gradient in (False, True):
        ours, plain = logits.clone(), logits.clone()
        found = cross_entropy.cross_entropy_(ours, targets, IGNORE, with_gradient)
        expected = loss.cross_entropy_(plain, targets, IGNORE, with_gradient)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        if with_gradient:
            limits = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.01, "atol": 1e-6}
            torch.testing.assert_close(ours, plain, **limits)
        else:
            assert torch.equal(ours, logits)


def test_a_logit_that_is_not_finite_is_not_hidden():
    logits = torch.zeros(2, 20, device=DEVICE)
    logits[0, 3] = float("nan")
    found = cross_entropy.cross_entropy_(logits, torch.tensor([1, 1], device=DEVICE), IGNORE, True)
    assert found[0].isnan() and found[1].isfinite()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_through_the_kernel_as_exact_as_plain_pytorch(dtype):
    """50,304 words, several tiles: no farther from fp64 than logits in the same dtype without the kernel."""
    hidden, weight, labels = draw(12_000, 50_304, 64, dtype=dtype)
    hidden, weight = (x.mul_(0.3).requires_grad_() for x in (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = torch.autograd.grad(
        F.cross_entropy(exact[0] @ exact[1].T, labels, ignore_index=IGNORE, reduction="sum"), exact
    )
    plain = F.cross_entropy((hidden @ weight.T).float(), labels, ignore_index=IGNORE, reduction="sum")
    plain_gradients = torch.autograd.grad(plain, (hidden, weight))
    gradients = torch.autograd.grad(summed_cross_entropy(hidden, weight, labels), (hidden, weight))
    for ours, theirs, right in zip(gradients, plain_gradients, expected, strict=True):
        error, floor = ((x - right).norm() / right.norm() for x in (ours, theirs))
        assert error < 1.1 * floor + 1e-5
