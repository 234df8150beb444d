"""The report: what is counted from the shards' notes, and the table that people read."""

import numpy as np

from opt_ds.ingest.report import build_report, report_table

LENGTHS = {"text": np.array([3, 4, 50]), "image": np.array([10, 100]), "audio": np.zeros(0, "int64")}


def note(skipped: list[tuple[str, str]], rows: list[tuple[str, str, str]], truncated: list[str]) -> dict:
    entries = [{"id": id, "reason": reason} for id, reason in skipped]
    digests = {"text": [], "image": [list(row) for row in rows], "audio": []}
    return {"skipped": entries, "truncated": {"text": truncated, "audio": []}, "digests": digests}


def test_shards_add_up_and_equal_files_are_found_across_them() -> None:
    notes = [
        note([("a", "image file is broken: a.jpg: cut")], [("x", "train", "1"), ("y", "train", "2")], ["2"]),
        note([("b", "image file is broken: b.jpg: odd")], [("x", "valid", "3"), ("x", "train", "4"), ("z", "train", "5")], []),
    ]
    report = build_report(7, [{"id": "line 9", "reason": "not a sample: line 9: not JSON"}], iter(notes), LENGTHS)
    assert (report["kept"], report["skipped"]) == (5, 3)
    assert report["reasons"] == {"image file is broken": 2, "not a sample": 1}
    assert report["duplicates"]["image"] == {"repeated": 2, "across_splits": 1, "largest": [["1", "3", "4"]]}
    assert report["duplicates"]["text"] == {"repeated": 0, "across_splits": 0, "largest": []}
    assert report["lengths"]["audio"] == {"rows": 0}
    assert report["lengths"]["image"]["median"] == 55
    table = report_table(report, {"max_tokens": 50, "max_frames": None})
    assert "text truncated at 50 tokens" in "\n".join(table)
    assert any("2, 1 of them in several splits" in line for line in table)
    assert table[-1] == '  skipped "b": image file is broken: b.jpg: odd'


def test_ids_cannot_repaint_the_terminal_and_long_lists_end() -> None:
    skipped = [(f"\x1b[2J{index}\u202e", "the text has no tokens") for index in range(12)]
    report = build_report(20, [], [note(skipped, [], [])], LENGTHS)
    table = report_table(report, {"max_tokens": None, "max_frames": None})
    assert all(line.isprintable() for line in table)
    assert table[-1] == "  and 2 more in report.json"


def test_histograms_have_bins_of_whole_lengths() -> None:
    from opt_ds.store.lengths import length_summary

    for values in ([5], [1, 2, 2, 9], list(range(3, 1003))):
        histogram = length_summary(np.array(values))["histogram"]
        assert sum(histogram["counts"]) == len(values)
        widths = set(np.diff(histogram["edges"]).tolist())
        assert len(widths) == 1 and all(width == int(width) for width in widths)
        assert len(histogram["counts"]) <= 51
    assert set(histogram["counts"][:-1]) == {20}
