"""A micro-batch's forward and backward pass as two CUDA graphs.

The host launches two graphs where it would launch a thousand kernels and collectives one by one, for which it
needs longer than the GPU below some tens of thousands of tokens a GPU; more so if ranks exchange rows. The
kernels are the same. Attention's exchange with other ranks is in the graphs; what ZeRO does with gradients is
not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from pi_dist.model.attention import SequenceContext
from pi_dist.model.transformer import PiTransformer


class GraphedModel(nn.Module):
    """A model that captures its training passes, and replays them on batches that are alike.

    The first pass of its kind runs as it is, which compiles kernels and connects ranks; the second is
    captured, if every rank has the memory (`_has_room`). One kind is kept: a batch of another shape begins
    anew. Every rank of the default group makes the same passes, each with its backward pass before the next.

    Args:
        most_tokens: of a rank and micro-batch; one of more runs as it is.
    """

    def __init__(self, model: PiTransformer, most_tokens: float = math.inf) -> None:
        super().__init__()
        self.model, self._most_tokens = model, most_tokens
        self._replays = True
        self._kind: tuple[Any, ...] | None = None
        self._before = 0  # bytes that were allocated before the first pass of this kind
        self._graphs: _Graphs | None = None

    def forward(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        context: SequenceContext,
        head: bool = True,
    ) -> torch.Tensor:
        """As the model's. The gradients of a replayed loss take the place of those that parameters have."""
        trains = self.training and torch.is_grad_enabled() and head and context.kept is None
        if not (trains and self._replays):
            return self.model(tokens, labels, context, head)
        if tokens.numel() > self._most_tokens:
            self.forget()
            return self.model(tokens, labels, context)
        has_documents = context.labels is not None
        kind = (tokens.shape, has_documents, replace(context, labels=None, row_start=0, seed=0))
        if kind != self._kind:
            self.forget()
            self._kind = kind
            if tokens.is_cuda:
                self._before = torch.cuda.memory_allocated(tokens.device)
            return _until_backward(self.model(tokens, labels, context))
        inputs = [tokens, labels] + ([context.labels] if has_documents else [])
        if self._graphs is None:
            if not _has_room(tokens.device, self._before):
                self._replays = False
                return self.model(tokens, labels, context)
            self._graphs = _Graphs(self.model, inputs, context)
        return _Replay.apply(self._graphs.anchor, self._graphs, inputs)

    @property
    def has_graphs(self) -> bool:
        """Whether the last kind of pass has been captured."""
        return self._graphs is not None

    def forget(self) -> None:
        """Free the graphs, and the memory that only they use."""
        self._kind = self._graphs = None

    @contextmanager
    def as_it_is(self) -> Iterator[None]:
        """Capture and replay nothing in here."""
        before, self._replays = self._replays, False
        try:
            yield
        finally:
            self._replays = before


def _has_room(device: torch.device, before: int) -> bool:
    """Whether every rank has twice the memory that a pass took, before which there were so many bytes.

    Graphs hold on to it, so that what else a run does, as evaluation, needs its own. A tenth of the GPU's
    memory stays free, for what is in no tensor, such as a graph's own nodes and the libraries' workspaces.
    Collective: whether a collective is captured must not differ between ranks.
    """
    held, (free, whole) = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)
    room = free - whole // 10 + torch.cuda.memory_reserved(device) - held
    needed = 2 * (torch.cuda.max_memory_allocated(device) - before)
    fits = torch.tensor(float(room >= needed), device=device)
    dist.all_reduce(fits, op=dist.ReduceOp.MIN)
    return bool(fits)


class _Graphs:
    """The two graphs of one kind of micro-batch, and the tensors that they read and write.

    Args:
        inputs: tokens, labels, and the documents of whole sequences if they are told apart.
    """

    def __init__(self, model: PiTransformer, inputs: list[torch.Tensor], context: SequenceContext) -> None:
        self.inputs = [x.clone() for x in inputs]
        self.anchor = torch.zeros((), device=inputs[0].device, requires_grad=True)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        tokens, labels, *documents = self.inputs
        context = replace(context, labels=documents[0] if documents else None)
        self.parameters = list(model.parameters())
        self.passes = 0
        for parameter in self.parameters:
            parameter.grad = None
        # other threads, as that which watches NCCL, may go on calling CUDA
        with torch.cuda.graph(self.forward, capture_error_mode="thread_local"):
            loss = model(tokens, labels, context)
        self.loss, self.dloss = loss.detach(), torch.ones_like(loss)
        with torch.cuda.graph(self.backward, self.forward.pool(), capture_error_mode="thread_local"):
            loss.backward(self.dloss)
        self.gradients = [parameter.grad for parameter in self.parameters]


def _until_backward(loss: torch.Tensor) -> torch.Tensor:
    """The loss, holding its graph no longer than until its backward pass, whoever holds the loss.

    That graph has a node for each parameter's gradient, which would go on belonging to the stream of this
    pass, and which a later pass, captured on another, would find and use.
    """
    anchor = torch.zeros((), device=loss.device, requires_grad=True)
    return _UntilBackward.apply(anchor, [loss])


class _UntilBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor: torch.Tensor, held: list[torch.Tensor]) -> torch.Tensor:
        ctx.held = held
        return held[0].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        ctx.held.pop().backward(dloss)
        return None, None


class _Replay(torch.autograd.Function):
    """The loss of the inputs; its backward pass puts the gradients where parameters have theirs."""

    @staticmethod
    def forward(ctx, anchor: torch.Tensor, graphs: _Graphs, inputs: list[torch.Tensor]) -> torch.Tensor:
        for mine, given in zip(graphs.inputs, inputs, strict=True):
            mine.copy_(given)
        for parameter in graphs.parameters:
            # until the backward pass, the memory of gradients holds what the forward pass saves for it; who
            # clears gradients in between, as DeepSpeed does, would clear that
            parameter.grad = None
        graphs.passes += 1
        ctx.graphs, ctx.number = graphs, graphs.passes
        graphs.forward.replay()
        return graphs.loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        graphs, ctx.graphs = ctx.graphs, None
        if graphs is None or graphs.passes != ctx.number:
            raise RuntimeError("a replayed loss has one backward pass, before the next forward pass")
        graphs.dloss.copy_(dloss)
        graphs.backward.replay()
        for parameter, gradient in zip(graphs.parameters, graphs.gradients, strict=True):
            parameter.grad = gradient
        return None, None, None
