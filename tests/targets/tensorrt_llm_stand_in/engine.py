"""A model, its cache and its metadata, in the way of TensorRT-LLM's engine."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch

from tests.targets.tensorrt_llm_stand_in.inputs import Inputs
from tests.targets.tensorrt_llm_stand_in.loading import load_model, model_config
from tests.targets.tensorrt_llm_stand_in.requests import LlmRequest
from tests.targets.tensorrt_llm_stand_in.runner import Runner, dummy_requests
from tests.targets.tensorrt_llm_stand_in.settings import Settings


class Engine:
    """Runs passes of a checkpoint's model while the stand-in is installed.

    Args:
        folder: the checkpoint.
        settings: how to run it.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        from tensorrt_llm._torch.attention_backend.interface import AttentionRuntimeFeatures
        from tensorrt_llm._torch.utils import set_torch_compiling
        from tensorrt_llm.mapping import Mapping

        self.folder, self.settings = folder, settings
        world = settings.tensor_parallel * settings.pipeline_parallel
        self.mapping = Mapping(world_size=world, tp_size=settings.tensor_parallel, pp_size=settings.pipeline_parallel)
        quantised: dict[str, Any] = {} if settings.quant_config is None else {"quant_config": settings.quant_config}
        config = model_config(
            folder,
            mapping=self.mapping,
            spec_config=settings.spec_config,
            max_num_tokens=settings.max_num_tokens,
            max_seq_len=settings.max_seq_len,
            use_cuda_graph=settings.cuda_graphs,
            **quantised,
        )
        self.features = AttentionRuntimeFeatures(
            chunked_prefill=settings.enable_chunked_prefill,
            cache_reuse=settings.enable_block_reuse,
            has_speculative_draft_tokens=settings.spec_config is not None,
        )
        self.model = load_model(folder, config, settings.consumable_weights)
        set_torch_compiling(settings.torch_compile)
        longest = self.model.infer_max_seq_len()
        self.max_seq_len = min(settings.max_seq_len or longest, longest)
        self._make_cache()
        self.inputs = Inputs(self.model, settings.max_num_tokens, settings.max_beam_width)
        self.runner = Runner(settings.max_batch_size) if settings.cuda_graphs else None
        self.attn_metadata: Any = None
        if settings.warmup:
            self._warm_up()

    def _make_cache(self) -> None:
        from tensorrt_llm._torch.pyexecutor.resource_manager import KVCacheManager

        # As TensorRT-LLM does: the decoder's configuration has to be the model's by now.
        config = self.model.model_config.pretrained_config
        head = getattr(config, "head_dim", None)
        self.kv_cache_manager = KVCacheManager(
            num_layers=config.num_hidden_layers,
            num_kv_heads=getattr(config, "num_key_value_heads", config.num_attention_heads),
            head_dim=head if isinstance(head, int) else config.hidden_size // config.num_attention_heads,
            tokens_per_block=self.settings.tokens_per_block,
            max_seq_len=self.max_seq_len,
            max_batch_size=self.settings.max_batch_size,
            dtype=self.model.model_config.torch_dtype,
            blocks=self.settings.blocks,
        )

    def _warm_up(self) -> None:
        """A long prompt that measures memory, one of dummy tokens, then every size of recorded pass, the longest first."""
        manager = self.kv_cache_manager
        longest = min(self.max_seq_len - 1, self.settings.max_num_tokens, len(manager.free) * manager.tokens_per_block)
        vocabulary = self.model.model_config.pretrained_config.vocab_size
        for count in (longest, min(5, self.settings.max_num_tokens)):
            (prompt,) = dummy_requests(manager, [0], [count], generation=False)
            if count == longest:
                # TensorRT-LLM draws them at random, so that any may be among them.
                prompt.tokens = [number % vocabulary for number in range(count)]
            self.forward([(prompt, prompt.prompt_len)], [])
            manager.free_resources(prompt)
        for size in reversed(self.runner.sizes if self.runner else []):
            longest = min(self.max_seq_len - 1, (len(manager.free) - size) * manager.tokens_per_block)
            ids = [size - 1, *range(size - 1)]
            made = dummy_requests(manager, ids, [longest] + [1] * (size - 1), generation=True)
            self.forward([], made)
            for request in made:
                manager.free_resources(request)

    def _set_up_attn_metadata(self) -> Any:
        """Made once, of the class that attention names at that moment."""
        from tensorrt_llm._torch.attention_backend import TrtllmAttentionMetadata
        from tensorrt_llm._torch.attention_backend.utils import get_attention_backend

        backend = get_attention_backend(self.model.model_config.attn_backend)
        if self.attn_metadata is None:
            beams = (self.settings.max_batch_size, self.settings.max_beam_width, self.max_seq_len)
            indirection = torch.zeros(beams, dtype=torch.int32) if self.settings.max_beam_width > 1 else None
            config = self.model.model_config.pretrained_config
            self.attn_metadata = backend.Metadata(
                max_num_requests=self.settings.max_batch_size,
                max_num_tokens=self.settings.max_num_tokens,
                max_num_sequences=self.settings.max_batch_size * self.settings.max_beam_width,
                kv_cache_manager=self.kv_cache_manager,
                mapping=self.mapping,
                runtime_features=self.features,
                enable_flash_mla=self.model.model_config.enable_flash_mla,
                enable_context_mla_with_cached_kv=False,
                # TensorRT-LLM compares the classes: a subclass gets none.
                cache_indirection=indirection if backend.Metadata is TrtllmAttentionMetadata else None,
                sparse_attention_config=None,
                num_heads_per_kv=config.num_attention_heads // getattr(config, "num_key_value_heads", 1),
            )
        return self.attn_metadata

    @torch.inference_mode()
    def forward(self, contexts: list[tuple[LlmRequest, int]], generations: list[LlmRequest]) -> torch.Tensor:
        """One pass: logits of each sequence, prompts first."""
        from tensorrt_llm._torch.utils import model_extra_attrs

        with model_extra_attrs(self.model.extra_attrs):
            metadata = self._set_up_attn_metadata()
            recorded = self.runner is not None and not contexts
            if recorded:
                generations = generations + self.runner.padding(len(generations), self.kv_cache_manager)
                recorded = len(generations) in self.runner.sizes
            if recorded:
                metadata = self.runner.metadata_for(len(generations), metadata)
            inputs = self.inputs.prepare(contexts, generations, metadata)
            outputs = self.runner.run(inputs, self._model_forward) if recorded else self._model_forward(inputs)
        return outputs["logits"] if isinstance(outputs, dict) else outputs

    def _model_forward(self, inputs: dict[str, Any]) -> Any:
        from tensorrt_llm._torch.utils import get_model_extra_attrs

        attributes = get_model_extra_attrs()
        attributes["attention_metadata"] = weakref.ref(inputs["attn_metadata"])
        attributes.update(self.model.model_config.extra_attrs)
        return self.model.forward(**inputs, return_context_logits=False)
