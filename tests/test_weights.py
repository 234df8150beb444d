"""Files of weights: what a file is instead of a checkpoint, and what a network and a checkpoint do not share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from opt_ds.errors import UserError
from opt_ds.weights import fit, read_config, read_folder, read_state_dict


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def _cut(write: Callable[[Path], None]) -> Callable[[Path], None]:
    def cut(file: Path) -> None:
        write(file)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return cut


def _torch(file: Path) -> None:
    torch.save(network().state_dict(), file)


def _safetensors(file: Path) -> None:
    save_file(network().state_dict(), file)


def _nan(file: Path) -> None:
    torch.save({"weight": torch.tensor([1.0, float("nan")])}, file)


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("a.pt", lambda file: torch.save(network(), file), "it holds pickled Python objects, which could run code"),
        ("a.pt", lambda file: torch.save(network(), file, _use_new_zipfile_serialization=False), "it holds pickled Python"),
        ("a.pth", lambda file: file.write_bytes(b"\n<!DOCTYPE html><html>"), r"it is a web page \(HTML\): download"),
        ("a.safetensors", lambda file: file.write_bytes(b"<html>"), r"it is a web page \(HTML\)"),
        ("a.pth", lambda file: file.touch(), "the file is empty: download it again"),
        ("a.safetensors", lambda file: file.touch(), "the file is empty: download it again"),
        ("a.safetensors", _cut(_safetensors), "truncated or damaged: download it again"),
        ("a.pth", _cut(_safetensors), "truncated or damaged: download it again"),
        ("a.pth", _cut(_torch), "truncated or damaged: download it again"),
        ("a.pth", lambda file: file.mkdir(), "a folder, not a file .*: name the file itself"),
        ("a.pt", lambda file: torch.jit.script(torch.nn.ReLU()).save(str(file)), "a TorchScript archive: save the state_dict"),
        ("a.pt", lambda file: file.write_bytes(b"\x1f\x8b" + bytes(64)), "it is compressed: unpack it first"),
        ("a.pt", lambda file: file.write_bytes(b'{"a": 1}'), "it is JSON: name the file of weights"),
        ("a.bin", lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
        ("a.pt", lambda file: file.write_bytes(bytes(range(256))), "truncated, damaged or of another kind"),
        ("a.pt", _nan, "weight is NaN or infinite: its training failed"),
        ("a.pt", lambda file: torch.save([torch.zeros(1)], file), "not a state dict"),
        ("a.pt", lambda file: None, "no such file"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_no_checkpoint_is_refused_in_our_words(
    tmp_path: Path, name: str, write: Callable[[Path], None], reason: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(UserError, match=f"^{tmp_path / name}: .*{reason}") as error:
        read_state_dict(tmp_path / name, "--image-weights")
    said = str(error.value)
    assert "\n" not in said and "\x1b" not in said and "weights_only" not in said and "torch.load" not in said


@pytest.mark.parametrize(("name", "write"), [("a.pt", _torch), ("a.safetensors", _safetensors), ("a.pth", _safetensors)])
def test_tensors_are_read_by_content_whatever_the_ending(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    found = read_state_dict(tmp_path / name, "weights")
    assert found.keys() == network().state_dict().keys()
    assert torch.equal(found["0.weight"], network()[0].weight)


def test_missing_unexpected_and_differently_sized_weights_are_refused() -> None:
    whole = network().state_dict()
    for change, reason in (
        ({"0.bias": None}, r"a\.pt: does not fit net: its weights lack 0\.bias$"),
        ({"0.bias": None, "0.weight": None}, r"its weights lack 0\.bias \(nor 1 more\)"),
        ({"2.bias": torch.zeros(1)}, r"does not fit net, which has no 2\.bias: it is another model's"),
        ({"0.bias": torch.zeros(5)}, r"0\.bias is \[5\], not \[4\]"),
    ):
        state = {key: value for key, value in {**whole, **change}.items() if value is not None}
        with pytest.raises(UserError, match=reason):
            fit(network(), state, "a.pt", "net")
    plain = {key: value for key, value in whole.items() if "num_batches" not in key}
    fit(network(), {**plain, "9.num_batches_tracked": torch.tensor(0)}, "a.pt", "net")
    fit(network(), {**plain, "head.weight": torch.zeros(1)}, "a.pt", "net", extras=r"head\..*")


def test_folders_of_several_files_are_read_and_nothing_outside_them(tmp_path: Path) -> None:
    state = network().state_dict()
    index = tmp_path / "model.safetensors.index.json"
    save_file({"0.weight": state["0.weight"]}, tmp_path / "one.safetensors")
    save_file({"0.bias": state["0.bias"]}, tmp_path / "two.safetensors")
    index.write_text('{"weight_map": {"0.weight": "one.safetensors", "0.bias": "two.safetensors"}}')
    assert read_folder(tmp_path, "weights").keys() == {"0.weight", "0.bias"}
    index.write_text('{"weight_map": {"0.weight": "../one.safetensors"}}')
    with pytest.raises(UserError, match="names files outside its folder"):
        read_folder(tmp_path, "weights")
    for text in ("{", "[" * 100_000, '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(UserError, match="not readable as an index of weights"):
            read_folder(tmp_path, "weights")


def test_another_kind_of_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json there"):
        read_config(tmp_path, "bert", "BERT")
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    with pytest.raises(UserError, match=r"not a BERT folder: model_type in its config\.json is 'roberta', not 'bert'"):
        read_config(tmp_path, "bert", "BERT")
