"""`pi-dist eval` on real ranks: one checkpoint for all, and results in words whatever the run was."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from distributed import Ranks
from test_checkpoint import save_steps
from test_trainer import config_for

from pi_dist.config import resolve
from pi_dist.data.shards import ShardError, ShardIndex, ShardWriter
from pi_dist.training.checkpoint import CheckpointError, directory
from pi_dist.training.evaluate import evaluate_checkpoint


def saved_run(corpus, run_dir, steps, overlap="interior", **options):
    """The directory of a run of two ranks with checkpoints of these steps."""
    config = config_for(corpus, run_dir, **options)
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, overlap=overlap))
    config = resolve(config, ShardIndex.open(corpus / "train").vocab_size)
    with Ranks(2) as ranks:
        ranks.run(save_steps, config, steps, 2)
    return Path(run_dir)


def evaluate(paths, data, sp=2):
    """The result on this rank, which is given a path of its own; in words if there is none."""
    try:
        return evaluate_checkpoint(str(paths[dist.get_rank()]), str(data), None, sp, "cpu")
    except (CheckpointError, ShardError) as error:
        return str(error)


def test_all_ranks_evaluate_the_checkpoint_that_rank_0_finds(corpus, tmp_path):
    """As when the run saves step 2 between one rank's look and the other's."""
    run_dir = saved_run(corpus, tmp_path / "run", [1, 2])
    paths = [directory(run_dir) / f"step-{step:08d}" for step in (1, 2)]
    with Ranks(2) as ranks:
        results = ranks.run(evaluate, paths, corpus / "heldout")
        missing = ranks.run(evaluate, [tmp_path, run_dir], corpus / "heldout")
    assert [result["step"] for result in results] == [1, 1]
    assert missing == [f"{tmp_path}: no checkpoint there, and no run with one"] * 2


def test_a_model_trained_with_pipelined_overlap_is_evaluated_on_ranks_that_share_sequences(corpus, tmp_path):
    run_dir = saved_run(corpus, tmp_path / "run", [1], "pipelined", micro_batch_size=2)
    losses = []
    for world_size in (1, 2):
        with Ranks(world_size) as ranks:
            results = ranks.run(evaluate, [run_dir] * world_size, corpus / "heldout", world_size)
        losses.append(results[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def evaluate_diverged(run_dir, data):
    """The result of a model whose loss is a thousand nats a token."""
    from pi_dist.training import evaluate as module

    module.heldout_loss = lambda *_: 1000.0
    return evaluate([run_dir], data, 1)


def test_the_perplexity_of_a_run_that_has_diverged_is_infinite(corpus, tmp_path):
    run_dir = saved_run(corpus, tmp_path / "run", [1])
    with Ranks(1) as ranks:
        (result,) = ranks.run(evaluate_diverged, run_dir, corpus / "heldout")
    assert result["loss"] == 1000.0 and result["perplexity"] == math.inf


def test_data_without_a_token_to_predict_are_not_evaluated(corpus, tmp_path):
    """Every document is its end-of-text token."""
    run_dir = saved_run(corpus, tmp_path / "run", [1])
    index = ShardIndex.open(corpus / "train")
    sizes = {"vocab_size": index.vocab_size, "end_of_text": index.end_of_text, "shard_tokens": 100}
    writer = ShardWriter(tmp_path / "empty", **sizes)
    writer.add(np.empty(0, dtype=np.uint32), id="0", source="test")
    writer.finish(index.tokenizer_path, {})
    with Ranks(2) as ranks:
        errors = ranks.run(evaluate, [run_dir] * 2, tmp_path / "empty")
    words = (
        f"{tmp_path / 'empty'}: tokens (1) > documents (1) does not hold; no token has a next one to predict"
    )
    assert errors == [words] * 2
