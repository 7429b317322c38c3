"""The Triton kernels as a backend: what is planned for a call, launched with its tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from pi_dist.kernels.pi_attention_bwd import _keys_kernel, _queries_kernel, _queries_once_kernel
from pi_dist.kernels.pi_attention_bwd_fused import _fused_kernel
from pi_dist.kernels.pi_attention_fwd import _pi_attention_fwd_kernel
from pi_dist.kernels.tiles import Rows
from pi_dist.ops.spec import AttentionSpec, nothing_arrives, nothing_to_send
from pi_dist.ops.triton_launches import INTERPRETED, Launch, LaunchPlan, plan_of


def check_usable(q: torch.Tensor) -> None:
    """Raise ValueError with the reason unless the kernels can run on tensors like `q` [B, T, H, D]."""
    if not q.is_cuda and not INTERPRETED:
        raise ValueError(
            f"backend 'triton' needs a GPU: q.device.type ({q.device.type}) == 'cuda' does not hold"
        )
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"backend 'triton': q.dtype ({q.dtype}) in (float32, float16, bfloat16) does not hold"
        )
    if INTERPRETED and q.dtype == torch.bfloat16:
        raise ValueError("backend 'triton': Triton's interpreter computes bfloat16 wrongly")
    if not 1 <= q.shape[3] <= 256:
        raise ValueError(f"backend 'triton': 1 <= head_dim ({q.shape[3]}) <= 256 does not hold")


def _rows(tensor: torch.Tensor) -> Rows:
    """A [B, T, H, D], [B, T, H] or [B, T] tensor as the kernels take it."""
    strides = tensor.stride()
    return Rows(tensor, strides[0], strides[1], strides[2] if len(strides) > 2 else 0)


def _dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself unless its last dimension is strided."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _run(kernel: Any, programs: int, *arguments: Any, **keywords: Any) -> None:
    """Launch a kernel."""
    kernel[(programs,)](*arguments, **keywords)


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the GPU that holds q, whichever is current."""

    @wraps(function)
    def on_its_device(spec, q, *arguments, **keywords):
        if not q.is_cuda or q.device.index == torch.cuda.current_device():
            return function(spec, q, *arguments, **keywords)
        with torch.cuda.device(q.device):
            return function(spec, q, *arguments, **keywords)

    return on_its_device


class _Tensors:
    """The tensors of one call by their names in the kernels; an absent one becomes any pointer."""

    def __init__(self, q: torch.Tensor, **others: torch.Tensor | None) -> None:
        self._absent = Rows(q, 0, 0, 0)
        self._rows = {"q": _rows(q)}
        self.add(**others)

    def add(self, **others: torch.Tensor | None) -> None:
        """Tensors that come later."""
        self._rows |= {name: self.rows(x) for name, x in others.items()}

    def rows(self, tensor: torch.Tensor | None) -> Rows:
        """A tensor, or none, as the kernels take it."""
        return self._absent if tensor is None else _rows(tensor)

    def token_stride(self) -> int:
        """The most elements between two tokens."""
        return max(rows.token for rows in self._rows.values())

    def of(self, launch: Launch, *names: str) -> list[Rows]:
        """What belongs to the queries of a launch."""
        found, view = [self._rows[name] for name in names], launch.part.view
        if view is None:
            return found
        return [rows if rows is self._absent else _rows(rows.ptr[:, view]) for rows in found]


