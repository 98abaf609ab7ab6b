"""A Llama, Mistral or Qwen2 decoder of TensorRT-LLM's own modules that drops visual tokens between its layers.

Follows TensorRT-LLM's guide for new models: attention, MLP and norms are its own, with their fused kernels and their
loading of weights. Added are a metadata for each run of layers (`metadata.py`) and, behind a stage's layer, the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from tensorrt_llm._torch.attention_backend.interface import PositionalEmbeddingParams, RopeParams
from tensorrt_llm._torch.models.modeling_utils import DecoderModel, DecoderModelForCausalLM
from tensorrt_llm._torch.modules.attention import Attention
from tensorrt_llm._torch.modules.decoder_layer import DecoderLayer
from tensorrt_llm._torch.modules.embedding import Embedding
from tensorrt_llm._torch.modules.gated_mlp import GatedMLP
from tensorrt_llm._torch.modules.linear import TensorParallelMode
from tensorrt_llm._torch.modules.rms_norm import RMSNorm
from tensorrt_llm.functional import PositionEmbeddingType
from torch import Tensor, nn

from vtexport.models.spec import DecoderSpec
from vtexport.pruning.decoder import Dropped
from vtexport.targets.tensorrt_llm.torch_model.packing import Packed, Row
from vtexport.targets.tensorrt_llm.torch_model.pruning import Prefill, Rope
from vtexport.targets.tensorrt_llm.torch_model.stages import Schedule

#: called after a stage with its layer, the contexts that it cut, and what it did
OnStage = Callable[[int, Sequence[Row], Dropped], None]


class StagedAttention(Attention):  # type: ignore[misc]  # no types without tensorrt_llm
    """Attention that hands out its queries and keys before RoPE while `listens` is set.

    RoPE stays fused into the kernel where a token's position is its place in the layer's cache: everywhere with compact
    positions, and up to the first stage with original ones.
    """

    def __init__(self, model_config: Any, layer: int, decoder: DecoderSpec, fused: bool) -> None:
        config = model_config.pretrained_config
        super().__init__(
            hidden_size=decoder.hidden_size,
            num_attention_heads=decoder.num_heads,
            num_key_value_heads=decoder.num_kv_heads,
            max_position_embeddings=config.max_position_embeddings,
            bias=decoder.query_bias,
            pos_embd_params=PositionalEmbeddingParams(
                type=PositionEmbeddingType.rope_gpt_neox, rope=RopeParams.from_config(config)
            ),
            rope_fusion=None if fused else False,
            layer_idx=layer,
            dtype=model_config.torch_dtype,
            dense_bias=decoder.output_bias,
            config=model_config,
        )
        self.listens = False
        self.heard: tuple[Tensor, Tensor] | None = None

    def apply_rope(self, q: Tensor, k: Tensor | None, v: Tensor | None, position_ids: Tensor) -> Any:
        """As the base class; q alone may hold queries, keys and values side by side, [T, (H + 2 G) * D]."""
        if self.listens:
            query, key, _ = self.split_qkv(q, k, v)
            # RoPE outside of the kernel writes over its arguments.
            self.heard = (query, key) if self.rope_fusion else (query.clone(), key.clone())
        return super().apply_rope(q, k, v, position_ids)

    def taken(self) -> tuple[Tensor, Tensor]:
        """What the last call heard: queries [T, H * D] and keys [T, G * D] before RoPE; they are let go of here."""
        assert self.heard is not None, "an attention that listens has heard"
        heard, self.heard = self.heard, None
        return heard

    def queries_and_keys(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [T, H * D] and keys [T, G * D] of normed [T, C] before RoPE."""
        query, key, _ = self.split_qkv(self.qkv_proj(normed))
        return query, key


