"""The model: reach by autograd, far rotary positions, the tiled loss, the gate and its ablations, FLOPs."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from pi_dist.config import ModelConfig
from pi_dist.measure.reach import report
from pi_dist.model import attention
from pi_dist.model.attention import Gate, SequenceContext
from pi_dist.model.flops import (
    keys_flops_per_token,
    mean_pairs,
    recomputed_flops_per_token,
    training_flops_per_token,
)
from pi_dist.model.loss import IGNORE
from pi_dist.model.rotary import rotary_table, rotate
from pi_dist.model.transformer import Pieces, PiTransformer, gelu, second_half
from pi_dist.ops.oracle import neighbour_masks, pi_attention_oracle
from pi_dist.ops.pattern import layer_patterns
from pi_dist.parallel.kept_keys import KeptKeys, Placement

TINY = ModelConfig(
    num_layers=2, hidden_size=16, num_heads=4, num_kv_heads=2, vocab_size=23, window=2, stride=5
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 3, "window": 1, "stride": 7},
        {"num_layers": 4, "schedule": "doubling", "stride": 4},
        {"num_layers": 3, "schedule": "per_head", "stride": 4},
        {"num_layers": 2, "num_skips": 3, "stride": 6},
        {"num_layers": 3, "num_skips": 0},
        {"num_layers": 2, "window": 0, "stride": 9},
        {"num_layers": 3, "include_self": False},
        {"num_layers": 3, "ring": False},
        {"num_layers": 3, "skip": False},
        {"num_layers": 2, "strides": [3, 17]},
        {"num_layers": 2, "strides": [[3, 3, 8, 8], [11, 11, 2, 2]]},
        {"num_layers": 4, "schedule": "doubling", "num_strides": 2, "num_skips": 2},
        {"num_layers": 2, "causal": False, "num_skips": 2},
    ],
)
def test_reach_is_what_autograd_finds(changes):
    """The distances whose embedding gets a gradient from the last token's output are those computed."""
    context = 64
    config = dataclasses.replace(TINY, **changes)
    model = PiTransformer(config, context, seed=1).double()
    with torch.no_grad():  # far from zero, so that no path cancels or vanishes
        for parameter in model.parameters():
            parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    inputs = torch.randn(1, context, 16, dtype=torch.float64, requires_grad=True)
    model.embedding = torch.nn.Identity()
    out = model.hidden(inputs, SequenceContext())[0, -1]
    gradient = torch.autograd.grad(out, inputs, torch.randn_like(out))[0][0].abs().sum(-1)
    found = {context - 1 - position for position in gradient.nonzero().flatten().tolist()}
    expected = report(config, context)
    assert found == {d for d in range(context) if expected.reached >> d & 1}
    assert max(found) == expected.reach_in_context
    assert (len(found) - 1) / (context - 1) == pytest.approx(expected.covered_share)


def test_rotary_angles_beyond_fp32():
    """At position 2^27+1 fp32 would see 2^27; the table must see the difference, and exactly."""
    far = 2**27 + 1
    cos, sin = rotary_table((far,), 1, 8, 10000.0, torch.device("cpu"))
    cos_before, _ = rotary_table((far - 1,), 1, 8, 10000.0, torch.device("cpu"))
    frequencies = 10000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    assert torch.equal(cos[0], torch.cos(far * frequencies).float())
    assert torch.equal(sin[0], torch.sin(far * frequencies).float())
    assert (cos - cos_before).abs().max() > 0.1


def test_rotated_scores_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 8).unbind()
    scores = []
    for start in (0, 1000, 2**30):
        table = rotary_table((start,), 6, 8, 10000.0, torch.device("cpu"))
        q_turned, k_turned = (rotate(x.expand(1, 6, 1, 8), table)[0, :, 0] for x in (q, k))
        scores.append((q_turned[5] @ k_turned[2]).item())
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-5)


def test_a_batch_without_labels_has_zero_loss_that_is_connected():
    model = PiTransformer(TINY, 16)
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    loss = model(tokens, torch.full_like(tokens, IGNORE), SequenceContext())
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_gate_keeps_small_complements_in_bf16():
    """At a pre-activation of 9 bf16 would round α to 1 and log(1-α) to the clamp's edge; fp32 keeps 1-α."""
    gate = Gate(TINY).to(torch.bfloat16)
    with torch.no_grad():
        gate.down.weight.zero_()
        gate.down.bias.fill_(9.0)
    alpha = gate(torch.randn(1, 3, 8, dtype=torch.bfloat16))
    assert alpha.dtype == torch.float32
    assert (1 - alpha).allclose(torch.tensor(1.234e-4), rtol=1e-2)


