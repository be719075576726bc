"""What kustomize makes of `deploy/kuberay`, as far as it is used there, so that the manifests are checked without it.

`test_manifests.test_kustomize_builds_the_same` holds it to the real one where `kubectl` is installed.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

KNOWN = {"resources", "components", "configMapGenerator", "generatorOptions", "patches", "namespace", "images"}
KNOWN |= {"replacements", "apiVersion", "kind"}
LEFT_OUT = "config.kubernetes.io/local-config"


@dataclass
class Build:
    """Objects by kind and name, and the files that were read."""

    objects: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    files: set[Path] = field(default_factory=set)

    def one(self, kind: str) -> dict[str, Any]:
        """The only object of a kind."""
        (found,) = (each for (known, _), each in self.objects.items() if known == kind)
        return found


def build(folder: Path) -> Build:
    """What `kubectl kustomize FOLDER` prints."""
    made = Build()
    _add_layer(folder.resolve(), made)
    made.objects = {
        key: each
        for key, each in made.objects.items()
        if each["metadata"].get("annotations", {}).get(LEFT_OUT) != "true"
    }
    return made


def read(path: Path, made: Build) -> list[Any]:
    """The documents of a file; what YAML aliases share is copied, so that one can be changed without the other."""
    made.files.add(path)
    return [json.loads(json.dumps(each)) for each in yaml.safe_load_all(path.read_text())]


def _add_layer(folder: Path, made: Build) -> None:
    (layer,) = read(folder / "kustomization.yaml", made)
    assert set(layer) <= KNOWN, set(layer) - KNOWN
    for name in layer.get("resources", []):
        path = (folder / name).resolve()
        if path.is_dir():
            _add_layer(path, made)
            continue
        for each in read(path, made):
            key = (each["kind"], each["metadata"]["name"])
            assert key not in made.objects, key
            made.objects[key] = each
    for name in layer.get("components", []):
        _add_layer((folder / name).resolve(), made)
    for generator in layer.get("configMapGenerator", []):
        _generate(folder, generator, made)
    for patch in layer.get("patches", []):
        (change,) = read(folder / patch["path"], made)
        _patch(patch, change, made)
    for each in made.objects.values():
        if "namespace" in layer and each["kind"] != "Namespace":
            each["metadata"]["namespace"] = layer["namespace"]
        for image in layer.get("images", []):
            _rename(each, image["name"], image["newName"])
    for replacement in layer.get("replacements", []):
        source = replacement["source"]
        value = at(made.objects[source["kind"], source["name"]], source["fieldPath"].split("."))
        for target in replacement["targets"]:
            chosen = made.objects[target["select"]["kind"], target["select"]["name"]]
            for path in target["fieldPaths"]:
                *above, last = path.split(".")
                at(chosen, above)[last] = copy.deepcopy(value)


def _generate(folder: Path, generator: dict[str, Any], made: Build) -> None:
    key = ("ConfigMap", generator["name"])
    assert (key in made.objects) == (generator.get("behavior") == "replace"), key
    data = {}
    for name in generator["files"]:
        read(folder / name, made)
        data[name] = (folder / name).read_text()
    metadata = made.objects[key]["metadata"] if key in made.objects else {"name": generator["name"]}
    made.objects[key] = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _patch(patch: dict[str, Any], change: Any, made: Build) -> None:
    if isinstance(change, dict):
        _merge(made.objects[change["kind"], change["metadata"]["name"]], change)
        return
    chosen = made.objects[patch["target"]["kind"], patch["target"]["name"]]
    for step in change:
        *above, last = step["path"].strip("/").split("/")
        parent = at(chosen, above)
        assert step["op"] in {"add", "replace"}
        assert (last in parent) == (step["op"] == "replace"), step["path"]
        parent[last] = copy.deepcopy(step["value"])


def _merge(old: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            _merge(old[key], value)
        else:
            old[key] = value


def _rename(value: Any, name: str, new: str) -> None:
    for each in value.values() if isinstance(value, dict) else value:
        if isinstance(each, dict | list):
            _rename(each, name, new)
    if isinstance(value, dict) and str(value.get("image", "")).startswith(f"{name}:"):
        value["image"] = new + value["image"].removeprefix(name)


def at(value: Any, path: list[str]) -> Any:
    """What lies at a path; numbers index lists."""
    for part in path:
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value
