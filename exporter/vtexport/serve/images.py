"""Images of requests: data URIs, and URLs of hosts that the server allows."""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

from vtexport.errors import InputError
from vtexport.models.decoding import MOST_PIXELS
from vtexport.models.pictures import read_image

_SECONDS = 10


def fetched(url: str, hosts: Sequence[str], most: int, pixels: int) -> Any:
    """The image behind `url`, as an RGB PIL image.

    Args:
        url: a data URI, or a URL.
        hosts: hosts whose URLs are allowed.
        most: bytes of the file at most.
        pixels: pixels of the image at most.

    Raises:
        InputError: another kind of URL, a host that is not allowed, a file that cannot be had, or no such image.
    """
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        data = _data(url)
    elif scheme in ("http", "https"):
        data = _download(url, hosts, most)
    else:
        raise InputError("an image URL is neither a data URI nor http(s); give data:image/png;base64,…")
    if len(data) > most:
        raise InputError(f"an image has {len(data)} bytes, the server takes {most}; send a smaller file")
    wrong = "an image is not readable; send a whole PNG or JPEG file"
    return read_image(io.BytesIO(data), "an image", wrong, min(pixels, MOST_PIXELS))


def _data(url: str) -> bytes:
    head, comma, content = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InputError("a data URI is not in base64; give data:image/png;base64,…")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError("a data URI is no valid base64; send the whole file") from error


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which could lead to a host that is not allowed."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _download(url: str, hosts: Sequence[str], most: int) -> bytes:
    try:
        host = urllib.parse.urlsplit(url).hostname
    except ValueError as error:
        raise InputError("an image URL is not valid; give https://host/path, or a data URI") from error
    if host not in hosts:
        remedy = f"it takes those of {', '.join(hosts)}" if hosts else "send a data URI"
        raise InputError(f"the server takes no image URLs of host {str(host)[:100]}; {remedy}")
    try:
        with urllib.request.build_opener(_Stay).open(url, timeout=_SECONDS) as answer:
            return _read(answer, most)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = f"status {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
        raise InputError(f"an image URL of {host} cannot be read ({reason}); send a data URI") from error


def _read(answer: Any, most: int) -> bytes:
    """Up to `most` bytes and one of what a host sends, which may be so slow that it never ends."""
    parts, size, end = [], 0, time.monotonic() + _SECONDS
    while size <= most and (part := answer.read1(1 << 16)):
        if time.monotonic() > end:
            raise TimeoutError
        parts.append(part)
        size += len(part)
    return b"".join(parts)
