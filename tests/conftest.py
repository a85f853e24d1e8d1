"""Which tests share a process where several are run side by side (``pytest -n``)."""

from __future__ import annotations

import pytest

# What takes long to make, and is made once a process.
_SHARED = ("ray_cluster", "made")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests with the same long fixture stay together, all others with those of their file."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        group = next((name for name in _SHARED if name in fixtures), item.nodeid.partition("::")[0])
        item.add_marker(pytest.mark.xdist_group(group))
