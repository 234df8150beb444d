"""YAML and JSON of users: whatever is wrong with a file is one line that names it and the place."""

import time
from pathlib import Path

import pytest

from opt_ds.config import load_config
from opt_ds.config.dvae import load_dvae_config
from opt_ds.errors import UserError
from opt_ds.user_files import read_json, read_yaml

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("model: {hidden_size: 64}\nseed: 1\nmodel: {num_heads: 2}\n", 'key "model" occurs twice (lines 1 and 3)'),
        ("model:\n  num_heads: 2\n  num_heads: 4\n", 'key "num_heads" occurs twice (lines 2 and 3)'),
        ("model: {num_heads: 2, num_heads: 4}\n", 'key "num_heads" occurs twice (line 1)'),
        ("model:\n\tnum_heads: 2\n", "line 2, column 1: not readable as YAML (a tab indents it: use spaces)"),
        ("- model\n", "expected a mapping of config keys, found a list"),
        ("a: [\n", "line 2, column 1: not readable as YAML (a list or section in brackets is not closed, or a comma is missing)"),
        ("a: {b: 1\nc: 2}\n", "a list or section in brackets is not closed, or a comma is missing"),
        ("a: b: c\n", "line 1, column 5: not readable as YAML (an unexpected colon or ?"),
        ("a: 'b\n", "not readable as YAML (a quote is not closed)"),
        ("a: @b\n", "line 1, column 4: not readable as YAML (a text that begins with this character needs quotes)"),
        ("a: *b\n", "an alias (*name) whose anchor (&name) is not there"),
        ("a: !b c\n", "a tag (!name)"),
        ("a: 1\n  b: 2\n c: 3\n", "not readable as YAML ("),
        ("a: 1\n---\nb: 2\n", "a second document"),
        ("a: 1\nb: \x07\n", "line 2, column 4: not readable as YAML (the character U+0007 is not allowed)"),
        ('a: "\\q"\n', "an unknown escape"),
        ("? [a]\n: b\n", "a list or a section cannot be a key"),
        ("model: &m\n  x: *m\n", "an anchor contains itself"),
        (LAUGHS, "more than 100,000 values"),
        ("a: " + "[" * 1500 + "]" * 1500, "nested too deeply"),
        (b"seed: \xff\n", "not UTF-8 text (byte 6)"),
        ("seed: 2024-13-45\n", "not readable as YAML (an impossible date or number)"),
        ("seed: one\n", "seed: a whole number is expected (found 'one')"),
        ("train: {recompute: 7}\n", "train.recompute: true or false is expected"),
        ("data: {stores: mine}\n", "data.stores: a list is expected, such as [a, b]"),
        ("model: 7\n", "model: a section of `key: value` is expected"),
    ],
)
def test_a_configuration_file(content: str | bytes, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        load_config(str(file))
    assert expected in str(error.value) and "mine.yaml" in str(error.value) and "\n" not in str(error.value)
    assert time.monotonic() - began < 30, "anchors are not written out to be counted"


def test_anchors_and_merge_keys_within_reason_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\n")
    assert read_yaml(file)["b"] == {"x": 1, "y": 3}


def test_other_files(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text('{"fp16": {}, "fp16": {"enabled": true}}')
    with pytest.raises(UserError, match='key "fp16" occurs twice'):
        read_json(file)
    file.write_text("steps: 3\nsteps: 4\n")
    with pytest.raises(UserError, match=r'key "steps" occurs twice \(lines 1 and 2\)'):
        load_dvae_config("dvae-tiny", file)
    for reader in (read_json, read_yaml):
        with pytest.raises(UserError, match="is a folder"):
            reader(tmp_path)
        with pytest.raises(UserError, match="no such file"):
            reader(tmp_path / "none")
