"""`docs/CONFIG.md` and `docs/config.schema.json`, made from the config classes: `python -m atlas.config.reference`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atlas.config.config import AtlasConfig
from atlas.config.loader import ALSO_ACCEPTED

_DOCS = Path(__file__).parents[2] / "docs"

# YAML 1.1 reads 3e-4 as text; so does the loader, which makes a number of it.
_NUMBER_AS_TEXT = {"type": "string", "pattern": r"^[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][+-]?\d+)?$"}

_KINDS = {
    "integer": "whole number",
    "number": "number",
    "boolean": "`true` or `false`",
    "string": "text",
    "null": "`null`",
    "array": "list",
}
_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}

_INTRODUCTION = """\
# Settings

<!-- Made by `python -m atlas.config.reference` from atlas/config/config.py. Change the descriptions there. -->

A config is a YAML file of sections and two settings above them. What is left out has the default below.

```yaml
# configs/my_config.yaml
model:
  hidden_size: 768      # Model dimension
  num_layers: 12        # Transformer blocks
  num_heads: 12         # Attention heads
  vocab_size: 50257     # Vocabulary size
  max_seq_len: 512      # Context length

training:
  batch_size: 4
  learning_rate: 3e-4
  max_steps: 100000
```

`--config` takes such a file, or the name of one that Atlas brings: `--config small`. Numbers may be written `3e-4`,
`1e5` or `100_000`. A setting that Atlas does
not know, a key given twice and a value out of its limits are refused, with what was probably meant.

## Which value holds

The first that somebody wrote, from the top:

1. a flag, such as `--learning-rate 1e-4`;
2. `--set section.key=value`, where the last of one key holds: `--set training.learning_rate=1e-4 --set seed=7`;
3. the file that `--config` names;
4. the checkpoint that a run goes on from;
5. the default.

The config that results is printed, saved in every checkpoint and written to `config.yaml` in the output folder.

Editors with a YAML language server check a file and complete its keys when it starts with

```yaml
# yaml-language-server: $schema=../docs/config.schema.json
```
"""


def schema() -> dict[str, Any]:
    """A JSON schema (draft 7) of what the loader accepts."""
    properties = _properties()
    for written, home in ALSO_ACCEPTED.items():
        (section, key), (home_section, home_key) = written.split("."), home.split(".")
        entry = properties[home_section]["properties"][home_key]
        properties[section]["properties"][key] = {**entry, "description": f"The same as {home}."}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Atlas config",
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {name: _also_as_text(entry) for name, entry in properties.items()},
    }


def _properties() -> dict[str, Any]:
    """Sections and settings above them, as pydantic describes them."""
    generated = AtlasConfig.model_json_schema()
    return {name: _inlined(entry, generated["$defs"]) for name, entry in generated["properties"].items()}


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    """Without references and titles, and with the limits that pydantic leaves in its own words in a union."""
    if isinstance(node, list):
        return [_inlined(entry, definitions) for entry in node]
    if isinstance(node, str):
        return " ".join(node.split())  # a docstring of several lines
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        node = definitions[node["$ref"].rsplit("/", 1)[-1]]
    words = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
    return {
        words.get(name, name): _inlined(entry, definitions)
        for name, entry in node.items()
        if not (name == "title" and isinstance(entry, str))
    }


def _also_as_text(entry: dict[str, Any]) -> dict[str, Any]:
    """Numbers also in the spellings that a YAML reader takes for text; a section may be empty."""
    if "properties" in entry:
        inside = {name: _also_as_text(property_) for name, property_ in entry["properties"].items()}
        return {**entry, "type": ["object", "null"], "properties": inside}
    choices = entry.get("anyOf", [{key: entry[key] for key in ("type", "enum", *_LIMITS) if key in entry}])
    if not any(choice.get("type") in ("integer", "number") for choice in choices):
        return entry
    about: dict[str, Any] = {key: entry[key] for key in ("description", "default") if key in entry}
    return {**about, "anyOf": [*choices, _NUMBER_AS_TEXT]}


def page() -> str:
    """The text of docs/CONFIG.md."""
    properties = _properties()
    sections = {name: entry for name, entry in properties.items() if "properties" in entry}
    above = {name: entry for name, entry in properties.items() if name not in sections}
    parts = [_INTRODUCTION, _section("Above the sections", "", above)]
    for name, entry in sections.items():
        parts.append(_section(f"`{name}`", entry["description"], entry["properties"]))
    parts += [f"`{written}` is understood as `{home}`.\n" for written, home in ALSO_ACCEPTED.items()]
    return "\n".join(parts)


def _section(title: str, about: str, properties: dict[str, Any]) -> str:
    lines = [f"## {title}", "", *([about, ""] if about else [])]
    lines += ["| setting | value | default | |", "|---|---|---|---|"]
    for name, entry in properties.items():
        default = entry["default"]
        shown = "" if default is None else f"`{json.dumps(default).strip(chr(34))}`"
        lines.append(f"| `{name}` | {_values(entry)} | {shown} | {entry['description']} |")
    return "\n".join(lines) + "\n"


def _values(entry: dict[str, Any]) -> str:
    return ", or ".join(_value(choice) for choice in entry.get("anyOf", [entry]))


def _value(choice: dict[str, Any]) -> str:
    literals = choice.get("enum") or ([choice["const"]] if "const" in choice else [])
    if literals:
        return ", ".join(f"`{literal}`" for literal in literals)
    limits = [f"{sign} {_limit(choice[name])}" for name, sign in _LIMITS.items() if name in choice]
    return " ".join([_KINDS[choice["type"]], " and ".join(limits)]).strip()


def _limit(value: int | float) -> str:
    power = int(value).bit_length() - 1
    return f"2^{power}" if value > 1000 and value == 2**power else f"{value:,}"


def main() -> None:
    """Write both files."""
    (_DOCS / "CONFIG.md").write_text(page(), encoding="utf-8", newline="\n")
    text = json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"
    (_DOCS / "config.schema.json").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
