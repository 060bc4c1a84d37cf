"""The report of a run: `loss.png` and one self-contained `report.html`, from the run folder."""

from __future__ import annotations

import base64
import html
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_ft.config.cache import cache_dir
from raytune_ft.training.run_folder import Event, RunFolder, read_json, read_jsonl

STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881;--accent:#2f6fed}
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem} h2{font-size:1.1rem;margin-top:2rem}
.sub{opacity:.7;margin-top:0} img{max-width:100%;background:#fff;border-radius:8px}
.cards{display:flex;flex-wrap:wrap;gap:.8rem;margin:1.2rem 0}
.card{border:1px solid var(--line);border-radius:8px;padding:.6rem 1rem;min-width:8rem}
.card b{display:block;font-size:1.25rem} .card span{opacity:.7;font-size:.85rem}
table{border-collapse:collapse;width:100%} td,th{border:1px solid var(--line);padding:.45rem .6rem;
text-align:left;vertical-align:top;overflow-wrap:anywhere} th{background:var(--soft)}
pre{background:var(--soft);padding:.8rem;border-radius:8px;overflow:auto}
"""


@dataclass(frozen=True)
class Summary:
    """The figures of a finished run."""

    steps: int
    tokens: int
    targets: int
    first_loss: float
    last_loss: float
    seconds: float
    rows: Event
    samples: dict[str, dict[str, str]]
    """prompt -> {"before" | "step N" | "after": answer}, in order."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second over all optimizer steps."""
        return self.tokens / self.seconds if self.seconds else 0.0


def summarize(folder: RunFolder) -> Summary:
    """Read the figures back from the run folder's files."""
    metrics = list(read_jsonl(folder.metrics))
    samples: dict[str, dict[str, str]] = {}
    for sample in read_jsonl(folder.samples):
        when = f"step {sample['step']}" if sample["when"] == "step" else sample["when"]
        samples.setdefault(sample["prompt"], {})[when] = sample["answer"]
    return Summary(
        steps=len(metrics),
        tokens=sum(m["tokens"] for m in metrics),
        targets=sum(m["targets"] for m in metrics),
        first_loss=metrics[0]["loss"] if metrics else float("nan"),
        last_loss=metrics[-1]["loss"] if metrics else float("nan"),
        seconds=sum(m["seconds"] for m in metrics),
        rows=read_json(folder.path / "data.json"),
        samples=samples,
    )


def moments(summary: Summary) -> list[str]:
    """Name the moments at which the prompts were answered, in order."""
    return list(dict.fromkeys(when for answers in summary.samples.values() for when in answers))


def write_report(folder: RunFolder) -> Path:
    """Write loss.png and report.html; return the latter's path."""
    summary = summarize(folder)
    plot = folder.path / "loss.png"
    draw_loss(list(read_jsonl(folder.metrics)), plot)
    report = folder.path / "report.html"
    report.write_text(_page(folder, summary, plot.read_bytes()), encoding="utf-8")
    return report


def draw_loss(metrics: list[Event], path: Path) -> None:
    """Draw loss, held-out loss and learning rate over optimizer steps."""
    os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [m["step"] for m in metrics]
    axes.plot(steps, [m["loss"] for m in metrics], color="#2f6fed", linewidth=2, label="loss")
    held_out = [(m["step"], m["val_loss"]) for m in metrics if m.get("val_loss") is not None]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o--", color="#e4572e", label="held-out loss")
    axes.set(xlabel="optimizer step", ylabel="loss per trained token", ylim=(0, None))
    axes.grid(alpha=0.25)
    rates = axes.twinx()
    rates.plot(steps, [m["lr"] for m in metrics], color="#999999", linewidth=1, label="lr")
    rates.set(ylabel="learning rate", ylim=(0, None))
    handles = [*axes.get_legend_handles_labels()[0], *rates.get_legend_handles_labels()[0]]
    axes.legend(handles, [str(h.get_label()) for h in handles], loc="upper right")
    figure.savefig(path)


def _page(folder: RunFolder, summary: Summary, plot: bytes) -> str:
    info = folder.info()
    image = base64.b64encode(plot).decode()
    parts = [
        f"<h1>{_text(info['name'])}</h1><p class=sub>{_text(info['created'])} · "
        f"{_text(info['source'])} · raytune_ft {_text(info['version'])}</p>",
        _cards(summary),
        f'<img alt="loss over steps" src="data:image/png;base64,{image}">',
        "<h2>Answers before, during and after</h2>",
        _samples(summary),
        mmlu_table(list(read_jsonl(folder.mmlu))),
        "<h2>Data</h2>",
        _rows(summary.rows),
        "<h2>Recipe</h2>",
        f"<pre>{_text(folder.recipe.read_text(encoding='utf-8'))}</pre>",
        "<h2>Environment</h2>",
        _pairs(read_json(folder.path / "environment.json")),
    ]
    title = _text(info["name"])
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f'<meta name=viewport content="width=device-width"><style>{STYLE}</style>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _cards(summary: Summary) -> str:
    figures = {
        "loss, first to last": f"{summary.first_loss:.3f} → {summary.last_loss:.3f}",
        "optimizer steps": f"{summary.steps:,}",
        "tokens, of them trained": f"{summary.tokens:,} · {summary.targets:,}",
        "tokens per second": f"{summary.tokens_per_s:,.0f}",
        "seconds of training": f"{summary.seconds:,.0f}",
    }
    cards = "".join(f"<div class=card><b>{v}</b><span>{k}</span></div>" for k, v in figures.items())
    return f"<div class=cards>{cards}</div>"


def _samples(summary: Summary) -> str:
    columns = moments(summary)
    if not columns:
        return "<p>The recipe has no chat_eval.prompts.</p>"
    head = "".join(f"<th>{_text(c)}</th>" for c in ["question", *columns])
    body = "".join(
        f"<tr><td><b>{_text(prompt)}</b></td>"
        + "".join(f"<td>{_text(answers.get(c, ''))}</td>" for c in columns)
        + "</tr>"
        for prompt, answers in summary.samples.items()
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def mmlu_table(lines: list[Event]) -> str:
    """Lay the accuracies of a run's MMLU questions under each other; nothing without any."""
    if not lines:
        return ""
    categories = list(dict.fromkeys(name for line in lines for name in line["categories"]))
    names = ["file", "step", "questions", "average", *categories]
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    body = ""
    for line in lines:
        shares = [line["average"], *(line["categories"].get(name) for name in categories)]
        cells = [line["name"], line["step"], f"{line['questions']:,}"]
        cells += ["" if share is None else f"{share:.2f}" for share in shares]
        body += "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"
    return f"<h2>MMLU, percent right</h2><table><tr>{head}</tr>{body}</table>"


def _rows(rows: Event) -> str:
    return _pairs({key: value for key, value in rows.items() if key != "places"})


def _pairs(content: Event) -> str:
    rows = "".join(
        f"<tr><th>{_text(k)}</th><td>{_text(_flat(v))}</td></tr>" for k, v in content.items()
    )
    return f"<table>{rows}</table>"


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _text(value: Any) -> str:
    return html.escape(str(value))
