"""Replayed micro-batches change nothing: losses, gradient norms and weights of a few steps, bit for bit."""

from dataclasses import asdict
from unittest.mock import patch

import pytest
import torch
from distributed import Ranks
from test_training_parity import columns_here

from pi_dist.config import (
    Config,
    ConfigError,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
    check,
    replays_graphs,
)
from pi_dist.data.loader import Batch
from pi_dist.model.attention import SequenceContext
from pi_dist.model.transformer import PiTransformer
from pi_dist.parallel.mesh import make_mesh
from pi_dist.training import deepspeed_engine
from pi_dist.training.cuda_graph import GraphedModel
from pi_dist.training.deepspeed_engine import Engine
from pi_dist.training.streaming import evaluated_loss, streamed_losses

CONTEXT = 512
LENGTHS = (512, 512, 256, 256, 512)  # of each step: graphs of another length begin anew
MODEL = {"num_layers": 2, "hidden_size": 128, "num_heads": 2, "vocab_size": 512, "window": 8, "stride": 16}
MODEL |= {"num_skips": 2}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_a_rank(sp, model, parallel, training, documents, kinds=(False, None)):
    """[(losses, gradient norms, what weights moved by, by name) of steps as they are, and of replayed ones].

    Compiled, all steps have the same length: another would be compiled for, and another engine find it.
    """
    mesh = make_mesh(sp, torch.device("cuda"))
    lengths = [CONTEXT] * len(LENGTHS) if training.get("compile") else LENGTHS
    results = []
    for cuda_graphs in kinds:
        t = {"context": CONTEXT, "precision": "bf16", "warmup_steps": 0, "compile": False} | training
        t["batch_size"] = 2 * t.get("micro_batch_size", 1)
        config = Config(
            model=ModelConfig(**MODEL | model),
            parallel=ParallelConfig(sp_degree=sp, device="cuda", **parallel),
            training=TrainingConfig(**t, cuda_graphs=cuda_graphs),
        )
        check(config, mesh.world_size)
        made = PiTransformer.of_run(config, "cuda")
        before = {name: weight.detach().to("cpu", copy=True) for name, weight in made.named_parameters()}
        engine = Engine(made, config, mesh)
        losses, norms = [], []
        for step, length in enumerate(lengths):
            valid = torch.tensor(float(CONTEXT * t["batch_size"]), device="cuda")
            for micro_step in range(2):
                batch = batch_of(config, mesh, 2 * step + micro_step, documents, length)
                for loss in streamed_losses(engine, mesh, batch, config.parallel, 0, None):
                    engine.backward(loss, valid)
                    engine.step(step)
                    losses.append(loss.item())
            norms.append(engine.gradient_norm().item())
            engine.eval()  # what is between replays must not spoil them
            losses.append(evaluated_loss(engine, mesh, batch, config.parallel, None).item())
            engine.train()
        assert engine.replays == (cuda_graphs is None)
        weights = {name: state["weight"].to("cpu", copy=True) for name, state in engine.state()}
        moved = {name: weight - before[name] for name, weight in weights.items()}
        results.append((losses, norms, moved))
        engine.close()
    return results


def batch_of(config, mesh, number, documents, length):
    """This rank's part of other tokens for every number; of documents that begin elsewhere each time."""
    generator = torch.Generator().manual_seed(number)
    shape = (config.training.micro_batch_size, length)
    tokens, labels = (torch.randint(0, 512, shape, generator=generator) for _ in range(2))
    ids = (torch.arange(length) > 20 + 30 * number).int().expand(shape) if documents else None
    starts, columns = columns_here(length, mesh, config.balanced, None)
    mine = (None if x is None else x[:, columns] for x in (tokens, labels, ids))
    return Batch(*mine, starts=starts, row_start=0)


def check_equal(found, tolerance=0.0):
    """tolerance: of losses, where kernels add in any order; AdamW makes much of small differences."""
    for (losses, norms, moved), (replayed, replayed_norms, replayed_moved) in found:
        assert replayed == pytest.approx(losses, rel=tolerance, abs=0)
        assert replayed_norms == pytest.approx(norms, rel=10 * tolerance, abs=0)
        for name, expected in moved.items():
            assert expected.norm() > 0, name
            assert (replayed_moved[name] - expected).norm() <= 300 * tolerance * expected.norm(), name


