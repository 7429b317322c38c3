"""Loss, held-out loss and gradients of any dp × sp × ZeRO stage equal those of one process (fp32, 1e-5).

One process means plain PyTorch on the whole batch, without DeepSpeed or any group. The batch has several
documents in a row, padding, a sequence whose second half is padding (whole shards without a valid token),
grouped-query heads with two strides, and attention dropout, which is keyed by position and so the same on any
split.
"""

from dataclasses import replace

import pytest
import torch
from distributed import Ranks

from pi_dist.config import Config, ModelConfig, ParallelConfig, TrainingConfig
from pi_dist.data.loader import Batch
from pi_dist.model.attention import SequenceContext
from pi_dist.model.loss import IGNORE
from pi_dist.model.transformer import Pieces, PiTransformer
from pi_dist.parallel.exchange_plan import shard_starts
from pi_dist.parallel.mesh import make_mesh
from pi_dist.training.deepspeed_engine import Engine
from pi_dist.training.evaluate import heldout_loss
from pi_dist.training.streaming import streamed_losses

EXACT_ALONE = {"ring": "dense", "ulysses": "dense"}  # what one rank takes for them
CONTEXT, ROWS, SEED, CLIP_NORM = 32, 4, 7, 0.05
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=24,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=37,
    window=5,
    strides=[[3, 3, 11, 11], [6, 6, 6, 6]],
    num_skips=2,
    attention_dropout=0.1,
)


def global_batch(documents=True):
    """Tokens, labels and segment ids [4, 32], the same everywhere; or [4, 256] without documents."""
    generator = torch.Generator().manual_seed(3)
    if not documents:
        tokens = torch.randint(0, 37, (ROWS, 8 * CONTEXT), generator=generator)
        return tokens, tokens.roll(-1, 1).index_fill(1, torch.tensor([-1]), IGNORE), None
    tokens = torch.randint(0, 37, (ROWS, CONTEXT), generator=generator)
    segment_ids = torch.zeros(ROWS, CONTEXT, dtype=torch.int32)
    segment_ids[0, 13:] = 1  # two documents, their border inside a shard
    segment_ids[1, 16:] = -1  # half of the sequence, and so whole shards, is padding
    segment_ids[2, 8:20] = 1
    segment_ids[2, 20:27] = 2
    segment_ids[2, 27:] = -1
    labels = torch.full_like(tokens, IGNORE)
    same = (segment_ids[:, :-1] == segment_ids[:, 1:]) & (segment_ids[:, 1:] >= 0)
    labels[:, :-1] = torch.where(same, tokens[:, 1:], IGNORE)
    return tokens, labels, segment_ids


def one_process(model=MODEL, documents=True):
    """(mean loss, held-out loss, gradients by name) without DeepSpeed, groups or accumulation."""
    tokens, labels, segment_ids = global_batch(documents)
    model = PiTransformer(model, tokens.shape[1], seed=1)
    valid = (labels != IGNORE).sum()
    loss = model(tokens, labels, SequenceContext(labels=segment_ids, seed=SEED)) / valid
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        heldout = model.eval()(tokens, labels, SequenceContext(labels=segment_ids)) / valid
    return loss.item(), heldout.item(), gradients


def columns_here(context, mesh, balanced, chunk_tokens):
    """(where this rank's runs of tokens begin, the columns of a whole batch that it holds)."""
    starts = shard_starts(context, mesh.sp_degree, mesh.sp_rank, balanced, chunk_tokens)
    length = context // mesh.sp_degree // len(starts)
    return starts, [start + t for start in starts for t in range(length)]


class HeldOut:
    """The global batch dealt over replicas as the loader deals it."""

    def __init__(self, mesh, training, balanced, batch):
        self.mesh, self.size, self.chunk_tokens = mesh, training.micro_batch_size, training.chunk_tokens
        self.balanced, self.batch = balanced, batch

    def evaluate(self):
        length = self.batch[0].shape[1]
        starts, columns = columns_here(length, self.mesh, self.balanced, self.chunk_tokens)
        for first in range(self.mesh.dp_rank * self.size, ROWS, self.size * self.mesh.dp_degree):
            rows = slice(first, first + self.size)
            parts = (None if x is None else x[rows, columns] for x in self.batch)
            yield Batch(*parts, starts=starts, row_start=first)


