"""The Ray that tests share: a test that needs it asks for `ray_cluster`; nothing else starts one in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

FAKE_ACCELERATOR = "fake_accelerator"  # a custom resource: counted, and nothing more
NUM_CPUS = 8  # logical ones, a count as well
NUM_ACCELERATORS = 4


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A local Ray, started by the first test that asks for it; it takes about ten seconds."""
    from pipeline.cluster.session import own_ray

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with own_ray(NUM_CPUS, tmp_path_factory.mktemp("ray") / "ray.log", {FAKE_ACCELERATOR: NUM_ACCELERATORS}):
        yield
