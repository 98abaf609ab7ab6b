"""What quantising the decoder's weights costs micro-llava, dense and pruned: the README's table.

    python benchmarks/quantized.py [--limit N] [--workers 2] [--json FILE]

Prints a Markdown table of exact match on held-out questions; the last line is one JSON object. The columns of ONNX Runtime
and OpenVINO are their own bundles. TensorRT's plans need a GPU to run, so its columns are plain bundles of a checkpoint with its
dequantised weights: the rounding is TensorRT's, the arithmetic fp32.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from accuracy import Job, measure
from rich.progress import track
from safetensors.numpy import load_file, save_file

from vtexport.cli.console import stderr
from vtexport.micro.heldout import NUM_QUESTIONS
from vtexport.models import resolve_model
from vtexport.targets.onnxruntime.quantize import SCHEMES as ONNXRUNTIME
from vtexport.targets.openvino.quantize import SCHEMES as OPENVINO
from vtexport.targets.quantize import Scheme
from vtexport.targets.tensorrt.quantize import SCHEMES as TENSORRT

SIDES = (("dense", 1.0), ("sparsevlm", 0.44), ("sparsevlm", 0.33), ("fastervlm", 0.25), ("fastervlm", 0.15))


def rounded_checkpoint(folder: Path, scheme: Scheme) -> Path:
    """micro-llava in `folder`, its decoder's linear layers rounded by `scheme`."""
    shutil.copytree(resolve_model("micro-llava"), folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "language_model" in name and ".layers." in name and tensor.ndim == 2:
            tensors[name] = scheme.rounded(tensor.astype(np.float32))
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=NUM_QUESTIONS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        columns = {"fp32": Job("", 0)}
        columns |= {f"{kind}, ONNX Runtime": Job("", 0, quantize=kind) for kind in ONNXRUNTIME}
        columns |= {f"{kind}, OpenVINO": Job("", 0, quantize=kind, target="openvino") for kind in OPENVINO}
        for kind, scheme in TENSORRT.items():
            folder = rounded_checkpoint(Path(scratch) / kind, scheme)
            columns[f"{kind}, TensorRT"] = Job("", 0, model=str(folder))
        todo = [replace(job, method=method, keep=keep) for method, keep in SIDES for job in columns.values()]
        with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
            results = pool.map(measure, todo, [arguments.limit] * len(todo))
            points = dict(zip(todo, track(results, "build and ask", total=len(todo), console=stderr), strict=True))
    print("| | mean tokens | " + " | ".join(columns) + " |")
    print("| --- " * (2 + len(columns)) + "|")
    every = []
    for method, keep in SIDES:
        row = {name: points[replace(job, method=method, keep=keep)] for name, job in columns.items()}
        cells = " | ".join("" if point is None else f"{point.accuracy:.1%}" for point in row.values())
        tokens = next(point.tokens for point in row.values() if point is not None)
        print(f"| {method}, keep {keep:g} | {tokens:.1f} | {cells} |")
        every += [
            {"method": method, "keep": keep, "weights": name, **asdict(point)} for name, point in row.items() if point
        ]
    result = {"questions": arguments.limit, "points": every}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
