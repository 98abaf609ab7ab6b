"""The flags of `vtexport build` that belong to a method or a target; whichever takes none of them refuses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

_FLAGS: tuple[Callable[[Any], Any], ...] = (
    click.option("--layers", help="Decoder layers to prune after, such as 2,6,15, or auto (calibrated)."),
    click.option("--schedule", help="A released schedule instead of --keep, such as sparsevlm-192."),
    click.option("--rule", help="How counts follow from ranks: rank or proportional.  [default: rank]"),
    click.option("--ranks", type=click.Path(path_type=Path), help="Calibration file.  [default: the recipe's]"),
    click.option("--positions", help="RoPE positions after pruning: compact or original."),
    click.option("--recycle/--no-recycle", default=None, help="Merge some of the dropped tokens.  [default: recycle]"),
    click.option("--recycle-pool", type=float, help="Share of the dropped tokens that is merged.  [default: 0.3]"),
    click.option("--recycle-clusters", type=float, help="Merged tokens, a share of these.  [default: 0.1]"),
    click.option("--merge", help="mean, or sum (joined by cosine, as the paper writes).  [default: mean]"),
    click.option("--vision-keep", type=float, help="Share that the first of two methods keeps.  [default: sqrt(keep)]"),
    click.option("--tower-from", type=int, help="First tower layer of vtc-cls.  [default: the middle]"),
    click.option("--important", type=float, help="Share that vispruner keeps by attention.  [default: 0.5]"),
    click.option("--contextual", type=float, help="Share of visionzip's tokens that are merged.  [default: 0.15625]"),
    click.option("--clip", help="CLIP checkpoint with text tower for cdpruner: a folder or a hub id."),
    click.option("--seed", type=int, help="Which patches method random draws.  [default: 0]"),
)
_VIEW_FLAGS: tuple[Callable[[Any], Any], ...] = (
    click.option("--grid", help="Any-resolution models: rows x columns of tiles that a bundle is for, such as 2x2."),
    click.option("--images", type=int, help="Images (or videos) a prompt.  [default: 1]"),
    click.option("--arrangement", help="Any-resolution models: rows (newlines, unpadded) or views.  [default: rows]"),
)
_TARGET_FLAGS: tuple[Callable[[Any], Any], ...] = (
    click.option("--quantize", help="The decoder's weights as int8 or int4; on TensorRT also fp8."),
    click.option("--sm", help="GPU architectures of target tensorrt-rtx.  [default: 86,89,120]"),
    click.option("--max-batch", type=int, help="Largest batch of a TensorRT target.  [default: 4]"),
    click.option(
        "--max-text", type=int, help="Most text tokens, prompt and answer, of a TensorRT target.  [default: 512]"
    ),
    click.option(
        "--strip-weights",
        is_flag=True,
        default=None,
        help="TensorRT: one copy of the weights for all plans, put in when opened.",
    ),
    click.option("--plugins/--no-plugins", default=None, help="TensorRT: pruning ops as plugins.  [default: plugins]"),
    click.option(
        "--version-compatible", is_flag=True, default=None, help="TensorRT: let later versions load the plans."
    ),
    click.option("--flow", help="TensorRT-LLM: pytorch or engine (its layout up to 1.2).  [default: pytorch]"),
    click.option("--hardware-compatible", help="TensorRT: none, same-sm, or ampere+.  [default: none]"),
    click.option(
        "--timing-cache", type=click.Path(), help="TensorRT: a file of its measurements, read and written back."
    ),
)
#: the parameters of `of_methods` that go to the method; `ranks` goes to the plan
METHODS = (
    "layers",
    "schedule",
    "rule",
    "positions",
    "recycle",
    "recycle_pool",
    "recycle_clusters",
    "merge",
    "vision_keep",
    "tower_from",
    "important",
    "contextual",
    "clip",
    "seed",
)
#: those that say what becomes of a prompt's images
VIEWS = ("grid", "images", "arrangement")
TARGETS = (
    "quantize",
    "sm",
    "max_batch",
    "max_text",
    "strip_weights",
    "plugins",
    "version_compatible",
    "hardware_compatible",
    "timing_cache",
    "flow",
)


class KeepRatio(click.ParamType):  # type: ignore[type-arg]  # not generic before Click 8.4
    """A number, or the word `auto`."""

    name = "ratio|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        """A float, or "auto"."""
        if value == "auto":
            return str(value)
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a ratio nor auto", param, ctx)


def of_methods(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags of methods to a command."""
    for flag in reversed(_FLAGS):
        command = flag(command)
    return command


def of_views(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags of a prompt's images to a command."""
    for flag in reversed(_VIEW_FLAGS):
        command = flag(command)
    return command


def of_targets(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags of targets to a command."""
    for flag in reversed(_TARGET_FLAGS):
        command = flag(command)
    return command


def given(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Those of `names` that were given on the command line; switches as 0 and 1, as a manifest has them."""
    found = {name: values[name] for name in names if values[name] is not None}
    return {name: int(value) if isinstance(value, bool) else value for name, value in found.items()}
