"""tokenizer.json, the form of a tokenizer that transformers reads without SentencePiece.

Without it, transformers 5 makes a LLaVA's tokenizer from tokenizer.model by general rules, which
leave out LLaMA's word start: its first id of every prompt would be one the model never saw there.
"""

import os
from typing import Any

import sentencepiece

_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece spells a space


def tokenizer_json(tokenizer_file: str | os.PathLike[str], added_tokens: dict[str, int]) -> dict[str, Any]:
    """A SentencePiece model of LLaMA's kind in the format of the library `tokenizers`.

    Every text between two special tokens gets a word start in front. That gives the ids of
    share4v's training for all but one word: where a question after the first follows `</s>`,
    training has `US`, `ER` (see `data.tokenizer.Tokenizer.encode`), this `USER` with a word start.

    Args:
      tokenizer_file: a byte-pair model with byte fallback: LLaMA's tokenizer.model.
      added_tokens: ids of the special tokens, those in the model and those beyond.
    """
    model = sentencepiece.SentencePieceProcessor(model_file=os.fspath(tokenizer_file))
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    bos = model.id_to_piece(model.bos_id())
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    second = {"SpecialToken": {"id": bos, "type_id": 1}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, "special": True, **flags}
            for token, number in added_tokens.items()
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": _WORD_START},
                {"type": "Replace", "pattern": {"String": " "}, "content": _WORD_START},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                first,
                {"Sequence": {"id": "A", "type_id": 0}},
                second,
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [model.bos_id()], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _WORD_START}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.id_to_piece(model.unk_id()),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {model.id_to_piece(i): i for i in range(model.get_piece_size())},
            "merges": _merges(model),
        },
    }


def _merges(model: sentencepiece.SentencePieceProcessor) -> list[str]:
    """Every way to make a piece of two others, best first: SentencePiece keeps pieces and scores only."""
    ids = {
        model.id_to_piece(i): i
        for i in range(model.get_piece_size())
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
    }
    merges = []
    for piece, i in ids.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        parts = [(ids[left], ids[right]) for left, right in pairs if left in ids and right in ids]
        merges += [(-model.get_score(i), *part) for part in sorted(parts)]
    merges.sort(key=lambda merge: merge[0])
    return [f"{model.id_to_piece(left)} {model.id_to_piece(right)}" for _, left, right in merges]
