"""Plain lists: BLIP's JSON, Common Voice's TSV, Kaldi's wav.scp and text; and gzipped text forms of all importers."""

import gzip
import json
from pathlib import Path

import pytest

from opt_ds.errors import UserError
from opt_ds.ingest.importers.blip import import_blip
from opt_ds.ingest.importers.common import report_path
from opt_ds.ingest.importers.common_voice import import_common_voice
from opt_ds.ingest.importers.kaldi import import_kaldi
from opt_ds.ingest.importers.spoken_captions import import_spoken_captions
from opt_ds.ingest.importers.table import import_table
from tests.ingest.importers.manifests import left_out, lines_of, touch


def unused_of(manifest: Path) -> dict[str, list[str]]:
    return {each["what"]: each["names"] for each in json.loads(report_path(manifest).read_text())["unused"]}


def test_blip_lists_of_one_or_several_captions(tmp_path: Path) -> None:
    touch(*(tmp_path / "coco" / name for name in ("val2014/COCO_val2014_000000522418.jpg", "1.jpg", "sbu/gone.jpg")))
    train = [
        {"caption": "A woman wearing a net", "image": "val2014/COCO_val2014_000000522418.jpg", "image_id": "coco_522418"},
        {"caption": "by its name", "image": "/export/share/vg/1.jpg"},
        {"caption": "gone", "image": "gone.jpg"},
        {"image": "1.jpg"},
        {"image": "1.jpg", "caption": {"en": "x"}},
        "odd",
    ]
    test = [{"image": "1.jpg", "caption": ["One.", "Two.", " "]}]
    (tmp_path / "coco_karpathy_train.json").write_text(json.dumps(train))
    (tmp_path / "coco_karpathy_test.json.gz").write_bytes(gzip.compress(json.dumps(test).encode()))
    manifest = tmp_path / "manifest.jsonl"
    files = [str(tmp_path / name) for name in ("coco_karpathy_train.json", "coco_karpathy_test.json.gz")]
    import_blip(files, manifest, images=tmp_path / "coco")
    samples = lines_of(manifest)
    assert {id: (line.split, line.text) for id, line in samples.items()} == {
        "coco_karpathy_train/entry 0": ("train", "A woman wearing a net"),
        "coco_karpathy_train/entry 1": ("train", "by its name"),
        "coco_karpathy_test/entry 0#0": ("test", "One."),
        "coco_karpathy_test/entry 0#1": ("test", "Two."),
    }
    assert samples["coco_karpathy_test/entry 0#0"].group == samples["coco_karpathy_test/entry 0#1"].group
    reasons = left_out(manifest)
    assert reasons["coco_karpathy_train/entry 2"] == "image file is missing: gone.jpg"
    assert reasons["coco_karpathy_train/entry 3"].endswith("no 'caption'")
    assert reasons["coco_karpathy_train/entry 4"].endswith("caption is neither a text nor a list of texts")
    assert reasons["coco_karpathy_test/entry 0#2"] == "the text is empty" and len(reasons) == 5
    assert unused_of(manifest) == {"fields": ["image_id"], "files": ["sbu/gone.jpg"]}, "a file of another folder is another image"
    (tmp_path / "x.json").write_text('{"image": "1.jpg"}')
    with pytest.raises(UserError, match="not a JSON array"):
        import_blip([str(tmp_path / "x.json")], manifest, images=tmp_path / "coco")


COMMON_VOICE = ("client_id", "path", "sentence_id", "sentence", "sentence_domain", "up_votes", "down_votes", "age", "gender",
                "accents", "variant", "locale", "segment")  # fmt: skip


def common_voice_row(path: str, sentence: str) -> str:
    return "\t".join(("0a1b", path, "c2", sentence, "", "2", "0", "twenties", "", "", "", "en", ""))


def test_common_voice(tmp_path: Path) -> None:
    touch(tmp_path / "clips" / "common_voice_en_1.mp3", tmp_path / "clips" / "common_voice_en_2.mp3")
    rows = [common_voice_row("common_voice_en_1.mp3", 'He said "yes".'), common_voice_row("common_voice_en_9.mp3", "gone"),
            "cut\toff", common_voice_row("common_voice_en_2.mp3", "")]  # fmt: skip
    (tmp_path / "train.tsv").write_text("\n".join(["\t".join(COMMON_VOICE), *rows]) + "\n")
    (tmp_path / "dev.tsv").write_text("\n".join(["\t".join(COMMON_VOICE), common_voice_row("common_voice_en_2", "Old form.")]))
    manifest = tmp_path / "manifest.jsonl"
    import_common_voice([str(tmp_path / "train.tsv"), str(tmp_path / "dev.tsv")], manifest, audio=tmp_path / "clips")
    assert {id: (line.split, line.text, line.audio) for id, line in lines_of(manifest).items()} == {
        "common_voice_en_1.mp3": ("train", 'He said "yes".', "clips/common_voice_en_1.mp3"),
        "common_voice_en_2": ("valid", "Old form.", "clips/common_voice_en_2.mp3"),
    }
    assert left_out(manifest) == {
        "common_voice_en_9.mp3": "audio file is missing: common_voice_en_9.mp3",
        "train.tsv row 2": "not a row of the table: line 4: 2 cells where the header has 13",
        "common_voice_en_2.mp3": "the text is empty",
    }
    assert len(unused_of(manifest)["columns"]) == 11
    (tmp_path / "x.tsv").write_text("path\ttext\na.mp3\tx\n")
    with pytest.raises(UserError, match="no column sentence: give a TSV file of Common Voice"):
        import_common_voice([str(tmp_path / "x.tsv")], manifest, audio=tmp_path / "clips")


