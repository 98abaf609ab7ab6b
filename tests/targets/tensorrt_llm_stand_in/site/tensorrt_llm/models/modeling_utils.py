"""Quantisation, of which there is none here."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace


@dataclass
class QuantConfig:
    """What is quantised, and how: nothing."""

    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None
    group_size: int | None = 128
    exclude_modules: list[str] | None = None

    @property
    def layer_quant_mode(self) -> SimpleNamespace:
        """Says no to every question about quantisation that attention asks."""
        if self.quant_algo or self.kv_cache_quant_algo:
            raise NotImplementedError("the stand-in does not quantise")
        questions = ("has_fp8_kv_cache", "has_fp4_kv_cache", "has_fp8_qdq", "has_nvfp4", "has_any_quant")
        return SimpleNamespace(**dict.fromkeys(questions, lambda: False))
