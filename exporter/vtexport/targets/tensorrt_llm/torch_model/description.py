"""What a bundle says of itself to the Python that runs TensorRT-LLM: geometry, plans and RoPE, as one JSON file.

TensorRT-LLM 1.2 comes with a transformers that is older than vtexport reads config.json with, so that nothing is read
from config.json there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from vtexport.errors import BundleError, InputError
from vtexport.models.spec import ITEMSIZE, ClipSpec, DecoderSpec, ModelSpec, ViewChoice, ViewSpec, VisionSpec
from vtexport.options import parse_options
from vtexport.pruning import PruningPlan, Stage, choose
from vtexport.pruning.geometry import Geometry
from vtexport.reading import read_json

#: where the file lies in a bundle
FOLDER, FILE = "vtexport_llava", "bundle.json"
_SCHEMA = 1


@dataclass(frozen=True)
class Description:
    """A bundle for TensorRT-LLM.

    Attributes:
        spec: the model's geometry.
        plans: its plans; several if every image gets one of them.
        dtype: "fp16", "bf16" or "fp32", that of the vision stage.
        frequencies: RoPE's inverse frequencies [D / 2], as transformers computes them from config.json.
        attention_scaling: the factor that RoPE's type puts on its cosines and sines.
        debug: whether the vision stage gives its scores.
    """

    spec: ModelSpec
    plans: Sequence[PruningPlan]
    dtype: str
    frequencies: Sequence[float]
    attention_scaling: float
    debug: bool = False

    @property
    def plan(self) -> PruningPlan:
        """The plan; if there are several, the one with the most tokens."""
        return self.plans[0]

    @property
    def takes_images(self) -> bool:
        """Whether TensorRT-LLM may be given images; otherwise only embeddings, made by `prompts` of this target."""
        return len(self.plans) == 1 and not self.plan.methods.vision.extras

    def write(self, folder: Path) -> None:
        """Write the file into the bundle `folder`."""
        place = folder / FOLDER
        place.mkdir(exist_ok=True)
        data = {
            "schema": _SCHEMA,
            "spec": asdict(self.spec),
            "plans": [_written(plan) for plan in self.plans],
            "dtype": self.dtype,
            "debug": self.debug,
            "rope": {"frequencies": list(self.frequencies), "attention_scaling": self.attention_scaling},
        }
        (place / FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Description:
        """Read the file of the bundle `folder`.

        Raises:
            BundleError: there is none, or it is damaged or of another version.
        """
        path = folder / FOLDER / FILE
        try:
            data = read_json(path, kind=dict[str, Any])
            if data["schema"] != _SCHEMA:
                raise BundleError(
                    f"{path} has schema {data['schema']}, not {_SCHEMA}; install the vtexport that made it"
                )
            rope, plans = data["rope"], [_read(plan) for plan in data["plans"]]
            rotation = rope["frequencies"], rope["attention_scaling"]
            found = cls(_spec(data["spec"]), plans, data["dtype"], *rotation, data["debug"])
            found._check()
            return found
        except (ValueError, KeyError, TypeError, AttributeError, msgspec.ValidationError, InputError) as error:
            raise BundleError(f"{path} is missing or damaged ({error}); build the bundle again") from error

    def _check(self) -> None:
        """Refuse with a ValueError what modules cannot be made from."""
        geometry, pairs = Geometry.of(self.spec), self.spec.decoder.head_size // 2
        if self.dtype not in ITEMSIZE or not isinstance(self.debug, bool) or not self.plans:
            raise ValueError("no plan, or an unknown dtype")
        for plan in self.plans:
            if (plan.num_visual_tokens, plan.num_layers) != (geometry.tokens, geometry.layers):
                raise ValueError("a plan for another model")
        numbers = msgspec.convert([self.attention_scaling, *self.frequencies], list[float])
        if len(numbers) > 1 + pairs or not all(map(math.isfinite, numbers)):
            raise ValueError("frequencies of another model")


def _written(plan: PruningPlan) -> dict[str, Any]:
    kept = {name: value for name, value in vars(plan).items() if name not in ("methods", "stages")}
    return {**kept, "method": plan.method, "options": plan.options, "stages": [asdict(stage) for stage in plan.stages]}


def _read(entry: Mapping[str, Any]) -> PruningPlan:
    given = dict(entry)
    methods = choose(given.pop("method"), given.pop("options"), resolved=True)
    stages = msgspec.convert(given.pop("stages"), tuple[Stage, ...])
    numbers: dict[str, Any] = msgspec.convert(given, dict[str, int | float])
    return PruningPlan(methods=methods, stages=stages, **numbers)


def _spec(entry: Mapping[str, Any]) -> ModelSpec:
    types = {"vision": VisionSpec, "decoder": DecoderSpec, "clip": ClipSpec | None, "views": ViewSpec}
    parts = {name: msgspec.convert(entry[name], kind) for name, kind in types.items()}
    parts["eos_token_ids"] = msgspec.convert(entry["eos_token_ids"], tuple[int, ...])
    parts["choice"] = parse_options(ViewChoice, entry["choice"], "this bundle")
    return ModelSpec(**{**entry, **parts})
