"""Prompts of a chat begin with the same tokens: these run once, and nothing but the last digits tells."""

from __future__ import annotations

import pytest
import torch
import transformers

import stableedit_cpp as se
from stableedit_cpp.evaluation import continuing
from stableedit_cpp.evaluation.answers import answer_scores
from stableedit_cpp.evaluation.generation import write_greedily
from stableedit_cpp.model import capture as capturing
from stableedit_cpp.model import prefix, running
from stableedit_cpp.model.capture import capture
from stableedit_cpp.model.heads import head_of, learn_head
from stableedit_cpp.model.logits import past_keyword
from stableedit_cpp.model.running import batches
from stableedit_cpp.model.tokens import TokenSequence
from stableedit_cpp.model.top_tokens import top_tokens
from stableedit_cpp.model.trunk import TrunkCache
from support import tiny
from support.captures import plain_reference
from support.headed import (
    HEAD,
    MAX_TOKENS,
    Watch,
    assert_close,
    captured,
    chats,
    chatting,
    logits_of,
    modules_of,
    plain_logits,
    tiny_model,
    tokens,
)
from support.tiny import ARCHITECTURES, VOCABULARY

pytestmark = pytest.mark.filterwarnings("error:.past_key_values. is deprecated:FutureWarning")

CAPITALS = [("France", "Paris"), ("Peru", "Lima"), ("Egypt", "Cairo"), ("Norway", "Oslo"), ("Fiji", "Suva")] * 2
COUNT_FOR_THEMSELVES = ("mpt",)  # the positions of tokens, padding included


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("cached", [False, True])
def test_logits_keys_and_gradients_are_those_of_each_sequence_alone(architecture, cached):
    model, sequences = tiny_model(architecture), chats()
    modules = modules_of(model, architecture)
    trunk = TrunkCache(model, modules) if cached else None
    exact = plain_logits(model, sequences)
    keys, gradients = plain_reference(model, sequences, [module.name for module in modules])
    for _ in range(2):  # the second time the trunk cache holds everything
        assert_close(logits_of(model, sequences, trunk=trunk), exact)
        turn = captured(model, modules, sequences, trunk=trunk)
        for module in modules:
            assert_close(turn.keys[module.name], keys[module.name])
            assert_close(turn.value_gradients[module.name], gradients[module.name])
    # None of them stands aside.
    assert prefix._objections[model] == dict.fromkeys([0, 1] if cached else [0])


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_model_is_asked_by_the_name_that_it_knows(name):
    """transformers has another since 5.24; a model's own code may know either with any version."""
    model, sequences = tiny_model("llama"), chats()
    exact, plain, own = plain_logits(model, sequences), model.forward, past_keyword(model)

    def since(input_ids, attention_mask=None, use_cache=None, cache=None):
        return plain(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache, **{own: cache})

    def before(input_ids, attention_mask=None, use_cache=None, past_key_values=None):
        return since(input_ids, attention_mask, use_cache, past_key_values)

    model.forward = since if name == "cache" else before
    assert past_keyword(model) == name
    assert_close(logits_of(model, sequences), exact)
    assert prefix._objections[model] == {0: None}  # it does not stand aside


def test_in_float64_to_the_last_digits():
    model, sequences = tiny_model("gpt2", torch.float64), chats()
    modules = modules_of(model, "gpt2")
    assert_close(logits_of(model, sequences), plain_logits(model, sequences), 1e-13)
    gradients = plain_reference(model, sequences, [module.name for module in modules])[1]
    turn = captured(model, modules, sequences)
    for name, exact in gradients.items():
        assert_close(turn.value_gradients[name], exact, 1e-13)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.003)], ids=str)
def test_half_precision(dtype, tolerance):
    model, sequences = tiny_model("llama", dtype), chats()
    assert_close(logits_of(model, sequences).float(), plain_logits(model, sequences).float(), tolerance)
    assert prefix._objections[model] == {0: None}


def test_the_head_runs_once():
    model, sequences = tiny_model("llama"), chats()
    logits_of(model, sequences)  # puts the model to the proof
    watch = Watch(model)
    logits_of(model, sequences)
    assert watch.seen[0] == len(HEAD)
    assert len(watch.seen) > 2 and sum(watch.seen[1:]) < len(HEAD) + sum(len(s) - len(HEAD) for s in sequences)
    watch.seen.clear()
    captured(model, modules_of(model, "llama"), sequences)
    assert watch.seen[0] == len(HEAD)


def test_the_same_bits_with_and_without_a_trunk_cache_empty_and_filled():
    for architecture in ("llama", "gpt2"):
        model, sequences = tiny_model(architecture), chats()
        modules = modules_of(model, architecture)
        trunk = TrunkCache(model, modules)
        turns = [captured(model, modules, sequences, trunk=cache) for cache in (None, trunk, trunk)]
        assert len(trunk) == len(sequences) + 1
        for turn in turns[1:]:
            for name in turn.keys:
                assert torch.equal(turn.keys[name], turns[0].keys[name])
                assert torch.equal(turn.value_gradients[name], turns[0].value_gradients[name])
        assert torch.equal(logits_of(model, sequences, trunk=trunk), logits_of(model, sequences))


