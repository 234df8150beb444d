"""Checkpoints and exported models that are damaged or come from strangers: one line, before any weight is used."""

import json
import shutil
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opt_ds.errors import UserError
from opt_ds.store.files import file_sha256
from opt_ds.store.processor_files import copy_processor_files
from opt_ds.training import checkpoint, checkpoint_files, checkpoint_writer
from tests.tiny import make_config, make_model, make_store

FILES = ("model.safetensors", "moments.safetensors", "state.json")


def write_checkpoint(output: Path, step: int, seed: int = 0) -> Path:
    """A checkpoint as the writer leaves it, without a run."""
    config = make_config()
    model = make_model(config, seed)
    weights = {**dict(model.named_parameters()), **checkpoint.buffers_of(model)}
    about = {"plan_version": 1, "config": config.model_dump(mode="json"), "stores": [], "versions": {}, "precision": "fp32"}
    state = {**asdict(checkpoint.TrainState(step=step, adam_steps=step)), **about}
    folder = output / "checkpoints" / checkpoint.folder_name(step)
    copies = {name: tensor.detach().clone() for name, tensor in weights.items()}
    checkpoint_writer._write_folder(folder, copies, {"a.exp_avg": torch.zeros(3)}, state)
    return folder


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, both pointers, and the processor's files."""
    output = tmp_path_factory.mktemp("runs") / "run"
    write_checkpoint(output, 2)
    newest = write_checkpoint(output, 4, seed=1)
    for pointer in ("latest", "best"):
        checkpoint_writer.point_to(output, pointer, newest)
    store = make_store(output.parent / "store", 8, num_codes_vocab=None)
    copy_processor_files(store, output / "processor")
    return output


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "run"))


def one_line(error: pytest.ExceptionInfo[UserError], folder: Path) -> None:
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_whole_checkpoints_load_and_old_pointers_too(run: Path) -> None:
    model, _ = checkpoint.load_model(run)
    assert torch.equal(model.embeddings.text.word.weight, make_model(make_config(), 1).embeddings.text.word.weight)
    (run / "checkpoints" / "best").write_text("step-00000002\n")  # as versions before the hash wrote it
    assert checkpoint.resolve_checkpoint(run).name == "step-00000002"


def test_weights_of_another_step_are_refused(run: Path) -> None:
    older, newest = (run / "checkpoints" / checkpoint.folder_name(step) for step in (2, 4))
    assert (older / FILES[0]).stat().st_size == (newest / FILES[0]).stat().st_size
    shutil.copyfile(older / FILES[0], newest / FILES[0])
    for use in (checkpoint.load_model, checkpoint.resolve_checkpoint):
        with pytest.raises(UserError, match=r"model.safetensors is damaged \(its SHA-256 differs\)") as error:
            use(run)
        one_line(error, newest)
    with pytest.raises(UserError, match="SHA-256 differs"):
        checkpoint.load_weights(make_model(make_config()), newest)
    assert checkpoint.find_resumable(run) == older


RECORDS: list[tuple[str, Any]] = [
    ("no object", []),
    ("deep", '{"a":' * 5000),
    ("no files", {"step": 4}),
    ("a damaged key", lambda found: {"step": 4, "filfs": found["files"]}),
    ("a damaged inner key", lambda found: {**found, "files": {**found["files"], FILES[0]: {"bytes": 1, "sha25&": ""}}}),
    ("an entry of another type", lambda found: {**found, "files": {**found["files"], FILES[0]: 3}}),
    ("files of another type", lambda found: {**found, "files": [*found["files"]]}),
    ("a file missing", lambda found: {**found, "files": {FILES[0]: found["files"][FILES[0]]}}),
    ("a file elsewhere", lambda found: {**found, "files": {**found["files"], "../../x": found["files"][FILES[0]]}}),
    ("an absolute file", lambda found: {**found, "files": {**found["files"], "/etc/passwd": found["files"][FILES[0]]}}),
    (
        "sizes of another type",
        lambda found: {**found, "files": {**found["files"], FILES[0]: {"bytes": True, "sha256": "0" * 64}}},
    ),
    ("another step", lambda found: {**found, "step": 2}),
]


