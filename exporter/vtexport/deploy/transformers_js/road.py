"""The road `transformers.js`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import ClassVar

from vtexport.bundle.folder import Bundle
from vtexport.deploy.base import Road
from vtexport.errors import InputError

#: what a file's name ends with, by the dtype that transformers.js calls it by
_SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4", "q4f16": "_q4f16"}


class TransformersJs(Road):
    """Graphs of ONNX Runtime, which transformers.js runs as its LlavaForConditionalGeneration."""

    name: ClassVar[str] = "transformers.js"
    summary: ClassVar[str] = "transformers.js on Node, for a bundle of ONNX Runtime's of one image per prompt"

    def check(self, bundle: Bundle) -> None:
        from vtexport.deploy.transformers_js.files import check_files

        manifest, spec = bundle.manifest, bundle.spec()
        plan, where = manifest.pruning_plans()[0], bundle.folder
        if manifest.target.name != "onnxruntime":
            raise InputError(
                f"{where} was built for {manifest.target.name}, and transformers.js runs ONNX Runtime; build with --target "
                "onnxruntime"
            )
        if manifest.adaptive is not None:
            raise InputError(f"{where} has several plans, and transformers.js takes one; build with --keep RATIO")
        if manifest.model.family != "llava" or spec.views.total > 1:
            kind = (
                manifest.model.family if manifest.model.family != "llava" else f"{spec.views.images} images per prompt"
            )
            raise InputError(
                f"{where} is of {kind}, and transformers.js's LLaVA takes one view of one image; use a LLaVA-1.5 checkpoint "
                "with --images 1"
            )
        extras = [extra.name for part in plan.methods.parts for extra in part.extras]
        if extras:
            raise InputError(
                f"{where} needs {extras[0]} besides image and prompt (method {plan.method}), which transformers.js does "
                "not give; build with another --method"
            )
        if spec.decoder.head_size % 8:
            raise InputError(
                f"{where} has attention heads of {spec.decoder.head_size} channels, for which ONNX Runtime has no kernel "
                "with a cache that grows; use a model with a multiple of 8"
            )
        check_files(bundle)

    def write(self, bundle: Bundle, folder: Path) -> str:
        import onnx_ir as ir

        from vtexport.deploy.transformers_js import graphs
        from vtexport.deploy.transformers_js.files import write_files
        from vtexport.deploy.transformers_js.weights import save

        spec, (plan,) = bundle.spec(), bundle.manifest.pruning_plans()
        compiled = bundle.manifest.target.graphs
        vision, language = (ir.load(bundle.folder / compiled[name]) for name in ("vision", "language"))
        parts = {"embed_tokens": graphs.embed_tokens(language, plan)}
        graphs.vision_encoder(vision, plan)
        graphs.decoder(language, plan)
        parts |= {"vision_encoder": vision, "decoder_model_merged": language}
        dtypes = _dtypes(bundle)
        (folder / "onnx").mkdir()
        chunks = {}
        for name, model in parts.items():
            file = f"{name}{_SUFFIXES[dtypes[name]]}.onnx"
            chunks[file] = save(model, folder / "onnx" / file)
        loading = {"dtype": dtypes, "use_external_data_format": chunks}
        write_files(bundle, plan, spec, loading, folder)
        script = files("vtexport.deploy.transformers_js").joinpath("ask.mjs")
        (folder / "ask.mjs").write_bytes(script.read_bytes())
        return 'npm install --prefix OUT && node OUT/ask.mjs photo.png "what is shown?"'


def _dtypes(bundle: Bundle) -> dict[str, str]:
    """What transformers.js calls the dtype of each graph; only the decoder is quantised."""
    dtype, bits = bundle.manifest.target.dtype, bundle.manifest.target.options.get("quantize", "")
    quantised = {"int8": "q8", "int4": "q4" if dtype == "fp32" else "q4f16"}
    return {"embed_tokens": dtype, "vision_encoder": dtype, "decoder_model_merged": quantised.get(str(bits), dtype)}
