"""Models. Importing this registers those that the stand-in has."""

from . import modeling_llama
from .modeling_auto import AutoModelForCausalLM
from .modeling_utils import get_model_architecture

__all__ = ["AutoModelForCausalLM", "get_model_architecture", "modeling_llama"]
