"""Importers. Each one writes a manifest (see opt_ds/ingest/manifest.py) for one collection or file layout."""
