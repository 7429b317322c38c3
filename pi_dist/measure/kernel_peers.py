"""Other attention kernels, for `pi-dist bench kernel`: how each is called on the same inputs.

Only FlexAttention can express the whole pattern. The others compute a plain causal window of the same size,
or dense causal attention; their backward passes use atomics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from pi_dist.ops.pattern import PiPattern
from pi_dist.ops.spec import GATE_EPSILON

FLEX = "flex-attention, same pattern and gate"


class Peer(NamedTuple):
    """Another kernel. Neither function takes arguments; `setup` returns them, and may raise."""

    name: str
    setup: Callable[[], tuple[Callable[[], Any], Callable[[], Any]]]  # (forward, backward)


def peers(pattern: PiPattern, tensors: tuple[torch.Tensor, ...]) -> Iterator[Peer]:
    """What can be compared on q, k, v [B, T, H, D], gate [B, T, H] and dout [B, T, H, D]."""
    q, k, v, gate, dout = tensors
    heads_first = [x.detach().transpose(1, 2).contiguous() for x in (q, k, v)]  # [B, H, T, D]
    if pattern.num_skips == 0:
        yield Peer("flash-attn, window", lambda: _flash_window(pattern.window, q, k, v, dout))
        yield Peer("cudnn, window", lambda: _cudnn_window(pattern.window, q, k, v, dout))
    if (pattern.window, pattern.num_skips) == (4, 1):
        yield Peer("sdpa-flash, dense causal", lambda: _sdpa("FLASH_ATTENTION", *heads_first, dout))
        yield Peer("sdpa-cudnn, dense causal", lambda: _sdpa("CUDNN_ATTENTION", *heads_first, dout))
    yield Peer(FLEX, lambda: _flex(pattern, *heads_first, gate, dout))


def _differentiated(
    forward: Callable[[], torch.Tensor], wanted: list[torch.Tensor], dout: torch.Tensor
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(forward, backward) by autograd."""
    for tensor in wanted:
        tensor.requires_grad_()
    out = forward()
    return forward, lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True)


def _sdpa(backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> Any:
    """PyTorch's dense causal attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def forward() -> torch.Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    return _differentiated(forward, [q, k, v], dout.transpose(1, 2))


def _flash_window(
    window: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The FlashAttention-2 that ships with PyTorch, which knows a window through its packed interface."""
    from torch.nn.attention.varlen import varlen_attn

    batch, length = q.shape[:2]
    packed = [x.detach().flatten(0, 1).contiguous() for x in (q, k, v)]  # [B·T, H, D]
    starts = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=q.device)

    def forward() -> torch.Tensor:
        return varlen_attn(*packed, starts, starts, length, length, window_size=(window, 0))

    return _differentiated(forward, packed, dout.flatten(0, 1))


def _cudnn_window(
    window: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """cuDNN through its frontend, since SDPA gives it no window."""
    try:
        import cudnn
    except ImportError as error:
        raise ImportError("cuDNN's frontend is missing: bash launch/install.sh bench") from error

    q, k, v, dout = (x.detach().contiguous().transpose(1, 2) for x in (q, k, v, dout))  # [B, H, T, D]
    band = {
        "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
        "diagonal_band_left_bound": window + 1,  # counts the token itself
        "diagonal_band_right_bound": 0,
    }
    out, dq, dk, dv = (torch.empty_like(x) for x in (q, q, k, v))
    lse = torch.empty(*q.shape[:3], 1, dtype=torch.float32, device=q.device)
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)

    def graph() -> Any:
        return cudnn.pygraph(
            io_data_type=cudnn.data_type.BFLOAT16,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=handle,
        )

    def built(
        graph: Any, bound: dict[Any, torch.Tensor], results: tuple[torch.Tensor, ...]
    ) -> Callable[[], Any]:
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=q.device)

        def run() -> tuple[torch.Tensor, ...]:
            graph.execute(bound, workspace, handle=handle)
            return results

        return run

    def named(graph: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {name: graph.tensor_like(tensor) for name, tensor in tensors.items()}

    def wanted(nodes: tuple[Any, ...], tensors: tuple[torch.Tensor, ...]) -> dict[Any, torch.Tensor]:
        """Declare a graph's results, laid out as these tensors."""
        for node, tensor in zip(nodes, tensors, strict=True):
            node.set_output(True).set_dim(tensor.shape).set_stride(tensor.stride())
        return dict(zip(nodes, tensors, strict=True))

    scale = q.shape[3] ** -0.5
    ahead, given = graph(), {"q": q, "k": k, "v": v}
    nodes = named(ahead, given)
    results = ahead.sdpa(**nodes, generate_stats=True, attn_scale=scale, **band)
    results[1].set_data_type(cudnn.data_type.FLOAT)
    bound = {nodes[name]: given[name] for name in given} | wanted(results, (out, lse))
    forward = built(ahead, bound, (out,))
    forward()
    back, given = graph(), given | {"o": out, "dO": dout, "stats": lse}
    nodes = named(back, given)
    results = back.sdpa_backward(**nodes, attn_scale=scale, **band)
    bound = {nodes[name]: given[name] for name in given} | wanted(results, (dq, dk, dv))
    return lambda: forward()[0], built(back, bound, (dq, dk, dv))


def _flex(
    pattern: PiPattern,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    dout: torch.Tensor,
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """FlexAttention with this pattern (one stride, causal, self included) and gate; no clamp."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # each pattern is compiled anew, and eight of them are the limit
    torch._functorch.config.donated_buffer = False  # the backward is run again and again
    window, stride, skips = pattern.window, pattern.distinct_strides()[0], pattern.num_skips
    gate = gate.detach().transpose(1, 2).contiguous()  # [B, H, T]

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        offset = i - j
        near = (offset >= 0) & (offset <= window)
        return near | ((offset > 0) & (offset % stride == 0) & (offset <= skips * stride)) if skips else near

    def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        alpha = (1 - 2 * GATE_EPSILON) * gate[b, h, i] + GATE_EPSILON
        return s + torch.where(i - j <= window, torch.log(alpha), torch.log(1 - alpha))

    # the default _compile=False would make the whole T×T mask
    blocks = create_block_mask(mask, None, None, q.shape[2], q.shape[2], device=q.device, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    return _differentiated(
        lambda: compiled(q, k, v, score_mod=score, block_mask=blocks),
        [q, k, v, gate],
        dout.transpose(1, 2),
    )