@pytest.fixture(scope="module")
def one():
    with Ranks(1, backend="nccl", timeout_s=300.0) as ranks:
        yield ranks


@GPU
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("activation_checkpointing", [False, True, "selective"])
def test_replayed_steps_change_no_bit(one, activation_checkpointing, documents):
    training = {"activation_checkpointing": activation_checkpointing, "micro_batch_size": 2}
    training["compile"] = activation_checkpointing == "selective"
    check_equal(one.run(on_a_rank, 1, {}, {}, training, documents))


@GPU
@pytest.mark.parametrize("options", [{"method": "dense"}, {"num_kv_heads": 1, "gate": "static"}], ids=str)
def test_replayed_steps_of_other_models(one, options):
    check_equal(one.run(on_a_rank, 1, options, {}, {}, False), 1e-3 if "method" in options else 0.0)


@GPU
def test_tiles_of_the_mlp_are_replayed(one):
    training = {"activation_checkpointing": True, "mlp_tile_tokens": 128}
    check_equal(one.run(on_a_rank, 1, {}, {}, training, False))


def on_one_rank():
    """(gradients as they are, gradients of a first pass, parameters whose nodes outlived it), bf16."""
    mesh = make_mesh(1, torch.device("cpu"))
    config = Config(
        model=ModelConfig(**MODEL),
        parallel=ParallelConfig(device="cpu"),
        training=TrainingConfig(
            context=CONTEXT, precision="bf16", batch_size=1, activation_checkpointing=True
        ),
    )
    tokens, labels = torch.randint(0, 512, (2, 1, CONTEXT), generator=torch.Generator().manual_seed(1))
    gradients, outlived = [], []
    for replays in (False, True):
        with patch.object(deepspeed_engine, "replays_graphs", lambda *_, replays=replays: replays):
            engine = Engine(model := PiTransformer(config.model, CONTEXT, 1, True), config, mesh)
        loss = engine(tokens, labels, SequenceContext())
        for parameter in model.parameters():
            torch.autograd.graph.get_gradient_edge(parameter).node.metadata["is"] = "of the first pass"
        engine.backward(loss, torch.tensor(1.0))
        gradients.append({name: gradient.clone() for name, gradient in engine.gradients()})
        for name, parameter in model.named_parameters():
            if replays and torch.autograd.graph.get_gradient_edge(parameter).node.metadata:
                outlived.append(name)
    return *gradients, outlived


def test_a_first_pass_leaves_no_node_of_a_parameter():
    """Nodes of the stream that it ran on would spoil the capture that follows; its loss may be held on to."""
    with Ranks(1) as ranks:
        ((expected, found, outlived),) = ranks.run(on_one_rank)
    assert not outlived
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def config_of(**changes):
    values = asdict(TrainingConfig(context=CONTEXT, precision="bf16", cuda_graphs=None))
    return Config(training=TrainingConfig(**values | changes))


def test_long_and_other_batches_run_as_they_are():
    assert replays_graphs(config_of(), "cuda")
    assert not replays_graphs(config_of(), "cpu")
    assert not replays_graphs(config_of(cuda_graphs=False), "cuda")
    assert not replays_graphs(config_of(context=131072), "cuda")
    assert replays_graphs(config_of(context=131072, cuda_graphs=True), "cuda")
    assert not replays_graphs(config_of(chunk_tokens=128), "cuda")
    assert not replays_graphs(config_of(precision="fp32"), "cuda")


def test_what_cannot_be_captured_is_refused():
    with pytest.raises(ConfigError, match=r"training.cuda_graphs: precision \('fp32'\) == 'bf16' for true"):
        check(config_of(precision="fp32", cuda_graphs=True))


def test_a_batch_of_too_many_tokens_runs_as_it_is():
    """Twice the same one: the second would be captured, which a CPU cannot do."""
    model = GraphedModel(PiTransformer(ModelConfig(**MODEL), CONTEXT, 1, True), most_tokens=CONTEXT - 1)
    tokens, labels = torch.randint(0, 512, (2, 1, CONTEXT), generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        model(tokens, labels, SequenceContext()).backward()
    assert not model.has_graphs
