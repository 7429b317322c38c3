"""The figures of what surviving faults costs, on two ranks."""

from distributed import Ranks

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
