import pytest
from distributed import Ranks


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
