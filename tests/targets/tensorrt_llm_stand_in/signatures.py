"""What a class or function of tensorrt_llm looks like, in the form of `signatures.json`."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

RECORDED: dict[str, Any] = json.loads(Path(__file__).with_name("signatures.json").read_text(encoding="utf-8"))
KINDS = ("fields", "parameters", "members", "abstract", "keys")


def expected(version: str) -> dict[str, dict[str, Any]]:
    """What was read, by name: of 1.2, with what is known to differ in newer versions."""
    return RECORDED["1.2"] | ({} if version.startswith("1.2.") else RECORDED["newer"])


def described(name: str, kind: str, module: str | None = None) -> Any:
    """What `name`, `module:path` of the tensorrt_llm that is installed, has now.

    Args:
        name: as in `signatures.json`.
        kind: one of `KINDS`.
        module: where to look instead.
    """
    own, _, path = name.partition(":")
    found: Any = importlib.import_module(module or own)
    for part in path.split("."):
        found = getattr(found, part)
    if kind == "fields":
        return [field.name for field in dataclasses.fields(found)]
    if kind == "members":
        return {member.name: member.value for member in found if isinstance(member, enum.Enum)}
    if kind == "abstract":
        return sorted(found.__abstractmethods__)
    if kind == "keys":
        return list(found.__annotations__)
    return _parameters(found)


def _parameters(function: Any) -> list[str]:
    listed, starred = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            listed.append("*")
        starred |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        listed.append(stars + parameter.name + ("=" if parameter.default is not parameter.empty else ""))
    return listed


def differences(version: str) -> dict[str, tuple[Any, Any]]:
    """Names whose description is not what was read: what was read, and what there is, or the error."""
    found = {}
    for name, entry in expected(version).items():
        (kind,) = set(entry) & set(KINDS)
        try:
            now = described(name, kind, entry.get("at"))
        except (ImportError, AttributeError) as error:
            now = repr(error)
        if now != entry[kind]:
            found[name] = (entry[kind], now)
    return found
