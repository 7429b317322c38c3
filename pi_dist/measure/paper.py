"""`pi-dist paper`: the paper's Table V and three of its claims, measured here, its figures beside ours."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from pi_dist.config import Config, Method, ModelConfig, ParallelConfig, TrainingConfig, UserError
from pi_dist.measure.fake_ranks import Request
from pi_dist.measure.record import PEAK_BF16, device_name
from pi_dist.measure.steps import PAPER, model_of
from pi_dist.measure.tables import table
from pi_dist.measure.timeline import busy_ms, kernels_of
from pi_dist.measure.workers import OUT_OF_MEMORY, Worker
from pi_dist.model import attention as attention_layers
from pi_dist.model.attention import SequenceContext
from pi_dist.model.flops import training_flops_per_token
from pi_dist.model.rotary import rotary_table
from pi_dist.model.transformer import PiTransformer
from pi_dist.ops.oracle import prior_logits

# Table V: training s, inference ms, memory GB, GFLOP, MFU; its "RingAttention" attends to a local window
TABLE_V: dict[Method, tuple[float, float, float, float, float]] = {
    "dense": (45.2, 125.4, 32.1, 345.0, 0.234),
    "window": (14.6, 44.3, 9.2, 345.0, 0.517),
    "pi": (12.4, 36.7, 8.8, 262.0, 0.554),
}
_COLUMNS = ("ms", "forward_ms", "peak_mib", "forward_gflop", "mfu")
# what a layer consists of, by what is added to a window
_LAYERS = {
    "window": {"method": "window", "num_skips": 0},
    "window + skip": {"method": "pi", "gate": "none"},
    "window + skip + gate": {"method": "pi"},
}


def _model(preset: str, **changes: Any) -> ModelConfig:
    return model_of(preset, **(PAPER | changes))


def table_rows(
    contexts: Sequence[int], preset: str, device: str, known: Sequence[dict[str, Any]], until: float
) -> Iterator[dict[str, Any] | None]:
    """Table V's columns of dense, window and π on one GPU, one sequence, nothing recomputed.

    Yields the rows that are not among the known ones, each when it is measured; a last None, if it is later
    than `until` (of `time.monotonic`) and some are left.
    """
    precision = "fp32" if device == "cpu" else "bf16"
    peak = PEAK_BF16.get(device_name())
    done = [{key: row.get(key) for key in ("preset", "context", "method")} for row in known]
    with Worker() as worker:
        for context, method in itertools.product(contexts, TABLE_V):
            what = {"preset": preset, "context": context, "method": method}
            if what in done:
                continue
            changes = _LAYERS["window"] if method == "window" else {"method": method}
            config = Config(
                model=_model(preset, **changes),
                parallel=ParallelConfig(sp_degree=1, zero_stage=1, device=device),
                training=TrainingConfig(context=context, batch_size=1, precision=precision),
            )
            if time.monotonic() > until:
                yield None
                return
            found = worker.ask(Request(config, 1, 0, timed_steps=3))
            if found["status"] not in ("ok", OUT_OF_MEMORY):
                raise UserError(f"paper table: {method} at {context}: {found['status']}")
            flops = training_flops_per_token(config.model, context) * context
            row = {"what": "table", **what, "forward_gflop": round(flops / 3e9, 4)}
            row |= {"ms": None, "forward_ms": None, "peak_mib": None} | found
            on_gpu = peak is not None and device != "cpu" and row["ms"] is not None
            yield row | {"mfu": round(flops / row["ms"] * 1e3 / peak, 4) if on_gpu else None}


def _ms(function: Callable[[], Any], device: torch.device) -> float:
    """Median time of a call; on a GPU of its kernels, which may wait for the host."""
    function()
    times = []
    if device.type == "cuda":
        return statistics.median(busy_ms(kernels_of(function)) for _ in range(5))
    for _ in range(3):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def layer_rows(contexts: Sequence[int], preset: str, device: torch.device) -> list[dict[str, Any]]:
    """Times of one block with a window, with skips too, and with the gate too: forward, and both ways."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = []
    for context in contexts:
        for name, changes in _LAYERS.items():
            model = _model(preset, **changes, num_layers=1)
            built = PiTransformer(model, context, compiled=device.type == "cuda")
            (block,) = built.blocks.to(device, dtype)
            x = torch.randn(1, context, model.hidden_size, device=device, dtype=dtype, requires_grad=True)
            table = rotary_table((0,), context, model.head_dim, model.rope_theta, device)

            def forward(block=block, x=x, table=table, pieces=built.pieces) -> torch.Tensor:
                return block(x, table, SequenceContext(), pieces)

            def both(forward=forward, x=x) -> None:
                forward().backward(x.detach())

            with torch.no_grad():
                forward_ms = _ms(forward, device)
            times = {"forward_ms": round(forward_ms, 4), "ms": round(_ms(both, device), 4)}
            rows.append({"what": "layer", "preset": preset, "layer": name, "context": context} | times)
    return rows


