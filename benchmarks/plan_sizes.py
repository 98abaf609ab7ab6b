"""How large the TensorRT plans of a LLaVA-1.5-7B are, and how their size grows with the number of buckets.

Plans of the real widths are built for the language model's first layers, with random weights; each further layer adds
the same. The vision plan is built whole. TensorRT for RTX builds them without a GPU:

    python benchmarks/plan_sizes.py                 # a table of bytes
    python benchmarks/plan_sizes.py --quantize int4
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from models import random_llava

from vtexport.builder.engines import EngineSpec, Source, make_engines
from vtexport.models import Checkpoint, read_spec
from vtexport.progress import Silent
from vtexport.pruning import Geometry, make_plan
from vtexport.targets import get_target

#: layers of LLaVA-1.5-7B's decoder, and keep ratios of up to four buckets
LAYERS, KEEPS = 32, (0.5, 0.25, 0.125, 0.0625)
BUCKETS = (1, 2, 4)


def checkpoint(folder: Path, layers: int) -> Path:
    """A LLaVA-1.5-7B of random weights in fp16, with the first `layers` layers of its decoder."""
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    decoder = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": layers, "num_attention_heads": 32}
    return random_llava(folder, tower, decoder, "float16")


def plan_bytes(model: Path, buckets: int, quantize: str) -> dict[str, int]:
    """Bytes of the plans of a bundle with this number of buckets, by graph."""
    spec = read_spec(model)
    plans = [make_plan("fastervlm", Geometry.of(spec), keep=keep) for keep in KEEPS[:buckets]]
    target = get_target("tensorrt-rtx", {"sm": "89", "quantize": quantize})
    folder = Path(tempfile.mkdtemp(dir=model.parent))
    try:
        source = Source("llava", model, model, Checkpoint.open(model), spec)
        compiled = make_engines(source, EngineSpec(plans, "fp16"), target, folder, Silent()).compiled
        return {name: (folder / file).stat().st_size for name, file in compiled.files.items()}
    finally:
        shutil.rmtree(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quantize", choices=["", "int8", "int4", "fp8"], default="", help="bits of the decoder's weights"
    )
    parser.add_argument("--folder", type=Path, help="where to put 3 GB of temporary files")
    options = parser.parse_args(arguments)
    found: dict[int, dict[str, int]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for layers in (1, 2):
            model = checkpoint(Path(scratch) / f"model-{layers}", layers)
            for buckets in BUCKETS if layers == 1 else (1, 4):
                found[10 * layers + buckets] = plan_bytes(model, buckets, options.quantize)
            shutil.rmtree(model)
    rows = []
    for buckets in BUCKETS:
        one = found[10 + buckets]["language"]
        # What a layer adds does not depend much on the number of buckets: between one and four, it is interpolated.
        low, high = (found[20 + n]["language"] - found[10 + n]["language"] for n in (1, 4))
        layer = low + (high - low) * (buckets - 1) / 3
        rows.append(
            {
                "buckets": buckets,
                "vision": found[10 + buckets]["vision"],
                "language, 1 layer": one,
                "each further layer": round(layer),
                "language, 32 layers": round(one + (LAYERS - 1) * layer),
            }
        )
    print(json.dumps({"quantize": options.quantize, "plans": rows}, indent=2))


if __name__ == "__main__":
    main()
