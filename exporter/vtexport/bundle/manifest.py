"""The schema of manifest.json, which describes a bundle and is validated whenever one is opened."""

from __future__ import annotations

from typing import Any

import msgspec

from vtexport.errors import BundleError, InputError
from vtexport.options import Option
from vtexport.pruning import choose
from vtexport.pruning.adaptive import Policy
from vtexport.pruning.plan import PruningPlan, Stage

SCHEMA_VERSION = 6
MANIFEST = "manifest.json"


class ViewsEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a prompt's images become views: `vtexport.models.spec.ViewSpec`, and the options that were given for it."""

    images: int
    views: int
    tiles: list[int] | None
    newlines: int
    asked: dict[str, str | int]


class ModelEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The checkpoint: the name given to the build, its config.json, and its end tokens."""

    name: str
    family: str
    config: dict[str, Any]
    image_token_id: int
    eos_token_ids: list[int]
    image_size: int
    grid: int
    views: ViewsEntry
    vocabulary: int
    max_positions: int


class StageEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stage of the plan: `vtexport.pruning.Stage`."""

    where: str
    tokens_in: int
    kept: int
    recycled: int


class PlanEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A plan: `vtexport.pruning.PruningPlan`, and its mean numbers of visual tokens."""

    method: str
    keep: float
    num_visual_tokens: int
    num_layers: int
    leading: int
    views: int
    newlines: int
    stages: list[StageEntry]
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

    limits: list[float]
    target_accuracy: float
    accuracy: float


class TargetEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The target of the bundle, with options, versions and the file of each graph."""

    name: str
    dtype: str
    options: dict[str, Option]
    versions: dict[str, str]
    facts: dict[str, Option]
    graphs: dict[str, str]


class PortEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output of a graph; named extents are dynamic."""

    name: str
    dtype: str
    shape: list[str | int]


class GraphEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Inputs and outputs of a graph, in order."""

    inputs: list[PortEntry]
    outputs: list[PortEntry]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the bundle; `path` is relative to the bundle's folder."""

    path: str
    bytes: int
    sha256: str


class VerificationEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The result of the self-check; see `vtexport.check.compare`.

    `rounded_logit_error` is that of the engine as it runs, if that rounds activations to 8 bits; all else was compared
    without that.
    """

    ran: str
    against: str
    samples: int
    tokens: int
    same_kept: bool
    same_tokens: bool
    max_logit_error: float
    tolerance: float
    rounded_logit_error: float | None = None


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of manifest.json; of several plans, from most to fewest tokens, `adaptive` chooses one per image."""

    schema_version: int
    vtexport: str
    model: ModelEntry
    plans: list[PlanEntry]
    adaptive: AdaptiveEntry | None
    target: TargetEntry
    graphs: dict[str, GraphEntry]
    debug: bool
    gives_ranking: bool
    verification: VerificationEntry | None
    files: list[FileEntry]

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


def decode(data: bytes, where: str) -> Manifest:
    """Parse and validate manifest.json.

    Args:
        data: the file's bytes.
        where: its path, for messages.

    Raises:
        BundleError: not JSON, another schema version, or fields that are missing, unknown or of another type.
    """
    try:
        version = msgspec.json.decode(data, type=_Version).schema_version
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{where} is not a vtexport manifest ({error}); build the bundle again") from error
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{where} has schema version {version}, this vtexport reads version {SCHEMA_VERSION}; "
            "build the bundle again with this vtexport"
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
        plans, choices = manifest.pruning_plans(), [] if manifest.adaptive is None else manifest.adaptive.limits
        if len(plans) != 1 + len(choices):
            raise ValueError(f"{len(plans)} plans, {len(choices)} limits between them")
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, InputError) as error:
        raise BundleError(f"{where} is damaged ({error}); build the bundle again") from error
    return manifest
