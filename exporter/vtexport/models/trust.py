"""What a checkpoint's files may not ask of the libraries that read them: running code, or reading from elsewhere."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from vtexport.errors import ModelError, first_line
from vtexport.models.conversation import check_whole
from vtexport.reading import TEXT_BYTES, Unreadable, read_json

#: files of settings that transformers reads, all of them JSON objects
SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
#: settings by which a file makes transformers run code or read something else, and why they are refused
_REFUSED = {
    "auto_map": "names Python code of its own, which is never run",
    "quantization_config": "says that its weights are quantised, which vtexport does not read",
    "transformers_weights": "names other weights than model.safetensors",
    "attribute_map": "renames settings",
    "fast_tokenizer_files": "names other tokenizers than tokenizer.json",
    "init_inputs": "gives the tokenizer arguments without names",
    "gguf_file": "names a file of another format",
    # Internal ones of transformers, given to the tokenizers library, which prints every name that it does not know.
    **dict.fromkeys(
        ("tokenizer_truncation", "tokenizer_padding", "_json_truncation", "_json_padding"),
        "sets what belongs into tokenizer.json",
    ),
}
# What a token that is added to a tokenizer may say of itself. The tokenizers library prints every other name, as it
# stands, to standard output.
_TOKEN = frozenset(("content", "single_word", "lstrip", "rstrip", "normalized", "special"))
#: image processors of the families, whose names may end in Fast or Pil; others scale by settings that nothing bounds
_PROCESSORS = ("CLIP", "Siglip", "Llava", "LlavaNext", "LlavaOnevision", "VideoLlava")
_REMEDY = "get the checkpoint in transformers' own form, such as one of llava-hf"
# Kernels for attention are fetched from the hub and run if they are named like a repository.
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
# Vocabularies: the largest that there are have some 35 MB.
_VOCABULARY_BYTES = 256 << 20
_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model", "merges.txt", "vocab.txt", "tekken.json")
# How often longer the replacements of a tokenizer may make a text.
_GROWTH = 64


class _Tokenizer(msgspec.Struct):
    """The parts of tokenizer.json that may do harm: those that change a text or what it is cut into, and added tokens."""

    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None
    added_tokens: list[dict[str, Any]] = []


def check_files(folder: Path) -> None:
    """Refuse a folder whose files are not plain, are too large, or lead out of the folder or to code.

    Raises:
        ModelError: there is such a file.
    """
    for path in _plain(folder):
        if path.name not in SETTINGS:
            continue
        try:
            settings = read_json(path, kind=dict[str, Any])
        except Unreadable as error:
            raise ModelError(f"{path} is not readable JSON ({error}); download it again") from error
        check_settings(path, settings)
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} holds an adapter, not a whole model; merge it into its model first")


def check_settings(path: Path, settings: Any) -> None:
    """Refuse settings, read from `path`, that lead to code or out of the folder, at whatever depth they stand.

    Raises:
        ModelError: there is one.
    """
    for key, value in _entries(settings):
        reason = _REFUSED.get(key)
        if reason is not None and value not in (None, {}, []):
            raise ModelError(f"{path}: {key} {reason}; {_REMEDY}")
        if key in _ATTENTION and value is not None and (not isinstance(value, str) or "/" in value):
            raise ModelError(f"{path}: {key} names a kernel to download, which is never run; remove it from the file")
        if key.startswith("__") and (key, value) != ("__type", "AddedToken"):
            raise ModelError(f"{path}: {key[:40]!r} is not a setting; {_REMEDY}")
    if path.name == "special_tokens_map.json":
        _check_tokens(path, (one for one in _objects(settings) if one is not settings), _TOKEN)
    elif path.name == "tokenizer_config.json":
        _check_tokens(path, _configured_tokens(settings), _TOKEN | {"__type"})
        listed = settings.get("added_tokens_decoder")
        _check_tokens(path, _objects(list(listed.values()) if isinstance(listed, dict) else []), _TOKEN)


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`, from its files alone: nothing is downloaded, no code of the checkpoint runs.

    Raises:
        ModelError: there is none, or one of its files is broken or not to be trusted.
    """
    from transformers import AutoTokenizer

    check_files(folder)
    if (folder / "tokenizer.json").exists():
        _check_tokenizer(folder / "tokenizer.json")
    return _opened(AutoTokenizer, folder, "tokenizer", "get its files")


def open_image_processor(folder: Path) -> Any:
    """As `open_tokenizer`, the image processor.

    Raises:
        ModelError: as `open_tokenizer`.
    """
    # The package itself of some releases (5.10) gives it only where torchvision is, though Pillow is all that it needs.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    check_files(folder)
    found = _opened(AutoImageProcessor, folder, "image processor", "get preprocessor_config.json of the checkpoint")
    name = type(found).__name__
    if name.removesuffix("Fast").removesuffix("Pil").removesuffix("ImageProcessor") not in _PROCESSORS:
        raise ModelError(f"{folder} names the image processor {name}, which no LLaVA model has; {_REMEDY}")
    return found


