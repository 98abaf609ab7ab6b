"""What a bundle carries for TensorRT-LLM's PyTorch backend: a module that registers it, options, and a script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vtexport.errors import InputError
from vtexport.models.prompt import chat_template
from vtexport.models.rope import rope_frequencies
from vtexport.targets.tensorrt_llm.torch_model.description import FOLDER, Description

if TYPE_CHECKING:
    from vtexport.models.spec import ModelSpec
    from vtexport.pruning import PruningPlan
    from vtexport.targets.base import CompileJob

SCRIPT, OPTIONS, TEMPLATE = "serve.sh", "options.yaml", "chat_template.jinja"


def check_deployed(spec: ModelSpec, plans: Sequence[PruningPlan]) -> None:
    """Refuse plans that the model registered with TensorRT-LLM cannot follow.

    Raises:
        InputError: a plan is not supported.
    """
    plan = plans[0]
    if plan.methods.decoder is not None and plan.methods.decoder.extras:
        raise InputError(
            f"method {plan.method} prunes by another bundle's ranking, which TensorRT-LLM has no way to pass on; use "
            "sparsevlm, or target tensorrt, tensorrt-rtx or onnxruntime"
        )
    if plan.decoder_stages and len(plans) > 1:
        raise InputError(
            f"--keep auto with method {plan.method} chooses among prefill graphs, and TensorRT-LLM has one; give a ratio"
        )
    if plan.decoder_stages and spec.decoder.activation != "silu":
        raise InputError(
            f"TensorRT-LLM's gated MLP computes silu, this model has {spec.decoder.activation}; use target tensorrt"
        )
    if plan.vision_stage is not None and spec.views.newlines:
        raise InputError(
            "TensorRT-LLM lays a prompt out before its image is seen, and how many newlines stay depends on the image; add "
            "--arrangement views"
        )


def check_selected(spec: ModelSpec, plans: Sequence[PruningPlan]) -> None:
    """Refuse what TensorRT-LLM's own models cannot be given embeddings for.

    Raises:
        InputError: it has no model of the family, or the method needs what it does not hand on.
    """
    if spec.family != "llava_next":
        raise InputError(
            f"TensorRT-LLM has no {spec.family} model of its own to choose tokens for, only llava_next; use --flow pytorch, "
            "which registers one"
        )
    if plans[0].methods.decoder is not None and plans[0].methods.decoder.extras:
        raise InputError(f"method {plans[0].method} needs another bundle's ranking; use sparsevlm or fastv")


def write_description(job: CompileJob) -> None:
    """Write what the bundle under construction says of itself."""
    frequencies, scaling = rope_frequencies(job.spec)
    debug = "score" in [value.name for value in job.models["vision"].graph.outputs]
    Description(job.spec, job.plans, job.dtype, frequencies.tolist(), scaling, debug).write(job.folder)


def write_deployment(job: CompileJob) -> None:
    """Write that, and the files that register and serve the model."""
    write_description(job)
    folder, place = job.folder, job.folder / FOLDER
    (place / "__init__.py").write_text(_MODULE, encoding="utf-8")
    (place / TEMPLATE).write_text(_STRING_CONTENT + chat_template(job.processor), encoding="utf-8")
    (folder / OPTIONS).write_text(_OPTIONS, encoding="utf-8")
    script = folder / SCRIPT
    script.write_text(_SERVE, encoding="utf-8")
    script.chmod(0o755)


_MODULE = '''\
"""Registers this bundle's LLaVA with TensorRT-LLM when `trtllm-serve --custom_module_dirs` imports it."""

from pathlib import Path

from vtexport.targets.tensorrt_llm.torch_model import register

# TensorRT-LLM's worker processes look this name up here.
VtexportLlava = register(Path(__file__).parent.parent, __name__)
'''

# TensorRT-LLM 1.2 gives a template the content of a message as a string, mark included; LLaVA's template takes a list.
_STRING_CONTENT = """\
{%- set ns = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set content = [{'type': 'text', 'text': message['content']}] -%}
{%- set ns.messages = ns.messages + [{'role': message['role'], 'content': content}] -%}
{%- else -%}
{%- set ns.messages = ns.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = ns.messages -%}
"""

_OPTIONS = """\
# Options of TensorRT-LLM that this bundle needs: prompts about two images may have the same token ids, by which blocks
# of the KV cache would be taken for equal; and a stage of pruning sees a prompt whole, and once.
kv_cache_config:
  enable_block_reuse: false
enable_chunked_prefill: false
scheduler_config:
  capacity_scheduler_policy: GUARANTEED_NO_EVICT
"""

_SERVE = f"""\
#!/usr/bin/env bash
# Serves the checkpoint that this bundle was built from with the bundle's pruning, on TensorRT-LLM's PyTorch backend.
# Usage: serve.sh LLAVA_CHECKPOINT [options of trtllm-serve]
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
if [ $# -lt 1 ] || [ ! -f "$1/config.json" ]; then
  echo "error: give the folder of the LLaVA checkpoint: serve.sh LLAVA_CHECKPOINT [options of trtllm-serve]" >&2
  exit 2
fi
if ! python3 -c "import vtexport.targets.tensorrt_llm.torch_model.description" 2> /dev/null
then
  echo "error: TensorRT-LLM's Python has no vtexport; install it there: pip install msgspec && pip install --no-deps" \\
    "vtexport" >&2
  exit 2
fi
model="$1"
shift
exec trtllm-serve "$model" --backend pytorch --custom_module_dirs "$here/{FOLDER}" \\
  --chat_template "$here/{FOLDER}/{TEMPLATE}" --extra_llm_api_options "$here/{OPTIONS}" "$@"
"""
