"""A LLaVA without pruning, written as TensorRT-LLM's own are, answers on the stand-in as transformers' does."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tests.checkpoints import random_checkpoint
from tests.conftest import noise_images
from tests.targets.tensorrt_llm_stand_in.server import Server

NEW = 6
QUESTIONS = ["USER: <image>\nwhat digit is red? ASSISTANT:", "USER: what is red? ASSISTANT:", "<image> where?"]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA whose decoder says what it is, and which has no end token."""
    folder = tmp_path_factory.mktemp("llava")
    return random_checkpoint(folder, seed=2, text={"architectures": ["LlamaForCausalLM"], "eos_token_id": None})


@pytest.fixture(scope="module")
def expected(llava: Path) -> list[list[int]]:
    """What transformers generates."""
    model, processor = LlavaForConditionalGeneration.from_pretrained(llava).eval(), AutoProcessor.from_pretrained(llava)
    model.generation_config.eos_token_id = None
    answers = []
    for question, image in zip(QUESTIONS, noise_images(len(QUESTIONS)), strict=True):
        images = {"images": [image]} if "<image>" in question else {}
        given = processor(text=question, **images, return_tensors="pt")
        answer = model.generate(**given, max_new_tokens=NEW, do_sample=False)
        answers.append(answer[0, given["input_ids"].shape[1] :].tolist())
    return answers