@pytest.mark.parametrize(("what", "record"), RECORDS, ids=[what for what, _ in RECORDS])
def test_a_damaged_record_is_a_damaged_checkpoint(run: Path, what: str, record: Any, logged: list[str]) -> None:
    newest = run / "checkpoints" / "step-00000004"
    file = newest / "COMPLETE.json"
    changed = record(json.loads(file.read_text())) if callable(record) else record
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    found = checkpoint.find_resumable(run)
    assert found is not None and found.name == "step-00000002" and len(logged) == 1 and "step-00000004" in logged[0]
    with pytest.raises(UserError, match=r"COMPLETE\.json") as error:
        checkpoint.resolve_checkpoint(newest)
    one_line(error, newest)


@pytest.mark.parametrize(
    "content", ["../../elsewhere", "/etc", "", "step-00000004/..", "\x00", "step-00000004\nnonsense", "best"]
)
@pytest.mark.parametrize("pointer", ["latest", "best"])
def test_pointers_name_checkpoints_of_the_run_alone(run: Path, pointer: str, content: str) -> None:
    (run / "checkpoints" / pointer).write_text(content)
    for use in (lambda: checkpoint.pointed(run, pointer), lambda: checkpoint.find_resumable(run)):
        with pytest.raises(UserError, match=f"{pointer}: damaged, names no checkpoint") as error:
            use()
        one_line(error, run)


def test_a_pointer_with_another_name_or_hash_is_refused(run: Path) -> None:
    best = run / "checkpoints" / "best"
    text = best.read_text()
    for changed in (text.replace("step-00000004", "step-00000002"), text.replace("step-00000004", "step-00000005")):
        best.write_text(changed)
        with pytest.raises(UserError, match=r"does not belong to|does not exist") as error:
            checkpoint.load_model(run)
        one_line(error, run)


def reseal(folder: Path) -> None:
    """Make COMPLETE.json agree with the files, as a stranger would."""
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in FILES}
    (folder / "COMPLETE.json").write_text(json.dumps({"step": 4, "files": files}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "4"}, "field step"),
        ({"step": 3}, "field step"),
        ({"config": 3}, "field config"),
        ({"plan_version": None}, "field plan_version"),
        ({"config": {"model": {"hidden_size": True}}}, "model"),
    ],
)
def test_a_state_of_a_stranger_is_one_line(run: Path, change: dict[str, Any], message: str) -> None:
    folder = run / "checkpoints" / "step-00000004"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, **change}))
    reseal(folder)
    with pytest.raises(UserError, match=message) as error:
        checkpoint.load_model(folder)
    one_line(error, folder)


@pytest.mark.parametrize(("name", "value"), [("guard", 3), ("losses", None), ("adam_steps", "many"), ("scaler", {"a": "b"})])
def test_a_train_state_of_other_types_is_one_line(name: str, value: Any) -> None:
    fields = {**asdict(checkpoint.TrainState()), name: value}
    if name == "losses":
        fields = {key: item for key, item in fields.items() if key != "guard"}
    with pytest.raises(UserError, match=r"state\.json: damaged") as error:
        checkpoint.train_state(fields)
    assert "\n" not in str(error.value)


def test_damaged_headers_and_impossible_sizes_are_one_line(run: Path) -> None:
    folder = run / "checkpoints" / "step-00000004"
    weights = (folder / FILES[0]).read_bytes()
    for content in (b"", weights[:4], b"\xff" * 64, weights[:8] + b"[" * 2000, weights[:-4]):
        (folder / FILES[0]).write_bytes(content)
        reseal(folder)
        with pytest.raises(UserError, match="no valid safetensors file") as error:
            checkpoint.load_model(folder)
        one_line(error, folder)
    (folder / FILES[0]).write_bytes(weights)
    state = json.loads((folder / "state.json").read_text())
    for sizes in ({"num_layers": 10_000_000}, {"hidden_size": 2**40}, {"vocab_size": 10**9}, {"image_codebook_size": 2**31}):
        state["config"]["model"] = make_config().model.model_dump(mode="json") | sizes
        (folder / "state.json").write_text(json.dumps(state))
        reseal(folder)
        with pytest.raises(UserError, match=r"require more than|model") as error:
            checkpoint.load_model(folder)
        one_line(error, folder)


# ---- exported models


