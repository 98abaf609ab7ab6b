"""The options of a build, and the checks of them before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from vtexport.errors import InputError, TargetError
from vtexport.models.spec import ViewChoice
from vtexport.options import Meta, Option, validate
from vtexport.pruning import DEFAULT_METHOD, METHODS, Method, MethodChoice, choose, parts_of
from vtexport.pruning.adaptive import AUTO, DEFAULT_BUCKETS, DEFAULT_TARGET_ACCURACY, check_buckets
from vtexport.targets import DEFAULT_TARGET, TARGETS, Target, get_target

_METHOD = "Pruning method, or a vision-stage and a decoder-stage method as A+B; `vtexport list` describes them."


@dataclass(frozen=True)
class BuildOptions:
    """The options of `vtexport build`; every default is the command line's.

    Attributes:
        model: a recipe's name (`vtexport list`), a checkpoint's folder, or a hub id.
        keep: share of the visual tokens kept, in (0, 1], as the mean over the decoder's layers; "auto" to choose it for
            every image; None for `dense`, and where a method's option decides it (`schedule`, `layers` of exit).
        method: a key of `vtexport.pruning.METHODS`, or a vision-stage and a decoder-stage method as `a+b`.
        target: a key of `vtexport.targets.TARGETS`.
        dtype: "fp32", "fp16" or "bf16"; None for the recipe's, else the checkpoint's own (bf16 becomes fp16).
        method_options: the methods' own options, by name (docs/methods.md).
        target_options: the target's own options, by name.
        views: how a prompt's images become views, where the model leaves a choice.
        buckets: with keep "auto", the keep ratios to choose from; None for 0.5, 0.25 and 0.125.
        target_accuracy: with keep "auto", the share of the dense model's answers that must stay as they are at
            calibration; None for 0.97.
        calibration: a file of `vtexport calibrate`; None for the recipe's, if it carries one.
        give_ranking: also output how much each visual token was attended to, for `Runner.open(ranking_from=…)`.
        debug: also output scores, raters and clusters.
        self_check: compare the engines with transformers before the bundle gets its name.

    Raises:
        InputError: a value is invalid.
    """

    model: str
    keep: Annotated[
        float | Literal["auto"] | None,
        Meta(
            description="Share of the visual tokens to keep, as the mean over the decoder's layers; auto chooses it for "
            "every image.",
            extra={"metavar": "RATIO|auto"},
        ),
    ] = None
    method: Annotated[str, Meta(description=_METHOD, extra={"metavar": "NAME", "names": tuple(METHODS)})] = (
        DEFAULT_METHOD
    )
    target: Annotated[
        str, Meta(description="Runtime to build for.", extra={"metavar": "NAME", "names": tuple(TARGETS)})
    ] = DEFAULT_TARGET
    dtype: Annotated[
        Literal["fp32", "fp16", "bf16"] | None,
        Meta(
            description="Number format of weights and activations.",
            extra={"default": "the recipe's, or the checkpoint's own, bf16 as fp16"},
        ),
    ] = None
    method_options: Mapping[str, Option] = field(default_factory=dict)
    target_options: Mapping[str, Option] = field(default_factory=dict)
    views: ViewChoice = field(default_factory=ViewChoice)
    buckets: Annotated[
        tuple[float, ...] | None,
        Meta(
            description="The keep ratios that --keep auto chooses from.",
            extra={"metavar": "LIST", "default": ",".join(map(str, DEFAULT_BUCKETS))},
        ),
    ] = None
    target_accuracy: Annotated[
        float | None,
        Meta(
            gt=0,
            le=1,
            description="Share of the dense model's answers that --keep auto must leave as they are.",
            extra={"default": str(DEFAULT_TARGET_ACCURACY)},
        ),
    ] = None
    calibration: Annotated[
        Path | None,
        Meta(
            description="File written by vtexport calibrate: ranks and layers for schedules, tables for --keep auto.",
            extra={"metavar": "FILE", "default": "the recipe's"},
        ),
    ] = None
    give_ranking: Annotated[
        bool, Meta(description="Let a dense bundle rank visual tokens for another bundle (method sgl).")
    ] = False
    debug: Annotated[bool, Meta(description="Let the engines also output scores, raters and clusters.")] = False
    self_check: bool = True

    def __post_init__(self) -> None:
        validate(self, "vtexport build")
        if self.buckets is not None:
            check_buckets(self.buckets)

    @property
    def parts(self) -> tuple[type[Method], ...]:
        """The method that `method` names, or both.

        Raises:
            InputError: an unknown method, or two that cannot be combined.
        """
        parts_of(self.method)
        return tuple(METHODS[name] for name in self.method.split("+"))

    @cached_property
    def methods(self) -> MethodChoice:
        """The methods with their options; those that a plan fills in are not set yet.

        Raises:
            InputError: see `parts`; or an option that none of them has, or an invalid value.
        """
        return choose(self.method, self.method_options)

    @property
    def adaptive(self) -> bool:
        """Whether the keep ratio is chosen for every image."""
        return self.keep == AUTO

    @cached_property
    def chosen_target(self) -> Target:
        """The target with its options.

        Raises:
            InputError: an unknown target, or an option that it does not have.
        """
        return get_target(self.target, self.target_options)

    def check(self) -> None:
        """Refuse what cannot be built here, before any work.

        Raises:
            InputError: an option that is invalid or has no effect with the others.
            TargetError: the target cannot build on this machine.
        """
        target = self.chosen_target
        if self.dtype is not None and self.dtype not in target.dtypes:
            raise InputError(
                f"target {target.name} has no dtype {self.dtype!r}; choose one of {', '.join(target.dtypes)}"
            )
        self._check_method()
        available = target.can_build()
        if not available.works:
            raise TargetError(f"target {target.name} cannot build here: {available.reason}")
        target.check_given(self.target_options)
        target.check()
        scheme = target.scheme()
        if self.dtype == "bf16" and scheme is not None and not scheme.takes_bf16:
            raise InputError(
                f"--quantize rounds weights in fp16 or fp32 for target {target.name}, not bf16; give another --dtype"
            )

    def _check_method(self) -> None:
        # Parsed here, so that a wrong option is refused before a model is looked for.
        methods = self.methods
        if self.adaptive:
            fixed = next((part.name for part in self.parts if not part.adaptive), None)
            if fixed is not None:
                raise InputError(f"--keep auto cannot go with method {fixed}, which cannot be calibrated; give a ratio")
        else:
            for flag, value in (("buckets", self.buckets), ("target-accuracy", self.target_accuracy)):
                if value is not None:
                    raise InputError(f"--{flag} has no effect without --keep auto; leave it out")
        if self.debug and not any(part.scores for part in self.parts):
            raise InputError(f"--debug has no effect with method {methods.name}, which rates no tokens; leave it out")
        if self.give_ranking and self.method != "dense":
            raise InputError(f"--give-ranking ranks every visual token, but method {self.method} drops some; use dense")
