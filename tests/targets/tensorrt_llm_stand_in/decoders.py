"""Random decoders for tests of the stand-in itself, prompts, and what transformers answers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

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


def write_decoder(name: str, folder: Path) -> Path:
    """Write the random decoder of a configuration into `folder`."""
    torch.manual_seed(1)
    randomised(AutoModelForCausalLM.from_config(CONFIGS[name])).save_pretrained(folder)
    return folder


def generated(folder: Path) -> list[list[int]]:
    """What transformers generates for each of the prompts."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return [
        model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]


def submit_all(server: Server) -> list[int]:
    """Put all prompts in the queue; their numbers."""
    return [server.submit({"prompt_token_ids": prompt}, NEW) for prompt in PROMPTS]


def run_ragged(server: Server) -> list[list[int]]:
    """Answers to all prompts, which start at different times: batches are mixed, and blocks are not in order."""
    ids = submit_all(server)
    for contexts in (2, 0, 1, 0, 0, 1):
        server.step(contexts)
    server.run()
    return [server.output(request) for request in ids]
