"""Regions that are made already: an odd file costs itself alone, never its neighbours in the shard."""

from pathlib import Path

import numpy as np
import pytest

from opt_ds.prepare import PrepareSettings, workers
from tests.prepare.test_update import uniter_arrays


def test_odd_files_are_skipped_with_their_reason_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: uniter_arrays(seed) for seed, name in enumerate(("short", "flat", "box", "score", "good"))}
    files["short"]["soft_labels"] = files["short"]["soft_labels"][:7]
    files["flat"]["soft_labels"] = files["flat"]["soft_labels"][:, 0]
    files["box"]["norm_bb"][3, 0] = np.nan
    files["score"]["conf"] = np.where(np.arange(30) == 3, np.nan, files["score"]["conf"])
    for name, arrays in files.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    monkeypatch.setattr(workers, "_worker", {"settings": PrepareSettings(images="npz"), "device": "cpu"})
    *failures, good = workers._extract_chunk("image", [f"{name}.npz" for name in files], tmp_path)
    assert [failure.reason for failure in failures] == [
        "no image features could be made: short.npz: soft_labels of shape [7, 1601], not [30, K]",
        "no image features could be made: flat.npz: soft_labels of shape [30], not [30, K]",
        "region boxes or scores are not finite",
        "region boxes or scores are not finite",
    ]
    labels = files["good"]["soft_labels"].argmax(1)
    assert np.array_equal(good.item.labels, labels[: len(good.item.labels)])
    assert len(good.item.features) == len(good.item.labels) >= 10
