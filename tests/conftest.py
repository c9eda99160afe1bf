"""Settings of every test: a shared machine is no stopwatch, so hypothesis sets no deadline; and what takes longest is
first, so that two processes end together.
"""

import pytest
from hypothesis import settings

settings.register_profile("farfield", deadline=None)
settings.load_profile("farfield")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "federation" not in item.path.parts)
