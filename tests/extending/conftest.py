"""The stores of the engine's and the server's tests."""

from tests.serving.conftest import raw, raw_store
from tests.training.conftest import store

__all__ = ["raw", "raw_store", "store"]
