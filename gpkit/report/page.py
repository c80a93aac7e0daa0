"""The report as one HTML file, with its plots inside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from gpkit.report.tables import Report

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222;
  margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
h1 { font-size: 1.5rem; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin-top: 2rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums }
th, td { padding: 0.3rem 0.7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #ddd }
th { border-bottom: 2px solid #888 }
td:first-child, th:first-child { text-align: left }
tr:hover { background: #f4f6f8 }
.note { color: #555; font-size: 0.9rem; max-width: 50rem }
figure { margin: 1.5rem 0 }
figure img { max-width: 100%; height: auto }
figcaption { font-weight: 600 }
li { overflow-wrap: anywhere }
"""


def page(report: Report) -> str:
    """Return a report as an HTML page that needs no other file."""
    parts = [f"<h1>{escape(report.title)}</h1>"]
    parts += [f"<p>{escape(sentence)}</p>" for sentence in report.summary]
    parts += [_table(report.header, report.rows), f'<p class="note">{escape(report.note)}</p>']
    if report.problems:
        lines = "".join(f"<li>{escape(line)}</li>" for line in report.problems)
        parts += ["<h2>Missing, failed or killed</h2>", f"<ul>{lines}</ul>"]
    parts += [_figure(title, path) for title, path in report.plots.items()]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{STYLE}</style></head>\n"
        f"<body>\n{chr(10).join(parts)}\n</body></html>\n"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    table = f"<table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _figure(title: str, path: Path) -> str:
    data = path.read_bytes()
    width = int.from_bytes(data[16:20], "big") * 5 // 8  # where a PNG has its width
    name, content = escape(title, quote=True), base64.b64encode(data).decode()
    image = f'<img alt="{name}" width="{width}" src="data:image/png;base64,{content}">'
    return f"<figure><figcaption>{name}</figcaption>{image}</figure>"