def handed_gate(monkeypatch, layer, x, table):
    """(α that `layer` hands to the operator, its output) for the hidden state x."""
    handed = []
    original = attention.sequence_parallel_pi_attention

    def noting(q, k, v, gate, *args, **options):
        handed.append(gate)
        return original(q, k, v, gate, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "sequence_parallel_pi_attention", noting)
        out = layer.out(layer.attend(layer.projection(x), table, SequenceContext()))
    return handed[0], out


@pytest.mark.parametrize("gate_input", ["hidden", "query"])
def test_projection_and_gate_are_the_formula(gate_input, monkeypatch):
    """α and the layer against Wq, Wk, Wv, W1, b1, W2 and b2 written out: values and every gradient, fp64."""
    config = dataclasses.replace(TINY, gate_input=gate_input)
    layer = attention.Attention(config, 0, layer_patterns(config, 32)[0]).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5, generator=generator)
    x = torch.randn(2, 12, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    table = rotary_table((0,), 12, 4, 10000.0, torch.device("cpu"))
    alpha, out = handed_gate(monkeypatch, layer, x, table)
    assert alpha.dtype == torch.float64

    gate, rows = layer.gate, layer.projection.weight
    assert rows.shape == (16 + 8 + 8 + (8 if gate_input == "hidden" else 0), 16)
    w1 = rows[32:] if gate_input == "hidden" else gate.up.weight
    q, k, v = x @ rows[:16].T, x @ rows[16:24].T, x @ rows[24:32].T
    u = x if gate_input == "hidden" else q
    hidden = F.gelu(u @ w1.T + gate.up_bias)
    expected_alpha = 1 / (1 + torch.exp(-(hidden @ gate.down.weight.T + gate.down.bias)))
    q, k, v = (part.reshape(2, 12, -1, 4) for part in (q, k, v))
    attended = attention.sequence_parallel_pi_attention(
        rotate(q, table), rotate(k, table), v, expected_alpha, layer.pattern, None
    )
    torch.testing.assert_close(alpha, expected_alpha)
    expected = attended.reshape(2, 12, 16) @ layer.out.weight.T
    torch.testing.assert_close(out, expected)

    wanted = [x, *layer.parameters()]
    direction = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    for a, b in zip(
        torch.autograd.grad(out, wanted, direction),
        torch.autograd.grad(expected, wanted, direction),
        strict=True,
    ):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gate_input", ["hidden", "query"])
@pytest.mark.parametrize("autocast", [False, True])
def test_tokens_of_a_head_lie_side_by_side_in_the_gate(gate_input, autocast, monkeypatch):
    """α [B, T, H] is a view of a contiguous [B, H, T], and fp32, also where the projection is bf16."""
    config = dataclasses.replace(TINY, gate_input=gate_input)
    layer = attention.Attention(config, 0, layer_patterns(config, 32)[0])
    table = rotary_table((0,), 12, 4, 10000.0, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        alpha, out = handed_gate(monkeypatch, layer, torch.randn(2, 12, 16), table)
    assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert alpha.shape == (2, 12, 4) and alpha.dtype == torch.float32
    assert alpha.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("gate_input", ["hidden", "query"])
def test_gate_starts_as_any_other_matrix(gate_input):
    """W1 and W2 are drawn from N(0, 0.02), b1 and b2 are 0: α is about one half."""
    config = dataclasses.replace(TINY, hidden_size=128, gate_input=gate_input)
    layer = PiTransformer(config, 32).blocks[0].attention
    w1 = layer.projection.weight[-64:] if gate_input == "hidden" else layer.gate.up.weight
    assert w1.shape == (64, 128) and w1.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.gate.down.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not layer.gate.up_bias.any() and not layer.gate.down.bias.any()


@pytest.mark.parametrize(
    ("changes", "gated"),
    [
        ({"gate": "dynamic"}, True),
        ({"gate": "dynamic", "gate_input": "query"}, True),
        ({"gate": "static"}, True),
        ({"gate": "none"}, False),
        ({"skip": False}, False),
        ({"ring": False}, False),
        ({"num_skips": 0}, False),
    ],
)
def test_gate_and_its_ablations_train(changes, gated):
    model = PiTransformer(dataclasses.replace(TINY, **changes), 32, seed=3)
    tokens = torch.randint(0, 23, (2, 32), generator=torch.Generator().manual_seed(0))
    model(tokens, tokens, SequenceContext()).backward()
    assert (model.blocks[0].attention.gate is not None) == gated
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    if gated:
        assert all(p.grad.abs().sum() > 0 for p in model.blocks[0].attention.gate.parameters())


def test_every_layer_and_step_has_its_own_dropout(monkeypatch):
    """The operator is handed another seed in each layer, and for another step in all of them."""
    seeds = []
    original = attention.sequence_parallel_pi_attention

    def noting(*args, seed, **options):
        seeds.append(seed)
        return original(*args, seed=seed, **options)

    monkeypatch.setattr(attention, "sequence_parallel_pi_attention", noting)
    model = PiTransformer(dataclasses.replace(TINY, attention_dropout=0.2), 16)
    for step_seed in (1, 2):
        model(torch.zeros(1, 16, dtype=torch.int64), context=SequenceContext(seed=step_seed))
    assert len(seeds) == 4 and len(set(seeds)) == 4


def test_recomputation_gives_the_same_gradients():
    gradients = []
    for activation_checkpointing in (False, True, "selective"):
        config = dataclasses.replace(TINY, attention_dropout=0.2)
        model = PiTransformer(config, 32, 5, activation_checkpointing)
        tokens = torch.randint(0, 23, (2, 32), generator=torch.Generator().manual_seed(0))
        model(tokens, tokens, SequenceContext(seed=9)).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))


