"""Decoding: options at their ends, and passes over what can influence the next token."""

import math

import pytest
import torch

from pi_dist.config import ModelConfig, UserError
from pi_dist.inference.generate import generate
from pi_dist.model.transformer import PiTransformer

VOCABULARY = 64


def model_of(**options):
    """Of two layers, with weights so large that a token matters."""
    config = ModelConfig(num_layers=2, hidden_size=32, num_heads=2, vocab_size=VOCABULARY, **options)
    model = PiTransformer(config, 8, seed=1)
    for parameter in model.parameters():
        parameter.data *= 4
    return model.eval()


def tokens_of(model, prompt, count, **options):
    return list(generate(model, prompt, count, vocab_size=VOCABULARY, **options))


def test_temperatures_without_end_draw_the_likeliest_or_any():
    model = model_of()
    likeliest = tokens_of(model, [1, 2, 3], 8, temperature=0)
    for temperature in (1e-30, 1e-40, 5e-324):
        assert tokens_of(model, [1, 2, 3], 8, temperature=temperature) == likeliest
    assert len(tokens_of(model, [1, 2, 3], 8, temperature=1e308)) == 8


@pytest.mark.parametrize(
    ("options", "equation"),
    [
        ({"temperature": -1.0}, "0 <= temperature (-1.0) < inf"),
        ({"temperature": math.inf}, "0 <= temperature (inf) < inf"),
        ({"temperature": math.nan}, "0 <= temperature (nan) < inf"),
        ({"top_k": -1}, "top_k (-1), max_new_tokens (1) >= 0"),
        ({"seed": 10**23}, "0 <= seed (100000000000000000000000) < 2^63"),
        ({"seed": -1}, "0 <= seed (-1) < 2^63"),
    ],
)
def test_options_out_of_range_are_refused_in_words(options, equation):
    with pytest.raises(UserError) as error:
        tokens_of(model_of(), [1], 1, **options)
    assert f"{equation} does not hold" in str(error.value)


@pytest.mark.parametrize("method", ["window", "pi", ["dense", "window"], ["window", "ring"], "ulysses"])
def test_tokens_are_those_of_passes_over_the_whole_text(method):
    """Which is longer than the training context and any reach."""
    model = model_of(method=method, window=2, stride=3)
    tokens = torch.randint(VOCABULARY, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    found = tokens_of(model, tokens, 12, temperature=0)
    with torch.no_grad():
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert found == tokens[-12:]