def test_a_trunk_cache_that_holds_some_of_them():
    model, sequences = tiny_model("llama"), chats()
    exact = plain_logits(model, sequences)
    for first in (sequences[::2], sequences[:1]):  # filled from the prefix, and in full
        trunk = TrunkCache(model, modules_of(model, "llama"))
        logits_of(model, first, trunk=trunk)
        for _ in range(2):
            assert_close(logits_of(model, sequences, trunk=trunk), exact)
    narrow = TrunkCache(model, modules_of(model, "llama"), max_bytes=4 * 16 * 60)
    for _ in range(2):
        assert_close(logits_of(model, sequences, trunk=narrow), exact)
    assert 0 < len(narrow) < len(sequences)


def test_captured_rows_are_in_order_whatever_the_trunk_cache_holds():
    model, sequences = tiny_model("llama"), chats()
    modules = modules_of(model, "llama")
    exact = captured(model, modules, sequences)
    trunk = TrunkCache(model, modules)
    logits_of(model, sequences[::3], trunk=trunk)
    watched: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda _m, args, _o: watched.append(len(args[0])))
    turn = captured(model, modules, sequences, trunk=trunk)
    assert sum(watched) == 1 + len(sequences) - len(sequences[::3])  # the head, and those that are not held
    assert torch.equal(turn.request, exact.request) and torch.equal(turn.correct, exact.correct)
    torch.testing.assert_close(turn.losses, exact.losses)
    for name in exact.keys:
        assert_close(turn.keys[name], exact.keys[name])
        assert_close(turn.value_gradients[name], exact.value_gradients[name])


def test_nothing_is_kept_from_call_to_call():
    """The head's keys and values change with the weights."""
    model, sequences = tiny_model("llama"), chats()
    modules = modules_of(model, "llama")
    trunk = TrunkCache(model, modules)
    for _ in range(3):
        assert_close(logits_of(model, sequences, trunk=trunk), plain_logits(model, sequences))
        modules[0].module.weight.data.mul_(1.5)


@pytest.mark.parametrize(
    "sequences",
    [
        [*chats()[1:], TokenSequence((3, *chats()[0].ids[1:]), chats()[0].answer)],
        [*chats()[1:], TokenSequence(HEAD, (3,))],
        [*chats()[1:], TokenSequence((*HEAD, 3), (3, 4))],
    ],
    ids=["another head", "nothing but the head", "an answer right behind it"],
)
def test_other_prompts_run_in_full(sequences):
    model = tiny_model("llama")
    assert_close(logits_of(model, sequences), plain_logits(model, sequences))
    assert model not in prefix._objections
    assert head_of(model, [s.ids for s in sequences[:-1]]) == HEAD


def test_a_short_head_and_no_head():
    for head in (HEAD[:7], ()):
        model = tiny.tiny_model("llama")
        learn_head(model, [(*head, 3), (*head, 4)])
        assert_close(logits_of(model, chats(head + HEAD)), plain_logits(model, chats(head + HEAD)))
        assert model not in prefix._objections


def test_in_any_company_it_is_the_same_head():
    """Alone, too, and beside prompts that have more in common: what is edited again is computed as before."""
    model = tiny_model("llama")
    logits_of(model, chats())
    for sequences in (chats()[:1], [TokenSequence((*HEAD, 7, 8, seed), (seed,)) for seed in range(3, 9)]):
        watch = Watch(model)
        assert_close(logits_of(model, sequences), plain_logits(model, sequences))
        assert watch.seen[:2] == [len(HEAD), sum(len(s) - len(HEAD) for s in sequences)]


def test_no_sequences():
    assert list(batches(tiny_model("llama"), [], max_tokens=MAX_TOKENS)) == []


def test_one_prompt_with_many_answers():
    """Its last token, which predicts the answer, is no part of the head."""
    model = tiny_model("llama")
    answers = [tokens(1 + seed % 3, seed) for seed in range(6)]
    sequences = [TokenSequence((*HEAD, 5, *answer[:-1]), answer) for answer in answers]
    logits_of(model, sequences)
    watch = Watch(model)
    assert_close(logits_of(model, sequences), plain_logits(model, sequences))
    assert watch.seen[0] == len(HEAD)
    modules = modules_of(model, "llama")
    keys, gradients = plain_reference(model, sequences, [module.name for module in modules])
    turn = captured(model, modules, sequences)
    for name in keys:
        assert_close(turn.keys[name], keys[name])
        assert_close(turn.value_gradients[name], gradients[name])


