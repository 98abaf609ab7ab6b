"""The output of `vtexport build`, `build --dry-run` and `inspect`."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Group, RenderableType

from vtexport.builder.estimate import Estimate
from vtexport.bundle.folder import Bundle
from vtexport.cli.report.layout import Facts, Table, Whole
from vtexport.figures import listed, number, percent, size
from vtexport.models.resolve import engines_folder, recipe_names
from vtexport.models.spec import ModelSpec
from vtexport.pruning import PruningPlan, dense_plan
from vtexport.pruning.flops import NOMINAL_TEXT_TOKENS, plan_flops


def build_summary(bundle: Bundle) -> RenderableType:
    """The summary at the end of `vtexport build`: tokens, cost, sizes, verification, and the next command to type."""
    target = bundle.manifest.target
    rows = [
        *_plan_rows(bundle),
        ("target", f"{target.name}, {target.dtype}"),
        ("size", ", ".join(f"{name} {size(count)}" for name, count in _sizes(bundle).items())),
        ("verified", _verification(bundle)),
        ("next", Whole(_next(bundle))),
    ]
    return Facts([("bundle", Whole(bundle.folder)), *rows])


def dry_run_summary(estimate: Estimate) -> RenderableType:
    """The output of `vtexport build --dry-run`."""
    weights = f"{size(estimate.weight_bytes)} of weights " + ("converted" if estimate.converts else "as they are")
    check = (
        "this model"
        if estimate.checked_in_full
        else "a small model of the same layers, because this one cannot run here"
    )
    rows = [row for plan in estimate.engines.plans for row in _one_plan(plan, estimate.spec)]
    return Facts(
        [
            *rows,
            ("target", f"{estimate.target.name}, {estimate.engines.dtype}"),
            ("size", f"{weights}, about {size(estimate.graph_bytes)} of graphs"),
            ("peak memory", f"about {size(estimate.peak_memory)}"),
            ("checked on", check),
            ("written", "nothing: a dry run"),
        ]
    )


def bundle_table(bundle: Bundle, *, verified: bool) -> RenderableType:
    """The output of `vtexport inspect`."""
    manifest = bundle.manifest
    files = Table("file", "bytes", "sha256")
    for entry in manifest.files:
        files.add_row(entry.path, number(entry.bytes), entry.sha256[:16])
    rows = [
        ("model", f"{manifest.model.name} ({manifest.model.family})"),
        *_plan_rows(bundle),
        ("target", f"{manifest.target.name}, {manifest.target.dtype}"),
        (
            "versions",
            ", ".join(f"{n} {v}" for n, v in {"vtexport": manifest.vtexport, **manifest.target.versions}.items()),
        ),
        ("verified", _verification(bundle)),
    ]
    if verified:
        added = bundle.unlisted()
        text = "all as they were built"
        rows.append(("files", f"{text}, and besides these: {', '.join(added)}" if added else text))
    return Group(Facts(rows), "", files)


def _plan_rows(bundle: Bundle) -> list[tuple[str, str]]:
    """The rows of the plan; if there are several, first those on how one is chosen."""
    spec, policy = bundle.spec(), bundle.manifest.policy()
    plans = bundle.manifest.pruning_plans()
    rows: list[tuple[str, str]] = []
    if policy is not None:
        rows.append(("keep auto", f"{percent(policy.accuracy)} of answers as in the dense model at calibration"))
        for place, plan in enumerate(plans):
            limit = f"spread up to {number(policy.limits[place - 1])} patches" if place else "any other image"
            rows.append((f"  keep {number(plan.keep)}", limit))
    return rows + [row for plan in plans for row in _one_plan(plan, spec)]


def _one_plan(plan: PruningPlan, spec: ModelSpec) -> list[tuple[str, str]]:
    dense = dense_plan(plan)
    cost, full = plan_flops(spec, plan), plan_flops(spec, dense)
    flops = (
        f"{number(cost.first_token / 1e9)} GFLOPs to the first token, {percent(cost.first_token / full.first_token, 0)} of dense "
        f"(decoder alone {percent(cost.prefill / full.prefill, 0)}; {NOMINAL_TEXT_TOKENS} text tokens)"
    )
    mean = f"{number(plan.mean_visual_tokens, 5)} of {number(plan.num_visual_tokens)}, mean over decoder layers"
    if plan.decoder_stages:
        mean += f" ({number(plan.mean_visual_tokens_sparsevlm, 5)} by SparseVLM's count)"
    options = listed(plan.options, ", ")
    rows = [("method", f"{plan.method}, keep {number(plan.keep)}" + (f" ({options})" if options else ""))]
    rows.append(("mean visual tokens", mean))
    rows += [
        (f"  {s.where}", f"{number(s.tokens_in)} in, {number(s.kept)} kept, {number(s.recycled)} merged")
        for s in plan.stages
    ]
    return [*rows, ("cost", flops)]


def _verification(bundle: Bundle) -> str:
    entry = bundle.manifest.verification
    if entry is None:
        return "not checked"
    kept = "same kept tokens" if entry.same_kept else "kept tokens equal up to rounding"
    answers = "same greedy tokens" if entry.same_tokens else "greedy tokens equal up to rounding"
    rounded = entry.rounded_logit_error
    return (
        f"{kept}, {answers}, largest logit error {entry.max_logit_error:.1e} of {entry.tolerance:g} allowed"
        f"{'' if rounded is None else f', {rounded:.1e} with activations in 8 bits'} "
        f"({entry.samples} samples x {entry.tokens} tokens; {entry.ran} against {entry.against})"
    )


def _next(bundle: Bundle) -> str:
    """The command to try next with a bundle."""
    model = bundle.manifest.model
    if not bundle.manifest.has_language_model:
        return "give it to TensorRT-LLM: docs/tensorrt-llm.md"
    image, question = "FILE", "what is in the image?"
    # The name comes from the manifest, which anyone may have written: only a recipe's leads to a file.
    example = engines_folder() / model.name / "example.png" if model.name in recipe_names() else None
    if example is not None and example.is_file():
        here = Path.cwd()
        image = shlex.quote(str(example.relative_to(here) if example.is_relative_to(here) else example))
        question = "what digit is red?"
    images = " ".join([f"--image {image}"] * model.views.images)
    return f'vtexport run {shlex.quote(str(bundle.folder))} {images} --prompt "{question}"'


def _sizes(bundle: Bundle) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for entry in bundle.manifest.files:
        place = Path(entry.path).parts[0] if "/" in entry.path else "manifest"
        sizes[place] = sizes.get(place, 0) + entry.bytes
    return {**sizes, "total": bundle.size()}
