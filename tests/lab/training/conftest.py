"""What the tests of training share."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _nothing_old_to_collect() -> Iterator[None]:
    """Each run collects garbage as it starts; without this, it looks each time at all that torch has imported."""
    gc.freeze()
    yield
    gc.unfreeze()