class _Sum:
    """The output or dq: what launches add to.

    Attributes:
        whole: [B, T, H, D], in the dtype of the plan.
    """

    def __init__(self, plan: LaunchPlan, q: torch.Tensor) -> None:
        self.whole = torch.empty(q.shape, dtype=plan.sum_dtype, device=q.device)
        self._edge, self._dtype, self._rows = plan.edge, q.dtype, None

    def of(self, launch: Launch) -> Rows:
        """The rows of a launch's queries; those of the plan's edge go on in fp32."""
        view = launch.part.view
        if view is None:
            return _rows(self.whole)
        if self._edge is None:
            return _rows(self.whole[:, view])
        if self._rows is None:
            self._rows = self.whole[:, self._edge].float()
        first = self._edge.start
        return _rows(self._rows[:, view.start - first : view.stop - first])

    def total(self) -> torch.Tensor:
        """The sum of all launches in q's dtype."""
        if self._rows is not None:
            self.whole[:, self._edge] = self._rows
        return self.whole.to(self._dtype)


def _plan_for(
    spec: AttentionSpec, q: torch.Tensor, gate: torch.Tensor | None, labels: torch.Tensor | None, stride: int
) -> LaunchPlan:
    """What is planned for a call; `stride`: the most elements between two tokens of its tensors."""
    stride = max(stride, q.shape[2] * q.shape[3])
    return plan_of(spec, q.shape, q.dtype, q.device, gate is not None, labels is not None, stride)


