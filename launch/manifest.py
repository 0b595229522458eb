"""Manifests as YAML that people can read."""

from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """Keeps the order of keys, writes every value out, and scripts as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def dump(tree: dict[str, Any]) -> str:
    """The YAML text of a manifest."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=1000)