@contextmanager
def _seen_attention(see: Callable[..., None]):
    """Call `see(q, k, gate, pattern, logit_cap)` for every π layer that is computed meanwhile."""
    compute = attention_layers.sequence_parallel_pi_attention

    def seen(q, k, v, gate, pattern, group, **options):
        see(q, k, gate, pattern, options["logit_cap"])
        return compute(q, k, v, gate, pattern, group, **options)

    with patch.object(attention_layers, "sequence_parallel_pi_attention", seen):
        yield


def divergence(
    q: torch.Tensor, k: torch.Tensor, gate: torch.Tensor | None, pattern, logit_cap: float | None
) -> tuple[torch.Tensor, float]:
    """(KL in nats [B, H, T]; share of logits that are clamped), in fp64.

    KL(p ‖ q) of the ideal softmax p of eq. (5), and q with clipped gate and clamped logits (section III-B3 of
    the paper). q, k [B, T, H, D], gate [B, T, H].
    """
    q, k = (x.double() for x in (q, k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)))
    gate = None if gate is None else gate.double()
    scale = q.shape[3] ** -0.5
    ideal, allowed = prior_logits(q, k, gate, pattern, scale, epsilon=0.0)
    stable, _ = prior_logits(q, k, gate, pattern, scale)
    clamped = 0.0
    if logit_cap is not None:
        clamped = ((stable.abs() > logit_cap) & allowed).sum().item() / (allowed.sum().item() * len(q))
        stable = stable.clamp(-logit_cap, logit_cap)
    log_p, log_q = (x.masked_fill(~allowed, float("-inf")).log_softmax(-1) for x in (ideal, stable))
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1), clamped


@torch.no_grad()
def divergence_rows(model: PiTransformer, sequences: Sequence[torch.Tensor]) -> list[dict[str, Any]]:
    """KL and clamped logits of every π layer of a trained model on short sequences of tokens [B, T].

    Raises:
        UserError: the model has no π layer.
    """
    seen: list[list[tuple[torch.Tensor, float]]] = []
    for tokens in sequences:
        of_sequence: list[tuple[torch.Tensor, float]] = []
        with _seen_attention(lambda *what, found=of_sequence: found.append(divergence(*what))):
            model.hidden(tokens, SequenceContext())
        seen.append(of_sequence)
    if not seen or not seen[0]:
        raise UserError("paper kl: π layers of the model (0) >= 1 does not hold")
    rows = []
    for layer, found in enumerate(zip(*seen, strict=True)):
        kl = torch.cat([x.flatten() for x, _ in found])
        rows.append(
            {
                "what": "kl",
                "layer": layer,
                "mean": kl.mean().item(),
                "max": kl.max().item(),
                "share_above_0.02": (kl > 2e-2).double().mean().item(),
                "clamped_share": statistics.mean(share for _, share in found),
            }
        )
    return rows