@_on_its_device
def pi_attention_fwd(
    spec, q, keys, values, gate, q_labels, k_labels, arrive=nothing_arrives, run=_run
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `pi_dist.ops.reference.pi_attention_fwd`; lse is fp32. The first block holds all heads.

    Waits for the other blocks after the launches that need none of them.
    """
    q, keys, values = _dense_rows(q), [_dense_rows(keys[0])], [_dense_rows(values[0])]
    gate = None if gate is None else gate.float()
    tensors = _Tensors(q, gate=gate, q_labels=q_labels)
    pairs = [(_rows(keys[0]), _rows(values[0]))]
    stride = max(tensors.token_stride(), *(rows.token for rows in pairs[0]))
    plan = _plan_for(spec, q, gate, q_labels, stride)
    batch, q_len, num_heads, _ = q.shape
    out = _Sum(plan, q)
    lse = torch.empty((batch, num_heads, q_len), dtype=torch.float32, device=q.device).transpose(1, 2)
    tensors.add(lse=lse)
    for launch in plan.forward:
        index = launch.part.index
        if index and len(pairs) == 1:
            pairs += [(_rows(k), _rows(v)) for k, v in zip(*arrive(), strict=True)]
        mine, of_gate, my_labels, of_lse = tensors.of(launch, "q", "gate", "q_labels", "lse")
        run(
            _pi_attention_fwd_kernel, launch.programs * batch, mine, *pairs[index], of_gate, my_labels,
            tensors.rows(k_labels[index]), out.of(launch), of_lse, *launch.arguments, **launch.keywords,
        )  # fmt: skip
    return out.total(), lse


@_on_its_device
def pi_attention_bwd(
    spec, q, keys, values, gate, q_labels, k_labels, out, lse, dout, send_back=nothing_to_send, run=_run
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `pi_dist.ops.reference.pi_attention_bwd`, but for the dtype of gradients.

    Those of q and of the first block are in q's, those of other blocks, which travel to their owners, fp32.
    They are computed before the rest, so as to travel meanwhile.
    """
    call = _BackwardCall(spec, q, keys, values, gate, q_labels, k_labels, out, lse, dout, run)
    sent, rest, unseen = call.plan.backward
    for launch in sent:
        call.run(launch)
    for index in unseen:
        call.dkeys[index].zero_()
        call.dvalues[index].zero_()
    send_back(call.dkeys[1:], call.dvalues[1:])
    for launch in rest:
        call.run(launch)
    dk, dv = (x[0].to(q.dtype) for x in (call.dkeys, call.dvalues))
    return call.dq.total(), dk, dv, call.gradient_of_gate()


class _BackwardCall:
    """The tensors of one backward call, and its launches."""

    def __init__(self, spec, q, keys, values, gate, q_labels, k_labels, out, lse, dout, run) -> None:
        q, gate = _dense_rows(q), None if gate is None else gate.float()
        self._run, self.batch = run, q.shape[0]
        self.tensors = _Tensors(q, dout=_dense_rows(dout), gate=gate, q_labels=q_labels)
        self.pairs = [
            (_rows(_dense_rows(k)), _rows(_dense_rows(v))) for k, v in zip(keys, values, strict=True)
        ]
        self.k_labels = [self.tensors.rows(labels) for labels in k_labels]
        strides = (rows.token for pair in self.pairs for rows in pair)
        stride = max(self.tensors.token_stride(), *strides)
        self.plan = _plan_for(spec, q, gate, q_labels, stride)
        self.dkeys, self.dvalues = (
            [
                torch.empty(x.shape, dtype=torch.float32 if index else self.plan.keys_dtype, device=q.device)
                for index, x in enumerate(tensors)
            ]
            for tensors in (keys, values)
        )
        self.dq = _Sum(self.plan, q)
        # laid out as the gate; where several launches make it, in three summands
        self.apart = gate is not None and self.plan.several_parts
        self.dgate = None if gate is None else torch.empty_like(gate)
        self.weight, self.residual = (
            torch.empty_like(self.dgate) if self.apart else self.dgate for _ in range(2)
        )
        self.tensors.add(out=out, lse=lse, dgate=self.dgate, weight=self.weight, residual=self.residual)
        self._has_once = False

    def once(self) -> None:
        """Compute delta, and of a gate log2 α and log2(1-α), of all queries: [B, T, H] fp32, heads apart."""
        if self._has_once:
            return
        self._has_once = True
        dq = self.dq.whole
        batch, q_len, num_heads, _ = dq.shape
        shape = (1 if self.dgate is None else 3, batch, num_heads, q_len)
        of_queries = torch.empty(shape, dtype=torch.float32, device=dq.device).transpose(2, 3).unbind()
        names = ("delta", "log_ring", "log_skip")
        self.tensors.add(**dict.fromkeys(names) | dict(zip(names, of_queries, strict=False)))
        launch = self.plan.once
        tensors = self.tensors.of(launch, "out", "dout", "gate", *names)
        self._run(
            _queries_once_kernel, launch.programs * batch, *tensors, *launch.arguments, **launch.keywords
        )

    def run(self, launch: Launch) -> None:
        """Launch one of the plan's, but for `once`."""
        index, seen = launch.part.index, self.tensors.of
        pair, k_labels = self.pairs[index], self.k_labels[index]
        match launch.kernel:
            case "fused":
                kernel = _fused_kernel
                mine, *others = seen(launch, "q", "gate", "q_labels")
                of_queries = seen(launch, "out", "lse", "dout")
                own = [self.dq.of(launch), _rows(self.dkeys[0]), _rows(self.dvalues[0])]
                tensors = [mine, *pair, *others, k_labels, *of_queries, *own]
                tensors += seen(launch, "dgate", "weight", "residual")
            case "keys":
                kernel = _keys_kernel
                self.once()
                mine, labels, *others = seen(
                    launch, "q", "q_labels", "delta", "lse", "dout", "log_ring", "log_skip"
                )
                own = [_rows(self.dkeys[index]), _rows(self.dvalues[index])]
                tensors = [mine, *pair, labels, k_labels, *others, *own]
            case "queries":
                kernel = _queries_kernel
                self.once()
                mine, labels, *others = seen(launch, "q", "q_labels", "delta", "lse", "dout", "gate")
                sums = seen(launch, "dgate", "weight", "residual")
                tensors = [mine, *pair, labels, k_labels, *others, self.dq.of(launch), *sums]
        self._run(kernel, launch.programs * self.batch, *tensors, *launch.arguments, **launch.keywords)

    def gradient_of_gate(self) -> torch.Tensor | None:
        """dα, put together if several launches made it, see `store_gate`."""
        return self.dgate.addcmul_(self.residual, self.weight, value=-1) if self.apart else self.dgate