def processor_class(calls: list[str]) -> type:
    """An input processor for LLaVA."""
    from tensorrt_llm.inputs import BaseMultimodalInputProcessor, InputProcessor

    class Processor(BaseMultimodalInputProcessor, InputProcessor):
        processor = tokenizer = config = None
        dtype = torch.float32

        def __init__(self, model_path: str, config: Any, tokenizer: Any, trust_remote_code: bool = True) -> None:
            super().__init__(model_path, config, tokenizer, trust_remote_code)
            self.config, self.tokenizer = config, tokenizer
            self.processor = AutoProcessor.from_pretrained(model_path)

        def get_vocab_size(self) -> int:
            return self.config.text_config.vocab_size

        def get_num_tokens_per_image(self, *, image: Any, **_: Any) -> int:
            return (self.config.vision_config.image_size // self.config.vision_config.patch_size) ** 2

        def __call__(self, inputs: Any, sampling_params: Any) -> tuple[list[int], Any]:
            calls.append("process")
            images = (inputs.get("multi_modal_data") or {}).get("image")
            if not images:
                return self.tokenizer(inputs["prompt"]).input_ids, {}
            made = self.processor(text=inputs["prompt"], images=images, return_tensors="pt")
            ids = made["input_ids"][0]
            ids[ids == self.config.image_token_index] = self.get_vocab_size() + 1
            return ids.tolist(), {"multimodal_data": {"image": {"pixel_values": made["pixel_values"]}}}

        def attach_multimodal_embeddings(self, inputs: Any, embedding: Any, sampling_params: Any) -> Any:
            (features,) = embedding["image"]
            ids = []
            for token in self.tokenizer(inputs["prompt"]).input_ids:
                image = token == self.config.image_token_index
                ids += [self.get_vocab_size() + 1] * len(features) if image else [token]
            return ids, {"multimodal_data": {"multimodal_embedding": features}}

    return Processor


def register(calls: list[str]) -> None:
    """A model and an input processor for LLaVA; `calls` tells what was called."""
    from tensorrt_llm._torch.models.modeling_auto import AutoModelForCausalLM
    from tensorrt_llm._torch.models.modeling_multimodal_utils import (
        find_input_mm_embeds,
        fuse_input_embeds,
        get_multimodal_embeddings,
    )
    from tensorrt_llm._torch.models.modeling_utils import filter_weights, register_auto_model
    from tensorrt_llm.inputs import MultimodalPlaceholderMetadata, register_input_processor

    marks = MultimodalPlaceholderMetadata(placeholder_map={"image": "<image>"})

    @register_auto_model("LlavaForConditionalGeneration")
    @register_input_processor(processor_class(calls), model_type="llava", placeholder_metadata=marks)
    class Llava(nn.Module):
        multimodal_data_device_paths = ("image.pixel_values", "multimodal_embedding")

        def __init__(self, model_config: Any) -> None:
            super().__init__()
            config, self.model_config = model_config.pretrained_config, model_config
            self.tower = LlavaForConditionalGeneration.from_pretrained(config._name_or_path)
            text = copy.deepcopy(model_config)
            text.pretrained_config = config.text_config
            # The decoder's own configuration may say nothing, which would mean bfloat16.
            text.pretrained_config.dtype = config.dtype
            self.llm = AutoModelForCausalLM.from_config(text)
            self.config = model_config.pretrained_config = self.llm.config

        def load_weights(self, weights: Any) -> None:
            self.llm.load_weights(filter_weights("language_model", weights))

        def infer_max_seq_len(self) -> int:
            return self.llm.infer_max_seq_len()

        def encode(self, params: list[Any]) -> list[torch.Tensor]:
            calls.append("encode")
            pixels = torch.cat([one.multimodal_data["image"]["pixel_values"] for one in params])
            return [torch.cat(list(self.tower.get_image_features(pixels).pooler_output))]

        def forward(self, attn_metadata: Any, input_ids: Any, position_ids: Any, **given: Any) -> torch.Tensor:
            calls.append("forward")
            params = given.pop("multimodal_params")
            given.pop("inputs_embeds")
            visual = find_input_mm_embeds(get_multimodal_embeddings(self.encode, params), params)
            ids, embeds = fuse_input_embeds(self.llm.model.embed_tokens, input_ids, visual, **given)
            return self.llm.forward(attn_metadata, ids, position_ids, embeds)


def submit(server: Server) -> list[int]:
    images = noise_images(len(QUESTIONS))
    ids = []
    for question, image in zip(QUESTIONS, images, strict=True):
        data = {"multi_modal_data": {"image": [image]}} if "<image>" in question else {}
        ids.append(server.submit({"prompt": question, **data}, NEW))
    return ids


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_images(tensorrt_llm: ModuleType, llava: Path, expected: list[list[int]], graphs: bool) -> None:
    calls: list[str] = []
    register(calls)
    server = Server(llava, cuda_graphs=graphs)
    ids = submit(server)
    server.step(2)
    server.step(1)
    server.preempt(ids[0])
    server.step(1)
    calls.clear()
    server.run()
    assert [server.output(request) for request in ids] == expected
    assert server.processor.multimodal_hashing_supported
    # What was recorded runs without the model's Python; images are encoded once, for their hashes are known.
    assert calls == ([] if graphs else ["forward"] * len(calls))


def test_embeddings(tensorrt_llm: ModuleType, llava: Path, expected: list[list[int]]) -> None:
    calls: list[str] = []
    register(calls)
    server = Server(llava, enable_chunked_prefill=True, max_num_tokens=24)
    model, processor = server.model.tower, AutoProcessor.from_pretrained(llava)
    pixels = processor.image_processor(noise_images(1), return_tensors="pt")["pixel_values"]
    features = model.get_image_features(pixels).pooler_output[0].detach()
    request = server.submit({"prompt": QUESTIONS[0], "multi_modal_embeddings": {"image": [features]}}, NEW)
    with pytest.raises(ValueError, match="visual tokens, but"):
        server.run()
    whole = Server(llava)
    request = whole.submit({"prompt": QUESTIONS[0], "multi_modal_embeddings": {"image": [features]}}, NEW)
    whole.run()
    assert whole.output(request) == expected[0]
    assert "encode" not in calls


def test_images_are_gone_when_a_newer_server_starts_again(
    tensorrt_llm: ModuleType, llava: Path, expected: list[list[int]]
) -> None:
    register([])
    server = Server(llava, strip_after_prefill=True)
    ids = submit(server)
    server.step()
    server.preempt(ids[0])
    with pytest.raises(IndexError):
        server.run()