class StagedLayer(DecoderLayer):  # type: ignore[misc]  # as above
    """A pre-norm layer; like TensorRT-LLM's, it leaves the last sum to the next layer's norm."""

    def __init__(self, model_config: Any, layer: int, decoder: DecoderSpec, fused: bool) -> None:
        super().__init__()
        dtype = model_config.torch_dtype
        norm = partial(RMSNorm, hidden_size=decoder.hidden_size, eps=decoder.rms_norm_eps, dtype=dtype)
        self.self_attn = StagedAttention(model_config, layer, decoder, fused)
        self.mlp = GatedMLP(
            hidden_size=decoder.hidden_size,
            intermediate_size=decoder.intermediate_size,
            bias=decoder.mlp_bias,
            dtype=dtype,
            config=model_config,
        )
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()

    def forward(
        self,
        position_ids: Tensor,
        hidden_states: Tensor,
        attn_metadata: Any,
        residual: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Hidden [T, C] and the residual that belongs to it."""
        if residual is None:
            hidden_states, residual = self.input_layernorm(hidden_states), hidden_states
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(
            position_ids=position_ids, hidden_states=hidden_states, attn_metadata=attn_metadata, **kwargs
        )
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class StagedModel(DecoderModel):  # type: ignore[misc]  # as above
    """The decoder without its head.

    Args:
        model_config: TensorRT-LLM's, of the language model.
        decoder: its geometry.
        schedule: the parts of the decoder.
        rope: its RoPE, for rating; attention itself rotates by `model_config`.
        counted: whether prompts differ in their visual tokens, or have several images.
    """

    def __init__(self, model_config: Any, decoder: DecoderSpec, schedule: Schedule, rope: Rope, counted: bool) -> None:
        super().__init__(model_config)
        self.decoder, self.schedule, self.rope, self.counted = decoder, schedule, rope, counted
        self.on_stage: OnStage | None = None
        plan, dtype = schedule.plan, model_config.torch_dtype
        assert plan.methods.decoder is not None, "a plan with decoder stages has a decoder-stage method"
        #: whether a stage is rated by its own layer's queries and keys, and not by the next layer's
        self.own, original = plan.methods.decoder.attention_of == "own", plan.positions == "original"
        self.embed_tokens = Embedding(
            decoder.vocab_size,
            decoder.hidden_size,
            dtype=dtype,
            mapping=model_config.mapping,
            tensor_parallel_mode=TensorParallelMode.COLUMN,
            gather_output=True,
        )
        self.layers = nn.ModuleList(
            StagedLayer(model_config, layer, decoder, fused=not (original and schedule.part_of(layer)))
            for layer in range(decoder.num_layers)
        )
        self.norm = RMSNorm(hidden_size=decoder.hidden_size, eps=decoder.rms_norm_eps, dtype=dtype)

    def forward(
        self,
        attn_metadata: Any,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        contexts: Sequence[Row] = (),
        **kwargs: Any,
    ) -> Tensor:
        """Normed hidden [T', C] of the rows that reach the end.

        Args:
            attn_metadata: a `StagedMetadata`, whose parts know what `contexts` drop.
            input_ids: [T], unless `inputs_embeds` are given.
            position_ids: [1, T].
            inputs_embeds: [T, C].
            contexts: the rows of this step that run a prompt with images.
            **kwargs: for attention.
        """
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        assert position_ids is not None, "TensorRT-LLM gives positions in every step"
        prefill, positions = self._prefill(contexts, attn_metadata, hidden), position_ids.flatten()
        residual: Tensor | None = None
        for number, layer in enumerate(self.blocks()):
            stage = number in self.schedule.stages
            part = self.schedule.part_of(number)
            layer.self_attn.listens = stage and self.own and prefill is not None
            hidden, residual = layer(
                position_ids=positions[None],
                hidden_states=hidden,
                attn_metadata=attn_metadata.part(part),
                residual=residual,
                **kwargs,
            )
            if not stage:
                continue
            # The sum is made here in every step, so that a request's numbers do not depend on what runs beside it.
            hidden, residual = hidden + residual, None
            if prefill is not None:
                lengths = attn_metadata.rows(part + 1)
                heard = self._heard(number, hidden)
                hidden, positions, dropped = prefill.drop(number, hidden, positions, heard, lengths)
                if self.on_stage is not None:
                    self.on_stage(number, contexts, dropped)
        normed: Tensor = self.norm(hidden, residual)[0]
        return normed

    def blocks(self) -> list[StagedLayer]:
        """The layers, typed as `StagedLayer`."""
        return [cast(StagedLayer, layer) for layer in self.layers]

    def _prefill(self, contexts: Sequence[Row], attn_metadata: Any, embedded: Tensor) -> Prefill | None:
        if not contexts:
            return None
        packed = Packed.of(
            contexts, attn_metadata.rows(0), self.schedule.plan.vision_tokens, self.counted, embedded.device
        )
        return Prefill(self.schedule.plan, self.decoder, self.rope, packed, embedded)

    def _heard(self, number: int, hidden: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """What gives the queries and keys that rate at the stage after layer `number`."""
        if self.own:
            return lambda: self.blocks()[number].self_attn.taken()
        following = self.blocks()[number + 1]
        return lambda: following.self_attn.queries_and_keys(following.input_layernorm(hidden))


class StagedForCausalLM(DecoderModelForCausalLM):  # type: ignore[misc]  # as above
    """The decoder with its head; arguments as for `StagedModel`."""

    def __init__(self, model_config: Any, decoder: DecoderSpec, schedule: Schedule, rope: Rope, counted: bool) -> None:
        super().__init__(
            StagedModel(model_config, decoder, schedule, rope, counted),
            config=model_config,
            hidden_size=decoder.hidden_size,
            vocab_size=decoder.vocab_size,
        )

    def forward(
        self,
        attn_metadata: Any,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_context_logits: bool = False,
        contexts: Sequence[Row] = (),
        **kwargs: Any,
    ) -> Tensor:
        """Logits of each row's last token; see `StagedModel.forward`."""
        hidden = self.model(attn_metadata, input_ids, position_ids, inputs_embeds, contexts)
        last = attn_metadata.part(self.schedule_parts - 1)
        return self.logits_processor.forward(hidden, self.lm_head, last, return_context_logits)  # type: ignore[no-any-return]

    @property
    def schedule_parts(self) -> int:
        """How many parts the decoder has."""
        return int(self.model.schedule.parts)