def test_kaldi_folders_of_plain_files(tmp_path: Path) -> None:
    train, test = tmp_path / "data" / "train", tmp_path / "data" / "test"
    touch(tmp_path / "wavs" / "a.wav", tmp_path / "wavs" / "b c.flac", test / "d.wav")
    scp = f"utt-a {tmp_path}/wavs/a.wav\nutt-b\twavs/b c.flac\nutt-gone wavs/gone.wav\nutt-silent wavs/a.wav\nutt-none\n"
    (train / "wav.scp").parent.mkdir(parents=True)
    (train / "wav.scp").write_text(scp)
    (train / "text").write_text("utt-a HELLO  WORLD\nutt-b bye\nutt-gone gone\nutt-left over\nutt-none x\n\n")
    (test / "wav.scp.gz").write_bytes(gzip.compress(b"utt-d d.wav\n"))
    (test / "text.gz").write_bytes(gzip.compress("utt-d ünïcode\n".encode()))
    manifest = tmp_path / "manifest.jsonl"
    import_kaldi([f"train={train}"], manifest, audio=tmp_path)
    assert {id: (line.split, line.text, line.audio) for id, line in lines_of(manifest).items()} == {
        "utt-a": ("train", "HELLO  WORLD", "wavs/a.wav"), "utt-b": ("train", "bye", "wavs/b c.flac"),
    }  # fmt: skip
    assert left_out(manifest) == {
        "utt-gone": "audio file is missing: wavs/gone.wav",
        "utt-silent": "it has no text",
        "utt-none": "not an utterance and a file: wav.scp line 5",
    }
    assert unused_of(manifest)["texts"] == ["utt-left"]
    (tmp_path / "data" / "dev").mkdir()
    (tmp_path / "data" / "dev" / "wav.scp").write_text("utt-e wavs/b c.flac\n")
    import_kaldi([f"train={train}", f"valid={tmp_path}/data/dev"], manifest, audio=tmp_path)
    assert unused_of(manifest)["files"] == ["data/test/d.wav"], "a file of one folder's list is not unused in another's"
    assert lines_of(manifest)["utt-e"].text is None
    import_kaldi([str(test)], manifest)
    assert [line.text for line in lines_of(manifest).values()] == ["ünïcode"]
    for line, message in (
        ("utt-a sph2pipe -f wav a.sph |", "wav.scp line 1: a command, not a file: nothing is executed here"),
        ("utt-a touch /tmp/x; cat a.wav |", "a command, not a file"),
        ("utt-a -", "a command, not a file"),
        ("utt-a data/raw.ark:1234", "a place in an archive, not a file"),
    ):
        (train / "wav.scp").write_text(f"{line}\n")
        with pytest.raises(UserError, match=message) as error:
            import_kaldi([str(train)], manifest)
        assert "\n" not in str(error.value)
    (train / "segments").write_text("utt-a rec-a 0.0 1.5\n")
    with pytest.raises(UserError, match=r"parts of audio files .segments."):
        import_kaldi([str(train)], manifest)
    with pytest.raises(UserError, match=r"no wav.scp is there"):
        import_kaldi([str(tmp_path / "wavs")], manifest)


def test_gzipped_texts_are_read_like_plain_ones(tmp_path: Path) -> None:
    touch(tmp_path / "a.jpg", tmp_path / "a.wav")
    manifest = tmp_path / "manifest.jsonl"
    entry = {"uttid": "u", "speaker": "s", "text": "spoken", "wav": "a.wav"}
    content = json.dumps({"data": [{"image": "a.jpg", "captions": [entry]}]}).encode()
    (tmp_path / "SpokenCOCO_val.json.gz").write_bytes(gzip.compress(content))
    import_spoken_captions([str(tmp_path / "SpokenCOCO_val.json.gz")], manifest, images=tmp_path, audio=tmp_path)
    assert [(line.text, line.split) for line in lines_of(manifest).values()] == [("spoken", "valid")]
    (tmp_path / "t.tsv.gz").write_bytes(gzip.compress(b"image\ttext\na.jpg\ta table\n"))
    import_table(tmp_path / "t.tsv.gz", manifest)
    assert [line.text for line in lines_of(manifest).values()] == ["a table"]
    (tmp_path / "SpokenCOCO_val.json.gz").write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(UserError, match="the gzip file is truncated or damaged"):
        import_spoken_captions([str(tmp_path / "SpokenCOCO_val.json.gz")], manifest, images=tmp_path, audio=tmp_path)
