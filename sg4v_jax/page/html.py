"""The frame of a page, and the pieces that several pages have.

What these functions get as text is escaped by them; what is named `html` or `body` must be HTML already.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape

from sg4v_jax.page.style import STYLE


def document(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """A whole page.

    Its content security policy forbids the network, and every script but the given one, so that even
    text that slipped through unescaped could run nothing.

    Args:
      title: text.
      body: HTML of the main part.
      style: more CSS, after the common one.
      script: JavaScript that runs at the end; "" is none.
    """
    allowed = f"'sha256-{_sha256(script)}'" if script else "'none'"
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        f"{body}\n</main>\n{f'<script>{script}</script>' if script else ''}</body>\n</html>\n"
    )


def figures(numbers: Iterable[tuple[str, str, str]]) -> str:
    """Large numbers in a row: (number, what it is, a note) each."""
    cells = "".join(
        f"<div><strong>{escape(number)}</strong><span>{escape(label)}</span><small>{escape(note)}</small></div>"
        for number, label, note in numbers
    )
    return f"<div class=figures>{cells}</div>"


def table(rows: Sequence[Sequence[str]], *, name: str = "") -> str:
    """A table of texts: the first row is its head, the first cell of a row names it, the rest are numbers."""
    head, *body = rows
    columns = "".join(f"<th{' class=n' if i else ''}>{escape(cell)}</th>" for i, cell in enumerate(head))
    lines = "".join(
        f"<tr><th>{escape(first)}</th>{''.join(f'<td class=n>{escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in body
    )
    return (
        f'<div class=scroll><table class="{escape(name)}"><thead><tr>{columns}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def bar(share: float) -> str:
    """A bar that is filled by a share between 0 and 1."""
    return f'<span class="bar"><i style="width:{100 * min(max(share, 0), 1):.1f}%"></i></span>'


def data_uri(encoded: bytes) -> str:
    """A PNG or JPEG file as an URI that holds it."""
    kind = "png" if encoded.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
