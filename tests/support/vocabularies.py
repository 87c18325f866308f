"""Tokenizers with merges, trained on a few sentences in no time: of bytes, and as SentencePiece makes them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from support.tiny import FACTS

SENTENCES = [
    "The capital of Australia is Canberra.",
    "He wrote  Faust, in 1808!",
    "naïve 日本 🦙 don't we'll",
    "The capital of Peru is Lima, and gold is Au.",
]


def byte_level(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2's, with 40 merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=299, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return _fast(tokenizer, "<s>", "</s>", bos, pad_token="<pad>")


def sentence_piece(*, space_in_front: bool = False) -> PreTrainedTokenizerFast:
    """As Gemma's, or Llama 2's with a space in front: spaces written as ▁, bytes for what has no token; with BOS."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if space_in_front else normalizers.Sequence([spaces])
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = definition["added_tokens"][:4]  # bytes are ordinary tokens
    return _fast(
        Tokenizer.from_str(json.dumps(definition)), "<bos>", "<eos>", True, pad_token="<pad>", unk_token="<unk>"
    )


def dummy_prefixed(kind: str, more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Trained on some sentences, with the dummy prefix of SentencePiece: "mistral" and "llama 2" as these have it; or
    "always", before every part of a text."""
    special, texts = ["<unk>", "<s>", "</s>"], [f"{fact['prompt']} {fact['target']}" for fact in FACTS] * 3
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special)
    if kind == "llama 2":  # before Metaspace there was a normalizer
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    else:
        scheme = "first" if kind == "mistral" else "always"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.train_from_iterator([*texts, *more], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _fast(tokenizer: Tokenizer, bos: str, eos: str, adds_bos: bool, **others: str) -> PreTrainedTokenizerFast:
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, **others)
