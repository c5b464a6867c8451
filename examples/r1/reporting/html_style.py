"""The style of the page: one sheet, for light and dark, screens and paper, without anything from elsewhere."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1c2024; --soft: #5b636b; --line: #dfe3e8; --card: #f5f7f9; --band: #eef1f4;
  --good: #0b6b3a; --bad: #b00020; --bad-card: #fdecee; --good-card: #e9f6ee;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b8578f; --c4: #b97a00; --c5: #2f8fc4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --ink: #e6e9ec; --soft: #9aa4ae; --line: #31373d; --card: #1d2125; --band: #1d2227;
    --good: #5fd397; --bad: #ff8a94; --bad-card: #3a1a1e; --good-card: #15291d;
    --c0: #4fa8dd; --c1: #f28e4b; --c2: #35c79b; --c3: #e08fbf; --c4: #eab23d; --c5: #8fd0f5;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.2rem 4rem; max-width: 1180px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { max-width: 75ch; }
.lead { font-size: 1.05rem; color: var(--soft); margin: 0 0 1.2rem; }
nav { font-size: .9rem; margin: .8rem 0; } nav a { display: inline-block; margin-right: 1.1rem; }
a { color: var(--c0); }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; }
.card { flex: 1 1 11rem; padding: .8rem 1rem; border-radius: 10px; background: var(--card); }
.card .label { font-size: .85rem; color: var(--soft); }
.card .value { font-size: 1.75rem; font-weight: 650; line-height: 1.2; font-variant-numeric: tabular-nums; }
.card .note { font-size: .82rem; color: var(--soft); }
.holds .value { color: var(--good); } .fails .value { color: var(--bad); }
.notice { padding: .8rem 1rem; border-left: 5px solid var(--good); border-radius: 6px; background: var(--good-card); }
.notice.warning { border-color: var(--bad); background: var(--bad-card); }
.notice.warning strong, .notice.warning a { color: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.4rem; }
figure.chart { margin: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 .6rem; align-items: baseline; font-size: .9rem; }
figcaption ul { display: flex; flex-wrap: wrap; gap: 0 .9rem; margin: 0 0 0 auto; padding: 0; list-style: none; }
figcaption li { font-size: .8rem; color: var(--soft); white-space: nowrap; }
.unit { font-size: .8rem; color: var(--soft); }
.swatch { display: inline-block; width: 1.1em; height: 3px; margin-right: .35em; vertical-align: middle; }
.swatch.dot { width: .6em; height: .6em; border-radius: 50%; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg path { fill: none; stroke-width: 1.9; stroke-linejoin: round; }
svg .grid { stroke: var(--line); stroke-width: .7; } svg .band { fill: var(--band); } svg .noband { fill: none; }
svg .faint { stroke-width: .8; opacity: .35; } svg .thin { stroke-width: 1.2; }
svg .aim { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 3; }
svg text { font-size: 10px; fill: var(--soft); text-anchor: middle; }
svg .side { text-anchor: end; } svg .stage { font-weight: 600; } svg .warned { fill: var(--bad); }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); }
.b0 { fill: var(--c0); background: var(--c0); } .b1 { fill: var(--c1); background: var(--c1); }
.b2 { fill: var(--c2); background: var(--c2); } .b3 { fill: var(--c3); background: var(--c3); }
.b4 { fill: var(--c4); background: var(--c4); } .b5 { fill: var(--c5); background: var(--c5); }
.tables { columns: 25rem; column-gap: 2rem; }
.tables > div { break-inside: avoid; margin-bottom: 1.8rem; }
.narrow { max-width: 46rem; } .narrow table { margin-bottom: 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .18rem .5rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--soft); font-weight: 500; } tbody th { font-weight: 400; white-space: pre-wrap; }
tr.section th { padding-top: .7rem; font-weight: 600; }
.number { text-align: right; white-space: nowrap; }
code { font: .86em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
td code { white-space: pre; overflow-wrap: normal; }
.right { color: var(--good); } .wrong { color: var(--bad); }
summary { cursor: pointer; color: var(--soft); }
footer { margin-top: 3rem; font-size: .85rem; color: var(--soft); }
@media print { body { max-width: none; } figure.chart { break-inside: avoid; } }
"""
