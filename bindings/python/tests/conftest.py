import numpy as np
import pytest

import indexcache as ix


@pytest.fixture(scope="session")
def context():
    return ix.Context(ix.ContextDesc(backend=ix.BACKEND_CPU, threads=2))


@pytest.fixture
def rng():
    return np.random.default_rng(1)
