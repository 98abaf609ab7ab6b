"""TensorRT-LLM: the pruned vision engine, and prompts with its visual tokens for the language model.

    from tensorrt_llm import LLM, SamplingParams
    from tensorrt_llm.llmapi import KvCacheConfig
    from vtexport.runtime.runner import Runner
    from vtexport.targets.tensorrt_llm import prompts

    runner = Runner.open(Path("bundle"))
    llm = LLM(model="llava-hf/llava-v1.6-vicuna-7b-hf", kv_cache_config=KvCacheConfig(enable_block_reuse=False))
    llm.generate(prompts(runner, [(image, "What is shown?")]), SamplingParams(max_tokens=64))

Blocks of the KV cache must not be reused: the same question about two images has the same token ids.
"""

from vtexport.targets.tensorrt_llm.prompts import messages, prompts

__all__ = ["messages", "prompts"]