@pytest.fixture
def exported(run: Path, tmp_path: Path) -> Path:
    from opt_ds.serving.export import export

    return export(run, tmp_path / "exported")


def test_an_exported_folder_loads_without_a_network_and_bit_for_bit(
    run: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opt_ds.serving.exported import load_exported
    from opt_ds.serving.pretrained import OPTModel

    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    expected = checkpoint.load_model(run)[0].state_dict()
    for loaded in (load_exported(exported)[0], OPTModel.from_pretrained(exported).opt):
        assert loaded.state_dict().keys() == expected.keys()
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.items())


def test_an_older_export_without_hashes_loads_with_a_note(exported: Path, logged: list[str]) -> None:
    from opt_ds.serving.exported import load_exported

    (exported / "opt_ds_files.json").unlink()
    load_exported(exported)
    assert len(logged) == 1 and "its files are not checked for damage" in logged[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_attn_implementation": "someone/repo"}, "_attn_implementation is not a key"),
        ({"attn_implementation": "someone/repo"}, "attn_implementation is not a key"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map is not a key"),
        ({"_name_or_path": "someone/repo"}, "_name_or_path is not a key"),
        ({"trust_remote_code": True}, "trust_remote_code is not a key"),
        ({"quantization_config": {"quant_method": "x"}}, "quantization_config is not a key"),
        ({"architectures": ["Evil"]}, "not a model that opt-ds export wrote"),
        ({"opt_ds_config": []}, "no opt_ds_config"),
        ({"sizes": {"num_layers": 10_000_000}}, "require more than"),
        ({"sizes": {"hidden_size": 2**40}}, "require more than|hidden_size"),
        ({"sizes": {"num_layers": -1}}, "num_layers"),
        ({"sizes": {"hidden_size": True}}, "hidden_size"),
        ({"sizes": {"vocab_size": 10**12}}, "require more than|vocab_size"),
    ],
)
def test_configurations_of_strangers_are_refused(exported: Path, change: dict[str, Any], message: str) -> None:
    from opt_ds.serving.exported import load_exported
    from opt_ds.serving.pretrained import OPTModel

    (exported / "opt_ds_files.json").unlink()
    file = exported / "config.json"
    fields = json.loads(file.read_text())
    fields["opt_ds_config"]["model"] |= change.pop("sizes", {})
    file.write_text(json.dumps({**fields, **change}))
    for use in (lambda: load_exported(exported), lambda: OPTModel.from_pretrained(exported)):
        with pytest.raises(UserError, match=message) as error:
            use()
        one_line(error, exported)


def test_weights_elsewhere_or_of_another_model_are_refused(exported: Path, tmp_path: Path) -> None:
    from opt_ds.serving.exported import load_exported

    (exported / "opt_ds_files.json").unlink()
    weights = exported / "model.safetensors"
    index = exported / "model.safetensors.index.json"
    tensors = load_file(weights)
    weights.rename(tmp_path / "stolen.safetensors")
    for name in ("../stolen.safetensors", "/etc/passwd", "..", "a.bin", 3):
        index.write_text(json.dumps({"weight_map": {key: name for key in tensors}}))
        with pytest.raises(UserError, match="which is not a safetensors file in the folder") as error:
            load_exported(exported)
        one_line(error, exported)
    half = sorted(tensors)[::2]
    parts = {"a.safetensors": half, "b.safetensors": [name for name in sorted(tensors) if name not in half]}
    for part, names in parts.items():
        save_file({name: tensors[name] for name in names}, exported / part)
    index.write_text(json.dumps({"weight_map": {name: part for part, names in parts.items() for name in names}}))
    load_exported(exported)
    first = next(name for name in half if name.endswith("weight"))
    save_file({name: tensors[name] for name in half if name != first}, exported / "a.safetensors")
    with pytest.raises(UserError, match="no weights of"):
        load_exported(exported)
    weights.symlink_to(tmp_path / "stolen.safetensors")
    with pytest.raises(UserError, match="leads out of"):
        load_exported(exported)


def test_the_hash_is_computed_once_per_change(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(checkpoint_files, "file_sha256", lambda path: read.append(path.name) or file_sha256(path))
    for _ in range(3):
        checkpoint.load_model(run / "checkpoints" / "step-00000004")
    assert sorted(read) == ["model.safetensors", "state.json"]
