"""How a page of a run looks: on a screen in light and dark, on a phone, and on paper."""

from __future__ import annotations

import base64
import hashlib
import html

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may load and run for the page: nothing but what stands in it."""

STYLE = """
:root{color-scheme:light dark;--ink:#1c2330;--soft:#5b6678;--line:#d9dee7;--panel:#f6f8fb;
--page:#fff;--c0:#2563eb;--c1:#d9480f;--c2:#0f8a5f;--c3:#8b3fd1;--c4:#b58100;--c5:#c2255c;
--c6:#0b7285;--c7:#64748b;--good:#0f8a5f;--bad:#c92a2a}
@media (prefers-color-scheme:dark){:root{--ink:#e6eaf2;--soft:#9aa5b8;--line:#323b4b;
--panel:#1b222e;--page:#11161f;--c0:#6ea8fe;--c1:#ff9a5c;--c2:#4cd3a2;--c3:#c494ff;--c4:#f0c24b;
--c5:#ff8ab1;--c6:#58cfe4;--c7:#a3b0c4;--good:#4cd3a2;--bad:#ff8787}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Noto Sans CJK SC",
sans-serif;color:var(--ink);background:var(--page);overflow-wrap:anywhere;
max-width:64rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.55rem;line-height:1.25;margin:0 0 .2rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2.2rem 0 .7rem} h3{font-size:1rem;margin:1.3rem 0 .5rem;
overflow-wrap:anywhere;white-space:pre-wrap}
.sub{color:var(--soft);margin:0;overflow-wrap:anywhere}
.tag{display:inline-block;border-radius:99px;padding:0 .6rem;font-size:.8rem;font-weight:600;
vertical-align:.25em;border:1px solid currentColor;color:var(--soft)}
.tag.done{color:var(--good)} .tag.failed,.tag.interrupted{color:var(--bad)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.6rem;
margin:1.2rem 0}
.card{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:.55rem .8rem}
.card{min-width:0} .card b{display:block;font-size:1.12rem;font-variant-numeric:tabular-nums}
.card span{color:var(--soft);font-size:.82rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr));gap:1rem}
figure{margin:0;break-inside:avoid} .wide{grid-column:1/-1} .chart{display:block;width:100%}
.narrow{display:none}
.chart text{font:11px system-ui,sans-serif;fill:var(--soft);font-variant-numeric:tabular-nums}
.chart .name{font-weight:600;font-size:12.5px;fill:var(--ink)} .chart .unit{font-weight:400;
fill:var(--soft)}
.chart path{fill:none;stroke-width:1.7;stroke-linejoin:round} .chart .grid{stroke:var(--line);
stroke-width:1} .chart .axis{stroke:var(--soft);stroke-width:1} .chart .faint{opacity:.32;
stroke-width:1} .chart .dashed{stroke-dasharray:5 3} .chart .key{stroke-width:2.5}
.c0{stroke:var(--c0)} .c1{stroke:var(--c1)} .c2{stroke:var(--c2)} .c3{stroke:var(--c3)}
.c4{stroke:var(--c4)} .c5{stroke:var(--c5)} .c6{stroke:var(--c6)} .c7{stroke:var(--c7)}
.dot{stroke-width:1.4} .dot circle{fill:var(--page)}
.moments{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,17rem),1fr));
gap:.6rem}
.moment{background:var(--panel);border:1px solid var(--line);border-radius:10px;
padding:.5rem .75rem;break-inside:avoid;min-width:0}
.moment b{display:block;color:var(--soft);font-size:.8rem;font-weight:600}
.moment p{margin:.15rem 0 0;white-space:pre-wrap;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
td,th{border-bottom:1px solid var(--line);padding:.35rem .6rem .35rem 0;text-align:left;
vertical-align:top;overflow-wrap:anywhere} th{font-weight:600} .pairs th{width:13rem;
color:var(--soft);font-weight:500} .num td+td,.num th+th{text-align:right;padding-left:.8rem}
tr.best td{font-weight:700} table.num{width:auto;min-width:min(100%,30rem)}
.size{width:6rem;white-space:nowrap} .bar{display:block;height:.5rem;margin-top:.45rem;
border-radius:3px;min-width:1px} .b0{background:var(--c0)}
.b1{background:var(--c1)} .b2{background:var(--c2)} .b3{background:var(--c3)}
.b4{background:var(--c4)} .b5{background:var(--c5)} .b6{background:var(--c6)}
.b7{background:var(--c7)}

.keys{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;margin:.5rem 0 1.2rem}
.run{overflow-wrap:anywhere} .run i{display:inline-block;width:1.1rem;height:.28rem;
border-radius:2px;margin-right:.4rem;vertical-align:.22em}
pre{background:var(--panel);border:1px solid var(--line);padding:.8rem;border-radius:10px;
overflow:auto;font-size:.85rem;white-space:pre-wrap;overflow-wrap:anywhere}
.note{border-left:3px solid var(--c1);padding:.1rem .8rem;margin:.8rem 0;overflow-wrap:anywhere}
@media (max-width:40rem){body{margin:1rem auto;padding:0 .8rem} .narrow{display:block}
.broad{display:none} .pairs th{width:8rem}}
@media print{*{print-color-adjust:exact} :root{color-scheme:light;
--ink:#000;--soft:#444;--line:#bbb;--panel:#fff;--page:#fff;
--c0:#1d4ed8;--c1:#c2410c;--c2:#047857;--c3:#7e22ce;--c4:#92400e;--c5:#9d174d;--c6:#155e75;
--c7:#475569;--good:#047857;--bad:#b91c1c} @page{size:A4;margin:14mm}
body{margin:0;padding:0;max-width:none;font-size:10.5pt} .charts{grid-template-columns:1fr 1fr}
.moments{grid-template-columns:1fr 1fr} h2,h3{break-after:avoid} tr{break-inside:avoid}
.narrow{display:none} .broad{display:block}}
"""


def page(title: str, parts: list[str], *, style: str = "", script: str = "") -> str:
    """Put a page's parts into a whole document; `title` is escaped here, the parts are not.

    Args:
        title: of the window.
        parts: of the body.
        style: further rules.
        script: run behind the parts; the browser runs it by its hash, and no other.
    """
    policy, behind = POLICY, ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy, behind = f"{POLICY}; script-src 'sha256-{digest}'", f"<script>{script}</script>"
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{policy}">'
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}{style}</style>"
        f"<body>{''.join(parts)}{behind}</body></html>\n"
    )


def text(value: object) -> str:
    """Escape what a run, a row or a model wrote."""
    return html.escape(str(value))
