"""The output of `vtexport list` and `vtexport doctor`."""

from __future__ import annotations

from rich.console import Group, RenderableType

from vtexport.cli.report.layout import Facts, Paragraph
from vtexport.measure.doctor import examine, kernels, versions
from vtexport.models.families import FAMILIES
from vtexport.models.resolve import read_recipe, recipe_names
from vtexport.pruning import DEFAULT_METHOD, METHODS
from vtexport.targets import DEFAULT_TARGET, TARGETS


def catalogue() -> dict[str, dict[str, str]]:
    """Models, methods and targets, each name with its summary."""
    return {
        "models": {name: str(read_recipe(name)["summary"]) for name in recipe_names()},
        "methods": {name: method.summary for name, method in METHODS.items()},
        "targets": {name: target.summary for name, target in TARGETS.items()},
    }


def catalogue_tables() -> RenderableType:
    """The tables that `vtexport list` prints."""
    defaults = (DEFAULT_METHOD, DEFAULT_TARGET)
    parts: list[RenderableType] = []
    for title, entries in catalogue().items():
        rows = [(name, text + (" (default)" if name in defaults else "")) for name, text in entries.items()]
        parts += [Paragraph(title, "bold"), Facts([(f"  {name}", text) for name, text in rows]), ""]
    families = ", ".join(FAMILIES)
    parts.append(
        Paragraph(
            f"Other checkpoints in Hugging Face form, of model_type {families}: give the folder or the hub id as "
            "--model."
        )
    )
    return Group(*parts)


def health_tables() -> RenderableType:
    """The lists that `vtexport doctor` prints."""
    rows = []
    for health in examine():
        for what, state in (("build", health.build), ("run", health.run)):
            rows.append((f"{health.name} {what}", f"{'works' if state.works else 'does not work'}: {state.reason}"))
    for what, state in kernels().items():
        rows.append((what, f"{'built' if state.works else 'not built'}: {state.reason}"))
    return Group(Facts(rows), "", Facts(list(versions().items())))
