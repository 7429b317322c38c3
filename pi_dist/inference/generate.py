"""Plain decoding: the next token from a forward pass over what it can see."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from pi_dist.config import EXACT_METHODS, UserError
from pi_dist.model.attention import SequenceContext
from pi_dist.model.transformer import PiTransformer
from pi_dist.ops.pattern import total_reach


@torch.no_grad()
def generate(
    model: PiTransformer,
    prompt: list[int],
    max_new_tokens: int,
    *,
    vocab_size: int,
    end_of_text: int | None = None,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` token ids that follow `prompt`; stops at `end_of_text`.

    Each pass runs over the last reach + 1 tokens at their own positions, which is exact: no earlier token can
    influence the next one. With a layer of an exact method, which looks back to the first, over all tokens.

    Args:
        vocab_size: ids from here on are padding of the vocabulary and never drawn.
        temperature: 0 takes the likeliest token. top_k: draw among so many; 0: among all.

    Raises:
        UserError: an empty prompt or options out of range.
    """
    if not prompt:
        raise UserError("prompt: len(prompt) (0) >= 1 does not hold; the model continues a text")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature: 0 <= temperature ({temperature}) < inf does not hold")
    if top_k < 0 or max_new_tokens < 0:
        raise UserError(f"top_k ({top_k}), max_new_tokens ({max_new_tokens}) >= 0 does not hold")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed: 0 <= seed ({seed}) < 2^63 does not hold")
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    exact = not set(EXACT_METHODS).isdisjoint(model.config.methods)
    sight = len(prompt) + max_new_tokens if exact else total_reach(model.patterns) + 1
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        start = max(0, len(tokens) - sight)
        visible = torch.tensor([tokens[start:]], device=device)  # [1, T]
        logits = model(visible, context=SequenceContext(starts=(start,)))[0, -1, :vocab_size].float().cpu()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            below = logits - logits.max()
            scaled = torch.where(below < 0, below / temperature, 0.0)  # the likeliest stays 0 at any of them
            if 0 < top_k < vocab_size:
                scaled[logits < logits.topk(top_k).values[-1]] = float("-inf")
            token = int(torch.multinomial(torch.softmax(scaled, -1), 1, generator=generator))
        if token == end_of_text:
            return
        tokens.append(token)
        yield token
