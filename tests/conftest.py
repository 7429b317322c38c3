import pytest
from distributed import Ranks
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # machines are shared: no test asserts a time
settings.load_profile("untimed")


def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true", help="a test that is skipped fails")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.config.getoption("no_skips"):
        report.outcome, report.longrepr = "failed", f"skipped, with --no-skips: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def ranks():
    """`ranks(n)`: n processes over gloo, started once and shared by the tests that leave no state behind."""
    pools: dict[int, Ranks] = {}

    def pool(world_size: int) -> Ranks:
        if world_size not in pools:
            pools[world_size] = Ranks(world_size)
        return pools[world_size]

    yield pool
    for started in pools.values():
        started.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Real text, prepared once; see `prepare_speeches`."""
    from corpus import prepare_speeches

    return prepare_speeches(tmp_path_factory.mktemp("corpus"))
