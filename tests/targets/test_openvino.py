"""The target openvino: as ONNX Runtime answers, in fused kernels, with a state per layer; and what it refuses."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import MICRO, family_checkpoint, random_checkpoint
from tests.conftest import BuildBundle, check_refused, greedy, noise_images
from tests.graph.test_language import CASES as LANGUAGE_CASES
from tests.graph.test_language import plans_of
from vtexport.builder.engines import EngineSpec, Source, make_engines
from vtexport.check.compare import Checked, compare_engine
from vtexport.models import Checkpoint, read_spec
from vtexport.models.spec import ViewChoice
from vtexport.progress import Silent
from vtexport.runtime.request import Result
from vtexport.runtime.runner import Runner
from vtexport.targets import get_target
from vtexport.targets.language import LANGUAGE
from vtexport.targets.openvino.quantize import SCHEMES

pytest.importorskip("openvino", reason="the extra openvino is not installed")

QUESTIONS = (
    "how many digits are there?",
    "what digit is red?",
    "where is the seven, and what colour is it, please?",
    "is there a photograph?",
)
#: geometries of the decoder and the tower, with a method and a keep ratio each
GEOMETRIES: dict[str, tuple[dict[str, Any], str, float | None]] = {
    "grouped keys": ({}, "dense", None),
    "six heads": ({"text": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}}, "sparsevlm", 0.6),
    "heads of 20": ({"text": {"hidden_size": 80, "num_key_value_heads": 4, "num_hidden_layers": 5}}, "fastv", 0.6),
    "one key head": ({"text": {"num_attention_heads": 8, "num_key_value_heads": 1}}, "pyramiddrop", 0.6),
    "another tower": (
        {
            "text": {"hidden_size": 72, "num_attention_heads": 3, "num_key_value_heads": 3},
            "vision": {"hidden_size": 64, "num_attention_heads": 4, "image_size": 48},
        },
        "fastervlm+sparsevlm",
        0.6,
    ),
}
#: families and what is asked of them besides
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "visionzip": ("llava", {"method": "visionzip", "keep": 0.6}),
    "original positions": ("llava", {"method": "sparsevlm", "keep": 0.6, "method_options": {"positions": "original"}}),
    "rows of different lengths": (
        "llava_next-mistral",
        {"method": "sparsevlm", "keep": 0.7, "views": ViewChoice(grid="2x2")},
    ),
    "biases and tied weights": ("llava_onevision", {"method": "fastv", "keep": 0.6, "views": ViewChoice(grid="2x2")}),
    "a ranking given": ("llava", {"method": "dense", "keep": None, "give_ranking": True}),
}


def answers(bundle: Path, tokens: int = 8) -> list[Result]:
    """Answers of a ragged batch of four, whose images differ in shape."""
    runner = Runner.open(bundle)
    sizes = ((120, 90), (90, 110), (100, 100), (120, 110))
    pictures = [picture.resize(size) for picture, size in zip(noise_images(4), sizes, strict=True)]
    requests = [runner.request(picture, question) for picture, question in zip(pictures, QUESTIONS, strict=True)]
    return greedy(runner, requests, tokens)


def check_same(build_bundle: BuildBundle, model: Path, **options: Any) -> None:
    """Kept tokens and greedy tokens are those of ONNX Runtime, logits and rankings nearly."""
    options = {"self_check": False, **options}
    theirs = answers(build_bundle(model, **options))
    ours = answers(build_bundle(model, target="openvino", **options))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.token_ids == other.token_ids
        assert mine.kept.keys() == other.kept.keys()
        for where, kept in other.kept.items():
            np.testing.assert_array_equal(mine.kept[where], kept)
        assert mine.logits is not None
        assert other.logits is not None
        np.testing.assert_allclose(mine.logits, other.logits, atol=2e-4)
        if other.ranking is not None:
            assert mine.ranking is not None
            np.testing.assert_allclose(mine.ranking, other.ranking, atol=1e-4)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_random_geometries_answer_as_on_onnxruntime(name: str, build_bundle: BuildBundle, tmp_path: Path) -> None:
    geometry, method, keep = GEOMETRIES[name]
    model = random_checkpoint(tmp_path / "model", list(GEOMETRIES).index(name), **geometry)
    check_same(build_bundle, model, method=method, keep=keep)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if number < 2 else name for number, name in enumerate(CASES)]
)
def test_families_answer_as_on_onnxruntime(name: str, build_bundle: BuildBundle, tmp_path: Path) -> None:
    family, options = CASES[name]
    model = family_checkpoint(tmp_path / "model", family)
    check_same(build_bundle, model, **options)


@pytest.mark.parametrize("method", ["sparsevlm", pytest.param("dense", marks=pytest.mark.long)])
def test_micro_llava_answers_as_on_onnxruntime(method: str, build_bundle: BuildBundle) -> None:
    check_same(build_bundle, MICRO, method=method, keep=None if method == "dense" else 0.25)


@pytest.fixture(scope="module")
def bundle(build_bundle: BuildBundle) -> Path:
    """micro-llava with sparsevlm at 0.25, with its self-check."""
    return build_bundle(MICRO, 0.25, "sparsevlm", target="openvino")


def layer_types(runner: Runner) -> Counter[str]:
    """How many layers of each type the compiled language model has."""
    model = runner.engine.model(LANGUAGE).compiled.get_runtime_model()  # type: ignore[attr-defined]
    return Counter(str(node.get_rt_info()["layerType"].value) for node in model.get_ops())


def caches_of(runner: Runner, steps: int) -> list[Any]:
    """The cache of a ragged batch of two, once for every decode step."""
    requests = [
        runner.request(picture, question) for picture, question in zip(noise_images(2), QUESTIONS, strict=False)
    ]
    caches = []
    real = runner.engine.decode

    def seen(cache: Any, *given: Any) -> Any:
        caches.append(cache)
        return real(cache, *given)

    runner.engine.decode = seen  # type: ignore[method-assign]
    greedy(runner, requests, steps + 1)
    return caches


def text_of(runner: Runner) -> int:
    """Text tokens of the longer prompt of `caches_of`."""
    picture = noise_images(1)[0]
    return max(len(runner.request(picture, question).prompt.token_ids) for question in QUESTIONS[:2])


def test_parts_run_fused_and_every_layer_has_blocks_for_its_own_length(bundle: Path) -> None:
    runner = Runner.open(bundle)
    layers = runner.plan.num_layers
    types = layer_types(runner)
    assert types["PagedAttention"] == layers
    assert types["RMS"] == 2 * layers + 1
    assert types["RoPE"] == 2 * layers
    cache = caches_of(runner, 2)[0]
    text, per_layer = text_of(runner), runner.plan.per_layer
    firsts = [layer for layer, visual in enumerate(per_layer) if layer == 0 or visual != per_layer[layer - 1]]
    assert sorted(cache.tables) == firsts
    for first, tables in cache.tables.items():
        # Of 32 tokens each, for the longest prompt and all new tokens.
        assert [len(table) for table in tables] == 2 * [-(-(text + per_layer[first] + 3) // 32)]
    spec = runner.bundle.spec().decoder
    row = 2 * spec.num_kv_heads * spec.head_size * 4
    blocks = sum(2 * -(-(text + visual + 3) // 32) for visual in per_layer)
    assert cache.nbytes == 32 * row * blocks


def test_without_pages_every_layer_has_a_state_of_its_own_length(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on devices other than the CPU."""
    paged = answers(bundle)
    monkeypatch.setattr("vtexport.targets.openvino.engine.SUPPORTED", False)
    for mine, other in zip(answers(bundle), paged, strict=True):
        assert mine.token_ids == other.token_ids
        assert mine.logits is not None
        assert other.logits is not None
        np.testing.assert_allclose(mine.logits, other.logits, atol=2e-4)
    runner = Runner.open(bundle)
    assert layer_types(runner)["ScaledDotProductAttention"] == runner.plan.num_layers
    cache = caches_of(runner, 2)[0]
    lengths = {state.name: state.state.shape[2] for state in cache.request.query_state()}
    for layer, visual in enumerate(runner.plan.per_layer):
        assert lengths[f"key.{layer}"] == lengths[f"value.{layer}"] == text_of(runner) + visual + 2
    assert cache.nbytes == sum(state.state.byte_size for state in cache.request.query_state())


