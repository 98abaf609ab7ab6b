"""Attention metadata with one part per run of layers between two stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from tensorrt_llm._torch.attention_backend import TrtllmAttentionMetadata
from tensorrt_llm._torch.metadata import KVCacheParams

from vtexport.targets.tensorrt_llm.torch_model.packing import Row
from vtexport.targets.tensorrt_llm.torch_model.refusals import refuse_features
from vtexport.targets.tensorrt_llm.torch_model.stages import Lengths, Schedule


class StagedMetadata(TrtllmAttentionMetadata):  # type: ignore[misc]  # no types without tensorrt_llm
    """TensorRT-LLM's own metadata, which serves the layers up to the first stage, and one more for each part behind.

    Attention takes every length from the metadata that it is called with, so layers behind a stage fill a shorter
    prefix of the same blocks. The parts have buffers of their own, those of CUDA graphs too: TensorRT-LLM shares graph
    buffers by name, and what two parts share the last one to prepare would decide.

    A subclass with a `schedule` takes the place of `TrtllmAttention.Metadata` (`metadata_class`).
    """

    schedule: ClassVar[Schedule]
    _parts: list[Any]
    _lengths: list[Lengths]

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_features(self)
        # Also called on the shallow copy that becomes a CUDA graph's metadata: what it shares is made anew.
        self._parts = [self._another() for _ in range(1, self.schedule.parts)]
        self._lengths = []

    def _another(self) -> Any:
        """A plain metadata of the same settings with buffers of its own."""
        base = TrtllmAttentionMetadata
        names = [field.name for field in dataclasses.fields(base) if field.init]
        # Lengths are properties, which `prepare` sets, and so is the greatest length, stored under another name.
        given = {name: getattr(self, name) for name in names if not isinstance(getattr(base, name, None), property)}
        lengths = {"seq_lens": None, "num_contexts": 0, "max_seq_len": None}
        return base(
            **{**given, **lengths, "_max_seq_len_storage": self._max_seq_len_storage, "cuda_graph_buffers": None}
        )

    def prepare(self) -> None:
        """As TensorRT-LLM does before each step. In a step with contexts, the parts wait for `begin`."""
        super().prepare()
        watch(self.kv_cache_manager, self.schedule)
        self._lengths = []
        if self.num_contexts == 0:
            self._prepare_parts()

    def begin(self, rows: Sequence[Row]) -> None:
        """Prepare the parts of a step with contexts, of which `rows` have images; the others drop nothing."""
        for request in self.request_ids[: self.num_contexts]:
            self.schedule.forget(request)
        for row in rows:
            self.schedule.start(row.request, row.images)
        self._prepare_parts()

    def part(self, number: int) -> Any:
        """The metadata of part `number`."""
        return self._parts[number - 1] if number else self

    def rows(self, number: int) -> list[int]:
        """Tokens of each row in part `number` in this step."""
        return self._lengths[number].new

    def _prepare_parts(self) -> None:
        cached = self.kv_cache_params.num_cached_tokens_per_seq if self.kv_cache_params.use_cache else None
        given = (
            [int(request) for request in self.request_ids],
            self.num_contexts,
            self.seq_lens.tolist(),
            [int(length) for length in self.prompt_lens],
            [0] * self.num_seqs if cached is None else [int(count) for count in cached],
        )
        self._lengths = [self.schedule.lengths(part, *given) for part in range(self.schedule.parts)]
        for part, lengths in zip(self._parts, self._lengths[1:], strict=True):
            part.beam_width, part.request_ids = self.beam_width, self.request_ids
            part.kv_cache_manager = self.kv_cache_manager
            part.seq_lens = torch.tensor(lengths.new, dtype=torch.int)
            part.num_contexts, part.prompt_lens = self.num_contexts, lengths.prompts
            part.kv_cache_params = KVCacheParams(
                use_cache=self.kv_cache_params.use_cache,
                num_cached_tokens_per_seq=None if cached is None else lengths.cached,
                num_extra_kv_tokens=self.kv_cache_params.num_extra_kv_tokens,
            )
            part.prepare()


def metadata_class(schedule: Schedule) -> type[StagedMetadata]:
    """The class of metadata whose parts are those of `schedule`."""
    return type("StagedMetadata", (StagedMetadata,), {"schedule": schedule})


def watch(manager: Any, schedule: Schedule) -> None:
    """Let `schedule` forget a request when `manager`, a KV cache manager or None, frees the request's blocks."""
    if manager is None or getattr(manager, "_vtexport_schedule", None) is schedule:
        return
    free = manager.free_resources

    def free_and_forget(request: Any, *args: Any, **kwargs: Any) -> Any:
        schedule.forget(request.py_request_id)
        return free(request, *args, **kwargs)

    manager.free_resources, manager._vtexport_schedule = free_and_forget, schedule
