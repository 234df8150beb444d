"""Text, YAML and JSON that a user wrote: one line for what is wrong, with its place. A repeated key is an error."""

import codecs
import json
import re
from pathlib import Path
from typing import Any

import yaml

from opt_ds.errors import UserError

_MOST_VALUES = 100_000  # with every anchor written out; the largest configuration has some hundred

_KINDS = {
    ("int_parsing", "int_type", "int_from_float", "int_parsing_size"): "a whole number is expected",
    ("float_parsing", "float_type"): "a number is expected",
    ("bool_parsing", "bool_type"): "true or false is expected",
    ("string_type",): "text is expected",
    ("tuple_type", "list_type"): "a list is expected, such as [a, b]",
    ("dict_type", "model_type", "model_attributes_type"): "a section of `key: value` is expected",
}
_YAML_PROBLEMS = (  # PyYAML's message, and its replacement; the first match is used
    (r"'\\t'", "a tab indents it: use spaces"),
    (r"expected ',' or|node content.*stream end", "a list or section in brackets is not closed, or a comma is missing"),
    (r"mapping (values|keys) are not allowed", "an unexpected colon or ?: put a text that has one in quotes"),
    (r"could not find expected ':'", "a key without its colon"),
    (r"unexpected end of stream", "a quote is not closed"),
    (r"cannot start any token", "a text that begins with this character needs quotes"),
    (r"undefined alias", "an alias (*name) whose anchor (&name) is not there"),
    (r"second occurrence", "an anchor (&name) that occurs twice"),
    (r"constructor for the tag|tag handle|URI|expected a .* node|for merging", "a tag (!name), or a value that does not fit it"),
    (r"<block end>|block sequence entries|indentation indicators", "its indentation does not fit the lines above"),
    (r"another document|<document start>|directive", "a second document, or a line that begins with %: give one document"),
    (r"escape", "an unknown escape (\\) in double quotes: use single quotes"),
    (r"unhashable", "a list or a section cannot be a key"),
    (r"node content|alphabetic or numeric", "a value is missing"),
)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file; None for an empty one.

    Raises UserError for a file that is not there, is no UTF-8 text, is no YAML, repeats a key, or unfolds by its anchors into
    more than any configuration holds.
    """
    return parse_yaml(_read_text(path), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """As `read_yaml`, of a text; `where` begins the messages."""
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count_values(node, where, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{where}{place}: not readable as YAML ({_problem(error)})") from None
    except yaml.reader.ReaderError as error:
        character = error.character if isinstance(error.character, str) else chr(error.character)
        line, column = text[: error.position].count("\n") + 1, error.position - text[: error.position].rfind("\n")
        raise UserError(
            f"{where} line {line}, column {column}: not readable as YAML (the character U+{ord(character):04X} is not allowed)"
        ) from None
    except RecursionError:
        raise UserError(f"{where}: not readable as YAML (nested too deeply)") from None
    except UserError:
        raise
    except ValueError:
        raise UserError(f"{where}: not readable as YAML (an impossible date or number)") from None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises UserError as `read_yaml` does."""
    text = _read_text(path)
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}, column {error.colno}: not readable as JSON") from None
    except RecursionError:
        raise UserError(f"{path}: not readable as JSON (nested too deeply)") from None
    except UserError:
        raise
    except ValueError:
        raise UserError(f"{path}: not readable as JSON (a number has too many digits)") from None


def decode_text(content: bytes) -> str:
    """Return the text that these bytes are: UTF-16 with its byte order mark, otherwise UTF-8 with or without one.

    Raises UnicodeDecodeError for another encoding.
    """
    return content.decode("utf-16" if is_utf16(content) else "utf-8-sig")


def is_utf16(head: bytes) -> bool:
    """Whether a text begins with UTF-16's byte order mark; UTF-32's is another one."""
    return head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and not head.startswith(codecs.BOM_UTF32_LE)


def expected_kind(mistake: str) -> str | None:
    """Return what a value should be, for the type of a pydantic mistake; None where pydantic's own message says it well."""
    return next((kind for names, kind in _KINDS.items() if mistake in names), None)


def _read_text(path: Path) -> str:
    try:
        return decode_text(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder: name a file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _count_values(node: yaml.Node, where: str, counts: dict[int, int]) -> int:
    """Return how many values a node holds, with anchors written out; refuse repeated keys on the way.

    `counts`: of the nodes that were counted; 0 for those that are being counted, which must not hold themselves.
    """
    if id(node) in counts:
        if not counts[id(node)]:
            raise UserError(f"{where} line {node.start_mark.line + 1}: an anchor contains itself: write the value out")
        return counts[id(node)]
    counts[id(node)] = 0
    total = 1
    if isinstance(node, yaml.MappingNode):
        _refuse_repeated(node, where)
        total += sum(_count_values(key, where, counts) + _count_values(value, where, counts) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count_values(item, where, counts) for item in node.value)
    if total > _MOST_VALUES:
        line = node.start_mark.line + 1
        raise UserError(f"{where} line {line}: more than {_MOST_VALUES:,} values, with its anchors written out: shorten it")
    counts[id(node)] = total
    return total


def _refuse_repeated(node: yaml.MappingNode, where: str) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name, line = (key.tag, key.value), key.start_mark.line + 1
        if name in lines:
            places = f"line {line}" if lines[name] == line else f"lines {lines[name]} and {line}"
            raise UserError(f'{where}: key "{key.value}" occurs twice ({places}): remove one')
        lines[name] = line


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise UserError(f'{path}: key "{key}" occurs twice: remove one')
        found[key] = value
    return found


def _problem(error: yaml.MarkedYAMLError) -> str:
    """Return what is wrong, in our words."""
    text = " ".join(str(error.problem or error.context).split())
    return next((words for pattern, words in _YAML_PROBLEMS if re.search(pattern, text)), "unexpected content")
