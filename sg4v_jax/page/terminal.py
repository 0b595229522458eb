"""Texts from elsewhere on a terminal."""


def printable(text: str) -> str:
    """The text with everything escaped that could steer a terminal; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
