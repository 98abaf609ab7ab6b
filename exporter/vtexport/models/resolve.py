"""A model's name, folder or hub id -> a local checkpoint folder."""

from __future__ import annotations

import re
from pathlib import Path

from vtexport.errors import InputError, ModelError, first_line
from vtexport.models.bounds import shown
from vtexport.reading import Unreadable, read_toml

_PACKAGE = Path(__file__).resolve().parents[1]
# What vtexport reads of a hub repository: never pickled weights.
_CONFIG_PATTERNS = ["config.json", "generation_config.json"]
_RECIPE_KEYS = {"summary", "checkpoint", "hub", "calibration", "dtype"}
_RECIPE_BYTES, _RECIPE_TEXT = 64 << 10, 200
# An owner and a name, as the hub allows them.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def engines_folder() -> Path:
    """The folder of recipes: inside the package once installed, at the root of the repository in development."""
    installed = _PACKAGE / "engines"
    return installed if installed.is_dir() else _PACKAGE.parents[1] / "engines"


def recipe_names() -> list[str]:
    """The names of the recipes, sorted."""
    return sorted(path.stem for path in engines_folder().glob("*.toml"))


def read_recipe(name: str) -> dict[str, str]:
    """The recipe `name`.

    Its keys are `summary`, `checkpoint` (a folder beside the recipe) or `hub` (an id), `calibration` (a file beside the
    recipe), and `dtype`.

    Raises:
        InputError: it is not TOML, has other keys or values that are no text, or lacks one.
    """
    path = engines_folder() / f"{name}.toml"
    try:
        recipe: dict[str, str] = read_toml(path, _RECIPE_BYTES, dict[str, str])
    except Unreadable as error:
        raise InputError(f"{path} is not a recipe ({error}); correct it or install vtexport again") from error
    unknown = sorted(set(recipe) - _RECIPE_KEYS)
    if unknown:
        raise InputError(f"{path} has the unknown key {unknown[0]!r}; a recipe has {', '.join(sorted(_RECIPE_KEYS))}")
    if "summary" not in recipe or ("hub" in recipe) == ("checkpoint" in recipe):
        raise InputError(f"{path} lacks something; give summary, and either hub or checkpoint")
    for key, value in recipe.items():
        if not value.isprintable() or len(value) > _RECIPE_TEXT:
            raise InputError(f"{path} has no usable text as {key}; give at most {_RECIPE_TEXT} printable characters")
    return recipe


def resolve_model(model: str, config_only: bool = False) -> Path:
    """The folder that holds checkpoint `model`.

    Args:
        model: a recipe's name, a folder, or a Hugging Face hub id (`owner/name`), downloaded with
            huggingface_hub's own progress into its own cache.
        config_only: download the configuration only.

    Raises:
        InputError: `model` is none of the three.
        ModelError: the hub could not be reached or has no such model.
    """
    folder = _folder(model)
    if folder is not None:
        return folder
    if model in recipe_names():
        recipe = read_recipe(model)
        if "checkpoint" in recipe:
            return engines_folder() / recipe["checkpoint"]
        return _download(recipe["hub"], config_only)
    if _HUB_ID.fullmatch(model) and not Path(model).exists():
        return _download(model, config_only)
    raise InputError(
        f"unknown model {shown(model)}; give a folder, a hub id such as llava-hf/llava-1.5-7b-hf, "
        f"or one of {', '.join(recipe_names())}"
    )


def recipe_calibration(model: str) -> Path | None:
    """The calibration file that recipe `model` carries, or None if it is no recipe or carries none."""
    if _folder(model) is not None or model not in recipe_names():
        return None
    name = read_recipe(model).get("calibration")
    return None if name is None else engines_folder() / name


def recipe_dtype(model: str) -> str | None:
    """The dtype that recipe `model` is built in, or None if it is no recipe or leaves it to the checkpoint."""
    if _folder(model) is not None or model not in recipe_names():
        return None
    return read_recipe(model).get("dtype")


def _folder(model: str) -> Path | None:
    """The folder that `model` names, or None if it names none."""
    try:
        folder = Path(model).expanduser()
        return folder if model and folder.is_dir() else None
    except (OSError, ValueError, RuntimeError):  # no such user's home, a name too long, or no name at all
        return None


def _download(hub_id: str, config_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_CONFIG_PATTERNS if config_only else _HUB_PATTERNS))
    except RepositoryNotFoundError as error:
        raise ModelError(f"the hub has no model {hub_id!r}, or it needs a login; check the id") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        first = first_line(error)
        raise ModelError(
            f"cannot download {hub_id!r} ({first}); check the connection, or give a local folder"
        ) from error
