"""The loader: every token once, the same global batch on any number of ranks, and an exact cursor."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_dist.config import DataConfig
from pi_dist.data.loader import Batch, SequenceLoader, epoch_order, plan_sequences
from pi_dist.data.shards import ShardError, ShardIndex, ShardWriter

CONTEXT = 24
COUNTS = [5, 1, 100, 24, 25, 23, 2, 48, 3, 3, 60, 9, 17]


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> ShardIndex:
    return ShardIndex.open(write(tmp_path_factory.mktemp("data") / "train"))


def write(directory: Path) -> Path:
    """Documents of tokens 1, 2, 3, … through the whole text, but for the end-of-text tokens, which are 0."""
    tokenizer = directory.parent / "tokenizer.json"
    tokenizer.write_text("{}")
    writer = ShardWriter(directory, vocab_size=1000, end_of_text=0, shard_tokens=90)
    last = 0
    for number, count in enumerate(COUNTS):
        writer.add(np.arange(last + 1, last + count), id=str(number), source="test")
        last += count
    writer.finish(tokenizer, {})
    return directory


def make(index: ShardIndex, **changes) -> SequenceLoader:
    """A loader of one rank, batch of 4, no workers, but for the changes."""
    data = {"packing": "pack", "shuffle": True, "num_workers": 0}
    arguments = dict(context=CONTEXT, micro_batch_size=4, accumulation_steps=1, dp_rank=0, dp_degree=1)
    arguments |= dict(sp_rank=0, sp_degree=1, seed=7)
    data |= {key: value for key, value in changes.items() if key in data}
    arguments |= {key: value for key, value in changes.items() if key not in data}
    return SequenceLoader(index, DataConfig(**data), **arguments)


def steps(loader: SequenceLoader, start: int, count: int) -> list[list[Batch]]:
    iterator = loader.iterate(start)
    found = [next(iterator) for _ in range(count)]
    iterator.close()
    return found


def stacked(batches: list[Batch]) -> torch.Tensor:
    """[3, rows, columns] of tokens, labels, segment_ids."""
    parts = [torch.stack([b.tokens, b.labels, b.segment_ids.long()]) for b in batches]
    return torch.cat(parts, dim=1)


def global_step(
    index: ShardIndex, start: int, count: int, dp: int, sp: int, micro: int, **options
) -> torch.Tensor:
    """[count, 3, batch, CONTEXT]: every rank's slices put where the batches say that they belong."""
    batch = 8
    accumulation = batch // (dp * micro)
    whole = torch.full((count, 3, batch, CONTEXT), -77)
    for r in range(dp):
        for s in range(sp):
            ranks = dict(dp_rank=r, dp_degree=dp, sp_rank=s, sp_degree=sp)
            sizes = dict(micro_batch_size=micro, accumulation_steps=accumulation)
            for n, found in enumerate(steps(make(index, **ranks, **sizes, **options), start, count)):
                assert len(found) == accumulation
                for one in found:
                    assert (
                        one.tokens.shape
                        == one.labels.shape
                        == one.segment_ids.shape
                        == (micro, CONTEXT // sp)
                    )
                    rows = slice(one.row_start, one.row_start + micro)
                    columns = slice(one.starts[0], one.starts[0] + CONTEXT // sp)
                    assert (whole[n, :, rows, columns] == -77).all()  # nobody else's
                    whole[n, :, rows, columns] = stacked([one])
    return whole


def expected_pairs() -> list[tuple[int, int]]:
    """(token, label) of every token of every document, sorted."""
    pairs = []
    last = 0
    for count in COUNTS:
        ids = [*range(last + 1, last + count), 0]
        pairs += zip(ids, [*ids[1:], -100], strict=True)
        last += count
    return sorted(pairs)


@pytest.mark.parametrize("packing", ["pack", "split"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_holds_every_token_once_with_its_label(
    index: ShardIndex, packing: str, shuffle: bool
) -> None:
    loader = make(index, packing=packing, shuffle=shuffle, micro_batch_size=1)
    epochs = []
    for epoch in (0, 1):
        rows = steps(loader, epoch * loader.num_sequences, loader.num_sequences)
        tokens, labels, segment_ids = stacked([batch for step in rows for batch in step])
        real = segment_ids >= 0
        assert (tokens[~real] == 0).all() and (labels[~real] == -100).all()
        pairs = sorted(zip(tokens[real].tolist(), labels[real].tolist(), strict=True))
        assert pairs == expected_pairs()
        epochs.append(tokens)
    assert torch.equal(*epochs) != shuffle
    other_seed = make(index, packing=packing, shuffle=shuffle, micro_batch_size=1, seed=8)
    rows = steps(other_seed, 0, other_seed.num_sequences)
    assert torch.equal(torch.cat([step[0].tokens for step in rows]), epochs[0]) != shuffle
    assert loader.num_tokens == int(real.sum()) == sum(COUNTS)
    assert loader.padding_share == pytest.approx(1 - sum(COUNTS) / real.numel())
    assert rows[0][0].tokens.dtype == rows[0][0].labels.dtype == torch.int32
    assert rows[0][0].segment_ids.dtype == torch.int32


@settings(max_examples=150)
@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=120),
    st.integers(1, 40),
    st.sampled_from(["pack", "split"]),
)
def test_plan_covers_every_token_once_and_fits(counts: list[int], context: int, packing: str) -> None:
    plan = plan_sequences(np.array(counts), context, packing)
    length = plan.stop - plan.start
    assert (length >= 1).all() and plan.first[0] == 0 and plan.first[-1] == len(length)
    covered = [
        (d, t) for d, a, b in zip(plan.document, plan.start, plan.stop, strict=True) for t in range(a, b)
    ]
    assert sorted(covered) == [(d, t) for d, count in enumerate(counts) for t in range(count)]
    sizes = np.add.reduceat(length, plan.first[:-1])
    assert (np.diff(plan.first) >= 1).all() and (sizes <= context).all()
    if packing == "split":
        assert (
            covered == sorted(covered) and (sizes[:-1] == context).all()
        )  # in order, padded at the end alone
    else:
        pieces = np.bincount(plan.document)
        assert (
            pieces == -(-np.array(counts) // context)
        ).all()  # whole, or cut at every context and not elsewhere
        half_empty = int((sizes * 2 <= context).sum())
        assert (
            half_empty <= 32 + 1
        )  # a closed sequence is fuller than what did not fit: two halves never stay apart


@pytest.mark.parametrize(
    "counts,context,packing", [([0], 4, "pack"), ([], 4, "split"), ([3], 0, "pack"), ([3], 4, "x")]
)
def test_plan_refuses(counts: list[int], context: int, packing: str) -> None:
    with pytest.raises(ValueError):
        plan_sequences(np.array(counts, dtype=np.int64), context, packing)


def test_segments_count_the_pieces_and_documents_do_not_mix(index: ShardIndex) -> None:
    loader = make(index, micro_batch_size=1)
    border = np.cumsum([0, *COUNTS])
    for batch in loader.evaluate():
        tokens, labels, segments = (row.tolist() for row in stacked([batch])[:, 0])
        used = sum(segment >= 0 for segment in segments)
        assert segments == sorted(segments[:used]) + [-1] * (CONTEXT - used)
        assert sorted(set(segments[:used])) == list(range(max(segments) + 1))
        for segment in range(max(segments) + 1):
            ids = [t for t, s in zip(tokens, segments, strict=True) if s == segment and t]
            assert len({int(np.searchsorted(border, id)) for id in ids}) <= 1  # of one document
        for column, label in enumerate(labels[: used - 1]):
            assert label == -100 if tokens[column] == 0 else label in (0, tokens[column] + 1)


LAYOUTS = [(1, 1, 1), (1, 1, 4), (2, 1, 2), (4, 1, 2), (8, 1, 1), (1, 2, 2), (1, 8, 8), (2, 4, 1), (4, 3, 1)]


@pytest.mark.parametrize("packing", ["pack", "split"])
def test_any_layout_reads_the_same_global_batch(index: ShardIndex, packing: str) -> None:
    alone = global_step(index, 0, 5, 1, 1, 8, packing=packing)
    for dp, sp, micro in LAYOUTS:
        assert torch.equal(global_step(index, 0, 5, dp, sp, micro, packing=packing), alone), (dp, sp, micro)


def test_resume_at_any_step_and_layout(index: ShardIndex) -> None:
    alone = global_step(index, 0, 9, 1, 1, 8)
    assert make(index).num_sequences < 9 * 8 / 3  # three epochs' borders are crossed
    for start, (dp, sp, micro) in [(1, (1, 1, 8)), (4, (2, 2, 2)), (8, (1, 4, 1)), (5, (8, 1, 1))]:
        assert torch.equal(global_step(index, start, 9 - start, dp, sp, micro), alone[start:])


def test_order_is_of_seed_and_epoch_and_nothing_else(index: ShardIndex) -> None:
    orders = {
        (seed, epoch): tuple(epoch_order(500, seed, epoch))
        for seed in (0, 1, 2**63 - 1)
        for epoch in range(4)
    }
    assert len(set(orders.values())) == len(orders)
    for (seed, epoch), order in orders.items():
        assert sorted(order) == list(range(500)) != list(order)
        assert tuple(epoch_order(500, seed, epoch)) == order
    # Pinned, so that a run can be resumed by a later version: these numbers must not change.
    assert epoch_order(8, 1234, 0).tolist() == [2, 7, 6, 1, 3, 0, 5, 4]
    assert epoch_order(8, 1234, 1).tolist() == [7, 4, 3, 5, 6, 1, 2, 0]
    plain = [step[0].tokens for step in steps(make(index, shuffle=False, micro_batch_size=1), 0, 3)]
    in_order = [batch.tokens for batch in make(index, micro_batch_size=1).evaluate()]
    assert all(torch.equal(a, b) for a, b in zip(plain, in_order, strict=False))


def test_order_looks_uniform() -> None:
    """Where index 0 lands over seeds and epochs: chi-square of 10 places, 99.99 % quantile."""
    places = [epoch_order(10, seed, epoch).tolist().index(0) for seed in range(100) for epoch in range(20)]
    expected = len(places) / 10
    assert ((np.bincount(places, minlength=10) - expected) ** 2 / expected).sum() < 33.7


def test_workers_give_the_same_batches_and_leave_the_generator_alone(index: ShardIndex) -> None:
    state = torch.get_rng_state()
    ranks = dict(sp_rank=1, sp_degree=2, micro_batch_size=2, accumulation_steps=2)
    alone = steps(make(index, **ranks), 3, 6)
    for workers in (1, 2):
        for mine, theirs in zip(alone, steps(make(index, num_workers=workers, **ranks), 3, 6), strict=True):
            assert torch.equal(stacked(mine), stacked(theirs))
            assert [b.row_start for b in mine] == [b.row_start for b in theirs] == [0, 2]
    assert torch.equal(torch.get_rng_state(), state)


def test_fewer_sequences_than_rows(tmp_path: Path) -> None:
    """One short document, eight replicas: epochs go round, and evaluation pads."""
    (tmp_path / "t.json").write_text("{}")
    writer = ShardWriter(tmp_path / "one", vocab_size=9, end_of_text=0, shard_tokens=90)
    writer.add(np.array([4, 5]), id="a", source="test")
    writer.finish(tmp_path / "t.json", {})
    index = ShardIndex.open(tmp_path / "one")
    for rank in range(8):
        loader = make(index, dp_rank=rank, dp_degree=8, micro_batch_size=1)
        assert [step[0].tokens[0, :4].tolist() for step in steps(loader, 0, 3)] == [[4, 5, 0, 0]] * 3
        (batch,) = loader.evaluate()
        assert (batch.labels[0, :3].tolist() == [5, 0, -100]) == (rank == 0)
        assert bool((batch.segment_ids == -1).all()) == (rank != 0)


@pytest.mark.parametrize("dp,micro", [(1, 1), (1, 5), (3, 2), (8, 4)])
def test_evaluation_covers_every_sequence_once(index: ShardIndex, dp: int, micro: int) -> None:
    loaders = [make(index, dp_rank=r, dp_degree=dp, micro_batch_size=micro) for r in range(dp)]
    dealt = [list(loader.evaluate()) for loader in loaders]
    assert len({len(batches) for batches in dealt}) == 1
    rows = {b.row_start + n: stacked([b])[:, n] for batches in dealt for b in batches for n in range(micro)}
    total = loaders[0].num_sequences
    assert sorted(rows) == list(range(len(dealt[0]) * dp * micro))
    reference = stacked(list(make(index, micro_batch_size=1).evaluate()))
    assert reference.shape[1] == total
    for row, values in rows.items():
        if row < total:
            assert torch.equal(values, reference[:, row])
        else:
            assert (values[1] == -100).all() and (values[2] == -1).all()


@pytest.mark.parametrize("sp", [2, 3])
def test_balanced_ranks_hold_the_front_and_the_back(index: ShardIndex, sp: int) -> None:
    """Together all columns of every sequence, labels across the borders of pieces included."""
    whole = [stacked([batch]) for batch in make(index).evaluate()]
    piece = CONTEXT // (2 * sp)
    found = [np.full_like(w, -77) for w in whole]
    for rank in range(sp):
        for n, batch in enumerate(make(index, sp_rank=rank, sp_degree=sp, balanced=True).evaluate()):
            assert batch.starts == (rank * piece, CONTEXT - (rank + 1) * piece)
            for run, start in enumerate(batch.starts):
                columns = stacked([batch])[..., run * piece : (run + 1) * piece]
                found[n][..., start : start + piece] = columns
    assert len(whole) > 1 and all((a == b).all() for a, b in zip(found, whole, strict=True))


def test_slices_must_be_equal(index: ShardIndex) -> None:
    with pytest.raises(ValueError, match=r"context \(24\) % sp_degree \(5\) == 0"):
        make(index, sp_degree=5)


def test_a_rank_reads_only_its_slice(tmp_path: Path) -> None:
    """Shards that only the other rank's columns need are gone, and this rank does not notice."""
    index = ShardIndex.open(write(tmp_path / "train"))
    batch = next(make(index, packing="split", micro_batch_size=1, sp_degree=2).evaluate())
    for shard in index.shards[1:]:
        (tmp_path / "train" / shard.name).unlink()
    again = next(make(index, packing="split", micro_batch_size=1, sp_degree=2).evaluate())
    assert torch.equal(stacked([batch]), stacked([again]))


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_met_while_reading_is_one_named_line(tmp_path: Path, workers: int) -> None:
    index = ShardIndex.open(write(tmp_path / "train"))
    path = tmp_path / "train" / "shard-000002.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 4
    path.write_bytes(content)
    iterator = make(index, num_workers=workers, shuffle=False, micro_batch_size=1).iterate(0)
    with pytest.raises(ShardError, match=r"shard-000002\.tar: changed: its SHA-256") as caught:
        for _ in range(make(index).num_sequences):
            next(iterator)
    assert "\n" not in str(caught.value)
    if workers == 0:
        with pytest.raises(ShardError, match=r"shard-000002\.tar: changed"):
            list(make(index).evaluate())


PROGRAM = """
import sys, time
from torch.utils.data._utils import worker
if sys.argv[2] == "wait":
    worker.MP_STATUS_CHECK_INTERVAL = 600  # else PyTorch's workers look themselves, every 5 s
from pi_dist.config import DataConfig
from pi_dist.data.loader import SequenceLoader
from pi_dist.data.shards import ShardIndex
loader = SequenceLoader(
    ShardIndex.open(sys.argv[1]), DataConfig(num_workers=2, prefetch=8), context=4096, micro_batch_size=32,
    accumulation_steps=1, dp_rank=0, dp_degree=1, sp_rank=0, sp_degree=1, seed=1,
)
steps = loader.iterate(0)
next(steps), next(steps)  # of one worker and of the other: both have started
import multiprocessing
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
if sys.argv[2] == "wait":
    time.sleep(600)
"""


def start_program(directory: Path, mode: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in [os.getcwd(), *sys.path] if p)}
    command = [sys.executable, "-c", PROGRAM, str(directory), mode]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_exit_with_full_queues_does_not_hang(tmp_path: Path) -> None:
    process = start_program(write(tmp_path / "train"), "exit")
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0 and err == "" and len(out.split()) == 2
    assert not any(alive(int(pid)) for pid in out.split())


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_workers_outlive_signals_but_not_their_rank(tmp_path: Path) -> None:
    process = start_program(write(tmp_path / "train"), "wait")
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        for pid in workers:
            os.kill(pid, number)
    time.sleep(0.2)
    assert all(alive(pid) for pid in workers)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    left = [pid for pid in workers if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert left == [], "a worker outlived its rank"


def joined_text(index: ShardIndex) -> torch.Tensor:
    """All documents end to end, end-of-text tokens included."""
    counts = index.token_counts.tolist()
    return torch.cat([torch.from_numpy(index.read(d, 0, n).astype(np.int32)) for d, n in enumerate(counts)])


@pytest.mark.parametrize("packing", ["pack", "split"])
@pytest.mark.parametrize("context", [1, 24, 1000])
def test_every_token_has_a_label_but_the_last_of_each_document(index, packing, context) -> None:
    """So that `check_labels` need not read any."""
    labels = sum((b.labels >= 0).sum() for b in make(index, packing=packing, context=context).evaluate())
    assert labels == index.num_tokens - index.num_documents


@pytest.mark.parametrize("context", [8, 64, 1000])
def test_joined_documents_are_one_that_begins_again(index: ShardIndex, context: int) -> None:
    text = joined_text(index)
    loader = make(index, packing="join", shuffle=False, micro_batch_size=1, context=context)
    assert loader.num_sequences == -(-len(text) // context) and loader.padding_share == 0
    assert loader.num_tokens == loader.num_sequences * context
    batches = [batch for step in steps(loader, 0, loader.num_sequences) for batch in step]
    endless = text.repeat(-(-loader.num_tokens // len(text)))[: loader.num_tokens].view(-1, context)
    assert torch.equal(torch.cat([b.tokens for b in batches]), endless)
    labels = torch.cat([b.labels for b in batches])
    assert torch.equal(labels[:, :-1], endless[:, 1:]) and (labels[:, -1] == -100).all()
    assert all(b.segment_ids is None for b in batches)


@pytest.mark.parametrize("options", [{}, {"balanced": True}, {"chunk_tokens": 8}])
def test_joined_documents_on_several_ranks(index: ShardIndex, options: dict) -> None:
    arguments = dict(packing="join", shuffle=False, micro_batch_size=1, context=64)
    alone = next(make(index, **arguments).evaluate())
    for rank in range(2):
        part = next(make(index, **arguments, sp_rank=rank, sp_degree=2, **options).evaluate())
        length = 32 // len(part.starts)
        columns = [start + t for start in part.starts for t in range(length)]
        assert torch.equal(part.tokens, alone.tokens[:, columns])
        assert torch.equal(part.labels, alone.labels[:, columns])


def test_a_round_that_joined_sequences_do_not_fill_has_no_labels(index: ShardIndex) -> None:
    *_, last = make(index, packing="join", context=1000, micro_batch_size=4).evaluate()
    assert (last.labels[1:] == -100).all() and (last.labels[0, :-1] >= 0).all()
