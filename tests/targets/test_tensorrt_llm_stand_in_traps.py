"""Mistakes that the stand-in for TensorRT-LLM is there to show do show."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from tests.targets.tensorrt_llm_stand_in.decoders import NEW, PROMPTS, run_ragged
from tests.targets.tensorrt_llm_stand_in.graphs import CaptureError
from tests.targets.tensorrt_llm_stand_in.server import Server

Decoders, Answers = dict[str, Path], dict[str, list[list[int]]]


def test_memory_that_no_one_wrote_shows(tensorrt_llm: ModuleType, decoders: Decoders) -> None:
    server = Server(decoders["llama"], warmup=False)
    request = server.submit({"prompt_token_ids": PROMPTS[0]}, NEW)
    server.step()
    # As if the prompt were one token longer than what was computed of it.
    server.requests[request].tokens.append(3)
    server.kv_cache_manager.add_token(request)
    server.kv_cache_manager.add_token(request)
    logits = server.forward([], [server.requests[request]])
    assert logits.isnan().all()


def metadata_class(tensorrt_llm: ModuleType, prepare: Any) -> type:
    """A subclass of the metadata whose `prepare` goes on with `prepare(self)`, made attention's."""
    from tensorrt_llm._torch.attention_backend import TrtllmAttention, TrtllmAttentionMetadata

    @dataclass(kw_only=True)
    class Metadata(TrtllmAttentionMetadata):
        def prepare(self) -> None:
            super().prepare()
            prepare(self)

    TrtllmAttention.Metadata = Metadata
    return Metadata


def test_the_class_of_metadata_is_read_when_it_is_made(tensorrt_llm: ModuleType, decoders: Decoders) -> None:
    server = Server(decoders["llama"], warmup=False)
    made = metadata_class(tensorrt_llm, lambda metadata: None)
    server.submit({"prompt_token_ids": PROMPTS[0]}, NEW)
    server.run()
    assert type(server.attn_metadata) is made


def new_lengths(metadata: Any) -> None:
    metadata.kv_lens_cuda = metadata.kv_lens_cuda.clone()
    metadata.kv_lens_cuda_runtime = metadata.kv_lens_cuda[: metadata.num_seqs]


def new_blocks(metadata: Any) -> None:
    metadata.kv_cache_block_offsets = metadata.kv_cache_block_offsets.clone()


@pytest.mark.parametrize("wrong", [new_lengths, new_blocks])
def test_a_buffer_made_anew_is_not_what_a_graph_reads(
    tensorrt_llm: ModuleType, decoders: Decoders, answers: Answers, wrong: Any
) -> None:
    metadata_class(tensorrt_llm, wrong)
    assert run_ragged(Server(decoders["llama"])) == answers["llama"]
    assert run_ragged(Server(decoders["llama"], cuda_graphs=True)) != answers["llama"]


