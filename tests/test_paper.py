"""The paper's figures measured here: what a divergence is, and that every part is measured and told."""

import json

import pytest
import torch

from pi_dist.cli import main
from pi_dist.config import Config
from pi_dist.measure import paper
from pi_dist.measure.paper import divergence, divergence_rows
from pi_dist.model.transformer import PiTransformer
from pi_dist.ops import PiPattern


def run(*arguments):
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return left.value.code


def test_a_divergence_is_that_of_two_softmaxes():
    """Two neighbours, itself with logit 30 and a skip with logit 0: the clamp at 20 moves weight."""
    q = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)
    k = torch.tensor([0.0, 0.0, 30.0]).view(1, 3, 1, 1)
    pattern = PiPattern(window=0, strides=2, num_skips=1)
    kl, clamped = divergence(q, k, None, pattern, 20.0)
    p, stable = (torch.tensor([x, 0.0], dtype=torch.float64).softmax(0) for x in (30.0, 20.0))
    assert kl.shape == (1, 1, 3) and clamped == pytest.approx(1 / 4)
    assert kl[0, 0, 2].item() == pytest.approx((p * (p / stable).log()).sum().item())
    assert divergence(q, k, None, pattern, None)[0].abs().max() == 0


def test_a_clipped_gate_diverges_little_and_one_that_is_shut_more():
    """The ring then still has a share of about 1e-4 · e^(difference of logits): no bound for all models."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 40, 4, 8)
    pattern = PiPattern(window=2, strides=8, num_skips=1)
    half, shut = (torch.full((1, 40, 4), value) for value in (0.5, 0.0))
    assert divergence(q, k, half, pattern, 20.0)[0].max() < 1e-12
    assert divergence(q, k, shut, pattern, None)[0].max() > 1e-3


def test_every_layer_of_a_model_is_looked_at():
    model_config = paper._model("tiny", vocab_size=64)
    model = PiTransformer(model_config, 64).eval()
    tokens = [torch.randint(0, 64, (1, 64)) for _ in range(2)]
    rows = divergence_rows(model, tokens)
    assert [row["layer"] for row in rows] == [0, 1]
    assert all(0 <= row["mean"] <= row["max"] < 1e-6 and row["clamped_share"] == 0 for row in rows)
    dense = PiTransformer(paper._model("tiny", vocab_size=64, method="dense"), 64)
    with pytest.raises(ValueError, match="π layers"):
        divergence_rows(dense, tokens)


def test_table_and_layers_are_measured_and_stand_beside_the_papers(tmp_path, capsys):
    record = tmp_path / "p.json"
    flags = ["--preset", "tiny", "--contexts", "128", "--device", "cpu", "--json", str(record)]
    assert run("paper", "layer", *flags) == 0
    assert run("paper", "table", *flags, "--minutes", "0") == 3
    assert run("paper", "table", *flags) == 0
    assert run("paper", "table", *flags, "--minutes", "0") == 0  # all rows are there
    rows = json.loads(record.read_text())["rows"]
    table = [row for row in rows if row["what"] == "table"]
    assert [row["method"] for row in table] == ["dense", "window", "pi"]
    assert all(row["ms"] > 0 and row["forward_ms"] > 0 and row["peak_mib"] > 0 for row in table)
    assert [row["layer"] for row in rows if row["what"] == "layer"] == list(paper._LAYERS)
    said = capsys.readouterr().out
    assert "| paper | pi | 12.4 (0.27) | 36.7 (0.29) | 8.8 (0.27) | 262.0 (0.76) | 0.554 (2.37) |" in said
    assert "The paper says gathers and gate < 3 %" in said


def test_what_is_measured_again_takes_the_place_of_that_alone(tmp_path, capsys):
    path = tmp_path / "paper.json"
    for context in ("64", "128", "64"):
        flags = ["--preset=tiny", "--device=cpu", f"--contexts={context}", f"--json={path}"]
        assert run("paper", "layer", *flags) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["context"] for row in rows] == [128] * 3 + [64] * 3
    said = paper.markdown({"device": "cpu", "rows": [*rows, *(row | {"preset": "small"} for row in rows)]})
    assert said.index("The tiny model:") < said.index("The small model:")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rows": [{"ms": 1.0}]}))
    assert run("paper", "layer", "--preset=tiny", f"--json={path}") == 2
    assert "not a record of `pi-dist paper`" in capsys.readouterr().err


def test_what_is_missing_is_asked_for(tmp_path, capsys):
    record = str(tmp_path / "p.json")
    assert run("paper", "kl", "--json", record) == 2
    assert "--checkpoint and --data are needed" in capsys.readouterr().err
    assert run("paper", "layer", "--json", record, "--preset", "huge") == 2
    assert "preset: 'huge' in" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A run of two steps."""
    from distributed import Ranks

    from pi_dist.config import DataConfig, ParallelConfig, TrainingConfig

    folder = tmp_path_factory.mktemp("paper") / "run"
    config = Config(
        run_dir=str(folder),
        model=paper._model("tiny", vocab_size=None),
        data=DataConfig(train=str(corpus / "train"), num_workers=0),
        parallel=ParallelConfig(device="cpu"),
        training=TrainingConfig(context=128, batch_size=1, steps=2, warmup_steps=1),
    )
    with Ranks(1) as ranks:
        ranks.run(train_run, config)
    return folder


def train_run(config):
    from pi_dist.training.trainer import train

    train(config)


def test_a_checkpoint_is_looked_at_on_text(trained, corpus, tmp_path, capsys):
    record = tmp_path / "kl.json"
    flags = ["--checkpoint", str(trained), "--data", str(corpus / "train"), "--context", "128"]
    assert run("paper", "kl", *flags, "--sequences", "2", "--device", "cpu", "--json", str(record)) == 0
    rows = json.loads(record.read_text())["rows"]
    assert [row["layer"] for row in rows] == [0, 1] and all(row["max"] < 0.02 for row in rows)
    assert "The paper says that the KL stays below 0.02." in capsys.readouterr().out
