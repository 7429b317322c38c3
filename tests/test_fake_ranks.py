"""One rank measured alone, in every ZeRO stage and method: its memory is that of real ranks."""

import dataclasses
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from pi_dist.config import PRESETS, Config, ParallelConfig, TrainingConfig
from pi_dist.measure import stand_ins
from pi_dist.measure.fake_ranks import (
    LiveBytes,
    Request,
    _arrives,
    _Job,
    _join_fake_group,
    _others_send_the_same,
    few_chunks,
    typical_rank,
)
from pi_dist.measure.step_model import MIB, num_parameters, state_bytes
from pi_dist.measure.workers import OUT_OF_MEMORY, Worker, measured_apart
from pi_dist.ops.exact_attention import ExactBlock
from pi_dist.parallel import ring_attention
from pi_dist.training.deepspeed_engine import unchecked_across_ranks

CONTEXT = 512


def job(method, sp_degree, zero_stage, *, precision="bf16", chunk_tokens=None, dp_degree=1, **model):
    """A configuration of the tiny preset on the CPU, with one sequence a replica."""
    tiny = dataclasses.replace(PRESETS["tiny"], method=method, **model)
    training = TrainingConfig(
        context=CONTEXT,
        batch_size=dp_degree,
        precision=precision,
        activation_checkpointing=True,
        chunk_tokens=chunk_tokens,
    )
    parallel = ParallelConfig(sp_degree=sp_degree, zero_stage=zero_stage, device="cpu")
    return Config(model=tiny, parallel=parallel, training=training)


def measured(config, world_size, **options):
    (row,) = measured_apart([Request(config, world_size, typical_rank(config, world_size), **options)], 100.0)
    assert row["status"] == "ok", row
    return row


@pytest.mark.parametrize(
    ("method", "sp_degree", "zero_stage", "chunk_tokens"),
    [
        ("pi", 8, 0, None),
        ("pi", 4, 1, None),
        ("ring", 4, 2, None),
        (["pi", "ring"], 4, 1, None),
        ("window", 8, 3, None),
        ("ulysses", 2, 3, None),
        ("pi", 2, 2, 256),
    ],
)
def test_a_rank_of_any_job_takes_a_step_and_holds_its_part_of_the_states(
    method, sp_degree, zero_stage, chunk_tokens
):
    config = job(method, sp_degree, zero_stage, chunk_tokens=chunk_tokens)
    row = measured(config, sp_degree)
    assert row["num_parameters"] == num_parameters(config)
    assert row["rank"] == sp_degree // 2 and row["fake"] and row["ms"] is None
    if zero_stage < 3:  # there the tiny model's parameters are all too small to be split
        rest, _ = state_bytes(config, sp_degree)
        assert row["resting_mib"] * MIB == pytest.approx(rest, rel=0.03)
    assert row["peak_mib"] > row["resting_mib"]


def test_data_parallel_ranks_are_pretended_too():
    row = measured(job("pi", 2, 1, dp_degree=2), 4, timed_steps=1)
    assert row["rank"] == 3 and row["ms"] > 0 and row["forward_ms"] > 0


@pytest.mark.parametrize(
    ("method", "zero_stage"), [("pi", 1), pytest.param("ring", 3, marks=pytest.mark.slow)]
)
def test_the_memory_of_a_fake_rank_is_that_of_real_ones(method, zero_stage):
    config = job(method, 2, zero_stage)
    (real,) = measured_apart([Request(config, 2, None)], 100.0)
    assert real["status"] == "ok" and not real["fake"], real
    fake = measured(config, 2)
    assert fake["peak_mib"] == pytest.approx(real["peak_mib"], rel=0.03)
    assert fake["resting_mib"] == pytest.approx(real["resting_mib"], rel=0.03)


