"""Config reference: every key of the configuration as Markdown tables, from the models' own JSON schema.

`docs/configuration.md` ends with them; limits between keys are validators of `common.config` and stand in no table.
"""

import json
from collections.abc import Iterator
from typing import Any

from common.config import Config

HEAD = "| key | type | default | limits | meaning |\n| --- | --- | --- | --- | --- |\n"
BOUNDS = {"minimum": ">= {}", "exclusiveMinimum": "> {}", "maximum": "<= {}", "exclusiveMaximum": "< {}"}
BOUNDS |= {"minItems": "at least {} of them", "maxItems": "at most {} of them", "pattern": "matches `{}`"}
TYPES = {"string": "text", "number": "number", "integer": "integer", "boolean": "true, false", "null": "null"}
Node = dict[str, Any]


def markdown_tables() -> str:
    """A heading and a table for each section, sections inside sections after their own; tasks one by one."""
    schema = Config.model_json_schema()
    definitions = schema["$defs"]
    return "\n".join(
        text for name in Config.model_fields for text in _sections(name, schema["properties"], definitions)
    )


def _sections(path: str, siblings: Node, definitions: Node) -> Iterator[str]:
    node = siblings[path.rpartition(".")[2]]
    for name in _references(node):
        section = definitions[name]
        keys: Node = section["properties"]
        chosen = f", `{path}.name: {keys['name']['const']}`" if "oneOf" in node else ""
        inner = [key for key, value in keys.items() if _references(value)]
        rows = "".join(_row(f"{path}.{key}", value) for key, value in keys.items() if key not in inner)
        absent = " `null`, the default, leaves it out." if node.get("default", "") is None else ""
        yield f"## `{path}`{chosen}\n\n{section['description']}{absent}\n\n{HEAD}{rows}"
        for key in inner:
            yield from _sections(f"{path}.{key}", keys, definitions)


def _references(node: Node) -> list[str]:
    """Names of the sections that a value may be."""
    choices = node.get("oneOf", node.get("anyOf", [node]))
    return [choice["$ref"].rpartition("/")[2] for choice in choices if "$ref" in choice]


def _row(key: str, node: Node) -> str:
    default = f"`{json.dumps(node['default'])}`" if "default" in node else "must be given"
    meaning = node["description"].replace("<", "&lt;")
    cells = (f"`{key}`", _type(node), default, _limits(node) or "-", meaning)
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |\n"


def _type(node: Node) -> str:
    if "anyOf" in node:
        return " or ".join(_type(choice) for choice in node["anyOf"])
    if "enum" in node or "const" in node:
        return ", ".join(f"`{value}`" for value in node.get("enum", [node.get("const")]))
    if node["type"] == "array":
        return f"list of {_type(node['items'] if 'items' in node else node['prefixItems'][0])}s"
    if node["type"] == "object":
        values = node.get("additionalProperties", next(iter(node.get("patternProperties", {}).values()), True))
        return "mapping" if values is True else f"mapping of names to {_type(values)}s"
    return TYPES[node["type"]]


def _limits(node: Node) -> str:
    own = [text.format(node[bound]) for bound, text in BOUNDS.items() if bound in node]
    each = [_limits(node["items"])] if "items" in node else []
    each += [_limits(choice) for choice in node.get("anyOf", [])]
    return ", ".join(filter(None, own + each))
