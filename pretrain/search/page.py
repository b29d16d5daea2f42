"""What a search found as one file without scripts, in which everything from the data is escaped."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from pretrain.search.search import Answer, Found, Hit

_MAX_TEXT = 300
_STYLE = """
body{font:14px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1100px;padding:0 1em;color:#222;background:#fff}
h1{font-size:1.4em}h2{font-size:1.1em;margin-top:2em;overflow-wrap:anywhere}figure{margin:0}
.hits{display:grid;grid-template-columns:repeat(auto-fill,minmax(165px,1fr));gap:1em}
img{max-width:160px;max-height:160px}figcaption{font-size:12px;overflow-wrap:anywhere}
small{color:#777;overflow-wrap:anywhere}.bad{color:#b00020}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}small{color:#aaa}}
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(found: Found) -> str:
    """The whole page."""
    parts = [
        f"<h1>{len(found.answers):,} searches among {found.rows:,} {escape(found.tower)}s</h1>",
        f"<p><small>{escape(found.folder)}, embedded by {escape(found.model)}; {escape(found.backend)}</small></p>",
    ]
    if found.missing_shards:
        parts.append(f"<p class=bad>{found.missing_shards:,} shards are not embedded yet.</p>")
    for answer in found.answers:
        parts += _answer(answer)
    head = f'<meta charset=utf-8><meta http-equiv=Content-Security-Policy content="{_POLICY}">'
    head += f"<title>Searches</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>" + "\n".join(parts) + "</body></html>\n"


def _answer(answer: Answer) -> Iterator[str]:
    yield f"<h2>{escape(answer.query)}</h2>"
    if answer.picture is not None:
        yield f'<p><img src="{escape(answer.picture)}" alt="the query"></p>'
    yield "<div class=hits>"
    yield from (_figure(hit) for hit in answer.hits)
    yield "</div>"


def _figure(hit: Hit) -> str:
    text = escape(" | ".join(hit.texts)[:_MAX_TEXT])
    picture = f"<small class=bad>{escape(hit.why_none or '')}</small>"
    if hit.picture is not None:
        picture = f'<img src="{escape(hit.picture)}" alt="{escape(hit.key)}">'
    caption = f"{hit.score:.4f} {text}<br><small>{escape(hit.key)}</small>"
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"
