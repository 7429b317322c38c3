"""The kernels on the shard of a rank and the rows that it receives: results, launches and their order."""

import contextlib
from unittest.mock import patch

import pytest
import torch
from kernel_calls import (
    DEVICE,
    assert_close,
    draw_inputs,
    on_ranks,
    results,
    spied,
)

from pi_dist.kernels.tiles import Rows
from pi_dist.ops import PiPattern, triton_backend, triton_bands, triton_launches
from pi_dist.ops.oracle import pi_attention_oracle
from pi_dist.ops.pi_attention import token_labels
from pi_dist.ops.spec import AttentionSpec, KeyBlock, Run
from pi_dist.ops.triton_compile import Call
from pi_dist.parallel.exchange_plan import make_plan

pytestmark = pytest.mark.usefixtures("quick_interpreter", "poisoned_memory")


@contextlib.contextmanager
def planned():
    """The launch plans of calls in here."""
    plans, plan_of = [], triton_backend.plan_of

    def noting(*arguments):
        plans.append(plan_of(*arguments))
        return plans[-1]

    with patch.object(triton_backend, "plan_of", noting):
        yield plans


@pytest.fixture
def far_is_near(monkeypatch):
    """Skips count as far beyond 8 tokens instead of 32, so that short sequences have all bands."""
    monkeypatch.setattr(triton_bands, "NEAR_SKIPS", 8)
    triton_launches.plan_of.cache_clear()
    yield
    triton_launches.plan_of.cache_clear()


def test_queries_near_the_edge_of_a_shard_alone_are_summed_in_fp32():
    """Four launches work on those, two on the others; errors as of plain PyTorch over the whole sequence."""
    inputs, dout = draw_inputs(31, 2, 240, None, 2, 1, dtype=torch.float16)
    pattern, edge = PiPattern(3, 20, num_skips=2), slice(120, 160)
    options = {"logit_cap": 20.0, "dropout_p": 0.0, "seed": 0, "row_start": 0}
    exact = results(pi_attention_oracle, inputs, dout, pattern, torch.float64)
    plain = results(pi_attention_oracle, inputs, dout, pattern)
    with planned() as plans:
        found = on_ranks(inputs, dout, pattern, None, 2, options)
    assert [plan.edge for plan in plans] == [None, None, slice(0, 40), slice(0, 40)]
    assert all(plan.sum_dtype == torch.float16 for plan in plans)
    for rows in (edge, slice(None)):
        for expected, eager, ours in zip(exact, plain, found, strict=True):
            errors = ((x.double() - expected)[:, rows].norm() for x in (eager, ours))
            eager_error, our_error = (error / expected[:, rows].norm() for error in errors)
            assert our_error <= 1.5 * eager_error + torch.finfo(torch.float16).eps


@pytest.mark.parametrize(
    ("pattern", "heads", "kv_heads"),
    [
        (PiPattern(3, 7), 2, 1),
        (PiPattern(3, 10), 1, 1),
        (PiPattern(4, (5, 11), causal=False), 2, 2),
        (PiPattern(1, (2, 4), num_skips=3), 2, 1),
        (PiPattern(1, (2, 2, 5, 5), causal=False, num_skips=3), 4, 2),
        (PiPattern(0, 4, include_self=False, num_skips=3), 1, 1),
        (PiPattern(8, 12), 1, 1),
        (PiPattern(20, 25, causal=False), 1, 1),
    ],
    ids=str,
)
def test_shards_with_received_rows_equal_the_whole_sequence(pattern, heads, kv_heads, far_is_near):
    """Several key blocks, of all heads or of one group of heads: three ranks played by one process."""
    inputs, dout = draw_inputs(8, 1, 21, None, heads, kv_heads)
    options = {"logit_cap": 20.0, "dropout_p": 0.25, "seed": 2**40 + 3, "row_start": 2**34}
    labels = None
    if heads < 4:
        segments = torch.tensor([[0] * 9 + [1] * 12], device=DEVICE)
        padding = torch.rand(1, 21, generator=torch.Generator().manual_seed(8)).to(DEVICE) < 0.8
        labels = token_labels(segments, padding)
    masks = {} if labels is None else {"segment_ids": labels, "padding_mask": labels >= 0}
    expected = results(pi_attention_oracle, inputs, dout, pattern, torch.float64, **options, **masks)
    assert_close(on_ranks(inputs, dout, pattern, labels, 3, options), expected)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_that_one_skip_sees_cost_the_same_at_any_distance(causal):
    """No launch works on the places between such rows and the queries that look at them."""

    def programs(distance):
        pattern = PiPattern(3, distance, causal)
        runs = (Run(0, 96), Run(-distance, 96 - distance), Run(distance + 48, distance + 96))
        blocks = tuple(KeyBlock((0, 1), Run(a + 10**6, b + 10**6)) for a, b in runs[: 2 if causal else 3])
        spec = AttentionSpec(pattern, 2, blocks, 0.5, 20.0, 0.0, 0, 10**6, 0)
        shape, device = torch.Size((1, 96, 2, 16)), torch.device(DEVICE)
        plan = triton_launches.LaunchPlan(spec, shape, torch.float32, device, True, False, 32)
        launches = (*plan.forward, *plan.backward.sent, *plan.backward.rest)
        return [(launch.kernel, launch.part.view, launch.programs) for launch in launches]

    near = programs(200)
    assert near == programs(2**19) and len(near) > 3
    assert causal or slice(47, 96) in [view for _, view, _ in near]


