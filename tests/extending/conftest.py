"""The stores of the engine's and the server's tests."""

from tests.engine.conftest import store
from tests.serve.conftest import raw, raw_store

__all__ = ["raw", "raw_store", "store"]
