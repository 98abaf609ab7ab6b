"""The properties of a model that a plan depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtexport.models.spec import ModelSpec


@dataclass(frozen=True)
class Geometry:
    """The numbers of a model that decide what a method can keep.

    Attributes:
        tokens: visual tokens per prompt before pruning, leading ones and newlines included.
        layers: decoder layers.
        leading: tokens before a view's patches that always stay (CLS under strategy `full`).
        views: views per prompt.
        newlines: greatest number of newline tokens per prompt.
        tower_layers: layers of the vision tower up to the feature layer; None if no method needs them.
        model: the model itself; None if only its sizes are known.
    """

    tokens: int
    layers: int
    leading: int = 0
    views: int = 1
    newlines: int = 0
    tower_layers: int | None = None
    model: ModelSpec | None = None

    @classmethod
    def of(cls, spec: ModelSpec) -> Geometry:
        """The geometry of `spec`."""
        return cls(
            tokens=spec.num_visual_tokens,
            layers=spec.decoder.num_layers,
            leading=spec.vision.leading,
            views=spec.views.total,
            newlines=spec.views.images * spec.views.newlines,
            tower_layers=spec.vision.feature_layer,
            model=spec,
        )
