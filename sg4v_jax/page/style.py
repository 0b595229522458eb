"""The style sheet that all pages share; each adds what only it has."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfb; --ink: #1d1d1b; --muted: #6c6b66; --rule: #e3e2dc; --accent: #2b6289; --track: #efeee9;
  --right: #2c6b3f; --wrong: #a02113; --wrong-paper: #fbe4df;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #171716; --ink: #e6e4de; --muted: #9c9a92; --rule: #34332f; --accent: #7db4da; --track: #2a2926;
    --right: #90cd9f; --wrong: #ffb3a5; --wrong-paper: #4b1f18;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 60rem; margin: 0 auto; padding: 3.5rem 1.5rem 5rem; }
h1 {
  font-size: 2rem; line-height: 1.2; font-weight: 600; letter-spacing: -.015em; text-wrap: balance;
  margin: .3rem 0 .8rem;
}
h2 { font-size: 1.15rem; font-weight: 600; margin: 0 0 .3rem; }
h3, .kicker, .number {
  font-size: .72rem; font-weight: 600; letter-spacing: .07em; text-transform: uppercase;
  color: var(--muted); margin: 0;
}
h3 small { font-weight: 400; letter-spacing: 0; text-transform: none; font-size: .8rem; margin-left: .4rem; }
p { margin: 0; }
small { color: var(--muted); font-size: .82rem; }
.lead { max-width: 44rem; font-size: 1.05rem; color: var(--muted); }
.note { color: var(--muted); font-size: .88rem; max-width: 46rem; margin-bottom: 1rem; }
section { margin-top: 3.2rem; }

.figures {
  display: grid; grid-template-columns: repeat(4, 1fr); margin-top: 2rem;
  border-top: 2px solid var(--ink); border-bottom: 1px solid var(--rule);
}
.figures div { padding: .9rem 1rem 1rem 0; }
.figures strong {
  display: block; font-size: 2rem; line-height: 1.2; font-weight: 600; letter-spacing: -.02em;
}
.figures span { display: block; font-weight: 600; font-size: .9rem; }
.figures small { display: block; line-height: 1.4; }

.bar { display: block; height: 3px; margin-top: .2rem; background: var(--track); border-radius: 2px; }
.bar i { display: block; height: 100%; background: var(--accent); border-radius: 2px; }

summary { cursor: pointer; padding: .8rem 0; border-top: 1px solid var(--rule); color: var(--accent); }

table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { text-align: left; font-weight: 400; padding: .4rem 1.5rem .4rem 0; }
thead th { color: var(--muted); font-size: .82rem; border-bottom: 1px solid var(--rule); }
th, td { vertical-align: top; }
td { padding: .4rem 1.5rem .4rem 0; min-width: 5rem; }
td .bar { margin-top: .1rem; }
.count { text-align: right; padding-right: 0; min-width: 0; color: var(--muted); }
.total th, .total td { border-top: 1px solid var(--rule); font-weight: 600; }
.total .count { font-weight: 400; }

.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 1.6rem 2rem; }
figure { margin: 0; }
.charts figcaption { font-weight: 600; font-size: .9rem; }
.charts figcaption small { font-weight: 400; margin-left: .6rem; }
.chart { width: 100%; height: auto; display: block; }
.chart text { font-size: 11.5px; fill: var(--muted); }
.chart .grid { stroke: var(--rule); stroke-width: 1; }
.chart .axis { stroke: var(--muted); stroke-width: 1; }
.chart polyline { fill: none; stroke: var(--accent); stroke-linejoin: round; }
.chart circle { fill: var(--accent); }
.chart .raw { stroke-width: 1; opacity: .35; }
.chart .mean { stroke-width: 1.8; }
.chart rect { fill: var(--accent); opacity: .75; }
.chart .other { stroke: var(--ink); stroke-width: 1.5; }

dl { display: grid; grid-template-columns: 7rem 1fr; gap: .7rem 0; margin: .8rem 0 0; font-size: .9rem; }
dt { font-weight: 600; }
dd { margin: 0; color: var(--muted); max-width: 44rem; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
.bad { color: var(--wrong); }
.scroll { overflow-x: auto; }
code { font-size: .88em; overflow-wrap: anywhere; }

@media (max-width: 46rem) {
  .figures, .charts { grid-template-columns: 1fr 1fr; }
  .charts, dl { grid-template-columns: 1fr; }
  td, th { padding-right: .6rem; min-width: 0; }
}
@media print { .card, figure, tr { break-inside: avoid; } }
"""