def calm(call: Callable[[], Any]) -> Any:
    """The result of `call`, a use of the tokenizer.

    Raises:
        ValueError: the tokenizer, which is written in Rust, gave up ("panicked").
    """
    try:
        return call()
    except BaseException as error:
        # Such an exception is not an Exception, so that nobody would catch it by accident.
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"it panicked: {first_line(error)}") from error


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens that `tokenizer` cuts `text` into.

    Raises:
        InputError: the text is no valid Unicode.
        ModelError: the tokenizer fails.
    """
    check_whole(text, "the prompt")
    try:
        ids: list[int] = list(calm(lambda: tokenizer(text)["input_ids"]))
    except Exception as error:  # whatever its files lead to
        raise ModelError(f"the tokenizer fails on the prompt ({first_line(error)}); get its files again") from error
    return ids


def _opened(loader: Any, folder: Path, name: str, remedy: str) -> Any:
    try:
        return calm(lambda: loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except Exception as error:  # transformers raises many kinds for a missing or broken file
        raise ModelError(f"{folder} has no usable {name} ({first_line(error)}); {remedy}") from error


def _plain(folder: Path) -> Iterator[Path]:
    """The files of `folder` that a tokenizer or a processor is read from, each plain and not too large."""
    templates = [*folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*")]
    for path in [*(folder / name for name in (*SETTINGS, *_VOCABULARIES)), *sorted(templates)]:
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error.strerror}); get it again") from error
        if not stat.S_ISREG(found.st_mode):
            raise ModelError(f"{path} is not a regular file; get it again")
        most = _VOCABULARY_BYTES if path.name in _VOCABULARIES else TEXT_BYTES
        if found.st_size > most:
            raise ModelError(f"{path} has {found.st_size} bytes, more than the {most} of any real one; get it again")
        yield path


def _check_tokenizer(path: Path) -> None:
    """Refuse a tokenizer whose tokens would print, or that makes a short text so long that it fits into no memory."""
    try:
        read = read_json(path, _VOCABULARY_BYTES, kind=_Tokenizer)
    except Unreadable as error:
        raise ModelError(f"{path} is not a tokenizer ({error}); get it again") from error
    _check_tokens(path, read.added_tokens, _TOKEN | {"id"})
    _check_template(path, read.post_processor)
    growth = 1.0
    for one in _objects([read.normalizer, read.pre_tokenizer]):
        content, pattern = one.get("content"), one.get("pattern")
        if isinstance(content, str):
            replaced = pattern.get("String") if isinstance(pattern, dict) else None
            growth *= max(1.0, len(content) / max(1, len(replaced) if isinstance(replaced, str) else 1))
    if growth > _GROWTH:
        raise ModelError(f"{path} makes texts more than {_GROWTH} times as long before it reads them; get it again")


def _check_template(path: Path, processor: Any) -> None:
    """Refuse a token to put around prompts that nothing defines; the tokenizers library would end in a panic, which prints."""
    for template in _objects(processor):
        known = template.get("special_tokens")
        for piece in _objects([template.get("single"), template.get("pair")]):
            token = piece.get("SpecialToken")
            name = token.get("id") if isinstance(token, dict) else None
            if isinstance(name, str) and not (isinstance(known, dict) and name in known):
                raise ModelError(f"{path} puts {name[:40]!r} around prompts and does not define it; get it again")


def _check_tokens(path: Path, tokens: Iterable[dict[str, Any]], names: frozenset[str]) -> None:
    """Refuse a token with a property that is not among `names`."""
    strange = next((key for token in tokens for key in token if key not in names), None)
    if strange is not None:
        raise ModelError(f"{path}: {strange[:40]!r} is no property of a token; {_REMEDY}")


def _configured_tokens(settings: Any) -> Iterator[dict[str, Any]]:
    """The objects of tokenizer_config.json that become tokens, besides those of `added_tokens_decoder`."""
    rest = [("", settings)]
    while rest:
        key, one = rest.pop()
        if isinstance(one, list):
            rest += [(key.removesuffix("s"), value) for value in one]
        if isinstance(one, dict):
            if key.endswith("_token") or "__type" in one or isinstance(one.get("content"), str):
                yield one
            # Tokens by names of their own, such as `extra_special_tokens` has them.
            named = key.endswith("_tokens")
            rest += [(f"{name}_token" if named else name, value) for name, value in one.items()]


def _entries(settings: Any) -> Iterator[tuple[str, Any]]:
    """All keys of nested objects, with their values."""
    for one in _objects(settings):
        yield from one.items()


def _objects(settings: Any) -> Iterator[dict[str, Any]]:
    """All objects that are nested in `settings`, itself among them."""
    rest = [settings]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            yield one
            rest += one.values()
        elif isinstance(one, list):
            rest += one
