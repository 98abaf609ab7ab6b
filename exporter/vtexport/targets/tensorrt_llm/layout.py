"""The folder that TensorRT-LLM's engine flow (up to 1.2) opens, and the names that it expects in it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from vtexport.arrays import Array
from vtexport.targets.base import CompileJob
from vtexport.targets.engine import VisionInput
from vtexport.targets.tensorrt.engine import TensorRTEngine

if TYPE_CHECKING:
    import onnx_ir as ir

#: the names of the engine's input and output in TensorRT-LLM's vision runner, and the files of the layout
INPUT, OUTPUT = "input", "encoder_output"
ENGINE, CONFIG, SCRIPT = "vision/model.engine", "vision/config.json", "llm/build.sh"
_PRECISION = {"fp16": "float16", "fp32": "float32"}


def renamed(model: ir.Model, dtype: str) -> ir.Model:
    """`model`, a vision graph, changed so that its pixels come in the engine's dtype, under the names above."""
    import onnx_ir as ir

    graph = model.graph
    pixels, element_type = graph.inputs[0], {"fp16": ir.DataType.FLOAT16, "fp32": ir.DataType.FLOAT}[dtype]
    source = ir.Value(name=INPUT, shape=pixels.shape, type=ir.TensorType(element_type))
    cast = ir.Node("", "Cast", [source], [ir.AttrInt64("to", int(ir.DataType.FLOAT))])
    cast.outputs[0].shape, cast.outputs[0].type = pixels.shape, pixels.type
    cast.outputs[0].name = pixels.name
    pixels.replace_all_uses_with(cast.outputs[0])
    graph.inputs[0] = source
    graph.insert_before(graph.node(0), cast)
    graph.outputs[0].name = OUTPUT
    return model


def write_layout(job: CompileJob, batch: int, text: int) -> None:
    """Write the files beside the engine: its config.json, and the script that builds the language model for at most
    `batch` prompts of `text` text tokens.
    """
    (plan,), hidden = job.plans, job.spec.decoder.hidden_size
    config = {
        "builder_config": {
            "model_type": job.spec.family,
            "precision": _PRECISION[job.dtype],
            "max_batch_size": batch,
            "output_shape": [-1, plan.vision_tokens, hidden],
        }
    }
    (job.folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    script = job.folder / SCRIPT
    script.parent.mkdir()
    script.write_text(_SCRIPT.format(**build_flags(plan.vision_tokens, batch, text, _PRECISION[job.dtype])))
    script.chmod(0o755)


def build_flags(tokens: int, batch: int, text: int, precision: str) -> dict[str, int | str]:
    """The values of trtllm-build's flags for `tokens` visual tokens per image and one image per prompt."""
    return {
        "precision": precision,
        "batch": batch,
        "length": tokens + text,
        # Exactly the rows of the prompt table that images can fill.
        "multimodal": batch * tokens,
    }


_SCRIPT = """\
#!/usr/bin/env bash
# Builds the language model beside this bundle's vision engine, with TensorRT-LLM up to 1.2.
# Usage: build.sh LLAVA_CHECKPOINT TENSORRT_LLM_REPOSITORY
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
# TensorRT-LLM tells LLaVA and VILA by "llava" and "vila" in the path, in small letters: the checkpoint gets a path that
# says which it is, whatever its own is called.
scratch="/tmp/trtllm-$$"
mkdir "$scratch"
trap 'rm -rf "$scratch"' EXIT
ln -s "$(cd "$1" && pwd)" "$scratch/llava"
# It reads weights by the names of checkpoints as they were published; newer versions of transformers save other names.
if {{ cat "$1"/*.index.json; head -qc 65536 "$1"/*.safetensors; true; }} 2> /dev/null | grep -a '"model\\.language_model\\.' > /dev/null
then
  echo "error: $1 was saved again by a newer transformers: its weights are called model.language_model.*, which" \\
    "TensorRT-LLM does not read; give the checkpoint as it was published" >&2
  exit 2
fi
python3 "$2/examples/models/core/llama/convert_checkpoint.py" --model_dir "$scratch/llava" --output_dir "$here/checkpoint" \\
  --dtype {precision}
trtllm-build --checkpoint_dir "$here/checkpoint" --output_dir "$here" --gemm_plugin {precision} --use_fused_mlp=enable \\
  --max_batch_size {batch} --max_input_len {length} --max_seq_len {length} --max_multimodal_len {multimodal}
"""


class EngineFlowVision(TensorRTEngine):
    """The vision engine of that layout, whose input and output have the names above."""

    def vision_feeds(self, inputs: VisionInput) -> dict[str, Array]:
        kind = str(self.plan("vision").kinds[INPUT]).removeprefix("torch.")
        return {INPUT: inputs.pixel_values.astype(np.dtype(kind))}

    def vision_name(self, output: str) -> str:
        return "visual" if output == OUTPUT else output
