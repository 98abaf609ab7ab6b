"""Manifests of other schema versions: the command that builds such a bundle again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtexport.errors import InputError
from vtexport.models.spec import ViewChoice
from vtexport.options import flag_of, option_fields
from vtexport.pruning import choose
from vtexport.pruning.adaptive import AUTO
from vtexport.targets import get_target

_LONGEST = 300


def build_command(found: Mapping[str, Any], folder: Path) -> str | None:
    """The command that builds the bundle `folder` again, from its parsed manifest of any schema version.

    Every version so far names the model, the target and a `plan` or, later, `plans`. What cannot be read is left out,
    and so are options that this vtexport does not have.

    Returns:
        the command; None if the manifest does not say what it was built from.
    """
    model, target = _object(found.get("model")), _object(found.get("target"))
    plans = found.get("plans", [found.get("plan")])
    plan = _object(plans[0] if isinstance(plans, list) and plans else None)
    name, method, keep = _text(model.get("name")), _text(plan.get("method")), plan.get("keep")
    if name is None or method is None or not isinstance(keep, int | float):
        return None
    try:
        choose(method, {})
    except InputError:
        return None
    flags = {"model": name, "method": method}
    if found.get("adaptive") is not None:
        keeps = [one.get("keep") for one in map(_object, plans)]
        flags |= {"keep": AUTO, "buckets": ",".join(f"{one:g}" for one in keeps if isinstance(one, int | float))}
    else:
        options, fixed = _method_options(method, _object(plan.get("options")))
        flags |= options
        if not fixed and method != "dense":
            flags["keep"] = f"{keep:g}"
    flags |= _target_flags(target)
    asked = _object(_object(model.get("views")).get("asked"))
    flags |= {
        one: str(asked[one]) for one in option_fields(ViewChoice) if _text(str(asked.get(one, ""))) and one in asked
    }
    words = [word for one, value in flags.items() for word in _words(one, value)]
    return shlex.join(["vtexport", "build", *words, "--out", str(folder), "--force"])


def _method_options(method: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The options that differ from their defaults, and whether they fix the counts without a keep ratio."""
    # A released schedule names its layers itself.
    given = {one: value for one, value in given.items() if one != "layers" or not given.get("schedule")}
    try:
        defaults = choose(method, {}, resolved=True)
        known = {one: value for one, value in given.items() if one in defaults.options}
        changed = {one: value for one, value in known.items() if value != defaults.options[one]}
        chosen = choose(method, changed)
    except InputError:
        return {}, False
    return changed, chosen.decoder is not None and bool(chosen.decoder.fixes_keep)


def _target_flags(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Target and dtype, and the target's options that differ from their defaults."""
    name, dtype, options = _text(entry.get("name")), _text(entry.get("dtype")), _object(entry.get("options"))
    try:
        known = get_target(name or "")
        get_target(name or "", changed := {one: v for one, v in options.items() if getattr(known, one, v) != v})
    except InputError:
        return {}
    return {"target": name, **({"dtype": dtype} if dtype in known.dtypes else {}), **changed}


def _words(name: str, value: Any) -> list[str]:
    """A flag and its value; a switch is its name alone, or `--no-` and its name."""
    if isinstance(value, bool):
        return [flag_of(name) if value else flag_of(f"no_{name}")]
    return [flag_of(name), f"{value:g}" if isinstance(value, float) else str(value)]


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    """`value` if it is text that a command can hold."""
    usable = isinstance(value, str) and 0 < len(value) <= _LONGEST and value.isprintable()
    return value if usable else None
