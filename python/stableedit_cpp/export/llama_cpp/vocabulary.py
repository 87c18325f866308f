"""A tokenizer in a GGUF file, as llama.cpp's converter writes it: tokens and their kinds, merges or scores, how a text
is split before, special tokens and the chat template."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

__all__ = ["write_vocabulary"]

_CONVERTER = (
    "write the whole model (--format model) and run llama.cpp's own convert_hf_to_gguf.py on that directory; it knows "
    "more tokenizers"
)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_CASES = rf"{_CASED}*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+"
_CASES_2 = rf"{_CASED}+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
# Expression by which a tokenizer splits, and whether words that are tokens stay whole (ignore_merges) -> llama.cpp's
# name for both.
_SPLITS = {
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "smaug-bpe",
    (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"), False): "qwen2",
    (rf"{_CASES}|{_CASES_2}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}", True): "tekken",
}


def write_vocabulary(writer, tokenizer, size: int) -> None:
    """Write a tokenizer into a file.

    Args:
        writer: a ``gguf.GGUFWriter``.
        tokenizer: a fast one.
        size: rows of the model's embedding; where the tokenizer has fewer tokens, the rest is said to be unused.

    Raises:
        ValueError: for a tokenizer that llama.cpp's name is not known of, or with more tokens than rows.
    """
    import gguf

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"a {type(tokenizer).__name__} has no tokenizer.json, from which a GGUF file is made; {_CONVERTER}"
        )
    definition = json.loads(backend.to_str())
    added = tokenizer.added_tokens_decoder
    # transformers adds a special token that a GGUF file does not have, and the model no row for; nothing can run it.
    largest = max(i for i in tokenizer.get_vocab().values() if i < size or not (i in added and added[i].special))
    if largest >= size:
        raise ValueError(f"the tokenizer has {largest + 1} tokens, and the model's embedding {size} rows")
    sentencepiece = definition["model"].get("byte_fallback", False)
    if sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_adds_space(definition))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split(definition))
        if not definition["model"].get("merges"):
            raise ValueError(f"the tokenizer has no merges, without which llama.cpp reads none; {_CONVERTER}")
    tokens, kinds = _tokens(tokenizer, size, sentencepiece)
    writer.add_token_list(tokens)
    if sentencepiece:
        writer.add_token_scores(_scores(definition, tokens, kinds))
    writer.add_token_types(kinds)
    with tempfile.TemporaryDirectory() as scratch, _quiet("gguf.vocab"):  # of templates, which are looked at below
        tokenizer.save_pretrained(scratch)
        special = gguf.SpecialVocab(Path(scratch), load_merges=not sentencepiece, n_vocab=size)
    text = tokenizer("a").input_ids
    special.add_special_token = {"bos": text[0] == tokenizer.bos_token_id, "eos": text[-1] == tokenizer.eos_token_id}
    special.add_to_gguf(writer, quiet=True)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _tokens(tokenizer, size: int, sentencepiece: bool) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    named = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for index in range(size):
        token, kind = named.get(index, f"[PAD{index}]"), TokenType.NORMAL
        if index not in named:
            kind = TokenType.UNUSED
        elif index in added and added[index].special:
            kind = TokenType.CONTROL
        elif index in added:
            token, kind = token.replace("▁", " "), TokenType.USER_DEFINED
        elif sentencepiece and re.fullmatch("<0x[0-9A-F]{2}>", token):
            kind = TokenType.BYTE
        if sentencepiece and kind == TokenType.CONTROL and index == tokenizer.unk_token_id:
            kind = TokenType.UNKNOWN
        tokens.append(token)
        kinds.append(int(kind))
    return tokens, kinds


def _scores(definition: Mapping[str, object], tokens: list[str], kinds: list[int]) -> list[float]:
    """llama.cpp joins the neighbours whose union has the highest score, tokenizers those of the first merge; the
    number of the first merge that makes a token says the same."""
    from gguf import TokenType

    merges = definition["model"]["merges"]
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    last = float(len(merges))
    return [
        -float(ranks.get(token, last)) if kind == TokenType.NORMAL else (0.0 if kind == TokenType.BYTE else -1000.0)
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def _adds_space(definition: Mapping[str, object]) -> bool:
    """Whether a text gets a space in front, of a tokenizer that writes spaces as ▁.

    Raises:
        ValueError: if it does something else to texts.
    """
    steps = _steps(definition["normalizer"], "normalizers") + _steps(definition["pre_tokenizer"], "pretokenizers")
    adds = replaces = False
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == "▁":
            adds = True
        elif kind == "Replace" and step["pattern"] == {"String": " "} and step["content"] == "▁":
            replaces = True
        elif kind == "Metaspace" and step["replacement"] == "▁":
            replaces, adds = True, step["prepend_scheme"] != "never"
        elif not (kind == "Split" and step["pattern"] == {"String": " "}):  # finds nothing where spaces are replaced
            raise _unknown(step)
    if not replaces:
        raise _unknown({"type": "a vocabulary of bytes and words, of which spaces are a part"})
    return adds


def _split(definition: Mapping[str, object]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits a text.

    Raises:
        ValueError: if it has none, as far as is known here.
    """
    for step in _steps(definition["normalizer"], "normalizers"):
        if step["type"] != "NFC":  # of Qwen, which llama.cpp leaves to those who write the text
            raise _unknown(step)
    steps = _steps(definition["pre_tokenizer"], "pretokenizers")
    whole_words = bool(definition["model"].get("ignore_merges", False))
    *before, last = steps or [{"type": "nothing"}]
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        if last["use_regex"] and not whole_words:
            if not before:
                return "gpt-2"
            if len(before) == 1 and before[0] == {"type": "Digits", "individual_digits": True}:
                return "smollm"
        elif not last["use_regex"] and len(before) == 1 and before[0]["type"] == "Split":
            split = before[0]
            name = _SPLITS.get((split["pattern"].get("Regex"), whole_words))
            if name is not None and split["behavior"] == "Isolated" and not split["invert"]:
                return name
    raise _unknown(before[0] if before else last)


def _steps(step: Mapping[str, object] | None, inner: str) -> list[Mapping[str, object]]:
    if step is None:
        return []
    return list(step[inner]) if step["type"] == "Sequence" else [step]


def _unknown(step: Mapping[str, object]) -> ValueError:
    return ValueError(
        f"how this tokenizer splits a text ({step['type']}) has no name in llama.cpp that is known here; {_CONVERTER}"
    )
