"""The figures of what surviving faults costs, on two ranks; which flags each benchmark takes."""

import pytest
from distributed import Ranks

from pi_dist.cli import main
from pi_dist.config import ConfigError
from pi_dist.measure.fault_bench import describe, measure


def test_costs_are_measured_and_nothing_is_left(tmp_path):
    with Ranks(2) as ranks:
        cost, _ = ranks.run(measure, "tiny", 256, "cpu", str(tmp_path))
    assert not list(tmp_path.iterdir())
    assert (
        cost["ranks"] == 2 and cost["checkpoint_bytes"] > 12 * cost["parameters"]
    )  # weight and moments, fp32
    assert 0 < cost["load_s"] < cost["restart_s"] and 0 < cost["save_s"] < cost["grace_s"]
    assert cost["watchdog_step_s"] < cost["step_s"]
    assert [line.split()[0] for line in describe(cost).splitlines()[1:]] == [
        "save",
        "restart",
        "grace",
        "watchdog",
    ]


def refused(*arguments):
    with pytest.raises((ConfigError, OSError)) as error:
        measure(*arguments)
    return str(error.value)


@pytest.mark.parametrize(
    ("context", "folder", "said"),
    [(129, ".", "context (129) % sp_degree (2) == 0"), (256, "nowhere", "No such file or directory")],
)
def test_what_cannot_be_is_an_error_of_all_ranks_and_leaves_nothing(tmp_path, context, folder, said):
    with Ranks(2) as ranks:
        errors = ranks.run(refused, "tiny", context, "cpu", str(tmp_path / folder))
    assert all(said in error for error in errors), errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["faults", "--presets=small,medium"], "bench faults: number of presets (2) == 1 does not hold"),
        (["faults", "--contexts=128,256"], "bench faults: number of contexts (2) == 1 does not hold"),
        (["faults", "--plot=f.svg"], "bench faults: there is no --plot of it"),
        (["sp", "--ranks=4", "--trace=t.json"], "bench sp --ranks: there is no --trace of it"),
        (["step", "--ranks=4"], "bench step: there is no --ranks of it"),
        (["kernel", "--json=nowhere/k.json"], "json: 'nowhere' is not a directory"),
        (["sp", "--json=s.json", "--trace=nowhere/t.json"], "trace: 'nowhere' is not a directory"),
    ],
)
def test_flags_of_another_benchmark_are_refused_in_one_line(flags, said, capsys):
    with pytest.raises(SystemExit) as left:
        main(["bench", *flags])
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and error.count("\n") == 1
