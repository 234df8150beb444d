"""Further modalities of stores from strangers: names, dtypes and sizes are bounded before anything is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from opt_ds.errors import UserError
from opt_ds.store import FeatureStore, inspect_store, verify_store
from opt_ds.store.further import MAX_COLUMNS, MAX_FURTHER, FurtherModality, StoredColumn
from opt_ds.store.index import INDEX_FILE
from tests.store.fixed_store import contents, new_writer, write
from tests.store.further_store import agree, write_store

Fields = dict[str, Any]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("stores") / "template")


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "store"))


def put(*path: Any, value: Any) -> Callable[[Fields], None]:
    """Set a field of store.json."""

    def change(fields: Fields) -> None:
        for part in path[:-1]:
            fields = fields[part]
        fields[path[-1]] = value

    return change


def named(name: str) -> Callable[[Fields], None]:
    """Give the modality "touch" this name, in all shards too."""

    def change(fields: Fields) -> None:
        for part in (fields, *fields["shards"]):
            part["further"][name] = part["further"].pop("touch")

    return change


def column(name: str = "finger", **changes: Any) -> Callable[[Fields], None]:
    """Change a column of "touch", or add one."""

    def change(fields: Fields) -> None:
        columns = fields["further"]["touch"]["columns"]
        columns[name] = {**columns.get(name, {"dtype": "uint8", "width": []}), **changes}

    return change


def many(count: int, columns: int = 1) -> dict[str, FurtherModality]:
    """Valid modalities."""
    more = {f"column{number}": StoredColumn(dtype="uint8") for number in range(columns - 1)}
    modality = FurtherModality(item="things", columns={"features": StoredColumn(dtype="float16", width=(1,)), **more})
    return {f"m{number}": modality for number in range(count)}


def dumped(count: int) -> Fields:
    return {name: modality.model_dump(mode="json") for name, modality in many(count).items()}


BUILT_IN = ["text", "image", "audio", "samples", "codes"]
NAMES = ["", "a b", "..", "../x", "a/b", "a.b", "_a", "9a", "a-b", "touché", "a" * 33, "touch\n", "\x1b[1mx", "a\nb", "\u202ea"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[(named(name), "field further.*a name has 1 to 32 letters, digits and underscores") for name in NAMES],
        *[(named(name), "field further.*is a name of the store's own") for name in BUILT_IN],
        (put("further", value=None), "field further"),
        (put("further", value=[]), "field further"),
        (put("further", value="touch"), "field further"),
        (put("further", value=dumped(MAX_FURTHER + 1)), "field further: .*at most 8 items"),
        (put("further", value={}), "a shard has other further modalities than the store"),
        (put("furthest", value={}), "field furthest: Extra inputs"),
        (put("\x1b[2J\n", value={}), r"field \\u001b\[2J\\u000a: Extra inputs"),
        (put("a" * 10_000, value={}), "field a{80}: Extra inputs"),
        (put("further", "touch", "code", value="x"), "field further.touch.code: Extra inputs"),
        *[(put("further", "touch", "item", value=item), "field further.touch.item") for item in ("", "a\nb", "$x$", "a" * 33, 3)],
        (put("further", "touch", "columns", value={}), 'columns: "features" of dtype float16 and one width is missing'),
        (column("features", dtype="float32"), '"features" of dtype float16 and one width'),
        (column("features", width=[]), '"features" of dtype float16 and one width'),
        (column("features", width=[3, 3]), '"features" of dtype float16 and one width'),
        *[(column(dtype=dtype), "field further.touch.columns.finger.dtype")
          for dtype in ("float64", "bool", "object", "O", "S8", "complex64", ">f2", "f2,f2", "", None, 3, ["f2"])],
        *[(column(width=width), "field further.touch.columns.finger.width")
          for width in ([0], [-1], [2**24 + 1], [2**63], ["3"], [3.5], [True], [1] * 4, None, 3, "33")],
        (column(width=[2**12, 2**12, 2]), "width: more than 16777216 values per item"),
        (column(chunks=3), "field further.touch.columns.finger.chunks: Extra inputs"),
        *[(column(name), "field further.touch.columns") for name in ("", "a/b", "a b", "..", "é", "a" * 33, "a\n", "\x1bx")],
        (column("offsets"), '"offsets" is a name of the store'),
        (put("further", "touch", "columns", value={f"c{number}": {"dtype": "int8"} for number in range(MAX_COLUMNS + 1)}),
         "field further.touch.columns: .*at most 7 items"),
        (put("shards", 1, "further", value={}), "a shard has other further modalities than the store"),
        (put("shards", 1, "further", "taste", value={"rows": 0, "items": 0}), "a shard has other further modalities"),
        *[(put("shards", 1, "further", "touch", value=counts), "field shards.1.further.touch")
          for counts in (None, {}, {"rows": 1}, {"rows": -1, "items": 0}, {"rows": True, "items": 0}, {"rows": "3", "items": 0},
                         {"rows": 0, "items": 2**48}, {"rows": 0, "items": 0, "more": 0})],
    ],
)  # fmt: skip
def test_impossible_descriptions_are_one_line(store: Path, change: Callable[[Fields], None], message: str) -> None:
    fields = json.loads((store / "store.json").read_text(encoding="utf-8"))
    change(fields)
    (store / "store.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        FeatureStore(store)
    assert str(error.value).isprintable() and str(error.value).startswith(f"{store}/store.json: ")


def swapped(entries: Fields) -> Fields:
    return dict(reversed(entries.items()))


def test_the_order_of_modalities_and_columns_is_in_the_fingerprint(store: Path) -> None:
    """It is the order of the columns of samples/rows, and of the datasets' places in the index."""
    text = (store / "store.json").read_text(encoding="utf-8")
    for change in (
        lambda further: swapped(further),
        lambda further: {**further, "touch": {**further["touch"], "columns": swapped(further["touch"]["columns"])}},
    ):
        fields = json.loads(text)
        fields["further"] = change(fields["further"])
        (store / "store.json").write_text(json.dumps(fields), encoding="utf-8")
        with pytest.raises(UserError, match="fingerprint differs from its own contents"):
            verify_store(store)
    fields = json.loads(text)
    for shard in fields["shards"]:
        shard["further"] = swapped(shard["further"])
    (store / "store.json").write_text(json.dumps(fields), encoding="utf-8")
    verify_store(store)  # these are found by their names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("shards", 1, "further", "touch", "rows", value=10**12), r"touch/offsets: shape \[4\], not \[1000000000001\]"),
        (put("shards", 1, "further", "touch", "items", value=10**12), r"touch/features: shape \[5, 3\], not \[10{12}, 3\]"),
        (column("features", width=[2**24]), r"statistics.touch: not 16777216 means"),
        (column("forces", width=[2**24]), r"touch/forces: shape \[3, 2, 2\], not \[3, 16777216\]"),
        (column("finger", dtype="int8"), "touch/finger: dtype uint8, not int8"),
        (column("gone"), "touch/gone: missing"),
    ],
)
def test_descriptions_that_are_not_the_shards_are_found(store: Path, change: Callable[[Fields], None], message: str) -> None:
    agree(store, change)
    with pytest.raises(UserError, match=message) as error:
        verify_store(store)
    assert str(error.value).isprintable()
    assert any(message.partition(":")[0] in failure for failure in inspect_store(store).failures)


