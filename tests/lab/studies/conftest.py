"""What the tests of the monitor's page and figures share."""

from typing import Any

import pytest
from monitor_records import monitored


@pytest.fixture(scope="session")
def records() -> list[dict[str, Any]]:
    return monitored()
