"""calibrate: what the dense model's decoder attends to, measured over images and prompts, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vtexport.errors import InputError
from vtexport.models.prompt import Prompt, Prompter, open_image
from vtexport.pruning import make_plan
from vtexport.pruning.rank import RANK_TOLERANCE, Calibration

if TYPE_CHECKING:
    from vtexport.reference import ReferenceModel

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Pair:
    """An image, a PIL image, and a prompt about it."""

    image: Any
    prompt: str


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a JSON-lines file, objects with `image` (a path, from the file's folder) and `prompt`.

    Raises:
        InputError: no such file, a line that is no such object, an image that cannot be read, or no pair at all.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give JSON lines of image and prompt as --data")
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            image, prompt = entry["image"], entry["prompt"]
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f'{path}, line {number}: not a pair; write {{"image": "photo.png", "prompt": "what is it?"}}'
            ) from error
        pairs.append(Pair(open_image(path.parent / str(image)), str(prompt)))
    if not pairs:
        raise InputError(f"{path} holds no usable pair; give JSON lines of image and prompt")
    return pairs


def calibrate_model(
    name: str, pairs: Sequence[Pair], exit_tolerance: float = 0.0, advance: Callable[[], None] = lambda: None
) -> Calibration:
    """Measure the model that `name` says (see `vtexport.models.resolve_model`) on `pairs`; see `calibrate`."""
    from vtexport.models import Checkpoint, read_spec, resolve_model
    from vtexport.models.llava import fingerprint
    from vtexport.reference import ReferenceModel

    folder = resolve_model(name)
    spec = read_spec(folder)
    mark = fingerprint(Checkpoint.open(folder))
    prompter = Prompter(folder, spec.image_token_id, spec.vision.image_size)
    return calibrate(ReferenceModel(folder, spec), prompter, pairs, mark, exit_tolerance, advance)


def calibrate(
    model: ReferenceModel,
    prompter: Prompter,
    pairs: Sequence[Pair],
    fingerprint: str,
    exit_tolerance: float = 0.0,
    advance: Callable[[], None] = lambda: None,
) -> Calibration:
    """Measure `model` on `pairs`; see `Calibration` for what.

    Args:
        model: the dense model.
        prompter: its processor.
        pairs: images and prompts, at least one.
        fingerprint: of the checkpoint.
        exit_tolerance: share of the pairs whose next token may change where visual tokens leave early.
        advance: called once a pair.

    Raises:
        InputError: a tolerance outside [0, 1).
    """
    if not 0 <= exit_tolerance < 1:
        raise InputError(f"--exit-tolerance {exit_tolerance:g} is out of range; give a share from 0 to below 1")
    found = []
    for pair in pairs:
        found.append(_measure(model, prompter.prompt(pair.prompt), prompter.pixels(pair.image)[None]))
        advance()
    ranks = np.array([one.ranks for one in found])
    changed = np.mean([one.changed for one in found], axis=0)
    # After the last layer nothing is left to drop, so that one always qualifies.
    exit_layer = int(np.flatnonzero(changed <= exit_tolerance)[0])
    return Calibration(
        model=fingerprint,
        num_visual_tokens=model.spec.vision.num_visual_tokens,
        pairs=len(found),
        ranks=_rounded(ranks.mean(axis=0)),
        rank_spread=_rounded(ranks.std(axis=0)),
        mass=_rounded(np.mean([one.mass for one in found], axis=0)),
        foresight=_rounded(np.mean([one.foresight for one in found], axis=0)),
        exit_layer=exit_layer,
        exit_tolerance=exit_tolerance,
    )


def _rounded(values: Array) -> tuple[float, ...]:
    return tuple(float(f"{value:.4g}") for value in values)


@dataclass(frozen=True)
class _Measured:
    """One pair: a value a layer each; `changed` says whether dropping the image after it changes the next token."""

    ranks: list[int]
    mass: list[float]
    foresight: list[float]
    changed: list[bool]


def _measure(model: ReferenceModel, prompt: Prompt, pixels: Array) -> _Measured:
    import torch

    d, v = model.spec.decoder, model.spec.vision
    leading = v.num_visual_tokens - v.num_patches
    plan_of = partial(make_plan, tokens=v.num_visual_tokens, layers=d.num_layers, leading=leading)
    dense = plan_of("dense", keep=1.0)
    visual = model.vision(pixels, dense).visual
    ranks, masses, scores = [], [], []
    for attention in model.rater_attention(prompt, visual):
        values = torch.linalg.svdvals(attention)
        ranks.append(int((values >= RANK_TOLERANCE * values[0]).sum()))
        masses.append(float(attention.sum(dim=1).mean()))
        scores.append(attention.mean(dim=0).numpy())
    token = int(model.answer(prompt, visual, (), dense).logits[0].argmax())
    changed = []
    for layer in range(d.num_layers - 1):
        plan = plan_of("exit", keep=None, options={"layers": str(layer)})
        changed.append(int(model.answer(prompt, visual, (), plan).logits[0].argmax()) != token)
    return _Measured(ranks, masses, _foresight(scores), [*changed, False])


def _foresight(scores: Sequence[Array]) -> list[float]:
    """For each layer, the mean share of the later layers' scores on the quarter of tokens that it scores highest."""
    found = []
    for layer, score in enumerate(scores):
        best = np.argsort(-score, kind="stable")[: max(1, len(score) // 4)]
        found.append(float(np.mean([later[best].sum() / later.sum() for later in scores[layer + 1 :] or [score]])))
    return found


def plot(calibration: Calibration, path: Path) -> None:
    """Draw rank, attention mass and foresight by layer into `path` (see `vtexport.show.check_destination`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(7, 5), sharex=True, layout="constrained")
    layers = range(len(calibration.ranks))
    upper.errorbar(layers, calibration.ranks, yerr=calibration.rank_spread, fmt="o-", capsize=3)
    upper.set_ylabel("rank of raters x visual")
    upper.set_ylim(bottom=0)
    lower.plot(layers, calibration.mass, "o-", label="attention of raters that falls on the image")
    lower.plot(layers, calibration.foresight, "s-", label="later layers' share on this layer's top quarter")
    lower.axhline(0.25, color="grey", linewidth=0.8, label="that share by chance")
    for layer in calibration.pruning_layers():
        lower.axvline(layer, color="grey", linestyle=":", linewidth=0.8)
    lower.set_ylim(0, 1)
    lower.set_xlabel("decoder layer; dotted: the layers that --layers auto prunes after")
    lower.legend(fontsize="small")
    upper.set_title(f"{calibration.pairs} pairs; visual tokens may leave after layer {calibration.exit_layer}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