def test_requests_that_share_a_process_do_not_add_up():
    """With other methods, numbers of ranks and ZeRO stages between them."""
    jobs = [("window", 4, 1), ("ring", 2, 2), ("dense", 1, 1), ("pi", 8, 1), ("ring", 4, 0), ("window", 4, 1)]
    requests = [Request(job(method, p, stage), p, p // 2) for method, p, stage in jobs]
    with Worker() as worker:
        rows = [worker.ask(request, 100.0) for request in requests]
        assert [(row["status"], row["world_size"]) for row in rows] == [("ok", p) for _, p, _ in jobs]
    assert {row["left_mib"] for row in rows} == {0.0}
    for key in ("peak_mib", "resting_mib"):
        assert rows[-1][key] == pytest.approx(rows[0][key], rel=0.01), key


def test_what_ends_the_process_is_told_in_words_and_the_next_has_another():
    config = job("window", 2, 1)
    with Worker() as worker:
        row = worker.ask(Request(config, 2, 7), 100.0)
        assert row["status"].startswith("ended with exit status 1: "), row
        assert worker.ask(Request(config, 2, 1), 0.01) == {"status": "no answer within 0 s"}
        row = worker.ask(Request(dataclasses.replace(config, parallel=ParallelConfig(3)), 2, 1), 100.0)
        assert "sp_degree (3) == 0 does not hold" in row["status"] and OUT_OF_MEMORY not in row["status"]
        assert worker.ask(Request(config, 2, 1), 100.0)["status"] == "ok"


def test_memory_alone_is_that_of_whole_steps():
    """Exact attention that only allocates, and of many chunks the backward pass of two."""
    configs = [job("ring", 4, 1), job("ulysses", 2, 1), job("pi", 2, 1, chunk_tokens=64)]
    assert [few_chunks(config, 2) is None for config in configs] == [True, True, False]
    with Worker() as worker:
        for config in configs:
            p = config.parallel.sp_degree
            alone, timed = (worker.ask(Request(config, p, p // 2, timed_steps=t), 100.0) for t in (0, 1))
            assert alone["ms"] is None and timed["ms"] > 0
            assert alone["peak_mib"] == pytest.approx(timed["peak_mib"], rel=0.01), config.model.method


def test_chunks_that_look_far_back_are_all_run():
    far = job("pi", 2, 1, chunk_tokens=64, window=4, stride=65)
    assert few_chunks(far, 2) is None and few_chunks(job("pi", 2, 1, chunk_tokens=256), 2) is None


def test_a_stand_in_runs_each_shape_once_and_scales_what_it_allocates(monkeypatch):
    ran, shape = [], (1, 100, 2, 8)

    def kernel(block, q, k, v):
        ran.append((q.shape[1], k.shape[1]))
        return q, q[..., 0]

    monkeypatch.setattr(stand_ins, "exact_attention_fwd", kernel)
    monkeypatch.setattr(stand_ins, "PROBE_TOKENS", 40)

    def extra_bytes(call):
        call()
        return 1000

    q, block = torch.ones(shape, dtype=torch.bfloat16), ExactBlock(True, None, None, 1.0)
    with stand_ins.StandIns(extra_bytes).in_place(), LiveBytes() as live:
        for keys in (100, 50, 100):
            out, lse = ring_attention.exact_attention_fwd(block, q, q[:, :keys], q[:, :keys])
            assert (
                out.shape == q.shape
                and not out.any()
                and (lse.shape, lse.dtype) == ((1, 100, 2), torch.float32)
            )
            live.peak, peak = live.now, live.peak
            assert peak - live.now == pytest.approx(1000 * (100 + keys) / 80, abs=1)
            del out, lse
    assert ran == [(40, 40), (40, 40)]


def test_others_send_what_this_rank_does():
    """Again and again until the buffer is full, so that it computes with numbers like those of a job."""
    received = torch.empty(2, 5)
    _arrives(received, torch.arange(3.0))
    assert received.flatten().tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    _arrives(received[0], torch.arange(9.0).view(3, 3))
    assert received[0].tolist() == [0, 1, 2, 3, 4]
    for nothing in (None, torch.empty(0, 4)):
        _arrives(received, nothing)
        assert not received.any()
        received.fill_(1.0)
    _arrives(torch.empty(0), torch.empty(3))


def test_every_collective_brings_it():
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        with _others_send_the_same(1):
            sent, row, all_rows, part = (
                torch.tensor([1.0, 2.0]),
                torch.zeros(2),
                torch.zeros(4),
                torch.zeros(1),
            )
            dist.batch_isend_irecv([dist.P2POp(dist.irecv, row, 0), dist.P2POp(dist.isend, sent, 0)])
            assert row.tolist() == [1, 2]
            dist.batch_isend_irecv([dist.P2POp(dist.irecv, row, 0)])
            assert row.tolist() == [0, 0]
            dist.all_to_all_single(row, sent, [2, 0], [2, 0])
            assert row.tolist() == [1, 2]
            dist.all_gather_into_tensor(all_rows, sent)
            assert all_rows.tolist() == [1, 2, 1, 2]
            dist.reduce_scatter_tensor(part, sent)
            assert part.item() == 1
        for zero_stage, after in ((1, [5, 6, 7]), (3, [6, 6, 6])):  # of ZeRO 3 nothing is there before
            in_place = torch.tensor([5.0, 6.0, 7.0])
            with _others_send_the_same(zero_stage):
                dist.all_gather_into_tensor(in_place, in_place[1:2])
                assert in_place.tolist() == after
                dist.reduce_scatter_tensor(in_place[1:2], in_place)
                assert in_place.tolist() == after
    finally:
        dist.destroy_process_group()


def norms_after_a_step(zero_stage):
    """Of the tiny model, a weight that the other rank updates and one that this does; made in its process."""
    config = job("pi", 2, zero_stage)
    os.environ |= {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}  # DeepSpeed asks for these
    _join_fake_group(1, 2)
    with _others_send_the_same(zero_stage), unchecked_across_ranks():
        made = _Job(config, torch.device("cpu"), Request(config, 2, 1))
        made.step()
        model = made.engine.engine.module
        return model.blocks[0].attention_norm.weight.tolist(), model.norm.bias.tolist()


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_weights_that_other_ranks_update_stay(zero_stage):
    """With this rank's own in their place products take less power, and a GPU is faster than in a job."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        theirs, mine = pool.submit(norms_after_a_step, zero_stage).result(timeout=100.0)
    assert set(theirs) == {1.0} and set(mine) != {0.0}  # as they were made, not


def test_live_bytes_counts_storages_once_until_they_die():
    with LiveBytes() as live:
        x = torch.zeros(1000)
        y = x[10:]
        assert live.now == 4000
        z = torch.cat([x, y])
        assert live.now == 4000 + 4 * 1990
        del x, z
        assert live.now == 4000
        del y
    assert (live.now, live.peak) == (0, 4000 + 4 * 1990)
