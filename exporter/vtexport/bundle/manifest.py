"""The schema of manifest.json, which describes a bundle and is validated whenever one is opened."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec

from vtexport.bundle.earlier import build_command
from vtexport.errors import BundleError, InputError
from vtexport.options import Meta, Option
from vtexport.pruning import choose
from vtexport.pruning.adaptive import Policy
from vtexport.pruning.plan import MOST_LAYERS, MOST_TOKENS, PruningPlan, Stage
from vtexport.reading import Unreadable, parse_json

SCHEMA_VERSION = 6
MANIFEST = "manifest.json"

# Nothing is made of a number or a name before it is known to be one that a model can have.
Count = Annotated[int, Meta(ge=0, le=MOST_TOKENS)]
Size = Annotated[int, Meta(ge=1, le=MOST_TOKENS)]
Id = Annotated[int, Meta(ge=0, le=1 << 31)]
Share = Annotated[float, Meta(ge=0, le=1)]
Name = Annotated[str, Meta(min_length=1, max_length=200)]
Text = Annotated[str, Meta(max_length=4096)]


class ViewsEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a prompt's images become views: `vtexport.models.spec.ViewSpec`, and the options that were given for it."""

    images: Size
    views: Size
    tiles: Annotated[list[Size], Meta(min_length=2, max_length=2)] | None
    newlines: Count
    asked: dict[str, Text | Size]


class ModelEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The checkpoint: the name given to the build, its config.json, and its end tokens."""

    name: Text
    family: Name
    config: dict[str, Any]
    image_token_id: Id
    eos_token_ids: list[Id]
    image_size: Size
    grid: Size
    views: ViewsEntry
    vocabulary: Annotated[int, Meta(ge=1, le=1 << 31)]
    max_positions: Annotated[int, Meta(ge=1, le=1 << 31)]


class StageEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stage of the plan: `vtexport.pruning.Stage`."""

    where: Annotated[str, Meta(pattern="^(vision|decoder\\.[0-9]{1,4})$")]
    tokens_in: Count
    kept: Count
    recycled: Count


class PlanEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A plan: `vtexport.pruning.PruningPlan`, and its mean numbers of visual tokens."""

    method: Name
    keep: Share
    num_visual_tokens: Size
    num_layers: Annotated[int, Meta(ge=1, le=MOST_LAYERS)]
    leading: Count
    views: Size
    newlines: Count
    stages: Annotated[list[StageEntry], Meta(max_length=MOST_LAYERS + 1)]
    options: dict[str, Option]
    mean_visual_tokens: float
    mean_visual_tokens_sparsevlm: float

    @classmethod
    def of(cls, plan: PruningPlan) -> PlanEntry:
        stages = [StageEntry(s.where, s.tokens_in, s.kept, s.recycled) for s in plan.stages]
        return cls(
            plan.method,
            plan.keep,
            plan.num_visual_tokens,
            plan.num_layers,
            plan.leading,
            plan.views,
            plan.newlines,
            stages,
            plan.options,
            plan.mean_visual_tokens,
            plan.mean_visual_tokens_sparsevlm,
        )

    def plan(self) -> PruningPlan:
        """The plan that this entry was made from.

        Raises:
            InputError: an unknown method, or options that it does not have.
        """
        stages = tuple(Stage(s.where, s.tokens_in, s.kept, s.recycled) for s in self.stages)
        return PruningPlan(
            choose(self.method, self.options, resolved=True),
            self.keep,
            self.num_visual_tokens,
            self.num_layers,
            self.leading,
            stages,
            self.views,
            self.newlines,
        )


class AdaptiveEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How each image gets one of several plans: `vtexport.pruning.adaptive.Policy`."""

    limits: Annotated[list[Annotated[float, Meta(ge=0)]], Meta(min_length=1, max_length=1000)]
    target_accuracy: Share
    accuracy: Share


class TargetEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The target of the bundle, with options, versions and the file of each graph."""

    name: Name
    dtype: Name
    options: dict[str, Option]
    versions: dict[Name, Text]
    facts: dict[Name, Option]
    graphs: Annotated[dict[Name, Text], Meta(min_length=1)]


class PortEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output of a graph; named extents are dynamic."""

    name: Name
    dtype: Name
    shape: Annotated[list[Name | Annotated[int, Meta(ge=0, le=1 << 31)]], Meta(max_length=16)]


class GraphEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Inputs and outputs of a graph, in order."""

    inputs: list[PortEntry]
    outputs: list[PortEntry]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the bundle; `path` is relative to the bundle's folder."""

    path: Annotated[str, Meta(min_length=1, max_length=4096)]
    bytes: Annotated[int, Meta(ge=0, le=1 << 50)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class VerificationEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The result of the self-check; see `vtexport.check.compare`.

    `rounded_logit_error` is that of the engine as it runs, if that rounds activations to 8 bits; all else was compared
    without that.
    """

    ran: Text
    against: Text
    samples: Annotated[int, Meta(ge=0)]
    tokens: Annotated[int, Meta(ge=0)]
    same_kept: bool
    same_tokens: bool
    max_logit_error: float
    tolerance: float
    rounded_logit_error: float | None = None


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of manifest.json; of several plans, from most to fewest tokens, `adaptive` chooses one per image."""

    schema_version: int
    vtexport: Text
    model: ModelEntry
    plans: Annotated[list[PlanEntry], Meta(min_length=1, max_length=1001)]
    adaptive: AdaptiveEntry | None
    target: TargetEntry
    graphs: dict[str, GraphEntry]
    debug: bool
    gives_ranking: bool
    verification: VerificationEntry | None
    files: Annotated[list[FileEntry], Meta(max_length=100_000)]

    def pruning_plans(self) -> list[PruningPlan]:
        """The plans, one per prefill graph."""
        return [entry.plan() for entry in self.plans]

    @property
    def has_language_model(self) -> bool:
        """Whether the bundle answers by itself, and does not only make visual tokens."""
        return not set(self.graphs) <= {"vision", "select"}

    def policy(self) -> Policy | None:
        """The policy that chooses among several plans; None if there is only one."""
        if self.adaptive is None:
            return None
        return Policy(tuple(self.adaptive.limits), self.adaptive.target_accuracy, self.adaptive.accuracy)


class _Version(msgspec.Struct):
    schema_version: int


def encode(manifest: Manifest) -> bytes:
    """`manifest` as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def decode(data: bytes, path: Path) -> Manifest:
    """Parse and validate manifest.json.

    Args:
        data: the file's bytes.
        path: where it lies.

    Raises:
        BundleError: not JSON, another schema version, or fields that are missing, unknown, of another type or range, or
            contradict each other.
    """
    try:
        version = parse_json(data, _Version).schema_version
    except Unreadable as error:
        raise BundleError(f"{path} is not a vtexport manifest ({error}); build the bundle again") from error
    if version != SCHEMA_VERSION:
        raise BundleError(_other_version(version, data, path))
    try:
        manifest: Manifest = parse_json(data, Manifest)
        _check(manifest)
    except (ValueError, InputError) as error:
        raise BundleError(f"{path} is damaged ({error}); build the bundle again") from error
    return manifest


def _other_version(version: int, data: bytes, path: Path) -> str:
    """What is wrong with a manifest of another schema version, and what to do."""
    wrong = f"{path} has schema version {version}, this vtexport reads version {SCHEMA_VERSION}"
    if version > SCHEMA_VERSION:
        return f"{wrong}; upgrade vtexport"
    command = build_command(parse_json(data, dict), path.parent)
    remedy = "build the bundle again with this vtexport"
    return f"{wrong}; {remedy}" if command is None else f"{wrong}; {remedy}: {command}"


def _check(manifest: Manifest) -> None:
    """Refuse entries that contradict each other, with a ValueError or an InputError."""
    for plan, entry in zip(manifest.pruning_plans(), manifest.plans, strict=True):
        told = entry.mean_visual_tokens, entry.mean_visual_tokens_sparsevlm
        means = plan.mean_visual_tokens, plan.mean_visual_tokens_sparsevlm
        if not all(math.isclose(one, two, rel_tol=1e-6) for one, two in zip(told, means, strict=True)):
            raise ValueError(f"a mean of {told[0]:g} visual tokens, its stages have {means[0]:g}")
    limits = [] if manifest.adaptive is None else manifest.adaptive.limits
    if len(manifest.plans) != 1 + len(limits):
        raise ValueError(f"{len(manifest.plans)} plans, {len(limits)} limits between them")
    if any(later > before for before, later in pairwise(limits)):
        raise ValueError("limits that ascend")
    paths = [entry.path for entry in manifest.files]
    if len(set(paths)) != len(paths):
        raise ValueError("a file that is listed twice")
    missing = sorted(set(manifest.target.graphs.values()) - set(paths))
    if missing:
        raise ValueError(f"target.graphs names {missing[0]!r}, which files do not list")
    if set(manifest.target.graphs) != set(manifest.graphs):
        raise ValueError("target.graphs and graphs name different graphs")