def on_a_rank(sp, stages, options, update, device="cpu", model_config=MODEL, exchange=None, documents=True):
    """For each ZeRO stage: (loss, held-out loss, gradients) of one optimizer step's global batch.

    exchange: of the configuration, what is not as by default.
    """
    whole = global_batch(documents)
    context = whole[0].shape[1]
    mesh = make_mesh(sp, torch.device(device))
    results = []
    for stage in stages:
        training = TrainingConfig(context=context, batch_size=ROWS, warmup_steps=1, **options)
        parallel = ParallelConfig(sp_degree=sp, zero_stage=stage, **(exchange or {}))
        config = Config(model=model_config, parallel=parallel, training=training)
        saving = (training.activation_checkpointing, training.activation_offload, training.mlp_tile_tokens)
        model = PiTransformer(model_config, context, 1, *saving)
        if training.compile:
            backend = "inductor" if device == "cuda" else "aot_eager"
            pieces = (torch.compile(piece, backend=backend) for piece in model.pieces)
            model.pieces = Pieces(*pieces)
        engine = Engine(model, config, mesh)
        data = HeldOut(mesh, training, config.balanced, whole)
        heldout = heldout_loss(engine, mesh, data, config.parallel, training.chunk_tokens)
        valid = (whole[1] != IGNORE).sum().to(mesh.device)
        total = torch.zeros(1, device=mesh.device)
        micro_steps = engine.engine.gradient_accumulation_steps()
        for batch in data.evaluate():
            for loss_sum in streamed_losses(
                engine, mesh, batch, config.parallel, SEED, training.chunk_tokens
            ):
                total += loss_sum.detach()
                engine.backward(loss_sum, valid)
                micro_steps -= 1
                if micro_steps:
                    engine.step(0)
        assert micro_steps == 0
        torch.distributed.all_reduce(total)
        gradients = {name: gradient.to("cpu", copy=True) for name, gradient in engine.gradients()}
        updated = None
        if update:
            engine.step(0)
            moments = {name: state["exp_avg"].to("cpu", copy=True) for name, state in engine.state()}
            updated = (engine.gradient_norm().item(), moments)
        results.append(((total / valid).item(), heldout, gradients, updated))
    return results


def check(found, model=MODEL):
    tolerance = 1e-5  # of fp32
    loss, heldout, gradients = one_process(model)
    for of_rank in found:
        for found_loss, found_heldout, found_gradients, updated in of_rank:
            assert found_loss == pytest.approx(loss, rel=tolerance)
            assert found_heldout == pytest.approx(heldout, rel=tolerance)
            assert found_gradients.keys() == gradients.keys()
            for name, expected in gradients.items():
                error = (found_gradients[name] - expected).norm() / expected.norm()
                assert error < tolerance, (name, error.item())
            if updated is not None:  # AdamW's first moment is a tenth of the clipped gradient
                norm, moments = updated
                whole = torch.cat([g.flatten() for g in gradients.values()]).norm().item()
                assert norm == pytest.approx(whole, rel=tolerance) and whole > 2 * CLIP_NORM
                for name, expected in gradients.items():
                    clipped = 0.1 * expected * CLIP_NORM / whole
                    assert (moments[name] - clipped).norm() < 2 * tolerance * clipped.norm(), name


def check_bf16(ranks, found, model=MODEL, device="cpu", documents=True):
    """In bf16 as near to one process in fp32 as a device alone is: its rounding is all the error there is."""
    exact = [EXACT_ALONE.get(method, method) for method in model.methods]
    options, model_alone = {"precision": "bf16"}, replace(model, method=exact)
    alone = ranks.run(on_a_rank, 1, [1], options, False, device, model_alone, None, documents)
    loss, heldout, gradients = one_process(model, documents)
    allowed, allowed_in_all = errors(alone[0][0][2], gradients)
    assert allowed_in_all < 0.01  # no gradient is off by a factor
    for of_rank in found:
        for found_loss, found_heldout, found_gradients, _ in of_rank:
            assert found_loss == pytest.approx(loss, rel=1e-3)
            assert found_heldout == pytest.approx(heldout, rel=1e-3)
            of_tensors, in_all = errors(found_gradients, gradients)
            assert in_all < 1.2 * allowed_in_all
            for name, error in of_tensors.items():
                assert error < 2 * allowed[name], name


def errors(found, expected):
    """Relative L2 error of each gradient, by name, and of all of them."""
    squares = {name: (found[name] - x).norm() ** 2 for name, x in expected.items()}
    in_all = sum(squares.values()) / sum(x.norm() ** 2 for x in expected.values())
    return {
        name: (squares[name].sqrt() / x.norm()).item() for name, x in expected.items()
    }, in_all.sqrt().item()


