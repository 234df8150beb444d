"""Convert raw images, text and audio to a feature store. Training imports this package only to build its default store.

Its names are imported on first use. The decoding processes import this package too and must start quickly.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opt_ds.ingest.default_store import emoji_store
    from opt_ds.ingest.pipeline import prepare
    from opt_ds.ingest.settings import PrepareSettings

__all__ = ["PrepareSettings", "emoji_store", "prepare"]

_MODULE_OF = {
    "PrepareSettings": "opt_ds.ingest.settings",
    "emoji_store": "opt_ds.ingest.default_store",
    "prepare": "opt_ds.ingest.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULE_OF[name]), name)
