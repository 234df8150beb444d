"""The HDF5 feature store: its schema, writer, reader, and the checks that it is whole."""

from opt_ds.store.reader import FeatureStore, Regions
from opt_ds.store.schema import StoreDescription

__all__ = ["FeatureStore", "Regions", "StoreDescription"]
