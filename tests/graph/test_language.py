"""The language graph, prefill and decode of all plans in one, against transformers; and the profiles it is built for."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from tests.checkpoints import MICRO, family_checkpoint
from vtexport.builder.engines import EngineSpec, Source, make_engines
from vtexport.check.compare import Checked, compare_engine
from vtexport.graph.export import trace_language
from vtexport.models import Checkpoint, read_spec
from vtexport.models.spec import ViewChoice
from vtexport.progress import Silent
from vtexport.pruning import Geometry, PruningPlan, make_plan
from vtexport.pruning.decoder import slots
from vtexport.targets.base import CompileJob
from vtexport.targets.language import LANGUAGE
from vtexport.targets.onnxruntime.check import OnnxRuntimeCheck
from vtexport.targets.tensorrt.profiles import Limits, profiles_of

ROOM = 80
SPLIT = ViewChoice(images=2, grid="2x1")
CASES = {
    "a ranking given out": ("llava", ViewChoice(), "dense", (1.0,)),
    "a ranking taken": ("llava", ViewChoice(), "sgl", (0.6,)),
    "three buckets": ("llava", ViewChoice(), "sparsevlm", (0.9, 0.75, 0.6)),
    "buckets that prune after different layers": ("llava", ViewChoice(), "exit", (0.8, 0.5)),
    "buckets of vision and decoder": ("llava", ViewChoice(), "fastervlm+sparsevlm", (0.6, 0.4)),
    "images of different sizes": ("llava_next-mistral", SPLIT, "sparsevlm", (0.9, 0.7)),
    "two images": ("llava", ViewChoice(images=2), "pyramiddrop", (0.7,)),
    "tied weights, four views": ("llava_onevision", ViewChoice(grid="2x2"), "fastv", (0.6,)),
}


def plans_of(folder: Path, choice: ViewChoice, method: str, keeps: tuple[float, ...]) -> list[PruningPlan]:
    geometry = Geometry.of(read_spec(folder, choice))
    return [make_plan(method, geometry, keep=keep) for keep in keeps]


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    """Prompts behind empty caches, then single tokens without any image; ragged rows, each plan in turn."""
    family, choice, method, keeps = CASES[name]
    folder = family_checkpoint(tmp_path / "model", family)
    plans, spec = plans_of(folder, choice, method, keeps), read_spec(folder, choice)
    place = tmp_path / "bundle"
    place.mkdir()
    runtime = OnnxRuntimeCheck(room=ROOM)
    engines = EngineSpec(plans, "fp32", debug=True, give_ranking=method == "dense")
    made = make_engines(Source("x", folder, folder, Checkpoint.open(folder), spec), engines, runtime, place, Silent())
    assert set(made.ports) == {"vision", LANGUAGE}
    engine = runtime.open(place, made.compiled, plans, 0)
    checked = compare_engine(engine, "", Checked(folder, folder, spec), plans, "fp32", lambda: None)
    assert checked.same_kept
    assert checked.same_tokens


def job_of(plans: list[PruningPlan]) -> CompileJob:
    spec = read_spec(MICRO)
    model = trace_language(spec, plans, "fp16", room=ROOM).model

    def unheard(*_: object) -> None: ...

    return CompileJob(Path(), {LANGUAGE: model}, spec, plans, "fp16", Path(), unheard, unheard, unheard)


def test_its_weights_exist_once_and_its_caches_are_as_large_as_the_largest_plan_needs() -> None:
    plans = plans_of(MICRO, ViewChoice(), "sparsevlm", (0.5, 0.25))
    graph = job_of(plans).models[LANGUAGE].graph
    assert len(graph.initializers) == len(
        trace_language(read_spec(MICRO), plans[:1], "fp16", room=9).model.graph.initializers
    )
    room = {value.name: value.shape[2] for value in graph.inputs if value.name.startswith("past.")}
    for layer, most in enumerate(map(max, *(plan.per_layer for plan in plans))):
        assert room[f"past.{layer}.key"] == room[f"past.{layer}.value"] == most + ROOM
    assert all(isinstance(value.type, ir.TensorType) for value in graph.outputs)


def test_every_bucket_and_decode_have_a_profile() -> None:
    plans = plans_of(MICRO, ViewChoice(), "fastervlm+sparsevlm", (0.5, 0.25))
    profiles = profiles_of(job_of(plans), LANGUAGE, Limits(max_batch=3, max_text=ROOM))
    assert len(profiles) == 3
    for plan, profile in zip(plans, profiles, strict=False):
        assert [shape[1] for shape in profile["visual"]] == [plan.vision_tokens] * 3
        assert [shape[0] for shape in profile["input_ids"]] == [1, 1, 3]
        assert [shape[1] for shape in profile["input_ids"]] == [1, 48, ROOM]
        for name, length in slots(plans, plan).items():
            assert profile[name] == ((length,),) * 3
    decode = profiles[-1]
    assert [shape[1] for shape in decode["visual"]] == [0] * 3
    assert [shape[1] for shape in decode["input_ids"]] == [1] * 3
    assert all(decode[name] == ((0,),) * 3 for name in slots(plans, plans[0]))
    assert {name for name in profiles[0] if name.startswith("slots.")} == set(slots(plans, plans[0]))