def test_the_interior_is_worked_on_while_rows_travel():
    """Forward, rows are awaited after the launches on the shard; backward, what is sent back comes first."""
    inputs, dout = draw_inputs(18, 1, 96, None, 1, 1)
    q, k, v, gate = inputs
    plan = make_plan(PiPattern(3, 40, num_skips=2), 1, 1, 96, 2, 1)
    spec = AttentionSpec(
        PiPattern(3, 40, num_skips=2), 1, plan.blocks, 0.5, 20.0, 0.0, 0, plan.shard.start, 0
    )
    keys, values = ([x[:, slice(*block.run)].clone() for block in plan.blocks] for x in (k, v))
    mine, nowhere = slice(*plan.shard), [None] * len(keys)
    rest = (gate[:, mine], None, nowhere)

    def names(launches):
        """(kernel, whether it works on the shard's own keys), or what happened in between."""
        own = keys[0].data_ptr()
        return [x if isinstance(x, str) else (x[0], x[1][1].ptr.data_ptr() == own) for x in launches]

    with spied() as launches:

        def arrive():
            launches.append("arrive")
            return keys[1:], values[1:]

        out, lse = triton_backend.pi_attention_fwd(spec, q[:, mine], keys[:1], values[:1], *rest, arrive)
        forward = names(launches)
        launches.clear()
        triton_backend.pi_attention_bwd(
            spec, q[:, mine], keys, values, *rest, out, lse, dout[:, mine],
            lambda dkeys, dvalues: launches.append("send back"),
        )  # fmt: skip
        backward = [name for name in names(launches) if name[0] != "_queries_once_kernel"]
    arrived, sent = forward.index("arrive"), backward.index("send back")
    assert 0 < arrived < len(forward) - 1
    assert all(own for _, own in forward[:arrived]) and not any(own for _, own in forward[arrived + 1 :])
    assert 0 < sent < len(backward) - 1
    assert all(name == ("_keys_kernel", False) for name in backward[:sent])
    assert all(own or name == "_queries_kernel" for name, own in backward[sent + 1 :])


@pytest.mark.parametrize("pattern", [PiPattern(4, 16), PiPattern(36, 7, num_skips=5)], ids=str)
@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_compiled_ahead_is_what_a_call_launches(pattern, rank):
    """The same kernels with the same options and types of arguments, though no tensor has memory."""
    (q, k, v, gate), dout = draw_inputs(25, 2, 240, None, 2, 2, 16)
    plan = make_plan(pattern, 2, 2, 240, 3, rank)
    spec = AttentionSpec(pattern, 2, plan.blocks, 0.25, 20.0, 0.0, 0, plan.shard.start, 0)
    keys, values = ([x[:, slice(*block.run)].contiguous() for block in plan.blocks] for x in (k, v))
    mine = slice(*plan.shard)
    labels = [torch.zeros(2, x.shape[1], dtype=torch.int32, device=DEVICE) for x in keys]
    by_head = gate[:, mine].transpose(1, 2).contiguous().transpose(1, 2)
    tensors = (q[:, mine].contiguous(), keys, values, by_head, labels[0], labels)
    out, lse, dout = torch.empty_like(tensors[0]), torch.empty_like(by_head), dout[:, mine].contiguous()

    def noted(launch):
        """The launches, tensors by their dtypes and strides."""
        launches = []

        def run(kernel, programs, *arguments, **keywords):
            kinds = [(x.ptr.dtype, x[1:]) if isinstance(x, Rows) else x for x in arguments]
            launches.append((kernel, programs, [x for x in kinds if not torch.is_tensor(x)], keywords))

        launch(run)
        return launches

    def real(run):
        q, keys, values, *rest = tensors
        triton_backend.pi_attention_fwd(
            spec, q, keys[:1], values[:1], *rest, lambda: (keys[1:], values[1:]), run=run
        )
        triton_backend.pi_attention_bwd(spec, q, keys, values, *rest, out, lse, dout, run=run)

    call = Call(spec, 2, 80, 2, 16, torch.float32, gated=True, labelled=True)
    assert noted(real) == noted(call.launch) != []


def test_gradients_of_received_rows_are_fp32_for_fp16_inputs():
    inputs, dout = draw_inputs(9, 1, 18, None, 2, 2, dtype=torch.float16)
    options = {"logit_cap": 20.0, "dropout_p": 0.0, "seed": 0, "row_start": 0}
    pattern = PiPattern(3, (4, 7))
    expected = results(pi_attention_oracle, inputs, dout, pattern, torch.float64)
    assert_close(on_ranks(inputs, dout, pattern, None, 3, options), expected, relative=2e-3)
