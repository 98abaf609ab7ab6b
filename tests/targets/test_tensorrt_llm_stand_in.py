"""The stand-in for TensorRT-LLM: its decoders answer as transformers', and mistakes that it is there to show do show."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from tests.targets.tensorrt_llm_stand_in import installed
from tests.targets.tensorrt_llm_stand_in.graphs import CaptureError
from tests.targets.tensorrt_llm_stand_in.server import Server
from vtexport.models.shrink import randomised

TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama": LlamaConfig(**TEXT),
    "llama3": LlamaConfig(**TEXT, rope_parameters=LLAMA3),
    "mistral": MistralConfig(**TEXT, sliding_window=None),
    "qwen2": Qwen2Config(**TEXT, tie_word_embeddings=True),
}
PROMPTS = [[5, 6, 7, 8, 9], [3] * 20, [1, 2], [11, 12, 13, 14, 15, 16, 17]]
NEW = 9
Folders = dict[str, Path]


@pytest.fixture
def tensorrt_llm() -> Iterator[ModuleType]:
    """The stand-in in TensorRT-LLM's place."""
    with installed() as module:
        yield module


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Random decoders."""
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(1)
        made[name] = tmp_path_factory.mktemp(name)
        randomised(AutoModelForCausalLM.from_config(config)).save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def answers(folders: Folders) -> dict[str, list[list[int]]]:
    """What transformers generates."""
    made = {}
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        made[name] = [
            model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, len(prompt) :].tolist()
            for prompt in PROMPTS
        ]
    return made


def submit_all(server: Server) -> list[int]:
    return [server.submit({"prompt_token_ids": prompt}, NEW) for prompt in PROMPTS]


def run_ragged(server: Server) -> list[list[int]]:
    """Prompts come in at different times, so that batches are mixed and blocks are not in order."""
    ids = submit_all(server)
    for contexts in (2, 0, 1, 0, 0, 1):
        server.step(contexts)
    server.run()
    return [server.output(request) for request in ids]


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("name", CONFIGS)
def test_answers_are_those_of_transformers(
    tensorrt_llm: ModuleType, folders: Folders, answers: dict[str, list[list[int]]], name: str, graphs: bool
) -> None:
    server = Server(folders[name], cuda_graphs=graphs)
    assert run_ragged(server) == answers[name]
    assert not graphs or server.runner.replays > NEW
    assert not server.kv_cache_manager.held or list(server.kv_cache_manager.held) == [(1 << 64) - 1]


@pytest.mark.parametrize("fused", [True, False])
def test_rope_outside_of_attention_is_the_same(
    tensorrt_llm: ModuleType,
    folders: Folders,
    answers: dict[str, list[list[int]]],
    fused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tensorrt_llm._torch.modules.attention import Attention

    original = Attention.__init__
    monkeypatch.setattr(Attention, "__init__", lambda self, **given: original(self, **given, rope_fusion=fused))
    server = Server(folders["llama"])
    attention = server.model.model.layers[0].self_attn
    assert (attention.rotary_emb is None) == fused
    assert run_ragged(server) == answers["llama"]


def test_chunks_of_prompts(tensorrt_llm: ModuleType, folders: Folders, answers: dict[str, list[list[int]]]) -> None:
    server = Server(folders["llama"], max_num_tokens=12, enable_chunked_prefill=True)
    ids = submit_all(server)
    server.run()
    assert [server.output(request) for request in ids] == answers["llama"]


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_preemption_cancelling_and_numbers_used_again(
    tensorrt_llm: ModuleType, folders: Folders, answers: dict[str, list[list[int]]], graphs: bool
) -> None:
    server = Server(folders["llama"], cuda_graphs=graphs)
    ids = submit_all(server)
    for _ in range(3):
        server.step()
    server.cancel(ids[1])
    server.preempt(ids[0])
    server.step(0)
    again = server.submit({"prompt_token_ids": PROMPTS[1]}, NEW, request_id=ids[1])
    server.run()
    assert again == ids[1]
    assert [server.output(request) for request in ids] == answers["llama"]


def test_embeddings_in_place_of_visual_tokens(
    tensorrt_llm: ModuleType, folders: Folders, answers: dict[str, list[list[int]]]
) -> None:
    """Embeddings of a prompt's own tokens, given as if they were an image's, change nothing."""
    from tensorrt_llm._torch.models.modeling_llama import LlamaForCausalLM
    from tensorrt_llm._torch.models.modeling_multimodal_utils import fuse_input_embeds, get_multimodal_embeddings
    from tensorrt_llm._torch.models.modeling_utils import register_auto_model

    seen = []

    @register_auto_model("LlamaForCausalLM")
    class WithImages(LlamaForCausalLM):
        multimodal_data_device_paths = ("image.ids",)

        def forward(self, attn_metadata: Any, input_ids: Any, position_ids: Any, **given: Any) -> torch.Tensor:
            params = given["multimodal_params"]
            seen.append((len(params), attn_metadata.num_contexts))
            visual = get_multimodal_embeddings(
                lambda some: [
                    self.model.embed_tokens(torch.cat([one.multimodal_data["image"]["ids"] for one in some]))
                ],
                params,
            )
            ids, embeds = fuse_input_embeds(
                self.model.embed_tokens,
                input_ids,
                visual,
                text_token_indices=given.get("text_token_indices"),
                mm_token_indices=given.get("mm_token_indices"),
            )
            return super().forward(attn_metadata, ids, position_ids, embeds)

    server = Server(folders["llama"])
    seen.clear()
    ids = []
    for number, prompt in enumerate(PROMPTS):
        hidden = [99 if number < 2 and place > 1 else token for place, token in enumerate(prompt)]
        ids.append(server.submit({"prompt_token_ids": hidden}, NEW))
        if number < 2:
            image = {"ids": torch.tensor(prompt[2:])}
            server.requests[ids[-1]].py_multimodal_data = {"image": image}
    server.step(3)
    server.step(1)
    server.preempt(ids[0])
    server.run()
    assert [server.output(request) for request in ids] == answers["llama"]
    assert seen[:3] == [(2, 3), (0, 1), (1, 1)]


def test_memory_that_no_one_wrote_shows(tensorrt_llm: ModuleType, folders: Folders) -> None:
    server = Server(folders["llama"], warmup=False)
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
    from dataclasses import dataclass

    from tensorrt_llm._torch.attention_backend import TrtllmAttention, TrtllmAttentionMetadata

    @dataclass(kw_only=True)
    class Metadata(TrtllmAttentionMetadata):
        def prepare(self) -> None:
            super().prepare()
            prepare(self)

    TrtllmAttention.Metadata = Metadata
    return Metadata


def test_the_class_of_metadata_is_read_when_it_is_made(tensorrt_llm: ModuleType, folders: Folders) -> None:
    server = Server(folders["llama"], warmup=False)
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
    tensorrt_llm: ModuleType, folders: Folders, answers: dict[str, list[list[int]]], wrong: Any
) -> None:
    metadata_class(tensorrt_llm, wrong)
    assert run_ragged(Server(folders["llama"])) == answers["llama"]
    assert run_ragged(Server(folders["llama"], cuda_graphs=True)) != answers["llama"]


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


def test_buffers_shared_by_stages_show(tensorrt_llm: ModuleType, folders: Folders) -> None:
    staged(tensorrt_llm, share=False)
    expected = run_ragged(Server(folders["llama"]))
    assert run_ragged(Server(folders["llama"], cuda_graphs=True)) == expected
    staged(tensorrt_llm, share=True)
    assert run_ragged(Server(folders["llama"])) == expected
    assert run_ragged(Server(folders["llama"], cuda_graphs=True)) != expected


def test_lengths_come_from_the_metadata_alone(tensorrt_llm: ModuleType, folders: Folders) -> None:
    staged(tensorrt_llm, share=False)
    server = Server(folders["llama"], torch_compile=True, warmup=False)
    server.submit({"prompt_token_ids": PROMPTS[0]}, NEW)
    with pytest.raises(ValueError, match="the metadata's lengths are"):
        server.step()


@pytest.mark.parametrize("wait", [lambda rows: rows.sum().item(), lambda rows: rows[rows > 0], torch.nonzero])
def test_a_pass_that_waits_cannot_be_recorded(
    tensorrt_llm: ModuleType, folders: Folders, wait: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorrt_llm._torch.models.modeling_llama import LlamaModel

    original = LlamaModel.forward

    def forward(self: nn.Module, **given: Any) -> torch.Tensor:
        hidden = original(self, **given)
        wait(hidden)
        return hidden

    monkeypatch.setattr(LlamaModel, "forward", forward)
    run_ragged(Server(folders["llama"]))
    with pytest.raises(CaptureError, match="waits for the GPU"):
        Server(folders["llama"], cuda_graphs=True)


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


def test_nothing_is_left_behind(folders: Folders) -> None:
    import sys

    with installed():
        from tensorrt_llm._torch.attention_backend import TrtllmAttention

        TrtllmAttention.Metadata = None
    assert not [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]
    with installed() as module:
        assert module.__version__ == "1.2.1"
        from tensorrt_llm._torch.attention_backend import TrtllmAttention, TrtllmAttentionMetadata

        assert TrtllmAttention.Metadata is TrtllmAttentionMetadata
