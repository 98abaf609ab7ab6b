"""LLaVA for TensorRT-LLM's PyTorch backend: vtexport's pruned vision stage before a decoder that prunes as well."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from tensorrt_llm._torch.models.modeling_auto import AutoModelForCausalLM
from tensorrt_llm._torch.models.modeling_multimodal_utils import fuse_input_embeds
from torch import Tensor, nn

from vtexport.errors import InputError, ModelError
from vtexport.graph.eager import DTYPES, fill, of_dtype
from vtexport.graph.vision import VisionGraph
from vtexport.models.names import PREFIXES
from vtexport.targets.tensorrt_llm.torch_model.decoder import StagedForCausalLM
from vtexport.targets.tensorrt_llm.torch_model.description import Description
from vtexport.targets.tensorrt_llm.torch_model.packing import Row
from vtexport.targets.tensorrt_llm.torch_model.processor import LAYOUT
from vtexport.targets.tensorrt_llm.torch_model.pruning import Rope
from vtexport.targets.tensorrt_llm.torch_model.refusals import refuse_compilation, refuse_model, refuse_reuse
from vtexport.targets.tensorrt_llm.torch_model.report import Report
from vtexport.targets.tensorrt_llm.torch_model.stages import Images, Schedule

#: language models by config.json's model_type -> TensorRT-LLM's names of them
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# Images of a prompt that has visual tokens but none of their data.
_LOST = Images((-1,), (-1,), -1)


class VtexportLlava(nn.Module):
    """The model that a bundle registers; a subclass has the bundle's `description` and `schedule` (`register`).

    Raises:
        InputError: the checkpoint is another than the bundle's, or a feature is on that pruning cannot go with.
    """

    description: ClassVar[Description]
    schedule: ClassVar[Schedule]

    def __init__(self, model_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        spec, plan = self.description.spec, self.description.plan
        llm_config = copy.deepcopy(model_config)
        llm_config.pretrained_config = _text_config(model_config.pretrained_config, self.description)
        self.vision: VisionGraph | None = None
        if self.description.takes_images:
            with of_dtype(DTYPES[self.description.dtype]):
                self.vision = VisionGraph(spec, [plan])
        rope = Rope(self.description.frequencies, self.description.attention_scaling)
        if plan.decoder_stages:
            refuse_model(model_config)
            self.llm = StagedForCausalLM(llm_config, spec.decoder, self.schedule, rope, spec.views.counted)
        else:
            self.llm = AutoModelForCausalLM.from_config(llm_config)
        # As TensorRT-LLM's own LLaVA-NeXT: the engine reads the language model's configuration.
        self.model_config, self.config = model_config, self.llm.config
        model_config.pretrained_config = self.llm.config
        self.report = Report.from_environment(self.schedule)

    @property
    def multimodal_data_device_paths(self) -> list[str]:
        """What of a request's data TensorRT-LLM moves to the GPU."""
        return ["image.pixel_values", "image.sequence", "image.row_start", "multimodal_embedding"]

    @property
    def mm_token_ids(self) -> Tensor:
        """The ids of visual tokens, by which TensorRT-LLM finds their places."""
        return torch.tensor([self.description.spec.image_token_id], dtype=torch.int32)

    @property
    def vocab_size_padded(self) -> int:
        """The rows of the head."""
        return int(self.llm.vocab_size_padded)

    def infer_max_seq_len(self) -> int:
        """The greatest number of tokens of prompt and answer."""
        return min(int(self.llm.infer_max_seq_len()), self.description.spec.decoder.max_positions)

    def load_weights(self, weights: Mapping[str, Any]) -> None:
        """Load the checkpoint's tensors, under any of the names that versions of transformers give them.

        Raises:
            ModelError: a tensor is missing, or of another shape than the bundle was built for.
        """
        self.llm.load_weights(language_weights(weights))
        if self.vision is None:
            return
        spec, plan = self.description.spec, self.description.plan
        constants = plan.methods.vision.constants(plan, spec.vision.grid)
        fill(self.vision, weights, {f"pruning.0.{name}": array for name, array in constants.items()})

    @torch.inference_mode()
    def forward(
        self,
        attn_metadata: Any,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_context_logits: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Logits of each row's last token.

        Args:
            attn_metadata: TensorRT-LLM's, a `StagedMetadata` if the plan has decoder stages.
            input_ids: [T]; visual tokens have the id of the image mark.
            position_ids: [1, T].
            inputs_embeds: not given.
            return_context_logits: refused with decoder stages, behind which prompts have fewer rows.
            **kwargs: `multimodal_params` of the contexts; and what `fuse_input_embeds` takes.

        Raises:
            InputError: a prompt's visual tokens are not those of the plan, or blocks would be reused.
        """
        # The first step, with which TensorRT-LLM warms up, so stops a server from starting.
        refuse_reuse(attn_metadata)
        contexts, staged = attn_metadata.num_contexts, bool(self.schedule.stages)
        params = kwargs.get("multimodal_params", []) if contexts else []
        # Contexts come first, and generations have no images any more.
        params = [param for param in params if LAYOUT in param.multimodal_data]
        rows = self._rows(params, attn_metadata, input_ids) if contexts else []
        if staged:
            if return_context_logits:
                raise InputError(
                    "gather_context_logits cannot go with pruning inside the decoder, behind which prompts have fewer "
                    "tokens; turn it off"
                )
            refuse_compilation()
            if contexts:
                # Before the vision stage: the lengths are copied to the GPU from buffers that TensorRT-LLM fills again
                # for the next step, which it prepares while this one runs.
                attn_metadata.begin(rows)
        embeds = [self._embedded(param, row.images) for param, row in zip(params, rows, strict=True)]
        table, marks = self.llm.model.embed_tokens, {"mm_token_ids": self.mm_token_ids}
        input_ids, inputs_embeds = fuse_input_embeds(table, input_ids, embeds, **marks, **kwargs)
        if not staged:
            self.report.add(rows, lambda _: attn_metadata.seq_lens.tolist())
            return self.llm.forward(attn_metadata, input_ids, position_ids, inputs_embeds, return_context_logits)
        logits = self.llm.forward(attn_metadata, input_ids, position_ids, inputs_embeds, contexts=rows)
        self.report.add(rows, attn_metadata.rows)
        return logits

    def _rows(self, params: Sequence[Any], attn_metadata: Any, input_ids: Tensor | None) -> list[Row]:
        """The contexts with images, in order; every other row of the step is left out."""
        lengths = attn_metadata.seq_lens[: attn_metadata.num_contexts].tolist()
        images: list[Images | None] = [_images(param) for param in params]
        if len(images) < len(lengths):
            # Prompts without data of their own are among them: only their tokens tell which.
            assert input_ids is not None, "TensorRT-LLM gives token ids"
            shown: list[Images | None] = []
            start, ids, left = 0, input_ids[: sum(lengths)].tolist(), iter(images)
            for length in lengths:
                has_places = self._has_places(ids[start : start + length], alone=bool(params))
                shown.append(next(left, _LOST) if has_places else None)
                start += length
            images = shown
        rows = []
        for number, (one, length) in enumerate(zip(images, lengths, strict=True)):
            if one is None:
                continue
            if one is _LOST:
                raise InputError(
                    "a prompt came without its images, as TensorRT-LLM loses them when it pauses a request"
                )
            if one.length != length:
                raise InputError(
                    f"a prompt of {one.text} text and {one.visual} visual tokens came with {length} tokens; turn "
                    "enable_chunked_prefill and truncate_prompt_tokens off, and leave capacity_scheduler_policy at "
                    "GUARANTEED_NO_EVICT"
                )
            rows.append(Row(number, int(attn_metadata.request_ids[number]), one))
        return rows

    def _has_places(self, ids: Sequence[int], alone: bool) -> bool:
        """Whether the prompt `ids` has the places of an image.

        Args:
            ids: its tokens.
            alone: whether a mark that stands alone is one. It is none in steps without any image: TensorRT-LLM measures
                memory with prompts of random tokens, which may have marks.
        """
        mark = self.description.spec.image_token_id
        if alone:
            return mark in ids
        return any(first == second == mark for first, second in pairwise(ids))

    def _embedded(self, param: Any, images: Images) -> Tensor:
        """The visual tokens [K, C] of one request."""
        data = param.multimodal_data
        visual = data.get("multimodal_embedding")
        if visual is None:
            assert self.vision is not None, "the input processor refuses images where only embeddings are taken"
            given = data["image"]
            several = self.description.spec.views.total > 1
            pixels = given["pixel_values"] if several else given["pixel_values"][0]
            others = [given[name][None] for name in self.vision.input_names()[1:]]
            visual = self.vision(pixels[None], *others)[0][0][: images.visual]
        if visual.shape[0] != images.visual:
            raise InputError(
                f"{visual.shape[0]} visual tokens were made for a prompt that has places for {images.visual}"
            )
        visual = visual.to(self.llm.model.embed_tokens.weight.dtype)
        assert isinstance(visual, Tensor), "embeddings are tensors"
        return visual


def language_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of the language model under the names that its own checkpoint would give them.

    Raises:
        ModelError: there are none.
    """
    found, names = {}, [name for name, _ in weights.items()]
    for ours, theirs in (("model.", PREFIXES["decoder."]), ("lm_head.", PREFIXES["head."])):
        # The longest first: one of the names begins with another.
        for prefix in sorted(theirs, key=len, reverse=True):
            for name in names:
                if name.startswith(prefix) and name not in found:
                    found[name] = ours + name.removeprefix(prefix)
    if not found:
        raise ModelError(
            "the checkpoint has no language model under a name of LLaVA's; give the LLaVA checkpoint itself"
        )
    return {renamed: weights[name] for name, renamed in found.items()}


def _images(param: Any) -> Images:
    """Where a request's images stand, as the input processor noted."""
    layout = param.multimodal_data[LAYOUT]
    return Images(tuple(layout["places"]), tuple(layout["counts"]), layout["text"])


def _text_config(config: Any, description: Description) -> Any:
    """The language model's configuration, completed where LLaVA's leaves something to a default.

    Raises:
        InputError: the checkpoint has another geometry than the bundle's.
    """
    text, decoder = config.text_config, description.spec.decoder
    for name, value in (
        ("hidden_size", decoder.hidden_size),
        ("num_hidden_layers", decoder.num_layers),
        ("num_attention_heads", decoder.num_heads),
        ("vocab_size", decoder.vocab_size),
    ):
        if getattr(text, name) != value:
            raise InputError(
                f"the checkpoint's {name} is {getattr(text, name)}, the bundle was built for {value}; serve the checkpoint "
                "that it was built from"
            )
    if not getattr(text, "architectures", None):
        text.architectures = [_ARCHITECTURES[text.model_type]]
    for name in ("attention_bias", "mlp_bias"):
        if not hasattr(text, name):
            setattr(text, name, False)
    if getattr(text, "torch_dtype", None) is None:
        text.torch_dtype = getattr(config, "torch_dtype", None)
    text.tie_word_embeddings = decoder.tied_embeddings
    _complete_rope(text, description)
    return text


def _complete_rope(text: Any, description: Description) -> None:
    """Tell a transformers older than 5 about RoPE what a checkpoint saved by a newer one says elsewhere.

    Raises:
        InputError: its base is another than the bundle's.
    """
    said = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if "rope_theta" in said:
        text.rope_theta = said["rope_theta"]
    if said.get("rope_type", said.get("type", "default")) != "default":
        text.rope_scaling = said
        return
    # The second frequency is the base to the power of -2 / D.
    size = description.spec.decoder.head_size
    base, read = description.frequencies[1] ** (-size / 2), getattr(text, "rope_theta", 10000.0)
    if abs(base / read - 1) > 1e-3:
        raise InputError(
            f"the checkpoint's RoPE has base {read:g}, the bundle was built for {base:g}; serve the checkpoint that it was "
            "built from"
        )
