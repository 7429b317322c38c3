from types import SimpleNamespace

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


@pytest.fixture(scope="module")
def quick_interpreter():
    """The interpreter patches `triton.language` anew at every call inside a kernel; here, once a launch."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch_lang, all_of_it = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def once(_):
        return patch_lang(all_of_it) if tl.core.is_builtin(tl.load) else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        yield


@pytest.fixture(scope="module")
def poisoned_memory():
    """Fresh tensors of the backend are NaN in these tests, so that each element must be written."""
    import torch

    from pi_dist.ops import triton_backend

    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, *arguments, **keywords):
            return torch.empty(*arguments, **keywords).fill_(float("nan"))

        def empty_like(self, *arguments, **keywords):
            return torch.empty_like(*arguments, **keywords).fill_(float("nan"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "torch", Torch())
        yield
