"""Loss of held-out data, on any number of ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist

from pi_dist.config import Config, ConfigError, ParallelConfig, accumulation_steps, check
from pi_dist.data.loader import SequenceLoader
from pi_dist.data.shards import ShardIndex, check_labels
from pi_dist.model.loss import IGNORE
from pi_dist.parallel.kept_keys import Placement
from pi_dist.parallel.mesh import Mesh, make_mesh
from pi_dist.parallel.process_group import of_rank_zero, start
from pi_dist.training.checkpoint import CheckpointError, load_model, open_checkpoint
from pi_dist.training.streaming import ON_DEVICE, Model, evaluated_loss


def make_loader(index: ShardIndex, config: Config, mesh: Mesh) -> SequenceLoader:
    """The loader of this rank."""
    return SequenceLoader(
        index,
        config.data,
        context=config.training.context,
        micro_batch_size=config.training.micro_batch_size,
        accumulation_steps=accumulation_steps(config, mesh.world_size),
        dp_rank=mesh.dp_rank,
        dp_degree=mesh.dp_degree,
        sp_rank=mesh.sp_rank,
        sp_degree=mesh.sp_degree,
        seed=config.training.seed,
        balanced=config.balanced,
        chunk_tokens=config.training.chunk_tokens,
    )


@torch.no_grad()
def heldout_loss(
    model: Model,
    mesh: Mesh,
    loader: SequenceLoader,
    parallel: ParallelConfig,
    chunk_tokens: int | None = None,
    placement: Placement = ON_DEVICE,
    going_on: Callable[[], None] = lambda: None,
) -> float:
    """Mean loss over every valid token of the loader's sequences, nats a token; the same on every rank.

    Sequences are worked on at once, or in chunks of `chunk_tokens` tokens, whose rows `placement` keeps.
    `going_on` is called before each micro-batch.
    """
    going_on()
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for batch in loader.evaluate():
        going_on()
        total[0] += evaluated_loss(model, mesh, batch, parallel, chunk_tokens, placement)
        total[1] += mesh.put((batch.labels != IGNORE).sum())
    model.train()
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def evaluate_checkpoint(
    path: str, data: str, context: int | None, sp_degree: int, device_choice: str
) -> dict:
    """Held-out loss of a checkpoint on prepared data; every rank of the launcher calls it.

    Args:
        path: a run directory or a checkpoint. context: tokens of a sequence; None: as trained.

    Rank 0 finds the checkpoint for all: a run may save, and delete, others meanwhile.

    Returns:
        checkpoint, step, context, loss (nats a token), perplexity, model (its ModelConfig).

    Raises:
        ConfigError, ShardError, CheckpointError: as in training.
    """
    if sp_degree < 1:
        raise ConfigError(f"sp-degree: sp_degree ({sp_degree}) >= 1 does not hold")
    index = ShardIndex.open(data)
    device = start(device_choice, ParallelConfig().timeout_s)
    checkpoint = of_rank_zero(lambda: open_checkpoint(path), CheckpointError, OSError)
    trained = Config.from_dict(checkpoint.state["config"])
    check_labels(index, trained.data.packing)
    context = trained.training.context if context is None else context
    chunk_tokens = trained.training.chunk_tokens
    if chunk_tokens is not None and chunk_tokens >= context:
        chunk_tokens = None
    dp_degree = max(1, dist.get_world_size() // sp_degree)
    config = dataclasses.replace(
        trained,
        parallel=dataclasses.replace(
            trained.parallel,
            sp_degree=sp_degree,
            device=device_choice,
            overlap="interior",  # pipelined needs several sequences at a time
        ),
        training=dataclasses.replace(
            trained.training,
            context=context,
            batch_size=dp_degree,
            micro_batch_size=1,
            chunk_tokens=chunk_tokens,
            kept_rows="auto",
            cuda_graphs=False,
        ),
    )
    check(config, dist.get_world_size())
    if index.tokenizer != (checkpoint.path / "tokenizer.json").read_bytes():
        raise ConfigError(
            f"data: SHA-256 of {index.tokenizer_path} == that of the checkpoint's tokenizer.json does not "
            f"hold; prepare the text with --tokenizer {checkpoint.path / 'tokenizer.json'}"
        )
    mesh = make_mesh(sp_degree, device, config.parallel.timeout_s)
    model, _ = load_model(checkpoint, mesh.device)
    loader = make_loader(index, config, mesh)
    loss = heldout_loss(model, mesh, loader, config.parallel, chunk_tokens)
    return {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "context": context,
        "loss": loss,
        "model": config.model,
        "perplexity": torch.tensor(loss, dtype=torch.float64).exp().item(),  # inf beyond the largest number
    }
