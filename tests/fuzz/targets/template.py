"""Chat templates."""

from __future__ import annotations

from pathlib import Path

from vtexport.models.conversation import rendered, turns
from vtexport.models.template import ChatTemplate

_SEEDS = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %} {% endfor %}",
    "{% set ns = namespace(n=1) %}{% for i in range(9) %}{% set ns.n = ns.n * 2 %}{{ 'a' * ns.n ~ ns.n }}{% endfor %}",
    "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ '%s' % n }}{% endif %}{% endmacro %}{{ f(9) | replace('1', 'xx') }}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages | tojson(indent=2) }}{{ messages[::-1] | length }}",
    "{{ '{:>8}'.format('x').center(20).split(' ') | list | sort | unique | batch(2) | list }}{{ 2 ** 10 // 3 }}",
)


def seeds(place: Path) -> list[bytes]:
    """Templates that use most of the language."""
    return [source.encode() for source in _SEEDS]


def one(data: bytes, place: Path) -> None:
    """Compile it, and render a question by it."""
    template = ChatTemplate(data.decode("utf-8", "replace"))
    messages = turns("what is it?", "<image>", "image", 1)
    rendered(messages, lambda form: template.render(messages=form, add_generation_prompt=True, bos_token="<s>"))
