"""Helpers of the importers' tests: files with any content, and the resulting samples and reports."""

import json
from pathlib import Path

from opt_ds.ingest.importers.common import report_path
from opt_ds.ingest.manifest import ManifestLine, read_manifest


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def lines_of(manifest: Path) -> dict[str, ManifestLine]:
    """Return the samples by id, read as `opt-ds prepare` reads them."""
    read = read_manifest(manifest, allow_outside=True)
    assert read.rejected == []
    for line in read.lines:
        for name in (line.image, line.audio):
            assert name is None or (manifest.parent / name).is_file(), "paths are relative to the manifest"
    return {line.id: line for line in read.lines}


def left_out(manifest: Path) -> dict[str, str]:
    report = json.loads(report_path(manifest).read_text())
    assert report["skipped"] == len(report["skipped_samples"]) == sum(report["reasons"].values())
    return {entry["id"]: entry["reason"] for entry in report["skipped_samples"]}
