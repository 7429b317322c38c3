"""Compiles the attention kernels that a run launches before its first step, which would wait for each."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from pi_dist.config import EXACT_METHODS, Config, num_chunks
from pi_dist.ops.pattern import PiPattern
from pi_dist.ops.spec import AttentionSpec
from pi_dist.parallel.exchange_plan import count_rows, make_plan
from pi_dist.parallel.mesh import Mesh

if TYPE_CHECKING:
    from pi_dist.ops.triton_compile import Call


def kernel_calls(config: Config, patterns: tuple[PiPattern, ...], mesh: Mesh) -> Iterator[Call]:
    """The calls of the operator that training makes on this rank, but those that are alike.

    `patterns`: of every layer. Chunks in the middle of a sequence are alike.
    """
    from pi_dist.ops.triton_compile import Call

    m, t, p = config.model, config.training, config.parallel
    layers = [
        (pattern, m.gated(layer))
        for layer, (pattern, method) in enumerate(zip(patterns, m.methods, strict=True))
        if method not in EXACT_METHODS
    ]
    last = num_chunks(t) - 1
    for pattern, gated in dict.fromkeys(layers):
        for chunk in sorted({0, min(1, last), last // 2, last}):
            plan = make_plan(
                pattern,
                m.num_heads,
                m.kv_heads,
                t.context,
                mesh.sp_degree,
                mesh.sp_rank,
                p.exchange == "all_to_all",
                t.chunk_tokens,
                chunk,
            )
            yield Call(
                spec=AttentionSpec(
                    pattern=pattern,
                    num_kv_heads=m.kv_heads,
                    blocks=plan.blocks,
                    softmax_scale=m.head_dim**-0.5,
                    logit_cap=m.logit_cap,
                    dropout_p=m.attention_dropout,
                    seed=0,
                    query_start=plan.shard.start,
                    row_start=0,
                ),
                batch=1 if p.overlap == "pipelined" and mesh.sp_degree > 1 else t.micro_batch_size,
                q_len=count_rows([plan.shard]),
                num_heads=m.num_heads,
                head_dim=m.head_dim,
                dtype=torch.bfloat16 if t.precision == "bf16" else torch.float32,
                gated=gated,
                labelled=config.data.packing != "join",
            )


def compile_ahead(config: Config, patterns: tuple[PiPattern, ...], mesh: Mesh) -> str | None:
    """Compile, on a GPU, what `kernel_calls` needs; every rank calls it. Returns what to say of it.

    The last rank of a machine does it first, with threads, and leaves the kernels in Triton's cache on disk:
    it receives rows, so it needs nearly all that the others need, who read them there. What fails here is
    compiled, and its error raised, by the first step.
    """
    if mesh.device.type != "cuda":
        return None
    from pi_dist.ops.triton_compile import compile_kernels

    began = time.perf_counter()
    hosts: list = [None] * mesh.world_size
    dist.all_gather_object(hosts, socket.gethostname())
    first = mesh.rank == max(rank for rank, host in enumerate(hosts) if host == hosts[mesh.rank])
    said = ""
    for turn in (first, not first):
        if turn:
            try:
                count = compile_kernels(kernel_calls(config, patterns, mesh))
                said = f"{count} attention kernels compiled or read from disk"
            except Exception as error:
                said = f"attention kernels not compiled ahead ({type(error).__name__}: {error})"
        dist.barrier()
    return f"{' '.join(said.split())} in {time.perf_counter() - began:.1f} s"
