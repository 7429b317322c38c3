"""`pi-dist generate`: continue a text with a trained model."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from pi_dist.config import UserError


def parser() -> ArgumentParser:
    p = ArgumentParser(description="Continue a text with a trained model.", exit_on_error=False)
    p.add_argument("checkpoint", type=str, help="a run directory (its newest checkpoint) or a checkpoint")
    p.add_argument("--prompt", type=str, required=True, help="the text to continue")
    p.add_argument("--max-new-tokens", type=int, default=100, help="stop after so many tokens")
    p.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    p.add_argument("--top-k", type=int, default=50, help="draw among the likeliest so many; 0: among all")
    p.add_argument("--seed", type=int, default=0, help="of the drawing")
    return p


def run(arguments: Namespace) -> int:
    import torch

    from pi_dist.data.tokenizer import encode_texts, load_tokenizer, vocabulary_size
    from pi_dist.inference.generate import generate
    from pi_dist.training.checkpoint import load_model, open_checkpoint

    try:
        arguments.prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"prompt: not UTF-8 from character {error.start} on") from error
    checkpoint = open_checkpoint(arguments.checkpoint)
    model, _ = load_model(checkpoint, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = load_tokenizer(checkpoint.path / "tokenizer.json")
    prompt = next(encode_texts(tokenizer, [("prompt", arguments.prompt)]))[1].tolist()
    new = generate(
        model,
        prompt,
        arguments.max_new_tokens,
        vocab_size=vocabulary_size(tokenizer),
        end_of_text=checkpoint.state["end_of_text"],
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )
    print(arguments.prompt + tokenizer.decode(list(new)))
    return 0
