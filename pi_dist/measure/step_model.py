"""Memory and time of an optimizer step in closed form: eq. (7) of the paper, for every method and ZeRO stage.

Terms that follow from the code are counted here; what only a GPU tells is a constant of its `Profile`.
Memory is what one rank allocates; time is that of the whole step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pi_dist.config import EXACT_METHODS, Config, Method, accumulation_steps, num_chunks, replays_graphs
from pi_dist.measure.cost_model import BYTES, exchanged_bytes, rebalanced_bytes
from pi_dist.measure.profile import Network, Profile
from pi_dist.model.flops import matmul_parameters
from pi_dist.model.loss import KERNEL_ELEMENTS, tile_rows
from pi_dist.ops.pattern import PiPattern, layer_patterns
from pi_dist.training import kept_memory
from pi_dist.training.kept_memory import KeptPlan, offloaded_bytes, plan_kept_rows

MIB = 2**20
_BUCKET = 500_000_000  # elements of DeepSpeed's default reduce bucket
_LIVE_PARAMETERS = 1_000_000_000  # that ZeRO 3 gathers at most ahead of their use, DeepSpeed's default
_LOGIT_MOVES = 6  # times that each is read or written: by three products, and by the loss
# what a block keeps for its backward pass, in copies of its input; measured of the small model, nothing
# recomputed, and of the medium one, all but matrix products and attention
_SAVED_COPIES, _PRODUCT_COPIES = 18.2, 12.0
# Of a block's copies, those that only its backward pass makes: of the wide MLP and inputs.
_GRADIENT_COPIES = 6
# Copies in the backward pass of the first half of a block, by its code: input, norm, projection, rotary q and
# k, output, and the gradients of all of them. Read where the MLP is in tiles, which hide behind it.
_FIRST_HALF_COPIES = 14
# Copies in the backward pass of dense attention, by its code: q, k, v and what they are parts of, out and its
# gradient, the sums of gradients in fp32, a block's own, and the kernel's workspace.
_EXACT_COPIES = 24
# Beyond them, in a ring: keys and values that are held and that arrive, and sums of gradients that arrive.
# Among other layers two fewer live, as q, k and v do not keep what they were parts of: not counted.
_RING_COPIES = 9
_RING_COPIES_OF_TWO = 7  # no keys arrive while others than a rank's own are worked on
_ULYSSES_COPIES = -2  # what is gathered takes the place of what it was gathered from
# Keys a query that a call of exact attention could look at while its tiles only begin and end: of all pairs,
# 1 % at 200k tokens, a quarter at 8k. Fitted to dense steps of the small and medium models on an H100.
_FILL_KEYS = 1024
# Of what a block with a gate moves, that of the gate: by its code d/2 numbers twice forward, four times back.
_GATE_MOVES = 0.07
# Matrix products in fp32 take so many times as long as in bf16, by the data sheets of H100 and H200 (989 and
# 67 TFLOP/s) and of A100 (312 and 19.5). Nothing in fp32 was measured.
_FP32_PRODUCTS = 15.0
_INPUTS_HERE = 3  # of blocks, where the rest are in host memory: one that leaves, one in use, one that comes
_STATE_BYTES = 28  # read and written by AdamW for each parameter of a partition
_ADDED_BYTES = 12  # for each parameter, where a further micro-step's gradient is added to an fp32 one


@dataclass(frozen=True)
class Memory:
    """MiB of one rank: what parts allocate at the step's peak."""

    states: float
    """Parameters, masters, moments and gradients."""
    kept: float
    """Inputs of blocks, rows kept of other chunks, tokens."""
    working: float
    """The block that is recomputed, or the loss, whichever is larger."""
    host: float = 0.0
    """Rows kept in host memory, or inputs of blocks, beside the total."""

    @property
    def total(self) -> float:
        return self.states + self.kept + self.working


@dataclass(frozen=True)
class Time:
    """Seconds of one optimizer step, by part."""

    compute: float
    communication: float
    """What nothing hides."""

    @property
    def total(self) -> float:
        return self.compute + self.communication


