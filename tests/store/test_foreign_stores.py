"""Test stores from others: names of files elsewhere and impossible values are refused in one line before reading."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from opt_ds.errors import UserError
from opt_ds.store import FeatureStore, inspect_store, open_store, verify_store
from opt_ds.store.files import file_sha256
from opt_ds.store.schema import StoreDescription
from opt_ds.store.synthetic import write_synthetic_store
from opt_ds.store.tokenizer import checked_tokenizer
from opt_ds.store.verify import VERIFIED_FILE

SECRET = b"what is in the user's own file"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "template"
    write_synthetic_store(path, 6, pixels=False, num_codes_vocab=None, samples_per_shard=3)
    (path.parent / "secret.txt").write_bytes(SECRET * 1000)
    return path


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Path:
    shutil.copyfile(template.parent / "secret.txt", tmp_path / "secret.txt")
    return Path(shutil.copytree(template, tmp_path / "store"))


def describe(store: Path, **changes: Any) -> None:
    """Make store.json agree with the shards, as its sender would."""
    fields = json.loads((store / "store.json").read_text()) | changes
    for shard in fields["shards"]:
        file = store / shard["file"]
        shard |= {"sha256": file_sha256(file), "bytes": file.stat().st_size}
    description = StoreDescription.model_validate(fields)
    (store / "store.json").write_text(json.dumps(fields | {"fingerprint": description.with_fingerprint().fingerprint}))
    (store / "index.h5").unlink(missing_ok=True)


def replace(store: Path, name: str, make: Callable[[h5py.File, tuple[int, ...], Any], None]) -> None:
    with h5py.File(store / "shard-00001.h5", "r+") as file:
        shape, dtype = file[name].shape, file[name].dtype
        del file[name]
        make(file, shape, dtype)
    describe(store)


def external_storage(file: h5py.File, shape: tuple[int, ...], dtype: Any) -> None:
    file.create_dataset("text/utf8", shape, dtype, external=[("../secret.txt", 0, h5py.h5f.UNLIMITED)])


def external_link(file: h5py.File, shape: tuple[int, ...], dtype: Any) -> None:
    file["text/utf8"] = h5py.ExternalLink("../other.h5", "/x")


def soft_link(file: h5py.File, shape: tuple[int, ...], dtype: Any) -> None:
    file["text/utf8"] = h5py.SoftLink("/text/tokens")


def virtual(file: h5py.File, shape: tuple[int, ...], dtype: Any) -> None:
    layout = h5py.VirtualLayout(shape, dtype)
    layout[:] = h5py.VirtualSource("../other.h5", "x", shape)
    file.create_virtual_dataset("text/utf8", layout)


def strings(file: h5py.File, shape: tuple[int, ...], dtype: Any) -> None:
    file.create_dataset("text/utf8", shape, h5py.string_dtype())


def compound(file: h5py.File, shape: tuple[int, ...], dtype: Any) -> None:
    file.create_dataset("text/utf8", shape, np.dtype([("a", "u1"), ("b", "u1")]))


def other_filter(file: h5py.File, shape: tuple[int, ...], dtype: Any) -> None:
    file.create_dataset("text/utf8", data=np.zeros(shape, dtype), compression="lzf")


def absurd(file: h5py.File, shape: tuple[int, ...], dtype: Any) -> None:
    file.create_dataset("text/utf8", (2**40,), dtype, chunks=(1024,), compression="gzip")


def absent_data(file: h5py.File, shape: tuple[int, ...], dtype: Any) -> None:
    file.create_dataset("text/utf8", (2**40,), dtype)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (external_storage, "external storage"),
        (external_link, "a link out of the file"),
        (soft_link, "a link out of the file"),
        (virtual, "a virtual dataset"),
        (strings, "neither integers nor floats"),
        (compound, "neither integers nor floats"),
        (other_filter, "a compression filter other than"),
        (absurd, "more bytes than the file has"),
        (absent_data, "more bytes than the file has"),
    ],
)
def test_hdf5_that_reaches_elsewhere_is_refused(store: Path, make: Callable[..., None], message: str) -> None:
    replace(store, "text/utf8", make)
    failures = inspect_store(store).failures
    assert len(failures) == 1 and failures[0].startswith("shard-00001.h5: text/utf8: ") and message in failures[0]
    for use in (verify_store, open_store, lambda path: FeatureStore(path).caption(4)):
        with pytest.raises(UserError, match=message) as error:
            use(store)
        assert "\n" not in str(error.value) and SECRET.decode() not in str(error.value)


def test_the_index_reaches_nowhere_either(store: Path) -> None:
    verify_store(store)
    for make in (external_link, virtual):
        with h5py.File(store / "index.h5", "r+") as index:
            shape, dtype = index["rows"].shape, index["rows"].dtype
            del index["rows"]
            make(index, shape, dtype)
            index.move("text/utf8", "rows")
            del index["text"]
        assert np.array_equal(FeatureStore(store).rows[:, 0], np.arange(6)), "the index is made again of the shards"
        verify_store(store)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_folder": "../tokenizer"}, "field tokenizer_folder"),
        ({"tokenizer_folder": "/etc"}, "field tokenizer_folder"),
        ({"num_samples": "6"}, "field num_samples"),
        ({"num_samples": True}, "field num_samples"),
        ({"num_samples": -1}, "field num_samples"),
        ({"num_samples": 2**63}, "field num_samples"),
        ({"split_names": ["train", "train"]}, "a name is listed twice"),
        ({"has_codes": True}, "dims.num_codes is missing"),
        ({"compression": "lzf"}, "field compression"),
        ({"shards": 3}, "field shards"),
    ],
)
def test_impossible_descriptions_are_one_line(store: Path, changes: dict[str, Any], message: str) -> None:
    fields = json.loads((store / "store.json").read_text()) | changes
    (store / "store.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=message) as error:
        FeatureStore(store)
    assert "\n" not in str(error.value) and str(store) in str(error.value)


@pytest.mark.parametrize("file", ["../store/shard-00000.h5", "/etc/passwd", "shard-00000.h5/..", "other.h5", "shard-00001.h5"])
def test_shards_are_in_the_folder_and_listed_once(store: Path, file: str) -> None:
    fields = json.loads((store / "store.json").read_text())
    fields["shards"][0]["file"] = file
    (store / "store.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"field shards.0.file|listed twice"):
        FeatureStore(store)


def test_dims_and_statistics_have_bounds(store: Path) -> None:
    text = (store / "store.json").read_text()
    for old, new in (('"vocab_size": 200', '"vocab_size": 1e30'), ('"image_feature_dim": 32', '"image_feature_dim": -32')):
        (store / "store.json").write_text(text.replace(old, new))
        with pytest.raises(UserError, match="field dims"):
            FeatureStore(store)
    fields = json.loads(text)
    fields["statistics"]["image"]["mean"][3] = float("nan")
    (store / "store.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"field statistics.image.mean.3"):
        FeatureStore(store)
    fields["statistics"]["image"]["mean"][3] = 7.0
    (store / "store.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"statistics.image: dimension 3 differs from the features"):
        verify_store(store)
    (store / "store.json").write_text('{"info":' + "[" * 100_000)
    with pytest.raises(UserError, match="not readable as JSON"):
        FeatureStore(store)


@pytest.mark.parametrize("name", ["shard-00000.h5", "tokenizer/tokenizer.json", "tokenizer", "store.json", "index.h5"])
def test_links_that_leave_the_folder_are_refused(store: Path, name: str) -> None:
    moved = store.parent / "moved"
    (store / name).rename(moved)
    (store / name).symlink_to(moved)
    with pytest.raises(UserError, match="leads out of"):
        verify_store(store)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("text/tokens", 0, 200), ("text/offsets", 1, 10**6), ("image/offsets", -1, 1), ("samples/rows", (1, 1), 99),
        ("samples/rows", (1, 2), -7), ("samples/split", 0, 9), ("samples/labels", 0, 50), ("image/labels", 2, 700),
        ("samples/id_offsets", 1, -3), ("text/utf8_offsets", 1, 2**62), ("text/utf8", 0, 255),
    ],
)  # fmt: skip
def test_training_refuses_what_inspect_refuses(store: Path, name: str, place: Any, value: int) -> None:
    with h5py.File(store / "shard-00001.h5", "r+") as file:
        file[name][place] = value
    describe(store)
    with pytest.raises(UserError) as error:
        verify_store(store)
    assert str(error.value).startswith(f"{store}/shard-00001.h5: {name}") and "\n" not in str(error.value)
    assert not (store / VERIFIED_FILE).exists()


def test_offsets_that_wrap_around_are_seen(store: Path) -> None:
    with h5py.File(store / "shard-00001.h5", "r+") as file:
        offsets = file["text/offsets"][:]
        offsets[1:3] = 2**63 - 1, -(2**63)  # their difference is +1 in int64
        file["text/offsets"][:] = offsets
    describe(store)
    with pytest.raises(UserError, match=r"text/offsets: falls"):
        verify_store(store)


def test_a_permuted_index_and_a_permuted_tokenizer_stop_training(store: Path) -> None:
    verify_store(store)
    with h5py.File(store / "index.h5", "r+") as index:
        rows = index["rows"][:]
        index["rows"][:] = rows[::-1]
    with pytest.raises(UserError, match=r"index.h5: rows differ from the shards: remove it"):
        verify_store(store)
    (store / "index.h5").unlink()
    verify_store(store)
    file = store / "tokenizer" / "tokenizer.json"
    fields = json.loads(file.read_text())
    words = fields["model"]["vocab"]
    words["w1"], words["w2"] = words["w2"], words["w1"]
    file.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"tokenizer: files differ from store.json's checksum"):
        verify_store(store)


def test_a_note_that_came_with_the_store_counts_for_nothing(store: Path, tmp_path: Path) -> None:
    verify_store(store)
    copy = Path(shutil.copytree(store, tmp_path / "copy"))  # with all its times
    with h5py.File(copy / "shard-00001.h5", "r+") as file:
        file["text/tokens"][0] = 200
    shutil.copystat(store / "shard-00001.h5", copy / "shard-00001.h5")
    assert (copy / VERIFIED_FILE).read_bytes() == (store / VERIFIED_FILE).read_bytes()
    with pytest.raises(UserError, match="checksum differs"):
        verify_store(copy)


def test_tokenizers_of_strangers(store: Path, tmp_path: Path) -> None:
    folder = store / "tokenizer"
    good = json.loads((folder / "tokenizer.json").read_text())
    assert checked_tokenizer(folder).get_vocab_size() == 200
    slow = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    cases: list[tuple[Any, str]] = [
        (good | {"pre_tokenizer": slow}, "pre_tokenizer 'Split'"),
        (good | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [slow]}}, "pre_tokenizer 'Split'"),
        (good | {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}}, "normalizer 'Replace'"),
        (good | {"decoder": 3}, "decoder None"),
        (good | {"model": good["model"] | {"type": "BPE", "merges": []}}, "not a WordPiece"),
        (good | {"model": good["model"] | {"vocab": {"a": 2**40}}}, "do not have the ids"),
        (good | {"model": good["model"] | {"vocab": []}}, "no vocabulary"),
        (good | {"added_tokens": 3}, "added_tokens"),
        ([], "no JSON object"),
    ]
    texts = [(json.dumps(fields), message) for fields, message in cases]
    texts += [("[" * 100_000, "nested too deeply"), ('{"a":' * 90 + "1" + "}" * 90, "nested too deeply"), ("{", "no valid")]
    for text, message in texts:
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match=message) as error:
            checked_tokenizer(folder)
        assert "\n" not in str(error.value)
    with open(folder / "tokenizer.json", "wb") as file:
        file.truncate(2**33)
    with pytest.raises(UserError, match="more than the 32 MiB allowed"):
        checked_tokenizer(folder)
