"""The generated reference of the configuration: complete, described, and equal to the committed page."""

import re
from pathlib import Path

import pytest

import opt_ds
from opt_ds.config.section import Section, dump_section, load_section
from opt_ds.errors import UserError
from opt_ds.tools.config_reference import PARTS, Part, nested_section, page, tables

ROOT = Path(opt_ds.__file__).parents[1]
TABLES = [table for part in PARTS for table in tables(part.section)]


def test_the_committed_page_is_the_generated_one() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == page(), "run make docs"


def test_every_field_of_every_section_has_a_description() -> None:
    undescribed = [key.path for table in TABLES for key in table.keys if not (key.field.description or "").endswith(".")]
    assert not undescribed


def test_every_section_of_the_package_is_in_the_reference() -> None:
    found = {
        name
        for file in (ROOT / "opt_ds").rglob("*.py")
        for name in re.findall(r"^class (\w+)\(Section\):", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    listed = {base.__name__ for part in PARTS for kind in _kinds(part.section) for base in kind.__mro__}
    assert len(found) > 15 and found <= listed


def _kinds(section: type[Section]) -> set[type[Section]]:
    inner = {kind for field in section.model_fields.values() if (kind := nested_section(field))}
    return {section}.union(*(_kinds(kind) for kind in inner))


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.title)
def test_every_part_loads_from_a_file_and_settings_and_survives_its_dump(part: Part, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(dump_section(part.section()))
    assert load_section(part.section, str(file)) == part.section() == load_section(part.section, None)
    key = next(iter(part.section.model_fields))
    with pytest.raises(UserError, match=rf'unknown key "{key}x" \(did you mean "{key}"\?\)'):
        load_section(part.section, str(file), [f"{key}x=1"])


def test_a_setting_overrides_the_file(tmp_path: Path) -> None:
    serving = next(part.section for part in PARTS if part.title == "Serving")
    file = tmp_path / "mine.yaml"
    file.write_text("images: 2\nplaces: 3\n")
    limits = load_section(serving, str(file), ["places=5", "body_s=1.5"])
    assert limits == serving(images=2, places=5, body_s=1.5)
