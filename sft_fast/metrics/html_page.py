"""Self-contained HTML: one file, no scripts from elsewhere, light and dark."""

from __future__ import annotations

from html import escape

STYLE = """
:root { color-scheme: light dark; --fg: #1c2024; --bg: #fff; --soft: #60646c; --line: #d9dce1;
  --trained: #cdebd3; --special: #8a3fc4; --warn: #b4540a; --card: #f6f7f9; --accent: #2f9e57;
  --idle: #c3c8d0; }
@media (prefers-color-scheme: dark) { :root { --fg: #e6e8eb; --bg: #15171a; --soft: #9aa0a8;
  --line: #33373d; --trained: #1f4d2c; --special: #cf9bf5; --warn: #f0a35e; --card: #1d2024;
  --accent: #43b06a; --idle: #4c525b; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg);
  max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
h1 + p { margin-top: 0; }
p.soft, .soft { color: var(--soft); }
table { border-collapse: collapse; } td, th { padding: .25rem 1.5rem .25rem 0; text-align: left;
  vertical-align: top; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; white-space: pre-wrap; }
td:first-child { color: var(--soft); white-space: nowrap; }
table.figures td + td { text-align: right; padding-right: 0; }
table.sample { width: 100%; margin-bottom: 1.4rem; table-layout: fixed; }
table.sample td:first-child { width: 9rem; white-space: normal; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .8rem;
  margin-top: 1.4rem; }
.tiles div { background: var(--card); border-radius: .5rem; padding: .7rem .9rem;
  font-variant-numeric: tabular-nums; }
.tiles b { display: block; font-size: 1.5rem; font-weight: 650; }
.tiles span { display: block; color: var(--soft); font-size: .85rem; }
pre, .tokens { font: 13px/1.6 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; background: var(--card); padding: .7rem .9rem; border-radius: .4rem; }
.trained { background: var(--trained); border-radius: .15rem; }
.masked { color: var(--soft); }
.special { color: var(--special); font-weight: 600; }
.warn { color: var(--warn); }
.bin { display: flex; height: 1.1rem; background: var(--card); border: 1px solid var(--line);
  margin: .15rem 0 .7rem; }
.bin span { border-right: 1px solid var(--bg); background: linear-gradient(to right,
  var(--idle) calc(100% - var(--share)), var(--accent) 0); min-width: 1px; }
img, svg { max-width: 100%; }
img { background: #fff; border-radius: .4rem; display: block; margin: .8rem 0; }
details > summary { cursor: pointer; }
"""


def page(title: str, body: str) -> str:
    """A whole document; `body` is HTML, `title` is text."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        '</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def table(rows: list[tuple[str, str]], kind: str = "") -> str:
    """Two columns of text; `kind` is a class of the style above."""
    cells = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>\n" for a, b in rows)
    return f'<table class="{kind}">\n{cells}</table>\n'


def tiles(figures: list[tuple[str, str, str]]) -> str:
    """(name, figure, remark), large, side by side."""
    parts = (
        f"<div><span>{escape(name)}</span><b>{escape(figure)}</b><span>{escape(remark)}</span></div>"
        for name, figure, remark in figures
    )
    return f'<div class="tiles">{"".join(parts)}</div>\n'
