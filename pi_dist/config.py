"""The configuration of a run: frozen dataclasses, each field documented where it is defined, and all checks.

Standard library only: a configuration is checked before torch, a GPU or a file is touched. A refused
configuration raises `ConfigError`, whose text is one line that names the key and prints the failing equation.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal, get_args


class UserError(ValueError):
    """What was asked for cannot be done; the message is one line for the user, without a traceback."""


class ConfigError(UserError):
    """The configuration cannot work; the message names the key and the equation that fails."""


Method = Literal["pi", "window", "dense", "ring", "ulysses"]
EXACT_METHODS = ("dense", "ring", "ulysses")
Overlap = Literal["none", "interior", "pipelined"]
OVERLAPS: tuple[Overlap, ...] = get_args(Overlap)
LONGEST_TIMEOUT_S = 30 * 24 * 3600  # what is much longer overflows the clocks that wait for it

MOST = {"num_layers": 1024, "num_heads": 4096, "num_strides": 1024, "num_skips": 2**20}  # all are listed
LONGEST_CONTEXT = 2**31  # whose distances are counted: 256 MB of bits


@dataclass(frozen=True)
class ModelConfig:
    """The π-Transformer: a pre-norm stack of π-attention and GELU MLP, rotary positions, tied embeddings."""

    method: Method | list[Method] = "pi"
    """Attention of all layers, or of each. pi; window: its skips off; and, exact over the whole context,
    without gate and clamp: dense (one rank), ring (ring attention), ulysses (DeepSpeed's)."""
    num_layers: int = 12
    """Number of blocks."""
    hidden_size: int = 768
    """Width d of the residual stream; the MLP is 4d wide."""
    num_heads: int = 12
    """Query heads; head_dim is hidden_size / num_heads."""
    num_kv_heads: int | None = None
    """Key/value heads (grouped-query attention); must divide num_heads. Default: num_heads."""
    vocab_size: int | None = None
    """Vocabulary of the model.
    Default: that of the prepared data's tokenizer, rounded up to a multiple of 64."""
    window: int = 4
    """k: neighbours on a side that a token attends to, the token itself not counted."""
    stride: int = 16
    """π: the base stride of the skips, in tokens."""
    num_skips: int = 1
    """M: skip targets i-π, i-2π, … i-Mπ of a token. 0 is a plain window."""
    schedule: Literal["fixed", "doubling", "per_head"] = "fixed"
    """fixed: π in every layer; doubling: layer l uses π·2^(l mod c); per_head: head h uses π·2^(h mod c)."""
    num_strides: int | None = None
    """c of the schedule. Default: the most that keep every stride below the context."""
    strides: list[int] | list[list[int]] | None = None
    """Explicit strides, one per layer or one list per layer with one per head;
    replaces stride and schedule."""
    include_self: bool = True
    """Whether a token attends to itself (eq. 2 does, Algorithm 1 does not)."""
    ring: bool = True
    """False removes the local window (the ablation "w/o Ring-Local"); then no gate prior is added."""
    skip: bool = True
    """False removes the skips (the ablation "w/o π-Skip"); then no gate prior is added."""
    causal: bool = True
    """False is the bidirectional encoder block; it has no next-token loss and so cannot be trained here."""
    gate: Literal["dynamic", "static", "none"] = "dynamic"
    """dynamic: the MLP of eq. (4); static: one learned value per head; none: no prior."""
    gate_input: Literal["hidden", "query"] = "hidden"
    """What the gate's MLP reads: the hidden state (the paper's listing)
    or the query projection (its eq. 4)."""
    logit_cap: float | None = 20.0
    """L_c: attention logits are clamped to [-L_c, L_c]; null switches the clamp off."""
    attention_dropout: float = 0.0
    """Dropout on attention probabilities, keyed by global position (the same on any number of ranks)."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""

    @property
    def methods(self) -> tuple[Method, ...]:
        """The method of every layer."""
        return (self.method,) * self.num_layers if isinstance(self.method, str) else tuple(self.method)

    def gated(self, layer: int) -> bool:
        """Whether a layer has a gate: with the window or the skips off there is nothing to weigh."""
        both = self.ring and self.skip and self.num_skips > 0
        return self.gate != "none" and both and self.methods[layer] == "pi"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


PRESETS = {  # Table I of the paper, and one that a CPU trains
    "tiny": ModelConfig(num_layers=2, hidden_size=64, num_heads=4, vocab_size=512),
    "small": ModelConfig(num_layers=12, hidden_size=768, num_heads=12),
    "medium": ModelConfig(num_layers=24, hidden_size=1024, num_heads=16),
    "large": ModelConfig(num_layers=32, hidden_size=1280, num_heads=20),
}


@dataclass(frozen=True)
class DataConfig:
    """Prepared shards (see `pi-dist prepare`) and how sequences are made of them."""

    train: str = "data/train"
    """Directory of prepared shards to train on."""
    heldout: str | None = None
    """Directory of prepared shards for the held-out loss; null: none is measured."""
    packing: Literal["pack", "split", "join"] = "pack"
    """pack: documents are kept whole up to the context, several to a sequence, the rest padded;
    split: documents are laid end to end and cut at every context, nothing padded but the very end;
    join: the same, but all are one document, begun again until the last context is full (any context can be
    trained on any text; more than its tokens repeat it)."""
    shuffle: bool = True
    """Another order of the sequences in every epoch, from training.seed."""
    num_workers: int = 1
    """Loader processes of a rank; 0 reads in the training process."""
    prefetch: int = 2
    """Micro-batches that each worker holds ready."""
    verify_hashes: bool = True
    """Check a shard's SHA-256 against the index when it is first opened (its size is checked always)."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the job is split: world size = data-parallel degree × sp_degree."""

    sp_degree: int = 1
    """Ranks that share one sequence (sequence parallel; torchtitan and Megatron say context parallel)."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: 1 splits optimizer states, 2 gradients too, 3 parameters too, over all ranks."""
    exchange: Literal["ring_all_to_all", "all_to_all"] = "ring_all_to_all"
    """ring_all_to_all: window halo by ring send/recv, skip rows by one all_to_all_single (the paper's);
    all_to_all: both in the one all_to_all_single."""
    overlap: Overlap = "interior"
    """interior: neighbours within a rank's own shard are worked on while rows travel; pipelined: also, the
    sequences of a micro-batch one by one, the rows of the next travelling meanwhile (the paper's III-B4);
    none: rows are awaited first, for comparison."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU per local rank over NCCL where there are any, else the CPU over gloo."""
    timeout_s: float = 600.0
    """Seconds after which a step that makes no progress, or a rank without a sign of life, ends the run with
    status 74: the rank that hangs is named, and the stacks of all ranks are in run_dir/stacks. Collectives
    fail half a minute later; those of ZeRO after PyTorch's 10 minutes on GPUs, 30 on CPUs, which DeepSpeed
    does not let us choose."""


@dataclass(frozen=True)
class TrainingConfig:
    """The optimization (defaults: Algorithm 2 of the paper)."""

    context: int = 4096
    """n: tokens of one sequence, over all ranks that share it."""
    batch_size: int = 8
    """Sequences of one optimizer step, over all ranks; does not change with the number of ranks."""
    micro_batch_size: int = 1
    """Sequences of one forward pass of one replica; the rest is gradient accumulation."""
    steps: int = 200_000
    """Optimizer steps of the whole run."""
    learning_rate: float = 3e-4
    """Peak learning rate of AdamW."""
    min_learning_rate: float = 0.0
    """Where the cosine ends."""
    warmup_steps: int = 2000
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """AdamW weight decay, on matrices only."""
    beta1: float = 0.9
    """AdamW β1."""
    beta2: float = 0.95
    """AdamW β2."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: bf16 parameters and activations, fp32 master weights, gradients and optimizer states."""
    activation_checkpointing: bool | Literal["selective"] = False
    """true: keep only each block's input and recompute the block in the backward pass (its keys are
    exchanged again). selective: keep the matrix products and what attention needs, and recompute only what is
    cheap: norms and GELU. Not in ZeRO 3."""
    compile: bool | None = None
    """Compile what lies around attention in every block (torch.compile), so that norms, GELU and sums are
    fused; rotary positions and the gate have kernels of their own. null: where there is a GPU, but not in
    ZeRO 3, which gathers a module's parameters when Python calls it, as compiled code does not."""
    cuda_graphs: bool | None = None
    """Capture the forward and backward pass of a micro-batch once, and replay it: the host no longer launches
    each kernel, which takes it longer than the GPU below some tens of thousands of tokens a GPU. null: where
    it can be done (on GPUs, bf16, ZeRO 1, no dropout, offload or chunks) and every rank has the memory, up to
    65536 tokens of a rank."""
    activation_offload: bool = False
    """Keep the inputs of blocks that are recomputed in pinned host memory until the backward pass comes to
    them."""
    mlp_tile_tokens: int | None = None
    """Compute the MLP, and recompute it in the backward pass, in tiles of so many tokens of a rank: its 4d
    wide activations are of one tile, and its input is kept, beside that of the block. null: at once."""
    chunk_tokens: int | None = None
    """Work on a sequence in chunks of so many tokens, over all ranks that share it: exact, in memory that
    grows with the context only by the keys and values that later chunks look back to. null: all at once."""
    kept_rows: Literal["auto", "device", "host"] = "auto"
    """Where these keys and values lie. device: on the GPU; host: those that neither the current nor the next
    chunk looks at in pinned host memory; auto: host where they, their gradients and about what a chunk takes
    are more than the GPU has. The run says which, and is refused if they fit nowhere."""
    max_nonfinite_steps: int = 0
    """Steps in a row whose loss or gradient may be not finite: no update is made, ranks and sequences are
    named, and the run goes on. One more ends it; 0: the first does."""
    seed: int = 1234
    """Seed of initialization, order of the data and dropout."""
    eval_every: int = 100
    """Steps between held-out losses; 0: only at the end."""
    save_every: int = 100
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = 2
    """Checkpoints kept; older ones are deleted after a new one is complete."""
    log_every: int = 1
    """Steps between TensorBoard points (and lines, where there is no terminal)."""


@dataclass(frozen=True)
class Config:
    """One run."""

    run_dir: str = "runs/default"
    """Where checkpoints, TensorBoard logs and the resolved configuration go; a run found there is resumed."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @property
    def balanced(self) -> bool:
        """Whether ranks hold a piece from the front and one from the back of a sequence: for ring alone.

        Ring layers among others exchange contiguous shards for such pieces, and back.
        """
        return set(self.model.methods) == {"ring"} and self.parallel.sp_degree > 1

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Config:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: a section is not a mapping, or has a setting that there is not.
        """
        parts = {
            "model": ModelConfig,
            "data": DataConfig,
            "parallel": ParallelConfig,
            "training": TrainingConfig,
        }
        for key, value in values.items():
            is_part = key not in parts or isinstance(value, dict)
            _require(is_part, key, f"type of {key} ({type(value).__name__}) == mapping")
        try:
            made = {key: parts[key](**value) if key in parts else value for key, value in values.items()}
            return cls(**made)
        except TypeError as error:  # says which
            raise ConfigError(f"configuration: {error}") from error


def _require(holds: bool, key: str, equation: str, hint: str = "") -> None:
    if not holds:
        raise ConfigError(f"{key}: {equation} does not hold" + (f"; {hint}" if hint else ""))


def _require_finite(name: str, section: object) -> None:
    """Raise ConfigError for an infinity, or what is not a number, among a section's values."""
    for key, value in vars(section).items():
        finite = not isinstance(value, float) or math.isfinite(value)
        _require(finite, f"{name}.{key}", f"-inf < {key} ({value}) < inf")


def check_model(model: ModelConfig) -> None:
    """Raise ConfigError unless the model's own sizes fit together."""
    m = model
    _require_finite("model", m)
    for key in ("num_layers", "hidden_size", "num_heads", "stride"):
        _require(getattr(m, key) >= 1, f"model.{key}", f"{key} ({getattr(m, key)}) >= 1")
    for key in ("window", "num_skips"):
        _require(getattr(m, key) >= 0, f"model.{key}", f"{key} ({getattr(m, key)}) >= 0")
    for key, most in MOST.items():
        value = getattr(m, key)
        _require(value is None or value <= most, f"model.{key}", f"{key} ({value}) <= {most}")
    _require(
        m.hidden_size % m.num_heads == 0,
        "model.num_heads",
        f"hidden_size ({m.hidden_size}) % num_heads ({m.num_heads}) == 0",
    )
    _require(
        m.head_dim % 2 == 0, "model.num_heads", f"head_dim ({m.head_dim}) % 2 == 0", "rotary turns pairs"
    )
    _require(m.kv_heads >= 1, "model.num_kv_heads", f"num_kv_heads ({m.kv_heads}) >= 1")
    _require(
        m.num_heads % m.kv_heads == 0,
        "model.num_kv_heads",
        f"num_heads ({m.num_heads}) % num_kv_heads ({m.kv_heads}) == 0",
    )
    _require(
        m.vocab_size is None or m.vocab_size >= 2, "model.vocab_size", f"vocab_size ({m.vocab_size}) >= 2"
    )
    _require(
        m.num_strides is None or m.num_strides >= 1,
        "model.num_strides",
        f"num_strides ({m.num_strides}) >= 1",
    )
    _require(m.logit_cap is None or m.logit_cap > 0, "model.logit_cap", f"logit_cap ({m.logit_cap}) > 0")
    _require(m.rope_theta > 0, "model.rope_theta", f"rope_theta ({m.rope_theta}) > 0")
    _require(
        0 <= m.attention_dropout < 1,
        "model.attention_dropout",
        f"0 <= attention_dropout ({m.attention_dropout}) < 1",
    )
    _require(m.ring or (m.skip and m.num_skips > 0), "model.ring", "ring or (skip and num_skips > 0)")
    _require(
        len(m.methods) == m.num_layers,
        "model.method",
        f"len(method) ({len(m.methods)}) == num_layers ({m.num_layers})",
    )
    exact = sorted(set(m.methods) & set(EXACT_METHODS))
    if exact:
        only = "an exact method is causal and has no dropout of its own"
        _require(m.causal, "model.method", f"causal == true for {exact[0]!r}", only)
        _require(
            m.attention_dropout == 0,
            "model.method",
            f"attention_dropout ({m.attention_dropout}) == 0 for {exact[0]!r}",
            only,
        )
    if m.strides is not None:
        _require(
            len(m.strides) == m.num_layers,
            "model.strides",
            f"len(strides) ({len(m.strides)}) == num_layers ({m.num_layers})",
        )
        for layer, entry in enumerate(m.strides):
            heads = entry if isinstance(entry, list) else [entry]
            _require(
                not isinstance(entry, list) or len(heads) == m.num_heads,
                "model.strides",
                f"len(strides[{layer}]) ({len(heads)}) == num_heads ({m.num_heads})",
            )
            _require(min(heads, default=0) >= 1, "model.strides", f"strides[{layer}] ({entry}) >= 1")


def _check_chunks(config: Config, chunk_tokens: int) -> None:
    """Raise ConfigError unless the run, of a causal model, can train in chunks."""
    m, p, t = config.model, config.parallel, config.training
    key = "training.chunk_tokens"
    _require(
        1 <= chunk_tokens <= t.context, key, f"1 <= chunk_tokens ({chunk_tokens}) <= context ({t.context})"
    )
    _require(
        p.overlap != "pipelined", key, "parallel.overlap in ('interior', 'none')", "rows of chunks are kept"
    )
    exact = sorted(set(m.methods) & set(EXACT_METHODS))
    _require(
        not exact,
        key,
        f"model.method in ('pi', 'window') for {exact[0] if exact else None!r}",
        "a chunk needs the keys of all before it",
    )
    _require(
        chunk_tokens % p.sp_degree == 0,
        key,
        f"chunk_tokens ({chunk_tokens}) % parallel.sp_degree ({p.sp_degree}) == 0",
        "its ranks share every chunk",
    )
    _require(
        p.sp_degree == 1 or t.context % chunk_tokens == 0,
        key,
        f"training.context ({t.context}) % chunk_tokens ({chunk_tokens}) == 0 "
        f"with parallel.sp_degree ({p.sp_degree}) > 1",
        "ranks hold equal pieces of all chunks",
    )


def check(config: Config, world_size: int = 1) -> None:
    """Raise ConfigError unless the run can work on `world_size` ranks. Reads no file, imports no engine."""
    m, p, t, d = config.model, config.parallel, config.training, config.data
    check_model(m)
    _require_finite("parallel", p)
    _require_finite("training", t)
    _require(config.run_dir != "", "run_dir", f"run_dir ({config.run_dir!r}) != ''")
    _require(
        m.causal or t.chunk_tokens is None,
        "training.chunk_tokens",
        "model.causal == true",
        "a chunk would need keys of later ones",
    )
    _require(m.causal, "model.causal", "causal == true", "the next-token loss needs a causal model")
    for key in ("context", "batch_size", "micro_batch_size", "steps", "keep_checkpoints", "log_every"):
        _require(getattr(t, key) >= 1, f"training.{key}", f"{key} ({getattr(t, key)}) >= 1")
    for key in (
        "warmup_steps",
        "weight_decay",
        "clip_norm",
        "max_nonfinite_steps",
        "eval_every",
        "save_every",
        "min_learning_rate",
    ):
        _require(getattr(t, key) >= 0, f"training.{key}", f"{key} ({getattr(t, key)}) >= 0")
    _require(t.learning_rate > 0, "training.learning_rate", f"learning_rate ({t.learning_rate}) > 0")
    _require(
        t.min_learning_rate <= t.learning_rate,
        "training.min_learning_rate",
        f"min_learning_rate ({t.min_learning_rate}) <= learning_rate ({t.learning_rate})",
    )
    for key in ("beta1", "beta2"):
        _require(0 <= getattr(t, key) < 1, f"training.{key}", f"0 <= {key} ({getattr(t, key)}) < 1")
    _require(0 <= t.seed < 2**63, "training.seed", f"0 <= seed ({t.seed}) < 2^63")
    _require(d.num_workers >= 0, "data.num_workers", f"num_workers ({d.num_workers}) >= 0")
    _require(d.prefetch >= 1, "data.prefetch", f"prefetch ({d.prefetch}) >= 1")
    _require(p.sp_degree >= 1, "parallel.sp_degree", f"sp_degree ({p.sp_degree}) >= 1")
    _require(p.timeout_s > 0, "parallel.timeout_s", f"timeout_s ({p.timeout_s}) > 0")
    _require(
        p.timeout_s <= LONGEST_TIMEOUT_S,
        "parallel.timeout_s",
        f"timeout_s ({p.timeout_s}) <= {LONGEST_TIMEOUT_S}",
        "30 days",
    )
    _require(t.context <= LONGEST_CONTEXT, "training.context", f"context ({t.context}) <= 2^31")
    _require(
        t.context > 1 or d.packing != "join",
        "training.context",
        f"context ({t.context}) > 1 for data.packing 'join'",
        "the last token of a sequence has no next one",
    )
    if not set(m.methods) <= set(EXACT_METHODS):
        _require(
            t.context > m.window, "training.context", f"context ({t.context}) > model.window ({m.window})"
        )
    for key, whole_modules in (
        ("compile", t.compile),
        ("activation_checkpointing", t.activation_checkpointing == "selective"),
    ):
        _require(
            not whole_modules or p.zero_stage < 3,
            f"training.{key}",
            f"parallel.zero_stage ({p.zero_stage}) < 3 for {getattr(t, key)!r}",
            "ZeRO 3 gathers and releases parameters whenever a module is called",
        )
    if t.chunk_tokens is not None:
        _check_chunks(config, t.chunk_tokens)
    _require(
        t.chunk_tokens is not None or t.kept_rows == "auto",
        "training.kept_rows",
        f"kept_rows ({t.kept_rows!r}) == 'auto' with chunk_tokens null",
        "nothing is kept of a sequence that is not in chunks",
    )
    _require(
        t.activation_checkpointing is True or not t.activation_offload,
        "training.activation_offload",
        "activation_checkpointing == true",
        "what goes to host memory is what it keeps",
    )
    _require(
        t.chunk_tokens is None or not t.activation_offload,
        "training.activation_offload",
        "chunk_tokens == null",
        "shorter chunks keep less on the device",
    )
    _require(
        t.mlp_tile_tokens is None or t.mlp_tile_tokens >= 1,
        "training.mlp_tile_tokens",
        f"mlp_tile_tokens ({t.mlp_tile_tokens}) >= 1",
    )
    _require(
        t.mlp_tile_tokens is None or p.zero_stage < 3,
        "training.mlp_tile_tokens",
        f"parallel.zero_stage ({p.zero_stage}) < 3",
        "tiles need the MLP's parameters outside its module, where ZeRO 3 does not gather them",
    )
    for holds, equation in _can_be_captured(config):
        _require(holds or not t.cuda_graphs, "training.cuda_graphs", f"{equation} for true")
    _require(
        t.context % p.sp_degree == 0,
        "parallel.sp_degree",
        f"training.context ({t.context}) % sp_degree ({p.sp_degree}) == 0",
    )
    _require(
        "ring" not in m.methods or p.sp_degree == 1 or t.context % (2 * p.sp_degree) == 0,
        "training.context",
        f"context ({t.context}) % (2 × parallel.sp_degree ({p.sp_degree})) == 0 for 'ring'",
        "a rank takes a piece from the front and one from the back",
    )
    _require(
        p.overlap != "pipelined" or p.sp_degree == 1 or t.micro_batch_size > 1,
        "parallel.overlap",
        f"training.micro_batch_size ({t.micro_batch_size}) > 1 for 'pipelined'",
        "the rows of a sequence travel while another is worked on",
    )
    _require(
        "dense" not in m.methods or p.sp_degree == 1,
        "model.method",
        f"parallel.sp_degree ({p.sp_degree}) == 1 for 'dense'",
        "ring and ulysses are exact on several ranks",
    )
    _require(
        "ulysses" not in m.methods or m.kv_heads % p.sp_degree == 0,
        "model.method",
        f"num_kv_heads ({m.kv_heads}) % parallel.sp_degree ({p.sp_degree}) == 0 for 'ulysses'",
        "its ranks share out the heads",
    )
    _require(world_size >= 1, "launch", f"ranks ({world_size}) >= 1")
    _require(
        world_size % p.sp_degree == 0,
        "parallel.sp_degree",
        f"world size ({world_size}) % sp_degree ({p.sp_degree}) == 0",
        "start as many ranks as dp × sp",
    )
    dp_degree = world_size // p.sp_degree
    _require(
        t.batch_size % (dp_degree * t.micro_batch_size) == 0,
        "training.batch_size",
        f"batch_size ({t.batch_size}) "
        f"% (dp_degree ({dp_degree}) × micro_batch_size ({t.micro_batch_size})) == 0",
    )


def resolve(config: Config, vocab_size: int) -> Config:
    """Fill in what follows from the data: the vocabulary, rounded up to a multiple of 64.

    Raises:
        ConfigError: the model's vocabulary is smaller than the data's.
    """
    model = config.model
    if model.vocab_size is None:
        model = dataclasses.replace(model, vocab_size=-(-vocab_size // 64) * 64)
    if model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size: vocab_size ({model.vocab_size}) >= that of the data ({vocab_size}) "
            "does not hold"
        )
    return dataclasses.replace(config, model=model)


def accumulation_steps(config: Config, world_size: int) -> int:
    """Forward passes of one replica per optimizer step."""
    dp_degree = world_size // config.parallel.sp_degree
    return config.training.batch_size // (dp_degree * config.training.micro_batch_size)


def compiles(config: Config, device_type: str) -> bool:
    """Whether blocks are compiled on a device of this type."""
    wanted = config.training.compile
    return device_type == "cuda" and config.parallel.zero_stage < 3 if wanted is None else wanted


GRAPHED_TOKENS = 65536  # of a rank and micro-batch; beyond, the host is faster than the GPU


def replays_graphs(config: Config, device_type: str) -> bool:
    """Whether micro-batches are captured and replayed on a device of this type."""
    t, wanted = config.training, config.training.cuda_graphs
    if wanted is None:
        tokens = t.micro_batch_size * t.context // config.parallel.sp_degree
        wanted = tokens <= GRAPHED_TOKENS and all(holds for holds, _ in _can_be_captured(config))
    return wanted and device_type == "cuda"


def _can_be_captured(config: Config) -> list[tuple[bool, str]]:
    """(whether it holds, the equation): what a micro-batch must be for graphs to stand for it."""
    m, p, t = config.model, config.parallel, config.training
    return [
        (p.device != "cpu", f"parallel.device ({p.device!r}) != 'cpu'"),
        (p.zero_stage == 1, f"parallel.zero_stage ({p.zero_stage}) == 1"),
        (t.precision == "bf16", f"precision ({t.precision!r}) == 'bf16'"),
        (m.attention_dropout == 0, f"model.attention_dropout ({m.attention_dropout}) == 0"),
        (not t.activation_offload, "activation_offload == false"),
        (t.chunk_tokens is None, "chunk_tokens == null"),
    ]


def num_chunks(training: TrainingConfig) -> int:
    """Chunks of a sequence."""
    return 1 if training.chunk_tokens is None else -(-training.context // training.chunk_tokens)