def test_blocks_go_back_and_are_taken_again(bundle: Path) -> None:
    runner = Runner.open(bundle)
    store = runner.engine.model(LANGUAGE).caches._stores[0]  # type: ignore[attr-defined]
    first, second = store.take(2, 40), store.take(1, 33)
    assert [table.tolist() for table in (*first, *second)] == [[0, 1], [2, 3], [4, 5]]
    held = store._arrays["key_cache.0"]
    held[:] = np.arange(6)[:, None, None, None]
    store.give(first)
    # Blocks in use stay what they are while the arrays grow.
    (longer,) = store.take(1, 32 * 5)
    assert longer.tolist() == [0, 1, 2, 3, 6]
    assert (store._arrays["key_cache.0"][4:6] == [[[[4]]], [[[5]]]]).all()
    assert len(store._arrays["key_cache.0"]) == 7
    # A batch that needs much less than is held lets the rest go.
    store.give([longer, *second])
    assert [table.tolist() for table in store.take(1, 1)] == [[0]]
    assert len(store._arrays["key_cache.0"]) == 1


def test_threads_share_an_engine(bundle: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    runner = Runner.open(bundle)
    asked = [(picture, QUESTIONS[number % 4]) for number, picture in enumerate(noise_images(8))]
    alone = [runner.ask([pair], 6)[0].text for pair in asked]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda pair: runner.ask([pair], 6)[0].text, asked)) == alone


