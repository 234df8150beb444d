"""Importers: each writes a manifest (see opt_ds/prepare/manifest.py) from one corpus."""
