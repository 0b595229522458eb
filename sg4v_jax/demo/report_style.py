"""What the demo's report adds to the common style sheet."""

STYLE = """
.flow {
  list-style: none; margin: 1rem 0 .6rem; padding: 0;
  display: grid; grid-template-columns: repeat(4, 1fr); gap: 1.6rem 2.2rem;
}
.flow li { position: relative; display: flex; flex-direction: column; }
.flow li:not(:last-child, :nth-child(4n))::after {
  content: "→"; position: absolute; right: -1.55rem; top: -.1rem; color: var(--muted);
}
.flow .title { flex: 1; font-size: .88rem; line-height: 1.35; margin: .15rem 0 .4rem; }
.flow strong { font-weight: 600; font-size: 1.05rem; }
.card {
  display: grid; grid-template-columns: 11rem 1fr 17rem; gap: 0 1.6rem;
  padding: 1.2rem 0; border-top: 1px solid var(--rule);
}
.card img { width: 11rem; height: 11rem; border-radius: 3px; display: block; }
.card p { margin: .1rem 0 .7rem; overflow-wrap: anywhere; }
.truth { color: var(--muted); }
.right { color: var(--right); }
.wrong {
  color: var(--wrong); background: var(--wrong-paper); border-radius: 2px; padding: 0 .15em;
  text-decoration: underline wavy 1px; text-underline-offset: 3px;
}
.qa { list-style: none; margin: .1rem 0 0; padding: 0; font-size: .85rem; line-height: 1.4; }
.qa li { display: flex; gap: .5rem; padding: .1rem 0; overflow-wrap: anywhere; }
.qa em { font-style: normal; font-weight: 600; }
.tick { color: var(--right); }
.cross { color: var(--wrong); }
.f1 { table-layout: fixed; }
.f1 .count { width: 4rem; }
.f1 th:first-child { width: 7rem; }
.qa-table { max-width: 26rem; }
.qa-table th { width: 7rem; }

.photos { display: grid; grid-template-columns: 1fr 1fr; gap: 1.4rem 2rem; }
.photos figure { display: grid; grid-template-columns: 8rem 1fr; gap: 1rem; }
.photos img { width: 8rem; border-radius: 3px; }
.photos p { font-size: .85rem; line-height: 1.45; overflow-wrap: anywhere; }

@media (max-width: 46rem) {
  .flow { grid-template-columns: 1fr 1fr; }
  .photos, .card { grid-template-columns: 1fr; }
  .card { gap: .8rem; }
  .flow li:not(:last-child, :nth-child(4n))::after { content: none; }
  .f1 { font-size: .78rem; }
}
"""
