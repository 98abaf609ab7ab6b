"""Triton's model repositories.

    OUT/models/vtexport/config.pbtxt     answers questions, in Triton's Python backend
    OUT/models/vtexport/1/model.py
    OUT/models/vtexport/1/bundle/        the bundle
    OUT/graphs/vtexport_vision/          the plain graphs, in Triton's own backends, where these can run them
    OUT/graphs/vtexport_language/

Two repositories, so that a server for questions does not hold the weights a second time for the plain graphs.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import ClassVar

from vtexport.bundle.folder import Bundle
from vtexport.bundle.manifest import MANIFEST
from vtexport.deploy.base import Road
from vtexport.deploy.triton.config import ModelConfig, Port, graph_ports
from vtexport.errors import InputError
from vtexport.targets.language import LANGUAGE

#: target -> Triton's backend for its graphs, if there is one
_BACKENDS = {"onnxruntime": "onnxruntime", "openvino": None, "tensorrt": "tensorrt"}
#: requests answered together at most, where the engine has no limit of its own
_BATCH = 8
#: how long a request may wait for others, in microseconds
_WAIT = 5000
_MODEL = '''"""Answers questions about images with the bundle beside this file, through vtexport."""

from pathlib import Path

from vtexport.deploy.triton.backend import Answering


class TritonPythonModel(Answering):
    """What Triton's Python backend looks for."""

    bundle = Path(__file__).parent / "bundle"
'''


class TritonRoad(Road):
    """Triton Inference Server's model repositories."""

    name: ClassVar[str] = "triton"
    summary: ClassVar[str] = "Triton Inference Server's model repository"

    def check(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        if manifest.target.name not in _BACKENDS:
            raise InputError(
                f"{bundle.folder} was built for {manifest.target.name}, which has no road to Triton; build it with "
                "--target onnxruntime, openvino or tensorrt"
            )
        for part in manifest.pruning_plans()[0].methods.parts:
            for extra in part.extras:
                if extra.of_questions(bundle.processor_folder, bundle.spec()) is None:
                    raise InputError(
                        f"{bundle.folder} prunes by another bundle's ranking (method {manifest.plans[0].method}), and a "
                        "model of Triton's has one bundle; build with another --method"
                    )

    def write(self, bundle: Bundle, folder: Path) -> str:
        kind = "KIND_GPU" if bundle.manifest.target.name == "tensorrt" else "KIND_CPU"
        rows = bundle.target().largest_batch or _BATCH
        version = folder / "models" / "vtexport" / "1"
        for path in [MANIFEST, *(entry.path for entry in bundle.manifest.files)]:
            _place(bundle.folder / path, version / "bundle" / path)
        (version / "model.py").write_text(_MODEL, encoding="utf-8")
        (version.parent / "config.pbtxt").write_text(_answering(bundle, rows, kind), encoding="utf-8")
        for name in _servable(bundle):
            _write_graph(bundle, name, version / "bundle", folder / "graphs", rows, kind)
        return "tritonserver --model-repository OUT/models"


def _answering(bundle: Bundle, rows: int, instances: str) -> str:
    """The configuration of the model that answers questions."""
    inputs = [
        Port("IMAGE", "TYPE_STRING", [bundle.spec().views.pictures]),
        Port("PROMPT", "TYPE_STRING", optional=True),
        Port("MESSAGES", "TYPE_STRING", optional=True),
        Port("MAX_NEW_TOKENS", "TYPE_INT32", optional=True),
        Port("STREAM", "TYPE_BOOL", optional=True),
    ]
    outputs = [
        Port("TEXT", "TYPE_STRING"),
        Port("TOKEN_IDS", "TYPE_INT32", [-1]),
        Port("FINISHED", "TYPE_BOOL"),
        Port("FINISH_REASON", "TYPE_STRING"),
        Port("VISUAL_TOKENS", "TYPE_FP32"),
    ]
    more = [
        "model_transaction_policy { decoupled: true }",
        f"dynamic_batching {{ max_queue_delay_microseconds: {_WAIT} }}",
        'parameters { key: "threads" value { string_value: "0" } }',
    ]
    return ModelConfig("vtexport", "python", rows, inputs, outputs, instances, more).text()


def _servable(bundle: Bundle) -> list[str]:
    """The graphs that Triton's own backends can run.

    OpenVINO's bundles have nodes that only vtexport's reader knows. TensorRT's language plan updates its KV cache in
    place, for which Triton has no ports; a plan without its weights takes them only from vtexport's runner.
    """
    target = bundle.target()
    if target.name == "onnxruntime":
        return list(bundle.manifest.graphs)
    if target.name == "tensorrt" and not getattr(target, "strip_weights", False):
        return [name for name in bundle.manifest.graphs if name != LANGUAGE]
    return []


def _write_graph(bundle: Bundle, name: str, source: Path, repository: Path, rows: int, instances: str) -> None:
    """A plain graph as a model of its own; its files are those of the bundle in `source`."""
    target = bundle.manifest.target
    file, model = Path(target.graphs[name]), repository / f"vtexport_{name}"
    for path in [file, *_weights(source / file)]:
        _place(source / path, model / "1" / path.name)
    batched, inputs, outputs = graph_ports(bundle.manifest.graphs[name])
    backend = _BACKENDS[target.name]
    assert backend is not None, "only servable graphs are written"
    more = [f'default_model_filename: "{file.name}"']
    config = ModelConfig(model.name, backend, rows if batched else 0, inputs, outputs, instances, more)
    (model / "config.pbtxt").write_text(config.text(), encoding="utf-8")


def _weights(graph: Path) -> list[Path]:
    """The files that an ONNX graph points into, from the bundle's folder."""
    if graph.suffix != ".onnx":
        return []
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    tensors = onnx.load(str(graph), load_external_data=False).graph.initializer
    names = {ExternalDataInfo(tensor).location for tensor in tensors if uses_external_data(tensor)}
    return [Path(graph.parent.name) / name for name in sorted(names)]


def _place(source: Path, destination: Path) -> None:
    """Link `source`, or copy it from another file system."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), destination)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, destination)
