"""Read settings from YAML files, from `--set key=value` and from flags.

A *layer* is a nested dict of the settings from one source. Layers are merged, and the later layer wins: default <
checkpoint < YAML < `--set` < flag. Every layer is checked the same way.
"""

from __future__ import annotations

import difflib
import functools
import reprlib
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from atlas.config.config import AtlasConfig
from atlas.config.fields import Section
from atlas.config.renamed import OLD_SECTIONS, hint
from atlas.errors import ConfigError, first_line
from atlas.files import read_limited

Layer = dict[str, Any]

# Messages show values only in brief: the full text of a malicious file's values could fill the memory.
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 2, 120, 120

LARGEST_FILE = 1 << 18
_MOST_ALIASES = 64
_DEEPEST = 20
_MOST_SHOWN = 40

# Exceptions that PyYAML raises for impossible dates, `!!int x`, `!!bool x`, `!!map [x]` and endless nesting.
_YAML_ESCAPES = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)

# Keys in the section in which the FAQ shows them → the settings that these keys set.
ALSO_ACCEPTED = {"training.keep_checkpoints": "checkpoint.keep_checkpoints"}


def _refusal(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


class _StrictLoader(yaml.SafeLoader):
    """A YAML loader that rejects duplicate keys and aliases inside anchors. If a key is duplicated, PyYAML silently
    uses the last value. Ten lines of aliases of aliases can expand to more values than any memory holds, because the
    merge key `<<` copies values."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._aliases = self._anchors_open = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            self._aliases += 1
            if self._anchors_open or self._aliases > _MOST_ALIASES:
                problem = f"aliases within anchors, or over {_MOST_ALIASES} aliases, are not read; write the values out"
                raise _refusal(problem, event)
            return super().compose_node(parent, index)
        if self._depth == _DEEPEST:  # PyYAML's time grows with the square of the depth
            raise _refusal(f"nested deeper than {_DEEPEST} levels", event)
        anchored = getattr(event, "anchor", None) is not None
        self._anchors_open += anchored
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._anchors_open -= anchored
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number = int(super().construct_yaml_int(node))
        if abs(number) >= 2**64:  # Python cannot print a number of 5,000 digits
            raise _refusal("a whole number beyond 2^64 is not a valid value", node)
        return number

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise _refusal("a key must be a name", key_node)
            if key in seen:
                raise _refusal(f"key {key!r:.80} is given twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)


def _decode_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)  # a SafeLoader: builds plain values only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(f"{origin}{place}: {problem!s:.200}") from None
    except _YAML_ESCAPES as error:
        reason = (
            error if isinstance(error, ValueError) else "a value that its tag does not allow, or deep nesting"
        )
        raise ConfigError(f"{origin}: not valid YAML: {reason!s:.200}") from None


def read_yaml(path: str | Path) -> Layer:
    """Return the settings in a config file. Raises `ConfigError` if the file is missing or malformed, or has unknown
    settings."""
    return check_keys(read_sections(path), str(path))


def read_sections(path: str | Path) -> dict[Any, Any]:
    """Return the content of a config file from any version of Atlas, without checking the keys. Raises `ConfigError` if
    the file is missing or malformed."""
    path = Path(path)
    try:
        text = read_limited(path, limit=LARGEST_FILE).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; the presets are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read as a config file: {reason}; give a YAML file") from None
    values = _decode_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: must contain sections such as `model:`; its content is of type {type(values).__name__}"
        )
    return values


def parse_overrides(assignments: Iterable[str]) -> Layer:
    """Return the layer of `--set` assignments such as `training.learning_rate=1e-4`. Raises `ConfigError` for an
    invalid assignment."""
    layer: Layer = {}
    for assignment in assignments:
        dotted, separator, text = assignment.partition("=")
        if not separator or not dotted.strip():
            raise ConfigError(f"--set {assignment}: write it as section.key=value")
        layer = overlay(layer, nested(dotted.strip(), _decode_yaml(text, f"--set {dotted}")))
    return check_keys(layer, "--set")


def nested(dotted: str, value: Any) -> Layer:
    """Return a dotted key and its value as a layer: `nested("a.b", 1)` is `{"a": {"b": 1}}`."""
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> Layer:
    """Return a layer with the keys of both layers; the values of `above` win."""
    result = dict(below)
    for key, value in above.items():
        mine = result.get(key)
        result[key] = overlay(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return result


def resolve(*layers: Mapping[str, Any]) -> AtlasConfig:
    """Merge the layers, lowest precedence first, into a config. Raises `ConfigError` for invalid values."""
    try:
        return AtlasConfig.model_validate(functools.reduce(overlay, layers, Layer()))
    except ValidationError as error:
        raise ConfigError("; ".join(_problem(detail) for detail in error.errors())) from None


def _problem(detail: Any) -> str:
    """Return one of pydantic's errors as a message such as `training.batch_size: -5: must be greater than or equal to
    1`."""
    place = ".".join(str(part) for part in detail["loc"] if part in _KNOWN_PARTS) or "config"
    if detail["type"] == "extra_forbidden":
        return f"unknown setting {place}.{detail['loc'][-1]!s:.60}: docs/CONFIG.md lists every setting"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error" and isinstance(detail["input"], Mapping):
        return f"{place}: {message}"  # a rule over several fields names the values in its message
    message = message.replace("Input should be", "must be")
    return f"{place}: {_BRIEF.repr(detail['input'])}: {message}"


def fields(section: type[Section] = AtlasConfig, prefix: str = "") -> dict[str, Any]:
    """Return dotted key → pydantic's field, for every setting."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found |= fields(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


_FIELDS = fields()
_SECTIONS = {key.split(".")[0] for key in _FIELDS if "." in key}
_KNOWN_PARTS = {part for key in _FIELDS for part in key.split(".")}


def describe(dotted: str) -> str:
    """Return the description of one setting, for `--help`."""
    return " ".join(str(_FIELDS[dotted].description).split())


def check_keys(values: Mapping[Any, Any], origin: str) -> Layer:
    """Return `values` as a layer. Raises `ConfigError` for unknown settings. The message names each unknown setting and
    the setting that was probably meant."""
    layer: Layer = {}
    unknown: list[str] = []
    wrong: list[str] = []
    for name, value in values.items():
        if name in _SECTIONS and value is None:
            continue  # a section in which every line is a comment
        if name in _SECTIONS and not isinstance(value, Mapping):
            wrong.append(f"{name}: is a section with keys of its own, not {_BRIEF.repr(value)}")
        elif name in _SECTIONS or (name in OLD_SECTIONS and isinstance(value, Mapping) and value):
            for key, entry in value.items():
                home = ALSO_ACCEPTED.get(f"{name}.{key}", f"{name}.{key}")
                section, _, leaf = home.partition(".")
                known = layer.setdefault(section, {})
                if home not in _FIELDS:
                    unknown.append(home)
                elif leaf in known and known[leaf] != entry:
                    wrong.append(
                        f"{leaf} is given twice, as {_BRIEF.repr(known[leaf])} and {_BRIEF.repr(entry)}"
                    )
                else:
                    known[leaf] = entry
        elif name in _FIELDS and "." not in name:
            layer[name] = value
        else:
            unknown.append(str(name))
    if unknown or wrong:
        problems = [*wrong, *map(_unknown, unknown[:_MOST_SHOWN])]
        if len(unknown) > _MOST_SHOWN:
            problems.append(f"and {len(unknown) - _MOST_SHOWN:,} more unknown settings")
        raise ConfigError(f"{origin}: {'; '.join(problems)}")
    return layer


def _unknown(dotted: str) -> str:
    """Return a message such as `unknown setting training.lr: it is training.learning_rate here`."""
    dotted = f"{dotted:.120}"
    leaf = dotted.rsplit(".", 1)[-1]
    if moved := hint(dotted):
        return f"unknown setting {dotted}: {moved}"
    if dotted in _FIELDS:
        return f"{dotted}: write it as {leaf} in the section {dotted.split('.')[0]}"
    homes = {key.rsplit(".", 1)[-1]: key for key in _FIELDS}
    if leaf in homes:
        return f"{dotted} is not a setting here; write it as {homes[leaf]}"
    names = _FIELDS if "." in dotted else [*_SECTIONS, *(key for key in _FIELDS if "." not in key)]
    close = difflib.get_close_matches(dotted, names, n=1)
    close = close or [homes[name] for name in difflib.get_close_matches(leaf, homes, n=1)]
    meant = f"did you mean {close[0]}?" if close else "docs/CONFIG.md lists every setting"
    return f"unknown setting {dotted}: {meant}"