def test_a_modality_that_the_shards_do_not_have_is_found(tmp_path: Path) -> None:
    path = tmp_path / "s"
    writer = new_writer(path)
    write(writer, contents())
    writer.finish(3)

    def claim(fields: Fields) -> None:
        fields["further"] = dumped(1)
        fields["statistics"]["m0"] = {"mean": [0.0], "std": [1.0], "count": 0}
        for shard in fields["shards"]:
            shard["further"] = {"m0": {"rows": 0, "items": 0}}

    agree(path, claim)
    with pytest.raises(UserError, match=r"shard-00000.h5: m0/offsets: missing"):
        verify_store(path)


def soft_link(file: h5py.File) -> None:
    file["touch/forces"] = h5py.SoftLink("/touch/features")


def external_link(file: h5py.File) -> None:
    file["touch/forces"] = h5py.ExternalLink("../elsewhere.h5", "x")


def external_storage(file: h5py.File) -> None:
    file.create_dataset("touch/forces", (5, 2, 2), "f4", external=[("../elsewhere", 0, h5py.h5f.UNLIMITED)])


def absent_data(file: h5py.File) -> None:
    file.create_dataset("touch/forces", (2**40, 2, 2), "f4")


@pytest.mark.parametrize(
    ("make", "message"),
    [(soft_link, "a link out of the file"), (external_link, "a link out of the file"), (external_storage, "external storage"),
     (absent_data, "more bytes than the file has")],
)  # fmt: skip
def test_columns_that_reach_elsewhere_are_refused(store: Path, make: Callable[[h5py.File], None], message: str) -> None:
    with h5py.File(store / "shard-00001.h5", "r+") as file:
        del file["touch/forces"]
        make(file)
    agree(store)
    (store / INDEX_FILE).unlink()
    for use in (verify_store, lambda path: FeatureStore(path).columns("touch", 3)):
        with pytest.raises(UserError, match=rf"shard-00001.h5: touch/forces: {message}|touch/forces: .*{message}"):
            use(store)


def test_places_in_a_foreign_index_stay_within_the_file(store: Path) -> None:
    names = list(FeatureStore(store).description.datasets)
    with h5py.File(store / INDEX_FILE, "r+") as file:
        file["layout"][1, names.index("touch/forces")] = (0, 2**40)
    with pytest.raises(UserError, match=r"touch/forces is not within the file"):
        FeatureStore(store).columns("touch", 3)
    with pytest.raises(UserError, match="layout differ from the shards"):
        verify_store(store)


def test_the_largest_store_that_a_description_allows_opens(tmp_path: Path) -> None:
    path, further = tmp_path / "s", many(MAX_FURTHER, MAX_COLUMNS)

    def row(number: int) -> dict[str, np.ndarray]:
        return {"features": np.ones((1, 1)), **{f"column{each}": np.array([number]) for each in range(MAX_COLUMNS - 1)}}

    rows = [[(0, 0, 0, *range(MAX_FURTHER))]]
    writer = new_writer(path, further=further)
    write(writer, contents(rows, dict.fromkeys(further, row)))
    writer.finish(1)
    assert inspect_store(path).failures == []
    assert FeatureStore(path).columns("m7", 7)["column5"].tolist() == [7]
    with pytest.raises(UserError, match="9 further modalities: a store has at most 8"):
        new_writer(tmp_path / "t", further=many(MAX_FURTHER + 1))
    with pytest.raises(UserError, match='"codes" is a name of the store'):
        new_writer(tmp_path / "t", further={"codes": further["m0"]})