def test_two_batches_at_once_keep_their_caches_apart(bundle: Path) -> None:
    runner = Runner.open(bundle)
    pictures = noise_images(2)
    apart = ["".join(runner.stream(picture, QUESTIONS[0], 6)) for picture in pictures]
    streams = [runner.stream(picture, QUESTIONS[0], 6) for picture in pictures]
    together = ["", ""]
    for _ in range(8):
        for row, stream in enumerate(streams):
            together[row] += next(stream, "")
    assert together == apart


#: of the language graph's cases, those that run every time
OFTEN = ("a ranking taken", "three buckets", "buckets that prune after different layers")


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.long) for name in LANGUAGE_CASES]
)
def test_buckets_and_rankings_share_one_graph(name: str, tmp_path: Path) -> None:
    """Every plan in turn, ragged rows, against transformers."""
    family, choice, method, keeps = LANGUAGE_CASES[name]
    folder = family_checkpoint(tmp_path / "model", family)
    plans, spec = plans_of(folder, choice, method, keeps), read_spec(folder, choice)
    place = tmp_path / "bundle"
    place.mkdir()
    target = get_target("openvino")
    engines = EngineSpec(plans, "fp32", debug=True, give_ranking=method == "dense")
    made = make_engines(Source("x", folder, folder, Checkpoint.open(folder), spec), engines, target, place, Silent())
    assert set(made.compiled.files) == {"vision", LANGUAGE}
    engine = target.open(place, made.compiled, plans, 1)
    checked = compare_engine(engine, "", Checked(folder, folder, spec), plans, "fp32", lambda: None)
    assert checked.same_kept
    assert checked.same_tokens


@pytest.mark.parametrize("bits", ["int8", pytest.param("int4", marks=pytest.mark.long)])
def test_quantised_weights_stay_compressed_and_answer_as_the_rounded_model(
    bits: str, build_bundle: BuildBundle
) -> None:
    """The self-check of the build compares with transformers on the rounded weights."""
    made = build_bundle(MICRO, 0.25, "sparsevlm", target="openvino", target_options={"quantize": bits})
    model = Runner.open(made).engine.model(LANGUAGE).compiled.get_runtime_model()  # type: ignore[attr-defined]
    held = Counter(str(node.get_rt_info()["outputPrecisions"].value) for node in model.get_ops())
    assert held[{"int8": "u8", "int4": "u4"}[bits]] >= 7 * 12