def staged(tensorrt_llm: ModuleType, share: bool) -> type[nn.Module]:
    """A Llama with another metadata for its layers from the second on: they see the prompt's second half only.

    With `share`, buffers of both metadata have the same names; without, those of the second are its own.
    """
    from tensorrt_llm._torch.models.modeling_llama import LlamaForCausalLM, LlamaModel
    from tensorrt_llm._torch.models.modeling_utils import register_auto_model

    def fork(metadata: Any) -> None:
        if not hasattr(metadata, "later") or metadata.later.is_cuda_graph != metadata.is_cuda_graph:
            metadata.later = copy.copy(metadata)
            metadata.later.cuda_graph_buffers = metadata.cuda_graph_buffers if share else None
            metadata.later._seq_lens_cuda = None
            metadata.later.seq_lens = metadata.seq_lens
            metadata.later.__post_init__()
        later, keep = metadata.later, [(n + 1) // 2 for n in metadata.context_lens.tolist()]
        if not metadata.is_cuda_graph:
            later.seq_lens = torch.tensor(keep + [1] * metadata.num_generations, dtype=torch.int)
        later.num_contexts, later.request_ids = metadata.num_contexts, metadata.request_ids
        later.prompt_lens = keep + metadata.prompt_lens[metadata.num_contexts :]
        cached = []
        for row, past in enumerate(metadata.kv_cache_params.num_cached_tokens_per_seq):
            prompt = metadata.prompt_lens[row]
            cached.append(past if row < metadata.num_contexts else past - prompt // 2)
        later.kv_cache_params = copy.copy(metadata.kv_cache_params)
        later.kv_cache_params.num_cached_tokens_per_seq = cached
        type(metadata).__mro__[1].prepare(later)

    metadata_class(tensorrt_llm, fork)

    class Model(LlamaModel):
        def forward(
            self, attn_metadata: Any, input_ids: Any = None, position_ids: Any = None, **_: Any
        ) -> torch.Tensor:
            hidden, residual = self.layers[0](position_ids, self.embed_tokens(input_ids), attn_metadata, None)
            if attn_metadata.num_contexts:
                rows, begin = [], 0
                for row, count in enumerate(attn_metadata.seq_lens.tolist()):
                    skip = count // 2 if row < attn_metadata.num_contexts else 0
                    rows += range(begin + skip, begin + count)
                    begin += count
                hidden, residual = hidden[rows], residual[rows]
            for layer in self.layers[1:]:
                hidden, residual = layer(position_ids, hidden, attn_metadata.later, residual)
            return self.norm(hidden, residual)[0]

    @register_auto_model("LlamaForCausalLM")
    class Staged(LlamaForCausalLM):
        decoder = Model

        def forward(self, attn_metadata: Any, input_ids: Any, position_ids: Any, **_: Any) -> torch.Tensor:
            hidden = self.model(attn_metadata, input_ids, position_ids)
            return self.logits_processor.forward(hidden, self.lm_head, attn_metadata.later)

    return Staged


def test_buffers_shared_by_stages_show(tensorrt_llm: ModuleType, decoders: Decoders) -> None:
    staged(tensorrt_llm, share=False)
    expected = run_ragged(Server(decoders["llama"]))
    assert run_ragged(Server(decoders["llama"], cuda_graphs=True)) == expected
    staged(tensorrt_llm, share=True)
    assert run_ragged(Server(decoders["llama"])) == expected
    assert run_ragged(Server(decoders["llama"], cuda_graphs=True)) != expected


def test_lengths_come_from_the_metadata_alone(tensorrt_llm: ModuleType, decoders: Decoders) -> None:
    staged(tensorrt_llm, share=False)
    server = Server(decoders["llama"], torch_compile=True, warmup=False)
    server.submit({"prompt_token_ids": PROMPTS[0]}, NEW)
    with pytest.raises(ValueError, match="the metadata's lengths are"):
        server.step()


@pytest.mark.parametrize("wait", [lambda rows: rows.sum().item(), lambda rows: rows[rows > 0], torch.nonzero])
def test_a_pass_that_waits_cannot_be_recorded(
    tensorrt_llm: ModuleType, decoders: Decoders, wait: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorrt_llm._torch.models.modeling_llama import LlamaModel

    original = LlamaModel.forward

    def forward(self: nn.Module, **given: Any) -> torch.Tensor:
        hidden = original(self, **given)
        wait(hidden)
        return hidden

    monkeypatch.setattr(LlamaModel, "forward", forward)
    run_ragged(Server(decoders["llama"]))
    with pytest.raises(CaptureError, match="waits for the GPU"):
        Server(decoders["llama"], cuda_graphs=True)


def test_normalisation_writes_over_its_arguments(tensorrt_llm: ModuleType) -> None:
    from tensorrt_llm._torch.modules.rms_norm import RMSNorm

    norm = RMSNorm(hidden_size=8, eps=1e-6, dtype=torch.float32)
    x, residual = torch.randn(3, 8), torch.randn(3, 8)
    total = x + residual
    normed, added = norm(x, residual)
    torch.testing.assert_close(normed, nn.functional.rms_norm(total, (8,), eps=1e-6))
    torch.testing.assert_close(added, total)
    assert normed is x
    assert added is residual
