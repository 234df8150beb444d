"""Importers: each writes a manifest (see opt_ds/ingest/manifest.py) from one corpus."""
