"""Keys and values that a rank keeps of earlier chunks of a sequence, and the gradients that later ones send.

Training in chunks (`pi_dist.training.streaming`) is exact because a token needs nothing of a layer but the
keys and values of a few earlier tokens. Those that lie in another chunk are kept here, and so are the
gradients that come back to them, in fp32, until the backward of their own chunk adds them to its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from pi_dist.ops.spec import Run, accumulate_dtype
from pi_dist.parallel.exchange_plan import ExchangePlan


def rows_at(tensor: torch.Tensor, lies: Run, wanted: Run) -> torch.Tensor:
    """The positions `wanted` of a [B, R, ...] tensor that holds the positions `lies`."""
    return tensor[:, wanted.start - lies.start : wanted.stop - lies.start]


@lru_cache(maxsize=1024)
def columns_of(heads: tuple[int, ...], device: torch.device) -> slice | torch.Tensor:
    """What selects these ascending heads: a slice, else indices that lie on the device already.

    A list would be copied there each time, and the host would wait for it.
    """
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    if heads == tuple(range(heads[0], heads[-1] + 1, step)):
        return slice(heads[0], heads[-1] + 1, step)
    return torch.tensor(heads, device=device)


def add_rows(
    target: torch.Tensor, lies: Run, run: Run, heads: tuple[int, ...], gradient: torch.Tensor
) -> None:
    """Add a [B, rows, heads, D] gradient, in its own dtype, to these heads of positions of `target`."""
    rows, columns = rows_at(target, lies, run), columns_of(heads, target.device)
    rows[:, :, columns] = (rows[:, :, columns] + gradient).to(target.dtype)


@dataclass
class _Piece:
    """Rows of one head group in one chunk: keys and values [2, B, rows, heads, D], and their gradient."""

    run: Run
    pair: torch.Tensor
    gradient: torch.Tensor | None = None  # in the accumulation dtype; None: nothing came yet


class KeptKeys:
    """What one rank keeps of one layer while a sequence goes by in chunks.

    Args:
        seq_len: tokens of the whole sequence.
        chunk_tokens: tokens of a chunk, of which only the last may have fewer.
        backward: whether a backward pass will follow; without one, rows are forgotten as soon as no later
            chunk needs them.
    """

    def __init__(self, seq_len: int, chunk_tokens: int, backward: bool) -> None:
        self.seq_len, self.chunk_tokens, self.backward = seq_len, chunk_tokens, backward
        self._chunks: dict[int, list[list[_Piece]]] = {}  # by chunk and head group

    def keep(self, plan: ExchangePlan, k: torch.Tensor, v: torch.Tensor, reach: int) -> None:
        """Copy what later chunks need of the shard's k and v [B, m, H_kv, D], unless it is there already.

        reach: how far back a token of the layer sees.
        """
        chunk = plan.shard.start // self.chunk_tokens
        if chunk not in self._chunks and any(plan.kept):
            self._chunks[chunk] = [
                [
                    _Piece(run, torch.stack([rows_at(x, plan.shard, run)[:, :, columns] for x in (k, v)]))
                    for run in runs
                ]
                for columns, runs in zip(
                    (columns_of(group.kv_heads, k.device) for group in plan.groups), plan.kept, strict=True
                )
            ]
        if not self.backward:
            oldest = (chunk * self.chunk_tokens - reach) // self.chunk_tokens  # that this one looks at
            for done in [number for number in self._chunks if number < oldest]:
                del self._chunks[done]

    def rows(self, group: int, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, rows, heads of the group, D] at positions of one chunk; views."""
        piece = self._piece(group, run)
        k, v = piece.pair
        return rows_at(k, piece.run, run), rows_at(v, piece.run, run)

    def add(self, group: int, run: Run, dk: torch.Tensor, dv: torch.Tensor) -> None:
        """Add gradients [B, rows, heads of the group, D] that a later chunk has for these rows."""
        piece = self._piece(group, run)
        if piece.gradient is None:
            piece.gradient = torch.zeros_like(piece.pair, dtype=accumulate_dtype(piece.pair.dtype))
        for total, gradient in zip(piece.gradient, (dk, dv), strict=True):
            rows_at(total, piece.run, run).add_(gradient)

    def give_back(self, plan: ExchangePlan, dk: torch.Tensor, dv: torch.Tensor) -> None:
        """Add all that came for the shard's rows to its own gradients, and forget these rows."""
        pieces = self._chunks.pop(plan.shard.start // self.chunk_tokens, [[] for _ in plan.groups])
        for group, of_group in zip(plan.groups, pieces, strict=True):
            for piece in of_group:
                if piece.gradient is not None:
                    for target, gradient in zip((dk, dv), piece.gradient, strict=True):
                        add_rows(target, plan.shard, piece.run, group.kv_heads, gradient)

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that is held, gradients too."""
        for groups in self._chunks.values():
            for piece in (piece for pieces in groups for piece in pieces):
                yield from (x for x in (piece.pair, piece.gradient) if x is not None)

    def _piece(self, group: int, run: Run) -> _Piece:
        pieces = self._chunks[run.start // self.chunk_tokens][group]
        return next(piece for piece in pieces if piece.run.start <= run.start < piece.run.stop)
