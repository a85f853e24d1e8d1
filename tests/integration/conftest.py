"""The Ray that tests share: a test that needs it asks for `ray_cluster`; nothing else starts one in this process."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

FAKE_ACCELERATOR = "fake_accelerator"  # a custom resource: counted, and nothing more
NUM_CPUS = 8  # logical ones, a count as well
NUM_ACCELERATORS = 4


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray, started by the first test that asks for it; it takes about ten seconds."""
    from pipeline.cluster.session import set_environment

    set_environment()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import ray

    ray.init(
        address="local",
        num_cpus=NUM_CPUS,
        resources={FAKE_ACCELERATOR: NUM_ACCELERATORS},
        object_store_memory=2 * 2**30,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()
