"""The HDF5 feature store: schema, writer, reader and validation."""

from opt_ds.store.inspect import inspect_store
from opt_ds.store.reader import FeatureStore, Regions
from opt_ds.store.schema import StoreDescription
from opt_ds.store.update import set_codes
from opt_ds.store.verify import open_store, verify_store

__all__ = ["FeatureStore", "Regions", "StoreDescription", "inspect_store", "open_store", "set_codes", "verify_store"]