def test_rows_of_the_prompts_are_captured_in_full():
    model, sequences = tiny_model("llama"), chats()
    modules = modules_of(model, "llama")
    turn = captured(model, modules, sequences, prompt_rows=True)
    names = [module.name for module in modules]
    gradients = plain_reference(model, sequences, names, prompt_rows=True)[1]
    for name in names:
        assert_close(turn.value_gradients[name], gradients[name])


def test_a_reference_instead_of_answers():
    model, sequences = tiny_model("gpt2", torch.float64), chats()
    modules = modules_of(model, "gpt2")
    wanted = [torch.randn(len(s.answer), VOCABULARY, dtype=torch.float64).log_softmax(-1) for s in sequences]
    reference = [top_tokens(rows, VOCABULARY) for rows in wanted]
    turn = captured(model, modules, sequences, reference=reference)
    exact = torch.nn.functional.kl_div(
        plain_logits(model, sequences).log_softmax(-1), torch.cat(wanted), reduction="sum", log_target=True
    )
    assert turn.loss == pytest.approx(exact.item())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_written_is_the_same(architecture, tokenizer):
    """Padding of prompts of several lengths comes behind the head."""
    prompts = [TokenSequence(sequence.ids, ()) for sequence in chats()]
    how = {"max_tokens": MAX_TOKENS}
    exact = write_greedily(tiny.tiny_model(architecture), tokenizer, prompts, [5] * len(prompts), **how)
    model = tiny_model(architecture)
    assert write_greedily(model, tokenizer, prompts, [5] * len(prompts), **how) == exact
    assert continuing._proven[model] == (architecture not in COUNT_FOR_THEMSELVES)


@pytest.mark.parametrize("window, goes_on", [(8, False), (20, False), (40, True)])
def test_a_window_of_attention(window, goes_on, tokenizer):
    """Of half of the layers: one that ends within the head, within the prompts with what is written, or behind."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.Gemma3TextConfig(
        **sizes,
        head_dim=8,
        vocab_size=VOCABULARY,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=window,
    )
    torch.manual_seed(0)
    model = chatting(transformers.AutoModelForCausalLM.from_config(config).eval())
    modules = se.find_modules(model, "model.layers.[123].mlp.down_proj")
    trunk = TrunkCache(model, modules)
    sequences = chats()
    for cache in (None, trunk, trunk):
        assert_close(logits_of(model, sequences, trunk=cache), plain_logits(model, sequences))
    assert prefix._objections[model] == {0: None, 1: None}
    prompts = [TokenSequence(sequence.ids, ()) for sequence in sequences]
    written = write_greedily(model, tokenizer, prompts, [6] * len(prompts), max_tokens=MAX_TOKENS)
    assert continuing._proven.get(model, False) == goes_on
    for prompt, text in zip(prompts, written, strict=True):
        assert text == write_greedily(model, tokenizer, [prompt], [6], max_tokens=MAX_TOKENS)[0]


def test_the_head_is_not_written_from_again(tokenizer):
    model, prompts = tiny_model("llama"), [TokenSequence(sequence.ids, ()) for sequence in chats()]
    write_greedily(model, tokenizer, prompts, [1] * len(prompts), max_tokens=1000)
    watch = Watch(model)
    write_greedily(model, tokenizer, prompts, [1] * len(prompts), max_tokens=1000)
    assert watch.seen == [len(HEAD), len(prompts) * (max(map(len, prompts)) - len(HEAD))]


@pytest.mark.slow
def test_chats_of_smollm2(monkeypatch):
    model, tokenizer = se.load_model("smollm2-135m")
    form = se.model.form.find_form(model, tokenizer, chat_template=True, end_of_answer=True)
    pairs = [(f"What is the capital of {land}?", city) for land, city in CAPITALS]
    sequences = se.model.tokens.tokenize(tokenizer, pairs, None, [land for land, _ in CAPITALS], form)
    modules = se.find_modules(model, "model.layers.{27,28}.mlp.down_proj")
    trunk = TrunkCache(model, modules)
    turns = [capture(model, modules, sequences, max_tokens=2048, trunk=trunk) for _ in range(2)]
    scores = answer_scores(model, sequences, max_tokens=2048, trunk=trunk)
    assert prefix._objections[model] == {0: None, 27: None}
    for room in (capturing, running):
        monkeypatch.setattr(room, "shared_prefix", lambda *_args, **_how: None)
    exact = capture(model, modules, sequences, max_tokens=2048)
    for turn in turns:
        for name in exact.keys:
            assert_close(turn.keys[name], exact.keys[name], 1e-4)
            assert_close(turn.value_gradients[name], exact.value_gradients[name], 1e-4)
    torch.testing.assert_close(scores, answer_scores(model, sequences, max_tokens=2048), rtol=1e-3, atol=1e-6)
