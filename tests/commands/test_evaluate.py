"""What `opt-ds evaluate` takes where nothing was said."""

from pathlib import Path

from opt_ds.commands.evaluate import _held_out
from tests.tiny import make_store


def test_a_store_without_a_test_split_is_judged_on_valid_and_that_is_said(
    tmp_path: Path, logged: list[str]
) -> None:
    store = make_store(tmp_path / "store", 20)
    assert _held_out(store, 1) == ["valid"]
    assert "evaluated on valid, since none begins with test" in logged[0]
