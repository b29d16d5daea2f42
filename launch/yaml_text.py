"""YAML that people read: several lines of text as a block, nothing sorted, no anchors."""

from __future__ import annotations

from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def dump_all(trees: list[Any]) -> str:
    """One document for each tree."""
    text: str = yaml.dump_all(trees, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    return text
