"""Loss of a micro-batch, at once or exactly in chunks, on any number of ranks.

A token needs nothing of layer l but the keys and values of the h_l = max(k, M·π_l) tokens before it. So a
sequence can go through the model chunk by chunk, without gradients, while each layer keeps the rows that
later chunks look back to; and then from the last chunk to the first, each computed once more, with gradients,
and handing the gradients of the rows that it looked at back to the chunks that own them. The work is that of
activation checkpointing. The memory is that of one chunk, and what is kept: for n tokens in chunks of C at
most (n/C)·Σ_l min(h_l, C)·2·H_kv·head_dim elements, and fp32 gradients for the chunks within h_l of the
current one; the rows of chunks farther off can lie in host memory.

A chunk's backward is a micro-step to DeepSpeed. So gradients add up in fp32, and are clipped after the last
chunk; ZeRO 0 and 1 reduce them there too, ZeRO 2 and 3 after every chunk, as after any micro-step, since they
never hold whole gradients.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial

import torch

from pi_dist.config import ParallelConfig
from pi_dist.data.loader import Batch
from pi_dist.model.attention import SequenceContext
from pi_dist.model.transformer import PiTransformer
from pi_dist.parallel.collectives import all_gather_tokens
from pi_dist.parallel.exchange_plan import chunk_run
from pi_dist.parallel.kept_keys import KeptKeys, Placement
from pi_dist.parallel.mesh import Mesh
from pi_dist.training.deepspeed_engine import Engine

Model = Engine | PiTransformer
ON_DEVICE = Placement()


def summed_loss(model: Model, mesh: Mesh, batch: Batch, parallel: ParallelConfig, seed: int) -> torch.Tensor:
    """Σ of this rank's token losses of one micro-batch, in nats, fp32 scalar.

    Documents and padding of the whole sequences travel here, once for all layers.
    """
    labels = _gathered_labels(mesh, batch)
    context = _context(mesh, batch, parallel, seed, labels)
    tokens, targets = (mesh.put(x).long() for x in (batch.tokens, batch.labels))
    return model(tokens, targets, context)


def streamed_losses(
    model: Model,
    mesh: Mesh,
    batch: Batch,
    parallel: ParallelConfig,
    seed: int,
    chunk_tokens: int | None,
    placement: Placement = ON_DEVICE,
) -> Iterator[torch.Tensor]:
    """Losses as of `summed_loss`, of each chunk of `chunk_tokens` tokens, the last first; they add up to it.

    Take the backward of each before asking for the next. None: one loss, of the whole. placement: where rows
    are kept that later chunks look back to.
    """
    if chunk_tokens is None:
        yield summed_loss(model, mesh, batch, parallel, seed)
        return
    run, numbers = _chunks(model, mesh, batch, parallel, seed, chunk_tokens, placement, backward=True)
    with torch.no_grad():
        for chunk in numbers[:-1]:
            run(chunk, head=False)
    for chunk in reversed(numbers):
        yield run(chunk)


@torch.no_grad()
def evaluated_loss(
    model: Model,
    mesh: Mesh,
    batch: Batch,
    parallel: ParallelConfig,
    chunk_tokens: int | None,
    placement: Placement = ON_DEVICE,
) -> torch.Tensor:
    """The loss of `summed_loss` without dropout's seed and without gradients, in chunks unless None."""
    if chunk_tokens is None:
        return summed_loss(model, mesh, batch, parallel, seed=0)
    run, numbers = _chunks(model, mesh, batch, parallel, 0, chunk_tokens, placement, backward=False)
    return torch.stack([run(chunk) for chunk in numbers]).sum()


def _gathered_labels(mesh: Mesh, batch: Batch) -> torch.Tensor | None:
    """Documents of whole sequences, in the order of ranks."""
    ids = batch.segment_ids
    return None if ids is None else all_gather_tokens(mesh.put(ids), mesh.sp_group)


def _context(
    mesh: Mesh, batch: Batch, parallel: ParallelConfig, seed: int, labels: torch.Tensor | None
) -> SequenceContext:
    return SequenceContext(
        labels=labels,
        starts=batch.starts,
        row_start=batch.row_start,
        seed=seed,
        group=mesh.sp_group,
        fused_exchange=parallel.exchange == "all_to_all",
        overlap=parallel.overlap,
    )


def _chunks(
    model: Model,
    mesh: Mesh,
    batch: Batch,
    parallel: ParallelConfig,
    seed: int,
    chunk_tokens: int,
    placement: Placement,
    backward: bool,
) -> tuple[Callable[..., torch.Tensor], range]:
    """What computes a chunk by its number, and all numbers. Batch columns are as `shard_starts` says."""
    seq_len = batch.tokens.shape[1] * mesh.sp_degree
    numbers = range(-(-seq_len // chunk_tokens))
    length = chunk_tokens // mesh.sp_degree  # tokens of a chunk on this rank
    labels = _gathered_labels(mesh, batch)  # [B, n], rank by rank
    if labels is not None and mesh.sp_degree > 1:
        labels = labels.unflatten(1, (mesh.sp_degree, -1, length)).transpose(1, 2).flatten(1)
    whole = dataclasses.replace(
        _context(mesh, batch, parallel, seed, labels),
        kept=defaultdict(partial(KeptKeys, seq_len, chunk_tokens, backward, placement)),
    )

    def run(chunk: int, head: bool = True) -> torch.Tensor:
        columns = slice(chunk * length, (chunk + 1) * length)
        tokens, targets = (mesh.put(x[:, columns]).long() for x in (batch.tokens, batch.labels))
        start = chunk_run(seq_len, chunk_tokens, chunk).start + mesh.sp_rank * tokens.shape[1]
        context = dataclasses.replace(whole, starts=(start,), chunk=chunk)
        return model(tokens, targets, context, head)

    return run, numbers
