"""Ranks' notes of their collective calls: a difference is found in the right place, equal or merely late ranks are left alone."""


import pytest

from opt_ds.training.collectives import CollectiveNotes, first_difference
from tests.training.runs import free_port, rank_environment
from tests.warm import WarmProcess

GATHER, REDUCE = ("all_gather_single", 200, "float32"), ("allreduce", 50, "float32")


def notes(calls: list[tuple[str, int, str]], group: str = "0") -> bytes:
    found = CollectiveNotes()
    for call in calls:
        found.add(group, call)
    return found.pack()


def test_a_skipped_call_is_found() -> None:
    found = first_difference({0: notes([REDUCE, GATHER, REDUCE]), 1: notes([REDUCE, REDUCE])})
    assert found == "in call 2 rank 0 is at all_gather_single of 200 float32, rank 1 at allreduce of 50 float32"


def test_a_rank_that_is_behind_is_no_mismatch() -> None:
    assert first_difference({0: notes([REDUCE, GATHER, REDUCE]), 1: notes([REDUCE])}) is None
    assert first_difference({0: notes([REDUCE]), 3: notes([GATHER], group="1")}) is None, "groups have an order each"


@pytest.mark.parametrize("skip", [False, True])
def test_places_hold_after_more_calls_than_are_kept(skip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opt_ds.training.collectives._KEPT", 16)
    ours = [("allreduce", number, "float32") for number in range(100)]
    theirs = ours[: 95 if skip else 97]
    if skip:
        theirs[90:91] = []
    found = first_difference({0: notes(ours), 1: notes(theirs)})
    assert (found is None) != skip and (not found or "in call 91 rank 0 is at allreduce of 90 float32" in found)


def test_two_ranks_of_which_one_skips_a_gather_end_with_both_calls_named() -> None:
    """Without the watch both wait until the collectives' timeout."""
    port = free_port()
    ranks = [WarmProcess(["-m", "tests.training.job_skipped_gather"], rank_environment(rank, 2, port)) for rank in range(2)]
    said = "".join(rank.communicate(timeout=250)[1] for rank in ranks)
    assert all(rank.returncode for rank in ranks)
    assert "the ranks' collective calls do not match: in call 2 rank 0 is at all" in said, said
    assert "of 200 float32, rank 1 at allreduce of 50 float32" in said, said
