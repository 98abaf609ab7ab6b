"""Prompts for vLLM, with the visual tokens of images that were pruned already.

vLLM takes them where it runs with `enable_mm_embeds`, and makes as many image tokens of each mark as its tensor has rows:

    from vllm import LLM, SamplingParams
    from vtexport import Runner
    from vtexport.deploy.vllm import prompts, reached

    if __name__ == "__main__":  # vLLM starts processes that import this file again
        runner = Runner.open("bundle")
        llm = LLM("llava-hf/llava-1.5-7b-hf", enable_mm_embeds=True)
        question = "What is shown?"
        (output,) = llm.generate(prompts(runner, [(image, question)]), SamplingParams(temperature=0, max_tokens=64))
        print(reached(runner, question, len(output.prompt_token_ids)), output.outputs[0].text)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vtexport.models.conversation import Question
from vtexport.targets.tensorrt_llm.prompts import Embedder, reached
from vtexport.targets.tensorrt_llm.prompts import messages as _messages
from vtexport.targets.tensorrt_llm.prompts import prompts as _prompts

__all__ = ["messages", "prompts", "reached"]


def prompts(runner: Embedder, pairs: Sequence[tuple[Any, Question]], dtype: Any = None) -> list[dict[str, Any]]:
    """Inputs for `vllm.LLM.generate`.

    Args:
        runner: an opened bundle without pruning inside the decoder, or one of `--flow select`.
        pairs: images (see `vtexport.models.prompt.Prompter.views`), and questions or conversations.
        dtype: a torch dtype, that of the language model; None for the engine's.

    Returns:
        For each pair `{"prompt": text, "multi_modal_data": {"image": [tensor [K, C], …]}}`, a tensor per image mark.

    Raises:
        InputError: the bundle prunes inside the decoder, or a pair that `Runner.ask` would refuse.
    """
    return [
        {"prompt": given["prompt"], "multi_modal_data": given["multi_modal_embeddings"]}
        for given in _prompts(runner, pairs, dtype)
    ]


def messages(runner: Embedder, pairs: Sequence[tuple[Any, Question]], dtype: Any = None) -> list[list[dict[str, Any]]]:
    """Messages for the chat completions of `vllm serve`; arguments and errors as for `prompts`.

    Returns:
        For each pair the messages of a conversation: in the turn where images stand, one part of type `image_embeds` per
        image, with its tensor [K, C] as `torch.save` writes it, in base64, and then the text; other turns are text.

    Raises:
        InputError: as for `prompts`, or an image behind text of its turn: LLaVA's chat templates put images first.
    """
    conversations = _messages(runner, pairs, dtype)
    for conversation in conversations:
        for message in conversation:
            if not isinstance(message["content"], str):
                message["content"] = [_part(part) for part in message["content"]]
    return conversations


def _part(part: dict[str, Any]) -> dict[str, Any]:
    """A part as vLLM has it: the tensor without an object around it."""
    if part["type"] != "image_embeds":
        return part
    return {"type": "image_embeds", "image_embeds": part["image_embeds"]["data"]}
