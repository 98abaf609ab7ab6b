"""TensorRT-LLM: a LLaVA of vtexport's for its PyTorch backend, and prompts with visual tokens that were made here.

A bundle's `serve.sh` registers the LLaVA (`vtexport.targets.tensorrt_llm.torch_model`) and serves it. For TensorRT-LLM's
own models, a bundle of a vision-stage method makes the visual tokens:

    from tensorrt_llm import LLM, SamplingParams
    from tensorrt_llm.llmapi import KvCacheConfig
    from vtexport import Runner
    from vtexport.targets.tensorrt_llm import prompts, reached

    if __name__ == "__main__":  # TensorRT-LLM starts processes that import this file again
        runner = Runner.open("bundle")
        # Blocks must not be reused: the same question about two images has the same token ids.
        cache = KvCacheConfig(enable_block_reuse=False, free_gpu_memory_fraction=0.8)
        llm = LLM(model="llava-hf/llava-v1.6-vicuna-7b-hf", kv_cache_config=cache)
        question = "What is shown?"
        (output,) = llm.generate(prompts(runner, [(image, question)]), SamplingParams(max_tokens=64))
        print(reached(runner, question, len(output.prompt_token_ids)), output.outputs[0].text)
"""

from vtexport.targets.tensorrt_llm.prompts import messages, prompts, reached

__all__ = ["messages", "prompts", "reached"]
