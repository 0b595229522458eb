"""What the caption report and the preference page add to the common style sheet."""

STYLE = """
:root { --k1: #fdf0c4; --k2: #d9ecf7; --k3: #e6e0f5; --k4: #fadfe0; --k5: #dff0dc; --k6: #e9e7e2; }
@media (prefers-color-scheme: dark) {
  :root { --k1: #4d3f10; --k2: #173a4f; --k3: #372c58; --k4: #55262a; --k5: #21432a; --k6: #3b3934; }
}
h1 em { font-style: normal; }
h1, .lead { overflow-wrap: anywhere; }
.card {
  display: grid; grid-template-columns: 11rem 1fr; gap: 0 1.6rem;
  padding: 1.2rem 0; border-top: 1px solid var(--rule);
}
.sets2 { grid-template-columns: 11rem 1fr 1fr; }
.card img {
  width: 11rem; height: auto; max-height: 18rem; object-fit: contain; border-radius: 3px; display: block;
}
.card .text { margin: .1rem 0 .3rem; overflow-wrap: anywhere; white-space: pre-line; }
.card small { overflow-wrap: anywhere; }
.missing { font-size: .8rem; color: var(--wrong); overflow-wrap: anywhere; }
mark { color: inherit; border-radius: 2px; padding: 0 .15em; background: var(--k6); }
mark.hedge { background: var(--k1); }
mark.writing { background: var(--k2); }
mark.count { background: var(--k3); }
mark.person { background: var(--k4); }
mark.mood { background: var(--k5); }
.meanings td:nth-child(2) { min-width: 19rem; }
.sources { font-size: .82rem; }
.sources th, .sources td { padding-right: .9rem; min-width: 0; }
h3.gap { margin-top: 1.4rem; }
.ours th, .ours td { font-weight: 600; }
td small, th small { display: block; font-weight: 400; }

@media (max-width: 46rem) {
  .card, .sets2 { grid-template-columns: 1fr; gap: .8rem; }
}
"""