def num_parameters(config: Config) -> int:
    """Parameters of the model, tied ones once."""
    m, d = config.model, config.model.hidden_size
    matrices = matmul_parameters(m)
    vectors = (4 * m.num_layers + 2) * d
    gated = sum(m.gated(layer) for layer in range(m.num_layers))
    if m.gate == "dynamic":
        vectors += gated * (d // 2 + m.num_heads)
    elif m.gate == "static":
        vectors += gated * m.num_heads
    return matrices + vectors


def state_bytes(config: Config, world_size: int) -> tuple[float, float]:
    """(at rest, at the end of the backward pass) bytes of parameters, optimizer states, gradients of a rank.

    As DeepSpeed 0.19 holds them: in bf16 ZeRO 1 keeps a whole fp32 gradient, and one in bf16 that is made in
    the backward pass; ZeRO 2 whole gradients in bf16 and its part in fp32, ZeRO 3 its parts; the latter two
    have a bucket of 5e8 elements, in fp32 all three.
    """
    n, stage = num_parameters(config), config.parallel.zero_stage
    element = BYTES[config.training.precision] if stage > 0 else 4
    own = n / world_size
    states = 12 * own if element == 2 else (8 * own if stage == 0 else 12 * own)
    if stage == 0:
        return 4 * n + 8 * n, 16 * n
    if stage == 1:
        rest = element * n + states + 4 * n
        return rest, rest + (element * n if element == 2 else element * _BUCKET)
    if stage == 2:
        rest = 2 * element * n + states
        return rest, rest + 4 * own + element * _BUCKET
    rest = (element + 4) * own + states + 4 * _BUCKET
    return rest, rest + element * min(n, _LIVE_PARAMETERS)


def _passing_gradients(config: Config) -> float:
    """Bytes of gradients, of those at the end of the backward pass, that are not there when a step begins."""
    stage, bf16 = config.parallel.zero_stage, config.training.precision == "bf16"
    return num_parameters(config) * (4 if stage == 0 else 2 if stage == 1 and bf16 else 0)


def attention_copies(method: Method, num_ranks: int) -> float:
    """Copies of [tokens, d] that live in the backward pass of the half of a block with attention."""
    if method not in EXACT_METHODS:
        return _FIRST_HALF_COPIES
    if method == "ulysses" and num_ranks > 1:
        return _EXACT_COPIES + _ULYSSES_COPIES
    if method == "ring" and num_ranks > 1:
        return _EXACT_COPIES + (_RING_COPIES if num_ranks > 2 else _RING_COPIES_OF_TWO)
    return _EXACT_COPIES


def memory(config: Config, world_size: int, profile: Profile) -> Memory:
    """What a rank allocates at most in one step; every term in MiB.

    At most: in the loss, or in the backward pass of the last block, when no gradient of another is there yet,
    or of the first, when all are.

    Raises:
        ConfigError: in chunks, see `kept_rows`.
    """
    m, t, p = config.model, config.training, config.parallel
    chunks = num_chunks(t)
    tokens = t.micro_batch_size * (t.context // p.sp_degree)
    here = -(-tokens // chunks)  # that go through the model at a time
    row = m.hidden_size * BYTES[t.precision]  # one token's hidden state
    recomputed = t.activation_checkpointing is True
    kept = here * (16 + 4 * m.head_dim)  # tokens and labels, rotary positions
    host = float(offloaded_bytes(config))
    if chunks > 1:
        rows = kept_rows(config, profile)
        size = rows.size
        kept += size.near + size.near_gradients if rows.host else size.rows + size.gradients
        host = size.rows + (0 if rows.spread else size.gradients) if rows.host else 0.0
    tiled = t.mlp_tile_tokens is not None
    # of blocks, and of their second halves, where these are in tiles
    inputs = here * row * max(1, m.num_layers * (recomputed + tiled))
    if t.activation_offload:
        inputs = min(inputs, _INPUTS_HERE * here * row)
    gradients = _GRADIENT_COPIES * here * row
    of_mlp = profile.block_copies * (min(here, t.mlp_tile_tokens) if tiled else here)
    of_attention = max(attention_copies(method, p.sp_degree) for method in m.methods) * here
    block = max(of_mlp, of_attention) * row - gradients  # what the backward pass of a block reads
    tile = tile_rows(here, m.vocab_size, KERNEL_ELEMENTS)
    loss = 3 * here * row + 4 * m.vocab_size * m.hidden_size
    loss += tile * (m.vocab_size * BYTES[t.precision] + row)
    if recomputed:
        all_blocks, own = 0, block
    elif t.activation_checkpointing == "selective":
        all_blocks, own = m.num_layers * _PRODUCT_COPIES * here * row, block
    else:
        all_blocks, own = m.num_layers * _SAVED_COPIES * here * row, 0
    _, full = state_bytes(config, world_size)
    begun = full
    if accumulation_steps(config, world_size) * chunks == 1:
        begun -= _passing_gradients(config)
    of_head = (full - begun) * m.vocab_size * m.hidden_size / num_parameters(config)
    moments = (
        (begun, inputs, all_blocks + loss),
        (begun + of_head, inputs, all_blocks + own + gradients),
        (full, inputs / m.num_layers if recomputed else inputs, block + gradients),
    )
    states, inputs, working = max(moments, key=sum)
    return Memory(states / MIB, (kept + inputs) / MIB, working / MIB + profile.fixed_mib, host / MIB)


def kept_rows(config: Config, profile: Profile) -> KeptPlan:
    """Where a run in chunks will keep its rows, on a machine whose host memory is large enough.

    Raises:
        ConfigError: the GPU has no room for those that chunks look at.
    """
    sp_degree = config.parallel.sp_degree
    device = kept_memory.Memory(device=round(profile.memory_mib * MIB), host=None)
    return plan_kept_rows(config, device, sorted({0, sp_degree // 2, sp_degree - 1}))


def forward_passes(config: Config) -> float:
    """How often a block is computed in one step: again where its backward pass recomputes it all.

    In chunks once more, but not the last one: for the rows that are kept of it. (Of the last layer that pass
    makes no more than those, which is not counted here: it is a layer's share too much.)
    """
    passes = 2.0 if config.training.activation_checkpointing is True else 1.0
    return passes + 1 - 1 / num_chunks(config.training)


def exact_flops(config: Config, method: Method) -> float:
    """4·head_dim FLOP for each pair of a query and a key of one exact layer, all heads, one rank, forward.

    And those that there is time for while calls begin and end; a ring has one for every block of keys.
    """
    t, ranks = config.training, config.parallel.sp_degree
    calls = ranks if method == "ring" else 1
    pairs = t.context / ranks * ((t.context + 1) / 2 + calls * _FILL_KEYS)
    return 4.0 * config.model.hidden_size * pairs * t.micro_batch_size


@dataclass(frozen=True)
class Work:
    """What one rank computes in one micro-step, in units of the constants that time is linear in."""

    matmul_flops: float
    moved_bytes: float
    """Of blocks, for block_moves = 1."""
    layers: float
    """Blocks that go forward, once more, and backward."""
    launched_layers: float
    """Of them, those whose kernels the host launches one by one: none of a graph's."""
    exact_forward_flops: float
    exact_backward_flops: float
    fixed_seconds: float
    """Of parts without a constant to fit: our attention kernels, the loss, AdamW."""


def work(config: Config, world_size: int, profile: Profile) -> Work:
    """What a rank does in one optimizer step, without communication."""
    m, t, p = config.model, config.training, config.parallel
    tokens = t.micro_batch_size * t.context // p.sp_degree
    forwards = forward_passes(config)
    head = m.vocab_size * m.hidden_size
    flops = tokens * (6.0 * head + 2.0 * (forwards + 2) * (matmul_parameters(m) - head))
    if t.activation_checkpointing is True:
        flops -= tokens * 8.0 * m.num_layers * m.hidden_size**2  # not computed again
    element = BYTES[t.precision]
    exact = sum(exact_flops(config, method) for method in m.methods if method in EXACT_METHODS)
    seconds = _kernel_seconds(config, profile, forwards) + _merge_seconds(config, profile, forwards)
    seconds += tokens * m.vocab_size * _LOGIT_MOVES * element / profile.copy_bytes_per_s
    steps = accumulation_steps(config, world_size)
    states = num_parameters(config) * (_STATE_BYTES / (world_size if p.zero_stage else 1) + 8)
    states += num_parameters(config) * _ADDED_BYTES * (steps * num_chunks(t) - 1)
    moves = forwards + (1 if t.activation_checkpointing == "selective" else 0)  # all but products, once more
    slower = _FP32_PRODUCTS if t.precision == "fp32" else 1.0
    moved = tokens * sum(1.0 if m.gated(layer) else 1 - _GATE_MOVES for layer in range(m.num_layers))
    layers = steps * m.num_layers * num_chunks(t) * (forwards + 2) / 4
    return Work(
        matmul_flops=slower * steps * flops,
        moved_bytes=steps * moved * m.hidden_size * element * (moves + 2) / 4,
        layers=layers,
        launched_layers=0 if replays_graphs(config, "cuda") else layers,
        exact_forward_flops=slower * steps * forwards * exact,
        exact_backward_flops=slower * steps * 2.5 * exact,
        fixed_seconds=steps * seconds + states / profile.copy_bytes_per_s,
    )


def _kernel_seconds(config: Config, profile: Profile, forwards: float) -> float:
    """Of our attention kernels in one micro-step of one rank; in fp32, by their bytes, twice as long."""
    m, t = config.model, config.training
    tokens, total = t.micro_batch_size * t.context // config.parallel.sp_degree, 0.0
    for method, pattern in zip(m.methods, layer_patterns(m, t.context), strict=True):
        if method not in EXACT_METHODS:
            cost = profile.attention_cost(*_neighbours(pattern, t.context))
            total += 1e-9 * tokens * m.num_heads * (forwards * cost.forward_ns + cost.backward_ns)
    return total * m.head_dim / 64 * BYTES[t.precision] / BYTES["bf16"]


def _neighbours(pattern: PiPattern, context: int) -> tuple[int, int]:
    """(of the ring, skips) that a token has in the mean, rounded up: the first ones have fewer."""
    window = min(pattern.window, context - 1)
    stride = min(pattern.distinct_strides())
    skips = min(pattern.num_skips, (context - 1) // stride)
    return (
        math.ceil(window * (1 - window / (2 * context))),
        math.ceil(skips * (1 - skips * stride / (2 * context))),
    )


def _merge_seconds(config: Config, profile: Profile, forwards: float) -> float:
    """Of ring attention's sums over its steps, in fp32: out and lse forward, three gradients backward.

    Among other layers also of q, k, v and out, and their gradients, which it packs and puts in order.
    """
    m, t, p = config.model, config.training, config.parallel
    rings = sum(method == "ring" for method in m.methods)
    if rings == 0 or p.sp_degree == 1:
        return 0.0
    moved = (p.sp_degree - 1) * (18 * forwards + 30) + (0 if config.balanced else 28 * (forwards + 1))
    tokens = t.micro_batch_size * t.context // p.sp_degree
    return rings * tokens * m.hidden_size * moved / profile.copy_bytes_per_s


def compute_seconds(done: Work, profile: Profile) -> float:
    """Time of the work of one rank: the GPU's, or that of the host to launch it, whichever is longer."""
    return max(gpu_seconds(done, profile), done.launched_layers * 1e-6 * profile.host_layer_us)


def gpu_seconds(done: Work, profile: Profile) -> float:
    """Time of the GPU's work, linear in the constants that `calibrate` fits."""
    return (
        done.matmul_flops / (profile.matmul_share * profile.matmul_flops_per_s)
        + done.moved_bytes * profile.block_moves / profile.copy_bytes_per_s
        + done.layers * 1e-6 * profile.gpu_layer_us
        + done.exact_forward_flops / profile.exact_forward_flops_per_s
        + done.exact_backward_flops / profile.exact_backward_flops_per_s
        + done.fixed_seconds
    )


def communication_seconds(config: Config, world_size: int, profile: Profile, network: Network) -> float:
    """Seconds of a step in which a rank waits for others: exchanges of layers that nothing hides, and ZeRO.

    A message takes `latency + bytes / rate`. Rows of π and window travel behind the attention to a rank's own
    rows, and are worked on by launches of their own; blocks of a ring behind the attention to the block
    before; Ulysses, the exchanges of shards around a ring among other layers, and ZeRO wait.
    """
    m, t, p = config.model, config.training, config.parallel
    forwards = forward_passes(config)
    micro_steps, total = accumulation_steps(config, world_size), 0.0
    if p.sp_degree > 1:
        by_method: dict[str, float] = {}
        for layer, method in enumerate(m.methods):  # layers of one pattern send the same
            key = f"{method} {m.strides and m.strides[layer]} {m.schedule == 'doubling' and layer}"
            if key not in by_method:
                sent = exchanged_bytes(config, layer) / t.batch_size * t.micro_batch_size
                by_method[key] = _layer_wait(config, method, sent, forwards, network, profile)
            total += by_method[key]
    return micro_steps * num_chunks(t) * total + _zero_seconds(config, world_size, network)


def _layer_wait(
    config: Config, method: str, sent: float, forwards: float, network: Network, profile: Profile
) -> float:
    """Seconds that one layer waits in one micro-step (of one chunk), for `sent` bytes of the whole step."""
    t, ranks, passes = config.training, config.parallel.sp_degree, forwards + 1
    chunks = num_chunks(t)
    rate, latency = network.of(ranks, all_at_once=method == "ulysses")
    if method == "ulysses":
        return 4 * passes * latency + sent / rate
    if method == "ring":
        steps = passes * (ranks - 1) + 1
        compute = exact_flops(config, method) * (
            forwards / profile.exact_forward_flops_per_s + 2.5 / profile.exact_backward_flops_per_s
        )
        around = rebalanced_bytes(config) * t.micro_batch_size
        wait = max(0.0, steps * latency + (sent - around) / rate - compute * (ranks - 1) / ranks)
        if around:
            wait += 2 * passes * latency + around / network.of(ranks, all_at_once=True)[0]
        return wait
    calls = 2 * passes  # window rows by send/recv and skip rows by all_to_all
    hidden = _kernel_seconds(config, profile, forwards) / chunks / config.model.num_layers
    edge = passes * latency  # launches for what arrives, short as a message
    return edge + max(0.0, calls * latency + sent / chunks / rate - hidden)


def _zero_seconds(config: Config, world_size: int, network: Network) -> float:
    """Gradients summed in fp32, parameters gathered in their own dtype, by rings over all ranks.

    ZeRO 2 and 3 sum after the backward pass of every micro-step and chunk; ZeRO 3 gathers for every pass.
    """
    if world_size == 1:
        return 0.0
    rate, latency = network.of_collective(world_size)
    stage, n = config.parallel.zero_stage, num_parameters(config)
    element, share = BYTES[config.training.precision], (world_size - 1) / world_size
    chunks = num_chunks(config.training)
    backwards = accumulation_steps(config, world_size) * chunks
    reductions = backwards if stage >= 2 else 1
    gathers = backwards * (3 - 1 / chunks) if stage == 3 else 1  # all chunks but the last once more, first
    factor = 1 if stage == 3 else 2  # an all_reduce, where ZeRO 3 has a reduce_scatter
    sent = share * n * (4 * factor * reductions + (element * gathers if stage else 0))
    messages = (reductions + gathers) * max(1, -(-n // _BUCKET)) * (world_size - 1).bit_length()
    return sent / rate + messages * latency


def step_time(config: Config, world_size: int, profile: Profile, network: Network) -> Time:
    """The predicted time of one optimizer step."""
    return Time(
        compute_seconds(work(config, world_size, profile), profile),
        communication_seconds(config, world_size, profile, network),
    )
