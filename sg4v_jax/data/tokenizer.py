"""LLaMA's SentencePiece tokenizer, giving the ids the released checkpoints were trained with.

Those checkpoints used the slow `LlamaTokenizer` of transformers 4.31 with `legacy=False`. It cuts
a text at control tokens and image placeholders and encodes each piece of text separately; this
module does one such piece at a time, and `conversation.py` puts the pieces together.
"""

import hashlib
import io
import os
import pathlib
from collections.abc import Iterable, Iterator

import sentencepiece

from sg4v_jax import atomic

_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece spells a space


class Tokenizer:
    """A SentencePiece model with LLaMA's conventions. Picklable, safe to share between threads.

    Attributes:
        path: where the model file was read from.
        sha256: hex digest of the model file; checkpoints carry it.
        vocab_size: number of pieces.
        bos_id, eos_id, unk_id: ids of `<s>`, `</s>` and `<unk>` (1, 2 and 0 in LLaMA).
        pad_id: equals `unk_id`, as ShareGPT4V trains (LLaMA has no padding piece).
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Reads a model file.

        Raises:
            FileNotFoundError: there is no file at `path`.
            ValueError: the file is not a SentencePiece model, or lacks `<s>`, `</s>` or `<unk>`.
        """
        self.path = pathlib.Path(path)
        model = self.path.read_bytes()
        self.sha256 = hashlib.sha256(model).hexdigest()
        try:
            self._sp = sentencepiece.SentencePieceProcessor()
            # The constructor's argument would take an empty file for "no model yet".
            self._sp.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(
                f"{self.path}: not a SentencePiece model ({len(model)} bytes). Give the "
                "checkpoint's tokenizer.model (not tokenizer.json, nor a Git LFS pointer)."
            ) from error
        self.vocab_size: int = self._sp.get_piece_size()
        self.unk_id: int = self._sp.unk_id()
        self.bos_id: int = self._sp.bos_id()
        self.eos_id: int = self._sp.eos_id()
        if min(self.bos_id, self.eos_id, self.unk_id) < 0:
            raise ValueError(
                f"{self.path}: needs the pieces <unk>, <s> and </s>, has ids {self.unk_id}, "
                f"{self.bos_id} and {self.eos_id} (-1: absent). Train it with train_tokenizer()."
            )
        self.pad_id = self.unk_id
        self._special = frozenset({self.unk_id, self.bos_id, self.eos_id})

    def encode(self, text: str, *, bos: bool = False, after_control: bool = False) -> list[int]:
        """Encodes one piece of text.

        Text never becomes a control id: a literal `</s>` is encoded as the characters it has.

        Args:
            text: any string without lone surrogates.
            bos: whether to put `<s>` in front.
            after_control: whether the text directly follows `<s>` or `</s>` inside a sequence. Then
                no word start is added in front of it, the way transformers 4.31 did it: the text
                is encoded with one, which is then cut off the first piece, so `USER` becomes
                `US`,`ER` (3308, 1001) where newer versions give `USER` (11889). Where the
                vocabulary has no piece without the word start (4.31 gives `<unk>`), it stays on.

        Raises:
            ValueError: the text holds a lone surrogate, which no UTF-8 file can.
        """
        # SentencePiece would do this replacement too, but after the test for a leading space below.
        text = text.replace(_WORD_START, " ")
        try:
            ids: list[int] = self._sp.encode(text)
        except RuntimeError as error:
            raise ValueError(f"text is not valid Unicode: {text[:80]!a}") from error
        if after_control and ids and not text.startswith(" "):
            ids = self._without_word_start(ids)
        return [self.bos_id, *ids] if bos else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Turns ids back into text.

        Special ids and ids outside the vocabulary (image placeholders, rows a checkpoint's
        embedding was padded with) are left out. Bytes that form no complete UTF-8 character, as at
        the end of an unfinished generation, each come out as U+FFFD.
        """
        kept = [int(i) for i in ids if 0 <= i < self.vocab_size and i not in self._special]
        text: str = self._sp.decode(kept)
        return text

    def _without_word_start(self, ids: list[int]) -> list[int]:
        piece: str = self._sp.id_to_piece(ids[0])
        if not piece.startswith(_WORD_START):
            return ids
        if piece == _WORD_START:
            return ids[1:]
        bare: int = self._sp.piece_to_id(piece.removeprefix(_WORD_START))
        return ids if bare == self.unk_id else [bare, *ids[1:]]


def train_tokenizer(
    texts: Iterable[str],
    path: str | os.PathLike[str],
    vocab_size: int,
    *,
    hard_vocab_limit: bool = True,
) -> Tokenizer:
    """Trains a byte-pair model with LLaMA's settings and writes it to `path`.

    The settings: byte fallback, digits split, a word start added in front, no normalisation,
    `<unk>`, `<s>`, `</s>` = 0, 1, 2 and no padding piece. The same texts give the same file. The
    file appears whole or not at all.

    Args:
        texts: training texts; lines within a text are taken separately.
        path: the model file to write; its folder must exist.
        vocab_size: number of pieces: 3 special, 256 bytes, the characters, then the merges.
        hard_vocab_limit: False accepts a smaller vocabulary where the texts can't fill it.

    Raises:
        ValueError: no text, or texts that can't give `vocab_size` pieces; the message says what
            SentencePiece asked for.
    """
    path = pathlib.Path(path)
    model = io.BytesIO()
    failures: list[Exception] = []

    def lines() -> Iterator[str]:
        # SentencePiece takes an error in here for its own, or for the end of the texts.
        try:
            yield from _lines(texts)
        except Exception as error:
            failures.append(error)

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=hard_vocab_limit,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            # The default drops longer lines without a word.
            max_sentence_length=1 << 24,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise ValueError(
            f"can't train a tokenizer of {vocab_size} pieces on these texts: {error}\n"
            "Too high: give more text, a smaller vocab_size, or hard_vocab_limit=False to take "
            "what there is. Smaller than required_chars: give a larger vocab_size. Sentences "
            "empty: give at least one non-empty text."
        ) from error
    if failures:
        raise failures[0]
    atomic.write(path, model.getvalue())
    return Tokenizer(path)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (line for line in text.splitlines() if line)
