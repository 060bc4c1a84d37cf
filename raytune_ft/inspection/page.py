"""The view as one self-contained page: no script, nothing fetched, all text escaped."""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from raytune_ft.errors import RecipeError
from raytune_ft.inspection.view import Bar, RowView, View

STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881;--t:#1a7f37;--tb:#1a7f3722;--a:#2f6fed}
@media(prefers-color-scheme:dark){:root{--t:#56d364;--tb:#56d36422;--a:#79a8ff}}
body{font:15px/1.55 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.45rem;margin-bottom:.3rem} h2{font-size:1.1rem;margin-top:2.2rem}
.dim{opacity:.7}
.row{border:1px solid var(--line);border-radius:8px;padding:.8rem 1rem;margin:1rem 0}
.turn{margin:.35rem 0;white-space:pre-wrap;overflow-wrap:anywhere}
.turn b{display:inline-block;min-width:5.5rem;font-weight:600}
.system b{color:#a34bc4}.user b{color:var(--a)}.assistant b{color:var(--t)}.tool b{color:#b7791f}
pre{background:var(--soft);padding:.8rem;border-radius:8px;white-space:pre-wrap;
overflow-wrap:anywhere;margin:.6rem 0 0} mark{background:var(--tb);color:var(--t)}
.s{border:1px solid var(--line);border-radius:4px;padding:0 .2em;font-size:.9em}
.drop{color:#b7791f} .pack{display:flex;height:1.3rem;background:var(--soft);border-radius:4px;
overflow:hidden;margin:.15rem 0} .pack i{background:var(--a);border-right:2px solid Canvas}
.pack i:nth-child(even){opacity:.65} .bar{display:flex;align-items:center;gap:.6rem;margin:.1rem 0}
.bar span{min-width:9rem;text-align:right;font-variant-numeric:tabular-nums}
.bar i{background:var(--a);height:1rem;border-radius:2px;min-width:2px} .grow{flex:1;display:flex;
align-items:center;gap:.5rem} table{border-collapse:collapse} td{padding:.2rem 1rem .2rem 0;
vertical-align:top;overflow-wrap:anywhere}
"""


def write_page(view: View, path: str) -> Path:
    """Write the page whole or not at all; RecipeError if it cannot be written."""
    target = Path(path).expanduser()
    try:
        handle, scratch = tempfile.mkstemp(prefix=".inspect-", dir=target.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write("\n".join(page_lines(view)))
        os.chmod(scratch, 0o644)  # noqa: PTH101  mkstemp made it private; a page is to be shown
        os.replace(scratch, target)  # noqa: PTH105
    except OSError as error:
        raise RecipeError(f"--html: {target} cannot be written: {error.strerror}") from None
    return target


def page_lines(view: View) -> Iterator[str]:
    """Yield the page's lines."""
    title = html.escape(view.title)
    yield "<!doctype html><html lang=en><meta charset=utf-8>"
    yield "<meta http-equiv=Content-Security-Policy content=\"default-src 'none';"
    yield "style-src 'unsafe-inline'\">"
    yield "<meta name=viewport content='width=device-width'>"
    yield f"<title>{title}</title><style>{STYLE}</style>"
    yield f"<h1>{title}</h1>"
    for source, what in view.formats:
        yield f"<p class=dim><b>{html.escape(source)}</b>: {html.escape(what)}</p>"
    yield "<h2>Rows as the model sees them</h2>"
    yield "<p class=dim>Green is trained; framed are special tokens.</p>"
    for row in view.rows:
        yield from _row(row)
    yield from _titled(view.lengths_title, _bars(view.bars))
    yield from _titled(
        f"First packs, {view.max_length} tokens wide",
        (_pack(pack, view.max_length) for pack in view.packs),
    )
    yield "<h2>All rows</h2><table>"
    for name, value in view.counts:
        yield f"<tr><td>{html.escape(name)}<td>{html.escape(value)}"
    yield "</table>"
    if view.sampled:
        yield f"<p class=dim>{view.sampled} were read; figures with ~ are estimates.</p>"
    yield "</html>"


def _titled(title: str, lines: Iterable[str]) -> Iterator[str]:
    drawn = list(lines)
    if drawn:
        yield f"<h2>{html.escape(title)}</h2>"
        yield from drawn


def _row(row: RowView) -> Iterator[str]:
    if row.dropped is not None:
        yield f"<div class='row drop'>dropped: {html.escape(row.dropped)}</div>"
        return
    cut = f", cut from {row.uncut_length}" if row.uncut_length > row.n_tokens else ""
    yield f"<div class=row><b>{html.escape(row.where)}</b>"
    yield f"<span class=dim> {row.n_tokens} tokens{cut}, {row.n_targets} trained</span>"
    for role, text in row.turns:
        safe = html.escape(role)
        yield f"<div class='turn {safe}'><b>{safe}</b> {html.escape(text)}</div>"
    yield "<pre>" + "".join(_piece(p.text, p.trained, p.special) for p in row.pieces) + "</pre>"
    yield "</div>"


def _piece(text: str, trained: bool, special: bool) -> str:
    inner = html.escape(text)
    if special:
        inner = f"<span class=s>{inner}</span>"
    return f"<mark>{inner}</mark>" if trained else inner


def _bars(bars: list[Bar]) -> Iterator[str]:
    most = max((bar.rows for bar in bars), default=0)
    for bar in bars:
        share = 80 * bar.rows / most
        yield (
            f"<div class=bar><span class=dim>{bar.label}</span><div class=grow>"
            f"<i style='width:{share:.2f}%'></i>{bar.rows:,}</div></div>"
        )


def _pack(sizes: list[int], max_length: int) -> str:
    samples = "".join(
        f"<i style='width:{100 * size / max_length:.3f}%' title='{size} tokens'></i>"
        for size in sizes
    )
    return f"<div class=pack title='{sum(sizes)} tokens, {len(sizes)} samples'>{samples}</div>"
