"""Bad input of every kind at once: a line with id and reason each, the rest kept, and the same bytes however it ran."""

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_ds.errors import UserError
from opt_ds.features.grid import GridExtractor
from opt_ds.ingest import PrepareSettings, prepare
from opt_ds.ingest.file_features import Failure, extract
from opt_ds.ingest.manifest import read_manifest
from opt_ds.ingest.report import REPORT_FILE
from opt_ds.store import FeatureStore, inspect_store
from opt_ds.store.lengths import LENGTHS_FILE
from tests.decoded import audio_of, image_of
from tests.decoding.wild_files import WILD, noise
from tests.ingest.test_pipeline import contents
from tests.logs import logged_lines

SETTINGS = PrepareSettings(samples_per_shard=20, vocab_size=300, max_tokens=50)
TEXTS = {
    "t/long": ("long word " * 10_000, None),
    "t/rtl": ("مرحبا \u202eשלום\u202c", None),
    "t/emoji": ("a 👩‍🚀 flies", None),
    "t/control": ("bell\x07 and\x00 nul\x1b[2J", None),
    "../../t": ("an id is not a path", None),
    "t/again": ("an id is not a path", None),
    "t/empty": ("", "the text has no tokens"),
    "t/blank": (" \u200b\n\x01", "the text has no tokens"),
}
# A line of the manifest -> the id it is reported under, and why.
BAD_LINES = {
    b"not json": ("line {}", "not JSON"),
    b'{"id": "latin", "text": "caf\xe9"}': ("line {}", "not UTF-8"),
    b"[" * 100_000: ("line {}", "not JSON"),
    b'["a list"]': ("line {}", "not a JSON object"),
    b'{"text": "no id"}': ("line {}", "field id: it is missing"),
    b'{"id": "", "text": "x"}': ("line {}", "field id: it is empty"),
    b'{"id": 7.5, "text": "x"}': ("line {}", "field id"),
    b'{"id": "plain.jpg", "text": "x"}': ("plain.jpg", "is also on line 1"),
    b'{"id": "surrogate", "text": "\\ud800"}': ("surrogate", "surrogate pair"),
    b'{"id": "\\udfff", "text": "x"}': ("line {}", "surrogate pair"),
    b'{"id": "typo", "txet": "x"}': ("typo", 'did you mean "text"'),
    b'{"id": "nothing"}': ("nothing", "none of image, text, audio"),
    b'{"id": "out-1", "image": "../secret.png"}': ("out-1", "is outside the manifest's folder"),
    b'{"id": "out-2", "image": "/etc/hostname"}': ("out-2", "is outside the manifest's folder"),
    b'{"id": "out-3", "audio": "sub/../../x.wav"}': ("out-3", "is outside the manifest's folder"),
    b'{"id": "long-name", "image": "' + b"n" * 5000 + b'.png"}': ("long-name", "image file is"),
    b'{"id": "nul", "image": "a\\u0000b.png"}': ("nul", "image file is"),
}  # fmt: skip


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The manifest, and id -> what the reason must contain, for all that must be skipped."""
    folder = tmp_path_factory.mktemp("wild")
    lines, expected = [], {}
    for file in WILD:
        file.write(folder / file.name)
        lines.append(json.dumps({"id": file.name, file.kind: file.name, "text": "words", "group": file.name}).encode())
        if file.reason is not None:
            expected[file.name] = file.reason
    for name, (text, reason) in TEXTS.items():
        lines.append(json.dumps({"id": name, "text": text}).encode())
        if reason is not None:
            expected[name] = reason
    for line, (name, reason) in BAD_LINES.items():
        lines.append(line)
        expected[name.format(len(lines))] = reason
    (folder / "manifest.jsonl").write_bytes(b"\n".join(lines))
    return folder / "manifest.jsonl", expected


@pytest.fixture(scope="module")
def prepared(wild: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    output = tmp_path_factory.mktemp("wild-store") / "store"
    with logged_lines() as logged:
        prepare(wild[0], output, SETTINGS, workers=2, device="cpu")
    return output, logged


def test_each_fault_is_reported_with_its_reason_and_the_rest_is_kept(
    wild: tuple[Path, dict[str, str]], prepared: tuple[Path, list[str]]
) -> None:
    report = json.loads((prepared[0] / REPORT_FILE).read_text())
    reasons = {entry["id"]: entry["reason"] for entry in report["skipped_samples"]}
    assert sorted(reasons) == sorted(wild[1])
    assert {name: reason for name, reason in reasons.items() if wild[1][name] not in reason} == {}
    assert not any(str(wild[0].parent) in reason for reason in reasons.values()), "reports do not tell where files lie"
    store = FeatureStore(prepared[0])
    good = ({file.name for file in WILD} | set(TEXTS)) - set(wild[1]) | {"plain.jpg"}  # a later line repeats its id
    assert {store.sample_id(number) for number in range(store.num_samples)} == good
    assert report["kept"] == store.num_samples
    assert report["skipped"] == len(reasons) == sum(report["reasons"].values())
    assert inspect_store(prepared[0]).failures == []


def test_the_report_counts_what_was_cut_and_what_is_double(prepared: tuple[Path, list[str]]) -> None:
    report = json.loads((prepared[0] / REPORT_FILE).read_text())
    assert report["truncated"] == {"text": ["t/long"], "audio": []}
    assert ["../../t", "t/again"] in report["duplicates"]["text"]["largest"]
    assert report["lengths"]["text"]["max"] == 50
    assert sum(report["lengths"]["image"]["histogram"]["counts"]) == report["lengths"]["image"]["rows"] > 10
    assert (prepared[0] / LENGTHS_FILE).read_bytes().startswith(b"\x89PNG")
    table = "\n".join(prepared[1])
    assert "text truncated at 50 tokens" in table
    assert "not a sample" in table


def test_one_worker_writes_the_same_bytes(
    wild: tuple[Path, dict[str, str]], prepared: tuple[Path, list[str]], tmp_path: Path
) -> None:
    prepare(wild[0], tmp_path / "store", SETTINGS, workers=1, device="cpu")
    ours, theirs = contents(tmp_path / "store"), contents(prepared[0])
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_strict_stops_at_the_first_bad_line(wild: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line \d+: not JSON.*--strict"):
        prepare(wild[0], tmp_path / "store", SETTINGS, strict=True, device="cpu")
    assert not any(tmp_path.iterdir())


def test_files_outside_are_taken_when_allowed(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    manifest = tmp_path / "m" / "manifest.jsonl"
    manifest.write_text('{"id": "a", "image": "../a.png"}\n{"id": "b", "image": "x/../b.png"}')
    assert [line.id for line in read_manifest(manifest).lines] == ["b"]
    assert [line.id for line in read_manifest(manifest, allow_outside=True).lines] == ["a", "b"]


def test_a_hole_in_a_batch_leaves_its_neighbours_bytes_alone() -> None:
    extractor, images = GridExtractor(), [noise(), noise(), noise()]
    whole, holed = extractor.extract(images), extractor.extract([images[0], None, images[2]])
    assert holed[1] is None
    for index in (0, 2):
        for ours, theirs in zip(holed[index], whole[index], strict=True):
            assert ours.tobytes() == theirs.tobytes()


def test_an_image_on_which_the_extractor_fails_changes_no_other_image() -> None:
    images, extractor = [noise(), noise(), noise()], GridExtractor()
    places = []

    class Failing(GridExtractor):
        def extract(self, inputs: list) -> list:
            places.append([place for place, image in enumerate(inputs) if image is not None])
            if inputs[1] is not None:
                raise RuntimeError("no memory for this one")
            return extractor.extract(inputs)

    found = extract(Failing(), images)
    assert isinstance(found[1], Failure) and "no memory for this one" in found[1].reason
    assert places == [[0, 1, 2], [0], [1], [2]], "each file at its own position of the chunk"
    expected = extractor.extract([images[0], None, images[2]])
    for index in (0, 2):
        assert all(ours.tobytes() == theirs.tobytes() for ours, theirs in zip(found[index], expected[index], strict=True))


@functools.cache
def whole_file(name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        next(file for file in WILD if file.name == name).write(path)
        return path.read_bytes()


@pytest.mark.parametrize("name", ["plain.jpg", "palette.png", "animated.webp", "low.wav", "music.ogg", "alaw.wav"])
@settings(deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_an_error_or_readable_never_a_crash(name: str, data: st.DataObject, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    whole = bytearray(whole_file(name))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, min(len(whole), 200) - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        loaded = np.asarray((audio_of if name.endswith(("wav", "ogg")) else image_of)(folder / name))
    except (OSError, ValueError, SyntaxError, RuntimeError, EOFError):
        return
    assert np.isfinite(loaded).all()
