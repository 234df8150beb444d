"""Test texts of a finished store that are tokenised again: the rest is kept, the report is correct, a kill is harmless."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from opt_ds.errors import UserError
from opt_ds.features.text import TextExtractor, train_wordpiece
from opt_ds.ingest import PrepareSettings
from opt_ds.ingest.report import REPORT_FILE
from opt_ds.ingest.update_text import update_text
from opt_ds.store import FeatureStore, inspect_store
from opt_ds.store.lengths import LENGTHS_FILE
from opt_ds.store.processor_files import copy_processor_files
from opt_ds.store.synthetic import write_synthetic_store
from opt_ds.store.tokenizer import load_tokenizer
from tests.store.test_update import die_at


@pytest.fixture
def store(own_store: Path) -> Path:
    return own_store


def by_id(store: FeatureStore) -> dict[str, list[int]]:
    return {store.sample_id(index): store.rows[index].tolist() for index in range(store.num_samples)}


def captions(store: FeatureStore) -> dict[str, str]:
    return {id: store.caption(rows[0]) for id, rows in by_id(store).items() if rows[0] >= 0}


def test_own_captions_by_another_tokenizer(store: Path, tmp_path: Path) -> None:
    before = FeatureStore(store)
    train_wordpiece([*captions(before).values(), "words of another corpus, zebras and foxes"], 120, tmp_path / "t")
    for times in (1, 2):
        description = update_text(store, None, PrepareSettings(text=tmp_path / "t"))
        after = FeatureStore(store)
        assert inspect_store(store).failures == []
        assert description.dims.vocab_size == TextExtractor(tmp_path / "t").dim != before.description.dims.vocab_size
        assert [path.name for path in store.glob("tokenizer*")] == [f"tokenizer-r{times}"]
    assert captions(after) == captions(before)
    assert by_id(after) == by_id(before)
    own = load_tokenizer(tmp_path / "t")
    for id, caption in captions(after).items():
        tokens = after.text(by_id(after)[id][0])
        assert tokens.tolist() == own(caption, add_special_tokens=False)["input_ids"]
        assert after.tokenizer().decode(tokens) == own.decode(tokens)
    assert np.array_equal(after.frames(0), before.frames(0))
    assert after.description.statistics == before.description.statistics
    copy_processor_files(after, tmp_path / "processor")
    kept = tmp_path / "processor" / "tokenizer" / "tokenizer.json"
    assert kept.read_bytes() == (tmp_path / "t" / "tokenizer.json").read_bytes()


def test_new_texts_of_a_manifest_and_a_report_that_is_true_again(
    store: Path, messy_manifest: Path, tmp_path: Path, logged: list[str]
) -> None:
    kept = json.loads((store / REPORT_FILE).read_text())
    image = (store / LENGTHS_FILE).read_bytes()
    lines = [json.loads(line) for line in messy_manifest.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line["text"] = {"ok-1": "one and two", "ok-2": "\u200b", "ok-3": "three", "ok-5": "three"}.get(line["id"], "plain words")
    manifest = messy_manifest.parent / "new.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with pytest.raises(UserError, match=r'sample "ok-2": the text has no tokens .--strict'):
        update_text(store, manifest, PrepareSettings(vocab_size=90), strict=True)
    assert json.loads((store / REPORT_FILE).read_text()) == kept
    assert not list(store.glob("tokenizer-*"))
    update_text(store, manifest, PrepareSettings(vocab_size=90, max_tokens=2))
    opened, report = FeatureStore(store), json.loads((store / REPORT_FILE).read_text())
    assert inspect_store(store).failures == []
    assert captions(opened) == {"ok-1": "one and two", "ok-3": "three", "ok-4": "plain words", "ok-5": "three",
                                "ok-6": "plain words", "ok-7": "plain words"}  # fmt: skip
    assert by_id(opened)["ok-2"][0] == -1
    assert report["dropped"] == {"text": [{"id": "ok-2", "reason": "the text has no tokens"}]}
    assert any("ok-2" in line for line in logged)
    assert "ok-1" in report["truncated"]["text"]
    assert max(opened.text_lengths) == 2 == report["lengths"]["text"]["max"]
    assert report["duplicates"]["text"]["repeated"] == 3  # "three" once more, "plain words" twice
    assert report["duplicates"]["text"]["across_splits"] == 1
    for name in ("skipped_samples", "kept"):
        assert report[name] == kept[name]
    for name in ("image", "audio"):
        assert report["lengths"][name] == kept["lengths"][name]
    assert (store / LENGTHS_FILE).read_bytes() != image


def test_what_cannot_be_is_refused_and_the_store_stays(store: Path, tmp_path: Path, messy_manifest: Path) -> None:
    before = FeatureStore(store).fingerprint
    lines = [json.loads(line) for line in messy_manifest.read_text(encoding="utf-8").splitlines()]
    (tmp_path / "few.jsonl").write_text('{"id": "ok-1", "text": "x"}')
    with pytest.raises(UserError, match=r"6 samples of .* are not in it"):
        update_text(store, tmp_path / "few.jsonl", PrepareSettings())
    (tmp_path / "none.jsonl").write_text("\n".join(json.dumps({"id": line["id"], "image": "x"}) for line in lines))
    with pytest.raises(UserError, match="no sample has a text"):
        update_text(store, tmp_path / "none.jsonl", PrepareSettings())
    with pytest.raises(UserError, match="no such folder"):
        update_text(store, None, PrepareSettings(text=tmp_path / "gone"))
    assert FeatureStore(store).fingerprint == before
    assert inspect_store(store).failures == []
    assert not list(store.glob("tokenizer-*"))


def test_samples_whose_line_has_no_text_are_lost_and_named(tmp_path: Path, logged: list[str]) -> None:
    write_synthetic_store(tmp_path / "s", 5, samples_per_shard=3)
    manifest = tmp_path / "m.jsonl"
    lines = [{"id": f"sample{index}", **({"image": "x.png"} if index in (1, 4) else {"text": "a thing"})} for index in range(5)]
    manifest.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=r'sample "sample1": the manifest names no text .--strict'):
        update_text(tmp_path / "s", manifest, PrepareSettings(vocab_size=40), strict=True)
    logged.clear()
    update_text(tmp_path / "s", manifest, PrepareSettings(vocab_size=40))
    assert "2 samples left without" in logged[0]
    assert logged[1:] == [f'  "sample{index}": the manifest names no text' for index in (1, 4)]
    update_text(tmp_path / "s", manifest, PrepareSettings(vocab_size=40), strict=True)  # no further sample loses the modality


def test_a_tokenizer_is_never_trained_on_no_text(tmp_path: Path) -> None:
    write_synthetic_store(tmp_path / "s", 5, splits={"train": 0.2, "valid": 0.8})
    manifest = tmp_path / "m.jsonl"
    lines = [{"id": f"sample{index}", **({"text": "a thing"} if index else {"image": "x.png"})} for index in range(5)]
    manifest.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=r'no text is in split "train".* give a tokenizer with --weights'):
        update_text(tmp_path / "s", manifest, PrepareSettings(vocab_size=40))
    assert not list((tmp_path / "s").glob("*tokenizer-*"))


def test_samples_that_share_a_text_go_on_sharing_it(tmp_path: Path) -> None:
    write_synthetic_store(tmp_path / "s", 6, samples_per_shard=3, missing=0.3, seed=2)
    rows = FeatureStore(tmp_path / "s").rows
    update_text(tmp_path / "s", None, PrepareSettings(vocab_size=300))
    after = FeatureStore(tmp_path / "s")
    assert inspect_store(tmp_path / "s").failures == []
    assert np.array_equal(after.rows, rows)
    assert (tmp_path / "s" / LENGTHS_FILE).is_file()
    assert not (tmp_path / "s" / REPORT_FILE).exists()  # it came without one


def test_a_kill_at_any_moment_leaves_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child process ends at once at its k-th file operation, for every k until it lives to the end."""
    write_synthetic_store(tmp_path / "s", 4, samples_per_shard=2, pixels=False)
    train_wordpiece([*captions(FeatureStore(tmp_path / "s")).values(), "w1 w2 w3"], 300, tmp_path / "t")
    # Plotting takes most of the time. The atomic write of its file remains.
    monkeypatch.setattr("opt_ds.ingest.report.draw_lengths", lambda _, path, units: path.write_bytes(b"drawn"))
    update_text(tmp_path / "s", None, PrepareSettings(text=tmp_path / "t"))  # imports what the children need
    for moment in range(1, 200):
        child = os.fork()
        if child == 0:
            die_at(moment)
            update_text(tmp_path / "s", None, PrepareSettings(text=tmp_path / "t"))
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        opened = FeatureStore(tmp_path / "s")
        assert inspect_store(tmp_path / "s").failures == []
        assert opened.tokenizer().decode(opened.text(0)) == opened.caption(0)
        if code == 0:
            break
    assert code == 0
    assert moment > 10
    assert len(list((tmp_path / "s").glob("tokenizer*"))) == 1
    assert len(list((tmp_path / "s").glob("shard-*"))) == 2
