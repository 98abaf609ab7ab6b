"""Bodies of requests to the server, and the images in them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

from PIL import Image

from vtexport.models.conversation import turns
from vtexport.serve.images import fetched
from vtexport.serve.protocol import image_urls, read_request


def seeds(place: Path) -> list[bytes]:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": "auto"}}, {"type": "text", "text": "what?"}]
    body = {"model": "m", "messages": [{"role": "user", "content": parts}], "max_tokens": 5, "stop": ["a"], "n": 1}
    stream_options = {"stream": True, "stream_options": {"include_usage": True}}
    return [json.dumps(body).encode(), json.dumps({**body, **stream_options}).encode()]


def one(data: bytes, place: Path) -> None:
    chat = read_request(data)
    for url in image_urls(chat.messages):
        # No host is allowed, so none is asked.
        fetched(url, (), 1 << 20, 1 << 20)
    turns(chat.messages, "<image>", "image", 1)
