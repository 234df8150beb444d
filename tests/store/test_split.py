"""Test the reassignment of splits: groups stay together, fractions are met, lists are followed, derived data is updated."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from opt_ds.errors import UserError
from opt_ds.store import FeatureStore, inspect_store
from opt_ds.store.split import parse_ratios, split_by_list, split_by_ratio
from opt_ds.store.synthetic import write_synthetic_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    small = {"image_feature_dim": 3, "audio_feature_dim": 2}
    write_synthetic_store(tmp_path / "s", 400, samples_per_group=2, samples_per_shard=150, **small)
    return tmp_path / "s"


def splits_of(path: Path) -> dict[str, str]:
    store = FeatureStore(path)
    names = store.description.split_names
    return {store.sample_id(index): names[store.split_codes[index]] for index in range(store.num_samples)}


def test_ratios_are_met_and_groups_stay_whole(store: Path) -> None:
    before = FeatureStore(store)
    captions = [before.caption(row) for row in range(400)]
    description = split_by_ratio(store, {"train": 0.7, "valid": 0.1, "test": 0.2})
    assert inspect_store(store).failures == []
    assert description.split_names == ["train", "test", "valid"]
    assert sum(description.split_counts.values()) == 400
    assert 250 < description.split_counts["train"] < 310
    assert 20 < description.split_counts["valid"] < 65
    after, of_group = FeatureStore(store), defaultdict(set)
    for group, code in zip(after.groups.tolist(), after.split_codes.tolist(), strict=True):
        of_group[group].add(code)
    assert all(len(codes) == 1 for codes in of_group.values())
    assert [after.caption(row) for row in range(400)] == captions
    rows = after.rows[after.split_samples("train"), 1]
    features = np.concatenate([after.regions(row).features for row in rows]).astype("float64")
    assert np.allclose(after.description.statistics["image"].mean, features.mean(0), atol=1e-6)
    assert np.allclose(after.description.statistics["image"].std, features.std(0), atol=1e-6)
    first = splits_of(store)
    split_by_ratio(store, {"train": 0.7, "valid": 0.1, "test": 0.2})
    assert splits_of(store) == first
    split_by_ratio(store, {"train": 0.7, "valid": 0.1, "test": 0.2}, seed=1)
    assert splits_of(store) != first


def test_lists_of_ids_and_of_groups(store: Path, tmp_path: Path) -> None:
    before = splits_of(store)
    (tmp_path / "ids.csv").write_text("sample3,test\nsample0,test\n")
    assert split_by_list(store, tmp_path / "ids.csv").split_counts["test"] == 2
    assert splits_of(store) == {**before, "sample3": "test", "sample0": "test"}
    assert inspect_store(store).failures == []  # sample 2 is of sample 3's group, as in the list
    assert "as the manifest's splits require" in inspect_store(store).notes[0]
    (tmp_path / "groups.tsv").write_text("group1\tdev\n")
    split_by_list(store, tmp_path / "groups.tsv", by_group=True)
    assert splits_of(store) == {**before, "sample0": "test", "sample2": "dev", "sample3": "dev"}


def test_mistakes_leave_the_store_alone(store: Path, tmp_path: Path) -> None:
    before = splits_of(store)
    for content, message in (
        ("nobody,test\n", '1 ids are not in .*such as "nobody"'),
        ("sample1\n", "line 1: write a name and a split"),
        ("".join(f"sample{index},test\n" for index in range(400)), "no sample would be in train"),
        ("".join(f"sample{index},fold{index}\n" for index in range(300)), "302 splits, .* a store has at most 256"),
        ("sample1,caf\xe9\n", "l.csv: not UTF-8 text: save it as UTF-8"),
    ):
        (tmp_path / "l.csv").write_text(content, encoding="latin-1")
        with pytest.raises(UserError, match=message):
            split_by_list(store, tmp_path / "l.csv")
    for arguments in (["train"], ["train=x"], ["train=0.5"], ["train=1.5", "test=-0.5"]):
        with pytest.raises(UserError, match="--ratio"):
            parse_ratios(arguments)
    assert splits_of(store) == before


def test_a_list_may_have_a_header_and_say_a_thing_twice_but_not_two_things(store: Path, tmp_path: Path) -> None:
    first, second = list(splits_of(store))[:2]
    list_file = tmp_path / "l.csv"
    list_file.write_text(f"ID,Split\n{first},test\n\n{second},valid\n{first},test\n")
    split_by_list(store, list_file)
    assert (splits_of(store)[first], splits_of(store)[second]) == ("test", "valid")
    list_file.write_text(f"{first},test\n{second},valid\n{first},train\n")
    with pytest.raises(UserError, match=f'l.csv line 3: "{first}" is in train, but in test on line 1: remove one'):
        split_by_list(store, list_file)
    list_file.write_text(f'{first},"test\n{second},valid\n')
    with pytest.raises(UserError, match=r"l.csv: a quote is not closed"):
        split_by_list(store, list_file)
    assert splits_of(store)[first] == "test"
