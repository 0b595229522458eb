"""Ids equal to the slow LlamaTokenizer of transformers 4.31, decoding, and training."""

import hashlib
import os
import pathlib
import pickle

import hypothesis
import pytest
import sentencepiece
from hypothesis import strategies as st

from sg4v_jax.data.tokenizer import Tokenizer, train_tokenizer

NASTY = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n x",
    "  two spaces  ",
    "\ttab\r\n",
    "USER: hi",
    "[INST] hi",
    "2023-11-07 3.14159",
    "日本語のテキスト",
    "😀👩‍👩‍👧‍👦",
    "e\u0301 \u00a0\u200b\ufeff",
    "a\0b",
    "</s> <s> <unk> <0x0A> <image>",
    "▁▁a ▁",
    "x" * 3000,
]


def test_llama_facts(llama_tokenizer: Tokenizer) -> None:
    t = llama_tokenizer
    assert (t.vocab_size, t.unk_id, t.bos_id, t.eos_id, t.pad_id) == (32000, 0, 1, 2, 0)
    assert t.sha256 == "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"


@pytest.mark.parametrize(
    ("text", "after_control", "ids"),
    [
        ("\nWhat", False, [29871, 13, 5618]),
        ("USER", False, [3148, 1001]),
        ("USER", True, [3308, 1001]),
        ("[INST]", True, [29961, 25580, 29962]),
        (" x", True, [29871, 921]),
        ("A cat on a mat.\n", False, [319, 6635, 373, 263, 1775, 29889, 13]),
        ("USER: ", False, [3148, 1001, 29901, 29871]),
        ("", True, []),
    ],
)
def test_llama_segments(llama_tokenizer: Tokenizer, text: str, after_control: bool, ids: list[int]) -> None:
    assert llama_tokenizer.encode(text, after_control=after_control) == ids
    assert llama_tokenizer.encode(text, bos=True, after_control=after_control) == [1, *ids]


@pytest.mark.parametrize("text", NASTY)
def test_round_trip(text: str, small_tokenizer: Tokenizer, mistral_tokenizer: Tokenizer) -> None:
    for tokenizer in (small_tokenizer, mistral_tokenizer):
        ids = tokenizer.encode(text, bos=True)
        assert ids[0] == tokenizer.bos_id
        assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id} & set(ids[1:])
        # Only the spelling of a space is lost.
        assert tokenizer.decode(ids) == text.replace("▁", " ")


@hypothesis.given(st.text(), st.booleans())
def test_text_round_trips_and_never_controls(
    small_tokenizer: Tokenizer, text: str, after_control: bool
) -> None:
    ids = small_tokenizer.encode(text, after_control=after_control)
    assert all(i > 2 for i in ids)
    if not after_control:
        assert small_tokenizer.decode(ids) == text.replace("▁", " ")


def test_word_start_stays_where_the_bare_piece_is_missing(tmp_path: pathlib.Path) -> None:
    # "▁z" is merged first, then "▁zq"; so "zq" never becomes a piece, and 4.31 would give <unk>.
    t = train_tokenizer(["za zb zc zd ze zq zq"], tmp_path / "m", 270)
    assert t.encode("zq", after_control=True) == t.encode("zq")
    assert len(t.encode("zq")) == 1


def test_decode_leaves_out_what_is_no_text(llama_tokenizer: Tokenizer) -> None:
    t = llama_tokenizer
    assert t.decode([1, 319, 6635, -200, 32000, 29889, 2, 0, 2**40]) == "A cat."
    assert t.decode([]) == ""
    emoji = t.encode("😀")
    assert len(emoji) == 5
    assert t.decode(emoji) == "😀"
    assert t.decode(emoji[:3]) == "\ufffd\ufffd"
    assert t.decode([*emoji[:3], 319]) == "\ufffd\ufffd A"


def test_lone_surrogate_is_named(small_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"not valid Unicode: 'a\\ud83d'"):
        small_tokenizer.encode("a\ud83d")


def test_pickles_for_loader_processes(small_tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(small_tokenizer))
    assert copy.encode("A cat 12") == small_tokenizer.encode("A cat 12")
    assert copy.sha256 == small_tokenizer.sha256


def test_opening_what_is_no_model(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError):
        Tokenizer(tmp_path / "absent")
    for data in (b"", b"version https://git-lfs.github.com/spec/v1\n"):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(ValueError, match="not a SentencePiece model"):
            Tokenizer(tmp_path / "x")


def test_model_without_bos(tmp_path: pathlib.Path) -> None:
    with open(tmp_path / "m", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b"]),
            model_writer=file,
            vocab_size=10,
            hard_vocab_limit=False,
            bos_id=-1,
            minloglevel=2,
        )
    with pytest.raises(ValueError, match="needs the pieces <unk>, <s> and </s>"):
        Tokenizer(tmp_path / "m")


def test_training_has_llamas_settings(tmp_path: pathlib.Path) -> None:
    texts = ["one 12 line\nanother line", "the last line " * 1000]
    path = tmp_path / "m"
    t = train_tokenizer(texts, path, 290)
    assert (t.vocab_size, t.unk_id, t.bos_id, t.eos_id, t.pad_id) == (290, 0, 1, 2, 0)
    assert t.path == path
    assert t.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(t.encode("12")) == 3, "a word start and two digits"
    assert t.encode("\n")[-1] == 13, "byte pieces follow the special ones"
    assert t.decode(t.encode("  Ω  ")) == "  Ω  "
    assert len(t.encode("last")) == 1, "long texts count"


def test_training_is_deterministic_and_leaves_one_file(tmp_path: pathlib.Path) -> None:
    train_tokenizer(iter(["a cat and a dog"]), tmp_path / "m", 275)
    first = (tmp_path / "m").read_bytes()
    train_tokenizer(iter(["a cat and a dog"]), tmp_path / "m", 275)
    assert (tmp_path / "m").read_bytes() == first
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (["a b"], 5000, "Vocabulary size too high.*hard_vocab_limit=False"),
        (["a b"], 100, "smaller than required_chars"),
        ([], 300, "non-empty text"),
        (["", "\n"], 300, "non-empty text"),
    ],
)
def test_training_that_cannot_be(tmp_path: pathlib.Path, texts: list[str], size: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        train_tokenizer(texts, tmp_path / "m", size)
    assert os.listdir(tmp_path) == []


def test_soft_limit(tmp_path: pathlib.Path) -> None:
    assert train_tokenizer(["a b"], tmp_path / "m", 5000, hard_vocab_limit=False).vocab_size < 300


def test_failed_write_leaves_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        train_tokenizer(["a b"], tmp_path / "m", 262, hard_vocab_limit=False)
    assert os.listdir(tmp_path) == ["m"]
    assert (tmp_path / "m").read_bytes() == b"old"
