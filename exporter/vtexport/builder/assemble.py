"""Writes the files of a bundle: traced graphs, weights, compiled engines, processor and manifest."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from vtexport.builder.engines import EngineSpec, Made, Source, make_engines
from vtexport.builder.selfcheck import check_engines
from vtexport.bundle.folder import PROCESSOR_FOLDER, Bundle
from vtexport.bundle.hashes import Hashes
from vtexport.bundle.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    AdaptiveEntry,
    FileEntry,
    Manifest,
    ModelEntry,
    PlanEntry,
    TargetEntry,
    VerificationEntry,
    ViewsEntry,
    encode,
)
from vtexport.bundle.writing import check_space, same_file_system, write_folder
from vtexport.models.checkpoint import AS_STORED
from vtexport.models.clip import FOLDER as CLIP_FOLDER
from vtexport.models.clip import ClipTokenizer
from vtexport.models.prompt import PROCESSOR_FILES
from vtexport.options import option_values
from vtexport.progress import Progress
from vtexport.targets.base import Target


def assemble(
    source: Source,
    engines: EngineSpec,
    target: Target,
    out: Path,
    progress: Progress,
    *,
    self_check: bool,
    force: bool = False,
) -> Bundle:
    """Write the bundle `out`; with `self_check`, compare it with the reference before it gets its name.

    With `force`, a bundle at `out` is replaced (`vtexport.bundle.writing.write_folder`).
    """
    check_space(out, _needed_bytes(source, engines, target, out))
    with write_folder(out, force) as building, contextlib.ExitStack() as stack:
        made = make_engines(source, engines, target, building, progress)
        _copy_processor(source, building)
        hashes = stack.enter_context(Hashes(building))
        verification = check_engines(source, engines, target, made.compiled, building, progress) if self_check else None
        target.finish(building, made.compiled)
        progress.stage("hash files")
        manifest = _manifest(source, engines, target, made, verification, hashes.entries())
        (building / MANIFEST).write_bytes(encode(manifest))
    return Bundle.open(out)


def _manifest(
    source: Source,
    engines: EngineSpec,
    target: Target,
    made: Made,
    verification: VerificationEntry | None,
    files: list[FileEntry],
) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        vtexport=version("vtexport"),
        model=_model_entry(source),
        plans=[PlanEntry.of(plan) for plan in engines.plans],
        adaptive=None if engines.policy is None else AdaptiveEntry(**asdict(engines.policy)),
        target=TargetEntry(
            name=target.name,
            dtype=engines.dtype,
            options=option_values(target),
            versions=dict(made.compiled.versions),
            facts=dict(made.compiled.facts),
            graphs=dict(made.compiled.files),
        ),
        graphs=dict(made.ports),
        debug=engines.debug,
        gives_ranking=engines.give_ranking,
        verification=verification,
        files=files,
    )


def _needed_bytes(source: Source, engines: EngineSpec, target: Target, out: Path) -> int:
    """Bytes that the build takes on disk at its peak, without hard-linked weights but with some room for graphs."""
    weights = source.spec.weight_bytes(engines.dtype)
    linked = source.checkpoint.stored == AS_STORED[engines.dtype] and same_file_system(source.checkpoint.folder, out)
    inside = weights if target.weights_inside else 0
    return int(1.1 * ((0 if linked else weights) + inside)) + (16 << 20)


def _copy_processor(source: Source, building: Path) -> None:
    place = building / PROCESSOR_FOLDER
    place.mkdir()
    for name in PROCESSOR_FILES:
        if (source.processor / name).is_file():
            shutil.copyfile(source.processor / name, place / name)
    if source.clip is not None and source.spec.clip is not None:
        # CLIP's tokenizer may be stored in one of several formats; saving it again writes the newest.
        ClipTokenizer(source.clip, source.spec.clip.length).tokenizer.save_pretrained(place / CLIP_FOLDER)
        shutil.copyfile(source.clip / "config.json", place / CLIP_FOLDER / "config.json")


def _model_entry(source: Source) -> ModelEntry:
    spec = source.spec
    return ModelEntry(
        name=source.name,
        family=spec.family,
        config=spec.config,
        image_token_id=spec.image_token_id,
        eos_token_ids=list(spec.eos_token_ids),
        image_size=spec.vision.image_size,
        grid=spec.vision.grid,
        views=ViewsEntry(
            images=spec.views.images,
            views=spec.views.views,
            tiles=None if spec.views.tiles is None else list(spec.views.tiles),
            newlines=spec.views.newlines,
            asked={name: value for name, value in vars(spec.choice).items() if value is not None},
        ),
        vocabulary=spec.decoder.vocab_size,
        max_positions=spec.decoder.max_positions,
    )
