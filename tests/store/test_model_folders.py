"""Hugging Face folders from strangers: no code, no hub, no file elsewhere, nothing unpickled; the hub's own cache is fine."""

import json
from pathlib import Path
from typing import Any

import pytest

from opt_ds.errors import UserError
from opt_ds.store.foreign import check_model_folder, is_plain_name, read_json_object


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "bert"
    made.mkdir()
    (made / "config.json").write_text(json.dumps({"model_type": "bert", "_attn_implementation": "sdpa"}))
    (made / "model.safetensors").write_bytes(b"never read here")
    return made


def test_ordinary_folders_pass(folder: Path) -> None:
    check_model_folder(folder)
    (folder / "pytorch_model.bin").write_bytes(b"beside safetensors it is not read")
    check_model_folder(folder)
    (folder / "model.safetensors").unlink()
    check_model_folder(folder, allow_pickled=True)
    with pytest.raises(UserError, match=r"pytorch_model.bin: pickled weights are not loaded"):
        check_model_folder(folder)


@pytest.mark.parametrize(
    ("file", "entry"),
    [
        ("config.json", {"auto_map": {"AutoModel": "evil.Model"}}),
        ("config.json", {"text_config": {"auto_map": {"AutoModel": "other/repo--evil.Model"}}}),
        ("config.json", {"trust_remote_code": True}),
        ("config.json", {"_attn_implementation": "someone/repo"}),
        ("config.json", {"attn_implementation": {"text_config": "someone/repo:kernel"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.T", None]}}),
        ("preprocessor_config.json", {"auto_map": {"AutoProcessor": "evil.P"}}),
        ("config.json", "[" * 5000),
        ("adapter_config.json", {"base_model_name_or_path": "someone/repo"}),
    ],
)
def test_code_and_hubs_are_refused(folder: Path, file: str, entry: Any) -> None:
    (folder / file).write_text(entry if isinstance(entry, str) else json.dumps(entry))
    with pytest.raises(UserError) as error:
        check_model_folder(folder)
    assert str(error.value).startswith(f"{folder / file}: ") and "\n" not in str(error.value)


def test_weights_elsewhere_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "stolen.safetensors")
    index = folder / "model.safetensors.index.json"
    for name in ("../stolen.safetensors", str(tmp_path / "stolen.safetensors"), "..", "model.bin"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match="which is not a safetensors file in the folder"):
            check_model_folder(folder)
    index.unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "stolen.safetensors")
    with pytest.raises(UserError, match="leads out of"):
        check_model_folder(folder)


def test_a_snapshot_in_the_hubs_cache_passes(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--bert" / "snapshots" / "abc"
    blobs = tmp_path / "models--bert" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    check_model_folder(snapshot)
    (snapshot / "vocab.txt").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="leads out of"):
        check_model_folder(snapshot)


def test_names_and_json_have_limits(tmp_path: Path) -> None:
    assert is_plain_name("shard-00001.h5") and is_plain_name("ä b")
    assert not any(map(is_plain_name, ("", ".", "..", "a/b", "/a", "a\\b", "a\0", "a\n", "x" * 256, None, 3)))
    file = tmp_path / "a.json"
    for text in ("[]", "{", "\udcff", '{"a": ' * 60 + "1" + "}" * 60, "[" * 10**6):
        file.write_text(text, errors="surrogateescape")
        with pytest.raises(UserError, match=r"a.json: .*: fetch it again$"):
            read_json_object(file, "fetch it again")
    file.write_text('{"a": "' + "b" * 100 + '"}')
    with pytest.raises(UserError, match="MiB allowed"):
        read_json_object(file, "fetch it again", max_bytes=100)
