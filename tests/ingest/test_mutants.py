"""Test damaged files of every accepted format among undamaged ones: see mutants.py."""

from pathlib import Path

import pytest

from tests.ingest.mutants import KILLERS, SLOW_KILLERS, check, write_campaign


def test_sixty_mutants_and_the_known_killers(tmp_path: Path) -> None:
    good = write_campaign(tmp_path / "files", 60, 1, KILLERS)
    counts = check(tmp_path / "files", tmp_path / "store", good, workers=2)
    assert counts["the decoder crashed (signal 11)"] >= 1
    assert counts["kept"] >= len(good) and sum(counts.values()) == 60 + len(KILLERS) + len(good)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_two_thousand_mutants(tmp_path: Path) -> None:
    good = write_campaign(tmp_path / "files", 2000, 2, {**KILLERS, **SLOW_KILLERS})
    check(tmp_path / "files", tmp_path / "store", good, workers=2)