@pytest.mark.parametrize(
    ("sp", "dp"),
    [
        *((1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (8, 1)),
        *(pytest.param(sp, 2, marks=pytest.mark.slow) for sp in (4, 8)),
    ],
)
def test_equals_one_process_in_every_zero_stage(sp, dp):
    with Ranks(sp * dp) as ranks:
        found = ranks.run(on_a_rank, sp, [0, 1, 2, 3], {"clip_norm": CLIP_NORM}, True)
    check(found)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_recomputation_and_larger_micro_batches_change_nothing(zero_stage):
    with Ranks(4) as ranks:
        options = {"activation_checkpointing": True, "micro_batch_size": 2}
        check(ranks.run(on_a_rank, 2, [zero_stage], options, False))


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_pipelined_exchange_changes_nothing(zero_stage):
    """Two sequences in a micro-batch, so that rows of one travel while the other is worked on."""
    with Ranks(2) as ranks:
        options = {"activation_checkpointing": True, "micro_batch_size": 2}
        check(ranks.run(on_a_rank, 2, [zero_stage], options, False, "cpu", MODEL, {"overlap": "pipelined"}))


def test_selective_recomputation_changes_nothing():
    with Ranks(2) as ranks:
        options = {"activation_checkpointing": "selective", "micro_batch_size": 2}
        check(ranks.run(on_a_rank, 2, [0, 1, 2], options, False))


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}, {"chunk_tokens": 8}], ids=str)
def test_compiled_blocks_change_nothing(options):
    """Forward, recomputation, evaluation; chunks too. ZeRO 3 is not compiled."""
    with Ranks(2) as ranks:
        check(ranks.run(on_a_rank, 2, [0, 1, 2], {"compile": True} | options, False))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bf16_stays_within_the_error_of_bf16(zero_stage):
    with Ranks(2) as ranks:
        check_bf16(ranks, ranks.run(on_a_rank, 2, [zero_stage], {"precision": "bf16"}, False))


def two_steps_on_a_rank(stage):
    """Gradients of two steps of two micro-steps each, alike, whose updates are too small to count."""
    mesh = make_mesh(2, torch.device("cpu"))
    training = TrainingConfig(
        context=CONTEXT,
        batch_size=ROWS,
        micro_batch_size=2,
        warmup_steps=1,
        precision="bf16",
        learning_rate=1e-30,
        min_learning_rate=0.0,
    )
    config = Config(model=MODEL, parallel=ParallelConfig(sp_degree=2, zero_stage=stage), training=training)
    engine = Engine(PiTransformer(MODEL, CONTEXT, 1), config, mesh)
    valid = (global_batch()[1] != IGNORE).sum()
    found = []
    for _ in range(2):
        for number, batch in enumerate(HeldOut(mesh, training, config.balanced, global_batch()).evaluate()):
            if number:
                engine.step(0)
            for loss_sum in streamed_losses(engine, mesh, batch, config.parallel, SEED, None):
                engine.backward(loss_sum, valid)
        found.append({name: gradient.clone() for name, gradient in engine.gradients()})
        engine.step(0)
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_leaves_no_gradient_to_the_next(stage):
    with Ranks(2) as ranks:
        for first, second in ranks.run(two_steps_on_a_rank, stage):
            for name, gradient in first.items():
                assert gradient.abs().sum() > 0 and torch.equal(second[name], gradient), name


@pytest.mark.parametrize(
    ("method", "sp"),
    [
        ("window", 2),
        ("ring", 2),
        ("ulysses", 2),
        (["pi", "ring"], 2),
        (["ring", "pi"], 4),
        (["ulysses", "pi"], 2),
    ],
    ids=str,
)
def test_other_methods_and_mixed_stacks_equal_one_process(method, sp):
    """In ZeRO 1 and 3, with recomputation."""
    model = replace(MODEL, method=method, attention_dropout=0.0)
    with Ranks(sp) as ranks:
        found = ranks.run(on_a_rank, sp, [1, 3], {"activation_checkpointing": True}, False, "cpu", model)
    check(found, model=model)


def test_a_mixed_stack_in_bf16_stays_within_its_error():
    model = replace(MODEL, method=["pi", "ring"], attention_dropout=0.0)
    options = {"precision": "bf16", "activation_checkpointing": True, "micro_batch_size": 2}
    with Ranks(2) as ranks:
        check_bf16(ranks, ranks.run(on_a_rank, 2, [1], options, False, "cpu", model), model)


@pytest.mark.parametrize(
    ("method", "chunk_tokens"), [("pi", None), ("pi", 8), ("ring", None), ("ulysses", None)]
)
def test_offload_and_tiles_change_nothing(method, chunk_tokens):
    """Block inputs in host memory, and the MLP in tiles that do not divide the shard, with clipping."""
    model = replace(MODEL, method=method, attention_dropout=0.0) if method != "pi" else MODEL
    options = {"activation_checkpointing": True, "mlp_tile_tokens": 3, "micro_batch_size": 2}
    options |= {"chunk_tokens": chunk_tokens, "activation_offload": chunk_tokens is None}
    options["clip_norm"] = CLIP_NORM
    with Ranks(2) as ranks:
        check(ranks.run(on_a_rank, 2, [0, 1, 2], options, True, "cpu", model), model=model)
