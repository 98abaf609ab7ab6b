"""The stand-in for TensorRT-LLM has its names, and its decoders answer as those of transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.targets.tensorrt_llm_stand_in import installed
from tests.targets.tensorrt_llm_stand_in.decoders import CONFIGS, NEW, PROMPTS, run_ragged, submit_all
from tests.targets.tensorrt_llm_stand_in.server import Server
from tests.targets.tensorrt_llm_stand_in.signatures import RECORDED, differences

Decoders, Answers = dict[str, Path], dict[str, list[list[int]]]


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("name", CONFIGS)
def test_answers_are_those_of_transformers(
    tensorrt_llm: ModuleType, decoders: Decoders, answers: Answers, name: str, graphs: bool
) -> None:
    server = Server(decoders[name], cuda_graphs=graphs)
    assert run_ragged(server) == answers[name]
    assert not graphs or server.runner.replays > NEW
    assert not server.kv_cache_manager.held or list(server.kv_cache_manager.held) == [(1 << 64) - 1]


@pytest.mark.parametrize("fused", [True, False])
def test_rope_outside_of_attention_is_the_same(
    tensorrt_llm: ModuleType,
    decoders: Decoders,
    answers: Answers,
    fused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tensorrt_llm._torch.modules.attention import Attention

    original = Attention.__init__
    monkeypatch.setattr(Attention, "__init__", lambda self, **given: original(self, **given, rope_fusion=fused))
    server = Server(decoders["llama"])
    attention = server.model.model.layers[0].self_attn
    assert (attention.rotary_emb is None) == fused
    assert run_ragged(server) == answers["llama"]


def test_chunks_of_prompts(tensorrt_llm: ModuleType, decoders: Decoders, answers: Answers) -> None:
    server = Server(decoders["llama"], max_num_tokens=12, enable_chunked_prefill=True)
    ids = submit_all(server)
    server.run()
    assert [server.output(request) for request in ids] == answers["llama"]


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_preemption_cancelling_and_numbers_used_again(
    tensorrt_llm: ModuleType, decoders: Decoders, answers: Answers, graphs: bool
) -> None:
    server = Server(decoders["llama"], cuda_graphs=graphs)
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


def test_embeddings_in_place_of_visual_tokens(tensorrt_llm: ModuleType, decoders: Decoders, answers: Answers) -> None:
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

    server = Server(decoders["llama"])
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


def test_nothing_is_left_behind(decoders: Decoders) -> None:
    with installed():
        from tensorrt_llm._torch.attention_backend import TrtllmAttention

        TrtllmAttention.Metadata = None
    assert not [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]
    with installed() as module:
        assert module.__version__ == "1.2.1"
        from tensorrt_llm._torch.attention_backend import TrtllmAttention, TrtllmAttentionMetadata

        assert TrtllmAttention.Metadata is TrtllmAttentionMetadata


def test_signatures_are_those_that_were_read(tensorrt_llm: ModuleType) -> None:
    assert differences(tensorrt_llm.__version__) == {}


def test_signatures_are_those_of_the_package() -> None:
    """Where the real one is installed, it has not moved away from what was read."""
    real = pytest.importorskip("tensorrt_llm", reason="TensorRT-LLM is not installed")
    assert differences(real.__version__) == {}


def test_every_source_is_named() -> None:
    entries = [*RECORDED["1.2"].values(), *RECORDED["newer"].values()]
    assert {entry["source"] for entry in entries} <= set(RECORDED["sources"])