def markdown(record: dict[str, Any]) -> str:
    """What of the three was measured, beside the paper's figures, with what they do and do not say."""
    by_what = {
        what: [row for row in record["rows"] if row["what"] == what] for what in ("table", "layer", "kl")
    }
    parts = [f"On {record['device']}."]
    presets = {row["preset"] for what in ("table", "layer") for row in by_what[what]}
    for what, tabled in (("table", _table), ("layer", _layers)):
        for preset in dict.fromkeys(row["preset"] for row in by_what[what]):
            parts += [f"The {preset} model:"] if len(presets) > 1 else []
            parts.append(tabled([row for row in by_what[what] if row["preset"] == preset]))
    if by_what["kl"]:
        parts.append(_divergences(by_what["kl"]))
    return "\n\n".join(parts) + "\n"


def _cell(value: float | None, other: float | None = None) -> str:
    if value is None:
        return "—"
    text = f"{value:,.1f}" if value >= 1 else f"{value:.3f}"
    return text if not other else f"{text} ({value / other:.2f})"


def _table(rows: list[dict[str, Any]]) -> str:
    of = {(row["context"], row["method"]): row for row in rows}
    lines = []
    for row in rows:
        dense = of.get((row["context"], "dense"), {})
        cells = [_cell(row[column], dense.get(column)) for column in _COLUMNS]
        if row["ms"] is None:
            cells[0] = row["status"]
        lines.append([f"{row['context']:,}", row["method"], *cells])
    for method, values in TABLE_V.items():
        cells = [_cell(value, other) for value, other in zip(values, TABLE_V["dense"], strict=True)]
        lines.append(["paper", method, *cells])
    shares = {
        context: 1 - row["forward_gflop"] / of[context, "dense"]["forward_gflop"]
        for (context, method), row in of.items()
        if method == "pi" and (context, "dense") in of
    }
    fewer = ", ".join(f"{share:.1%} at {context:,}" for context, share in shares.items()) or "not known yet"
    head = ["context", "method", "step ms", "forward ms", "peak MiB", "forward GFLOP", "MFU"]
    return table(head, lines) + (
        "\n\nIn parentheses: over dense. The paper's columns are seconds, ms, GB, GFLOP and MFU on A100s, of "
        "a model, batch and context that it does not name: so only ratios compare, and only at a context at "
        f"which its saving of 24.1 % of the FLOP arises; that of π here: {fewer}. Its dense attention has "
        "23.4 % MFU: a faster one leaves less to gain. Its window (called RingAttention) has as many FLOP as "
        "dense, which no window has. A forward pass on a GPU is the time of its kernels: short ones wait "
        "for the host."
    )


def _layers(rows: list[dict[str, Any]]) -> str:
    lines = []
    for context in dict.fromkeys(row["context"] for row in rows):
        group = [row for row in rows if row["context"] == context]
        for row, before in zip(group, [group[0], *group], strict=False):
            cells = []
            for key in ("forward_ms", "ms"):
                cells += [f"{row[key]:.3f}", f"{(row[key] - before[key]) / group[-1][key]:.1%}"]
            lines.append([f"{context:,}", row["layer"], *cells])
    head = ["context", "layer", "forward ms", "of it added", "both ways ms", "of it added"]
    return table(head, lines) + (
        "\n\nAdded: what this part takes of the whole layer. The paper says gathers and gate < 3 %, skip and "
        "fusion < 17 %."
    )


def _divergences(rows: list[dict[str, Any]]) -> str:
    head = ["layer", "mean KL, nats", "largest", "tokens and heads above 0.02", "clamped logits"]
    lines = []
    for row in rows:
        shares = [f"{row[key]:.2%}" for key in ("share_above_0.02", "clamped_share")]
        lines.append([str(row["layer"]), f"{row['mean']:.2e}", f"{row['max']:.2e}", *shares])
    return table(head, lines) + "\n\nThe paper says that the KL stays below 0.02."
