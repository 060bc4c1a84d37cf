"""Tables of benchmarks.lengths: its lines of JSON in, Markdown out, predictions beside outcomes."""

from __future__ import annotations

from typing import Any

Line = dict[str, Any]


def print_tables(lines: list[Line]) -> None:
    """Print speeds and memory by length, then the longest contexts by cap."""
    cells = [line for line in lines if "side" in line]
    if cells:
        _print(
            ["tokens a sequence", "side", "tok/s", "predicted", "allocated GB", "predicted",
             "device GB", "step s", "settings"],
            [_cell(line) for line in cells],
        )  # fmt: skip
    found = [line for line in lines if "longest" in line]
    if found:
        tries = [line for line in lines if "trains" in line or ("cap" in line and "failed" in line)]
        _print(
            ["cap GiB", "longest that trains", "fails at", "predicted longest", "allocated GB",
             "device GB", "step s", "layout"],
            [_longest(line, tries) for line in found],
        )  # fmt: skip


def _cell(line: Line) -> list[str]:
    if "tok_s" not in line:
        said = str(line.get("skipped") or line.get("refused") or line.get("failed"))
        return [f"{line['length']:,}", line["side"], said, *[""] * 6]
    steps = sorted(line["step_s"])
    speed = line.get("predicted_tok_s")
    return [
        f"{line['length']:,}",
        line["side"],
        f"{line['tok_s']:,}",
        f"{speed:,}" if speed else "",
        *(str(line.get(key, "")) for key in ("allocated_gb", "predicted_gb", "device_gb")),
        f"{steps[0]:.2f} to {steps[-1]:.2f}",
        str(line.get("layout") or settings(line)),
    ]


def settings(line: Line) -> str:
    """Say how a side was laid out, where it tells."""
    if "micro_batch" not in line:
        return ""
    return f"{line['micro_batch']} x {line['passes']}, recompute {line['recompute']}"


def _longest(line: Line, tries: list[Line]) -> list[str]:
    mine = [one for one in tries if one["cap"] == line["cap"]]
    best = next((one for one in mine if one["length"] == line["longest"]), {})
    fails = f"{line['fails']:,}" if line["fails"] else "not tried longer"
    return [
        f"{line['cap']:g}", f"{line['longest']:,}", fails, f"{line.get('predicted', 0):,}",
        *(str(best.get(key, "")) for key in ("allocated_gb", "device_gb", "seconds", "layout")),
    ]  # fmt: skip


def _print(columns: list[str], rows: list[list[str]]) -> None:
    print("|", " | ".join(columns), "|")
    print("|", " | ".join("---" for _ in columns), "|")
    for row in rows:
        print("|", " | ".join(row), "|")
