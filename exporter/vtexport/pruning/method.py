"""The base class of pruning methods, and the choice of one or two methods that a plan applies."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, TypeVar

from vtexport.options import Meta, Option, option_values, parse_options
from vtexport.pruning.extra import Extra

if TYPE_CHECKING:
    from vtexport.models.spec import ModelSpec
    from vtexport.pruning.decoder import DecoderMethod
    from vtexport.pruning.vision import VisionMethod

Self = TypeVar("Self", bound="Method")


@dataclass(frozen=True)
class Method:
    """A pruning method with its options.

    To add a method, write a subclass of `VisionMethod` or `DecoderMethod` in a file of its own: a frozen dataclass
    whose annotated fields are the options (`vtexport.options`). Then list it in `vtexport.pruning.registry.METHODS`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    #: whether the method rates tokens, so that a debug build has scores to give out
    scores: ClassVar[bool] = False
    #: inputs that its graphs take besides images and prompts
    extras: ClassVar[tuple[Extra, ...]] = ()
    #: whether its schedule uses a calibration
    calibrated: ClassVar[bool] = False
    #: whether `vtexport calibrate --method` can measure it, as `--keep auto` needs
    adaptive: ClassVar[bool] = True

    @classmethod
    def parse(cls: type[Self], given: Mapping[str, object]) -> Self:
        """The method with the options in `given`; the other options have their defaults.

        Raises:
            InputError: an option that the method does not have, or a value that the option cannot have.
        """
        return parse_options(cls, given, f"method {cls.name}")

    def check_given(self, given: Collection[str]) -> None:
        """Refuse options that a user gave although they have no effect together with the others.

        Raises:
            InputError: an option in `given` has no effect.
        """

    @classmethod
    def check_model(cls, spec: ModelSpec) -> None:
        """Refuse a model that the method cannot prune.

        Raises:
            InputError: the method cannot prune this model.
        """


@dataclass(frozen=True)
class Combination:
    """The options of a vision-stage and a decoder-stage method together."""

    vision_keep: Annotated[
        float | None,
        Meta(
            gt=0,
            le=1,
            description="Share of the visual tokens that the first of two methods keeps; the second prunes the rest.",
            extra={"default": "the square root of --keep"},
        ),
    ] = None


@dataclass(frozen=True)
class MethodChoice:
    """The methods of a plan, options resolved: a vision-stage one (`dense` for none), a decoder-stage one, or both."""

    vision: VisionMethod
    decoder: DecoderMethod | None = None
    combination: Combination | None = None

    @property
    def name(self) -> str:
        """The name of the method, or of both as `a+b`."""
        if self.decoder is None:
            return self.vision.name
        return self.decoder.name if self.combination is None else f"{self.vision.name}+{self.decoder.name}"

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods."""
        return (self.vision,) if self.decoder is None else (self.vision, self.decoder)

    @property
    def options(self) -> dict[str, Option]:
        """The options of all parts by name."""
        values: dict[str, Option] = {}
        for part in (*self.parts, self.combination):
            if part is not None:
                values |= option_values(part)
        return values