def kept_bytes(model):
    """What one block keeps for the backward pass of 2 × 64 tokens, parameters apart."""
    sizes, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens, table = torch.zeros(2, 64, 16), rotary_table((0,), 64, 4, 10000.0, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model.blocks[0](tokens.requires_grad_(), table, SequenceContext(), model.pieces)
    return sum(sizes.values()), out


def test_selective_recomputation_keeps_matrix_products_and_attention_only():
    """x twice, projection (2.5d), q and k rotated (1.5d), attended, up (4d) and little more."""
    everything, products = (
        kept_bytes(PiTransformer(TINY, 64, 5, activation_checkpointing))[0]
        for activation_checkpointing in (False, "selective")
    )
    token = 2 * 64 * 16 * 4
    assert products < 13 * token < 17 * token < everything


def stepped(model, length, dtype=torch.float32):
    """Loss and gradients of one batch of `length` tokens, in bf16 under autocast."""
    tokens = torch.randint(0, 23, (2, length), generator=torch.Generator().manual_seed(length))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(tokens, tokens, SequenceContext(seed=9))
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def counts():
    """What torch.compile counted since `compiled_model`."""
    from torch._dynamo.utils import counters  # imports triton; see kernel_calls.py

    return counters


def compiled_model(config, activation_checkpointing, backend):
    """(a model, its copy in compiled pieces), and no graph of before."""
    torch.compiler.reset()
    counts().clear()
    plain, compiled = (
        PiTransformer(config, 64, 5, activation_checkpointing, compiled=compiled)
        for compiled in (False, True)
    )
    compiled.pieces = Pieces(*(torch.compile(piece, backend=backend) for piece in plain.pieces))
    return plain, compiled


@pytest.mark.parametrize("gate_input", ["hidden", "query"])
@pytest.mark.parametrize("activation_checkpointing", [False, True, "selective"])
def test_compiled_blocks_are_whole_graphs_that_layers_share(activation_checkpointing, gate_input):
    """Four layers with a stride each, lengths that change, evaluation between: gradients as uncompiled.

    Two graphs for a length, then two for all lengths; as many where no gradient is wanted.
    """
    config = dataclasses.replace(
        TINY, num_layers=4, schedule="doubling", gate_input=gate_input, attention_dropout=0.2
    )
    plain, compiled = compiled_model(config, activation_checkpointing, "aot_eager")
    for length, dtype in [(64, torch.float32), (48, torch.float32), (17, torch.float32)]:
        for a, b in zip(stepped(compiled, length, dtype), stepped(plain, length, dtype), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        tokens = (torch.arange(length) % 23).expand(2, -1)
        with torch.no_grad():
            losses = [m.eval()(tokens, tokens).item() for m in (plain, compiled)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        plain.train(), compiled.train()
    assert not counts()["graph_break"]
    assert counts()["stats"]["unique_graphs"] == 8


@pytest.mark.parametrize("activation_checkpointing", [False, True, "selective"])
def test_compiled_blocks_under_autocast(activation_checkpointing):
    config = dataclasses.replace(TINY, num_layers=3)
    plain, compiled = compiled_model(config, activation_checkpointing, "aot_eager")
    for a, b in zip(stepped(compiled, 64, torch.bfloat16), stepped(plain, 64, torch.bfloat16), strict=True):
        assert a.dtype == b.dtype and (a - b).norm() <= 0.02 * b.norm()
    assert not counts()["graph_break"] and counts()["stats"]["unique_graphs"] <= 4


def test_a_mixed_stack_compiles_its_kinds_of_layers():
    """Layers with and without a gate: graphs of their own before attention, and one after it."""
    config = dataclasses.replace(TINY, num_layers=4, method=["pi", "window", "dense", "pi"])
    plain, compiled = compiled_model(config, False, "aot_eager")
    for a, b in zip(stepped(compiled, 32), stepped(plain, 32), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not counts()["graph_break"] and counts()["stats"]["unique_graphs"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("activation_checkpointing", [False, True, "selective"])
def test_blocks_compiled_to_machine_code(activation_checkpointing):
    """Inductor, as training uses it: gradients as uncompiled, also of another length."""
    config = dataclasses.replace(TINY, num_layers=2)
    plain, compiled = compiled_model(config, activation_checkpointing, "inductor")
    for length in (64, 40):
        for a, b in zip(stepped(compiled, length), stepped(plain, length), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tile_tokens", [None, 1, 7, 64])
def test_inputs_in_host_memory_and_tiles_give_the_same_gradients(tile_tokens):
    """Bit for bit where no sum is split, else in fp64; in a second pass, which uses buffers again, too."""
    config, found = dataclasses.replace(TINY, attention_dropout=0.2), []
    tokens = torch.randint(0, 23, (2, 32), generator=torch.Generator().manual_seed(0))
    for options in ((False, False, None), (True, True, tile_tokens)):
        model = PiTransformer(config, 32, 5, *options).double()
        for _ in range(2):
            model(tokens, tokens, SequenceContext(seed=9)).backward()
        found.append([p.grad for p in model.parameters()])
    for plain, saved in zip(*found, strict=True):
        assert (
            torch.equal(plain, saved)
            if tile_tokens is None
            else (plain - saved).norm() < 1e-12 * plain.norm()
        )


def test_a_tiled_mlp_holds_its_wide_activations_of_one_tile():
    """What autograd saves at most for the MLP: its input, whole."""
    saved = []
    model = PiTransformer(TINY, 32, mlp_tile_tokens=4)
    x = torch.randn(1, 32, TINY.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = model.blocks[0].feed_forward(x, model.pieces)
    assert saved == [x.shape]
    block = PiTransformer(TINY, 32).blocks[0]
    parameters = (block.mlp_norm.weight, block.mlp_norm.bias, block.mlp_up.weight, block.mlp_down.weight)
    assert torch.allclose(y, second_half(x, *parameters), atol=1e-6)


def test_compiled_gelu_is_the_one_that_is_not():
    x = torch.linspace(-20, 20, 4001, dtype=torch.float64, requires_grad=True)
    plain, compiled = gelu(x), torch.compile(gelu, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, plain, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (compiled, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_tiles_compute_again_in_autocast_precision():
    """ZeRO 0 computes in bf16 under autocast, also what it computes in the backward pass."""
    dtypes, model = [], PiTransformer(TINY, 32, mlp_tile_tokens=16)
    x = torch.randn(1, 32, TINY.hidden_size, requires_grad=True)
    original = torch.nn.functional.gelu

    def noting(value, **form):
        dtypes.append(value.dtype)
        return original(value, **form)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "gelu", noting)
        with torch.autocast("cpu", torch.bfloat16):
            y = model.blocks[0].feed_forward(x, model.pieces)
        y.sum().backward()
    assert dtypes == [torch.bfloat16] * 4


def test_presets_have_the_stated_size():
    """About 124M, 353M and 693M with a vocabulary of 50k, gate on top (the paper: 125M, 750M and 1.5B).

    The gate has the same size whatever it reads.
    """
    for layers, width, heads, plain in (
        (12, 768, 12, 123.6e6),
        (24, 1024, 16, 353.6e6),
        (32, 1280, 20, 693.7e6),
    ):
        config = ModelConfig(num_layers=layers, hidden_size=width, num_heads=heads, vocab_size=50304)
        with torch.device("meta"):
            none, hidden, query = (
                PiTransformer(dataclasses.replace(config, **changes), 4096).num_parameters()
                for changes in ({"gate": "none"}, {}, {"gate_input": "query"})
            )
        assert none == pytest.approx(plain, rel=2e-3)
        gate = width * width // 2 + width // 2 + width // 2 * heads + heads
        assert hidden == query == none + layers * gate


@pytest.mark.parametrize("changes", [{}, {"schedule": "per_head", "num_skips": 3}, {"causal": False}])
def test_mean_pairs_counts_the_masks(changes):
    config = dataclasses.replace(TINY, **changes)
    positions = torch.arange(40)
    total = 0
    for pattern in layer_patterns(config, 40):
        for stride in pattern.head_strides(config.num_heads):
            ring, skip = neighbour_masks(pattern, stride, positions, positions)
            total += (ring | skip).sum().item() / config.num_heads
    assert mean_pairs(config, 40) == pytest.approx(total / 40 / config.num_layers)


@pytest.mark.parametrize(
    "changes", [{}, {"gate_input": "query"}, {"gate": "static"}, {"gate": "none"}, {"num_skips": 0}]
)
def test_flops_are_those_of_the_matrices_and_the_pairs(changes):
    """An independent count: each nn.Linear by its shape (2 FLOP a multiply-add, 3 passes), head and pairs."""
    config = dataclasses.replace(TINY, **changes)
    model = PiTransformer(config, 4096)
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    head = TINY.vocab_size * TINY.hidden_size
    pairs = mean_pairs(config, 4096) * TINY.num_layers * TINY.num_heads
    expected = 6 * (linears + head) + 12 * pairs * TINY.head_dim
    assert training_flops_per_token(config, 4096) == pytest.approx(expected)


def pairs_by_enumeration(config, context, patterns=None):
    """Query-key pairs of one sequence, over layers and heads: sets of keys as defined, no formula."""
    pairs = 0
    for pattern in patterns or layer_patterns(config, context):
        for stride in pattern.head_strides(config.num_heads):
            for i in range(context):
                keys = {i - o for o in range(0 if pattern.include_self else 1, pattern.window + 1)}
                keys |= {i - m * stride for m in range(1, pattern.num_skips + 1)}
                pairs += len([j for j in keys if j >= 0])
    return pairs


def counted_keys_pass(config, context):
    """FLOPs a token that PyTorch counts in a pass for keys, and those of pairs of all layers but the last."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton; see kernel_calls.py

    kept = {layer: KeptKeys(2 * context, context, True, Placement()) for layer in range(config.num_layers)}
    model = PiTransformer(config, context)
    tokens = torch.randint(0, 23, (1, context), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as keys, torch.no_grad():
        model(tokens, context=SequenceContext(kept=kept), head=False)
    patterns = layer_patterns(config, context)
    pairs = pairs_by_enumeration(config, context) - pairs_by_enumeration(config, context, patterns[-1:])
    return keys.get_total_flops() / context + 4 * config.head_dim * pairs / context


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gate_input": "query"},
        {"gate": "none"},
        {"num_kv_heads": None, "schedule": "doubling", "num_skips": 3, "window": 7},
        {"num_layers": 3, "schedule": "per_head", "include_self": False},
    ],
)
def test_flops_are_what_pytorch_counts(changes):
    """Matrix products of a real step and of the dense oracle, a pair, times the pattern's pairs.

    What is computed again does not count as work: it is what a step with recomputation has more.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton; see kernel_calls.py

    config, context, batch = dataclasses.replace(TINY, **changes), 48, 2
    tokens = torch.randint(0, 23, (batch, context), generator=torch.Generator().manual_seed(0))

    def counted_step(recompute):
        model = PiTransformer(config, context, activation_checkpointing=recompute)
        with FlopCounterMode(display=False) as step:
            model(tokens, tokens, SequenceContext()).backward()
        return step.get_total_flops()

    step = counted_step(False)
    pairs = pairs_by_enumeration(config, context)
    recomputed = counted_step(True) - step + 4 * config.head_dim * batch * pairs
    expected = batch * context * recomputed_flops_per_token(config, context)
    assert recomputed == pytest.approx(expected, rel=1e-12)

    assert keys_flops_per_token(config, context) == pytest.approx(
        counted_keys_pass(config, context), rel=1e-12
    )
    heads = (config.num_heads, config.kv_heads, config.kv_heads)
    q, k, v = (torch.randn(1, context, h, config.head_dim, requires_grad=True) for h in heads)
    with FlopCounterMode(display=False) as dense:
        pi_attention_oracle(q, k, v, None, layer_patterns(config, context)[0]).sum().backward()
    of_a_pair = dense.get_total_flops() / (config.num_heads * context**2)

    counted = step + batch * of_a_pair * pairs
    assert training_flops_per_token(config, context) == pytest.approx(counted / (batch * context), rel=1e-12)