@pytest.mark.parametrize("bits", sorted(SCHEMES))
def test_no_weight_is_off_by_more_than_half_a_step(bits: str) -> None:
    scheme, weight = SCHEMES[bits], np.random.default_rng(0).normal(size=(5, 256)).astype(np.float32)
    scales = scheme.encode(weight)[2]
    off = np.abs(scheme.rounded(weight) - weight).reshape(5, -1, 128)
    # Rounding the zero point as well may cost the ends of the range up to another half.
    assert (off <= 1.01 * scales).all()
    assert (scheme.rounded(np.zeros((2, 64), np.float16)) == 0).all()


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.long)])
def test_other_formats_compute_in_fp32_where_the_cpu_lacks_them(dtype: str, vtexport: Any, photo: Path) -> None:
    from vtexport.targets.openvino.settings import computes_in

    options = ["--method", "fastv", "--keep", "0.5", "--target", "openvino", "--dtype", dtype, "--out", "made"]
    built = vtexport("build", "--model", MICRO, *options)
    assert built.code == 0, built.err
    assert ("does not compute in" in built.err) == (computes_in("CPU", dtype) == "fp32")
    assert vtexport("run", "made", "--image", photo, "--prompt", QUESTIONS[0]).code == 0


def test_commands_take_its_bundles(bundle: Path, vtexport: Any, photo: Path) -> None:
    done = vtexport("run", bundle, "--image", photo, "--prompt", QUESTIONS[0], "--json")
    assert json.loads(done.out)["stages"][0]["where"].startswith("decoder.")
    done = vtexport("profile", bundle, "--runs", 1, "--new-tokens", 2, "--layers", 999, "--json", "report.json")
    assert done.code == 0, done.err
    layers = json.loads(Path("report.json").read_text())["layers"]
    assert set(layers) == {"vision", LANGUAGE}
    assert any("PagedAttentionExtension" in name for name in layers[LANGUAGE])
    done = vtexport("eval", bundle, "--limit", 2, "--json")
    assert done.code == 0, done.err


def test_a_device_that_is_not_here_is_refused(vtexport: Any, tmp_path: Path) -> None:
    done = vtexport("build", "--model", MICRO, "--target", "openvino", "--method", "dense", "--device", "TPU")
    check_refused(done, "--device TPU: OpenVINO has no such device here; choose from CPU", tmp_path)
    available = get_target("openvino", {"device": "TPU"}).can_run()
    assert not available.works
    assert "no device TPU here" in available.reason


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "openvino" else found(name, *more)
    )
    available = get_target("openvino").can_run()
    assert not available.works
    assert "pip install 'vtexport[openvino]'" in available.reason


def test_a_damaged_graph_is_one_line(bundle: Path, tmp_path: Path) -> None:
    import shutil

    from vtexport.errors import BundleError

    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    graph = copy / "engine" / "language.onnx"
    # Damaged before the bundle is opened, it is found by its hash.
    engine = Runner.open(copy).engine
    graph.write_bytes(b"\xff" * graph.stat().st_size)
    with pytest.raises(BundleError, match=r"language.onnx cannot be read .*; build the bundle again"):
        engine.load()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_of_mapped_files_are_given_back(tmp_path: Path) -> None:
    from vtexport.targets.openvino.memory import Released

    path = tmp_path / "weights"
    path.write_bytes(b"\1" * (8 << 20))
    mapped = np.memmap(path, mode="r")

    def resident() -> int:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
        start = next(number for number, line in enumerate(lines) if line.endswith(str(path)))
        return next(int(line.split()[1]) for line in lines[start:] if line.startswith("Rss:"))

    assert mapped.sum() == 8 << 20
    assert resident() > 0
    with Released(tmp_path):
        pass
    assert resident() == 0
    assert mapped.sum() == 8 << 20
