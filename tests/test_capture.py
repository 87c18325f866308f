"""Capture of keys and value gradients: exact, cheap, and without a trace in the model."""

from __future__ import annotations

import pytest
import torch

from stableedit_cpp.model.capture import CapturedTurn, capture
from stableedit_cpp.model.form import PARSED
from stableedit_cpp.model.modules import find_modules
from stableedit_cpp.model.tokens import TokenSequence, longest_first, tokenize
from support.captures import MICRO_BATCH, flags_of, plain_reference, sequences_of
from support.tiny import pattern_of, tiny_model, tiny_tokenizer

LAST_TWO = "model.layers.[12].mlp.down_proj"


def capture_of(model, sequences, *, modules=LAST_TWO, max_tokens=100_000, **how) -> CapturedTurn:
    found = find_modules(model, modules)
    return capture(model, found, sequences, micro_batch=MICRO_BATCH, max_tokens=max_tokens, **how)


def assert_same(one: CapturedTurn, other: CapturedTurn, rtol: float = 1e-9) -> None:
    assert torch.equal(one.request, other.request)
    assert torch.equal(one.micro_batch, other.micro_batch)
    torch.testing.assert_close(one.losses, other.losses, rtol=rtol, atol=rtol)
    assert torch.equal(one.correct, other.correct)
    for name in one.keys:
        for mine, theirs in ((one.keys, other.keys), (one.value_gradients, other.value_gradients)):
            torch.testing.assert_close(mine[name], theirs[name], rtol=rtol, atol=rtol * theirs[name].abs().max().item())


# GPT-2 and not Llama where 1e-9 is asked: Llama's RMSNorm computes in float32 whatever the model's dtype.
GPT2_MODULES = ["transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj"]


class TestValues:
    def test_equals_micro_batch_backward_passes(self, tokenizer):
        model = tiny_model("gpt2", torch.float64)
        sequences = sequences_of(tokenizer)
        captured = capture_of(model, sequences, modules=GPT2_MODULES)
        keys, gradients = plain_reference(model, sequences, GPT2_MODULES)
        assert list(captured.keys) == list(captured.value_gradients) == GPT2_MODULES
        for name in GPT2_MODULES:
            torch.testing.assert_close(captured.keys[name], keys[name], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(captured.value_gradients[name], gradients[name], rtol=1e-9, atol=1e-12)
            assert gradients[name].abs().max() > 1e-4  # there is something to compare

    @pytest.mark.parametrize("max_tokens", [1, 111, 100_000])
    def test_rows_of_the_prompts_too(self, max_tokens, tokenizer):
        """All but the first of each request, whose rows are the same wherever they are asked for; the loss, and what
        is said of each request, is that of the answers alone."""
        model = tiny_model("gpt2", torch.float64)
        sequences = sequences_of(tokenizer)
        how = {"modules": GPT2_MODULES, "max_tokens": max_tokens}
        captured, answers = (capture_of(model, sequences, prompt_rows=whole, **how) for whole in (True, False))
        keys, gradients = plain_reference(model, sequences, GPT2_MODULES, prompt_rows=True)
        assert captured.request.tolist() == [i for i in longest_first(sequences) for _ in range(len(sequences[i]) - 1)]
        for name in GPT2_MODULES:
            torch.testing.assert_close(captured.keys[name], keys[name], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(captured.value_gradients[name], gradients[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(captured.losses, answers.losses)
        assert captured.loss == pytest.approx(answers.loss) and torch.equal(captured.correct, answers.correct)

    def test_a_prompt_of_one_token_keeps_its_row(self):
        model = tiny_model("llama", torch.float64)
        captured = capture_of(model, [TokenSequence((5, 6), (6, 7)), TokenSequence((5,), (6,))], prompt_rows=True)
        assert captured.request.tolist() == [0, 0, 1]

    def test_the_output_embedding_sees_no_prompts(self, tokenizer):
        model = tiny_model("llama")
        capture_of(model, sequences_of(tokenizer), modules=["lm_head"])
        with pytest.raises(ValueError, match="lm_head does not see every token"):
            capture_of(model, sequences_of(tokenizer), modules=["lm_head"], prompt_rows=True)

    @pytest.mark.parametrize("max_tokens", [1, 40, 111, 300])
    def test_size_of_the_forward_pass_does_not_matter(self, max_tokens, tokenizer):
        model = tiny_model("gpt2", torch.float64)
        sequences = sequences_of(tokenizer)
        whole = capture_of(model, sequences, modules=GPT2_MODULES)
        assert_same(capture_of(model, sequences, modules=GPT2_MODULES, max_tokens=max_tokens), whole)

    def test_number_of_forward_passes(self, tokenizer):
        """All requests in one when they fit; one each when nothing fits."""
        model, sequences = tiny_model("llama"), sequences_of(tokenizer)
        calls = []
        model.model.register_forward_pre_hook(lambda *_: calls.append(1))
        capture_of(model, sequences)
        assert len(calls) == 1
        capture_of(model, sequences, max_tokens=1)
        assert len(calls) == 1 + len(sequences)

    def test_rows(self, tokenizer):
        """Longest request first, each with its answer tokens in order; micro-batches count up."""
        model, sequences = tiny_model("llama"), sequences_of(tokenizer)
        captured = capture_of(model, sequences)
        order = longest_first(sequences)
        lengths = [len(sequences[index]) for index in order]
        assert lengths == sorted(lengths, reverse=True)
        request = [index for index in order for _ in sequences[index].answer]
        assert captured.request.tolist() == request
        assert captured.micro_batch.tolist() == [order.index(index) // MICRO_BATCH for index in request]
        rows = len(request)
        for name in captured.keys:
            assert captured.keys[name].shape == (rows, 24)
            assert captured.value_gradients[name].shape == (rows, 16)

    def test_equally_long_requests_keep_their_order(self, tokenizer):
        facts = [{"prompt": f"Fact {index}", "target": "abc"} for index in range(7)]
        captured = capture_of(tiny_model("llama"), sequences_of(tokenizer, facts))
        assert captured.request.unique_consecutive().tolist() == list(range(7))

    def test_losses_and_correct(self, tokenizer):
        model, sequences = tiny_model("llama"), sequences_of(tokenizer)
        # The model's own top choice as the answer of one request: then it is right.
        with torch.no_grad():
            top = model(input_ids=torch.tensor([sequences[3].ids[: sequences[3].first + 1]])).logits[0, -1].argmax()
        sequences[3] = type(sequences[3])(sequences[3].ids[: sequences[3].first + 1], (int(top),))
        captured = capture_of(model, sequences)
        for index, sequence in enumerate(sequences):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([sequence.ids])).logits[0, -len(sequence.answer) :]
            answer = torch.tensor(sequence.answer)
            loss = torch.nn.functional.cross_entropy(logits, answer)
            torch.testing.assert_close(captured.losses[index], loss, rtol=1e-5, atol=1e-6)
            expected = (logits.argmax(-1) == answer).float().mean()
            assert captured.correct[index] == pytest.approx(expected.item())
        assert captured.correct[3] == 1.0
        assert captured.correct.mean() < 1.0

    @pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.15), (torch.float16, 0.02)], ids=str)
    def test_half_precision_model(self, dtype, tolerance, tokenizer):
        """float32 rows, near those of the float32 model with the same (rounded) weights."""
        model, sequences = tiny_model("llama", dtype), sequences_of(tokenizer)
        captured = capture_of(model, sequences)
        exact = capture_of(tiny_model("llama", dtype).float(), sequences)
        assert torch.equal(captured.request, exact.request)
        assert captured.losses.dtype == torch.float32
        for name in captured.keys:
            for mine, theirs in ((captured.keys, exact.keys), (captured.value_gradients, exact.value_gradients)):
                assert mine[name].dtype == torch.float32
                assert (mine[name] - theirs[name]).norm() < tolerance * theirs[name].norm()

    def test_small_gradients_survive_float16(self, tokenizer):
        """The weight 1 / (answer tokens) is applied after the backward pass, where float16 cannot lose it."""
        fact = {"prompt": "A", "target": "b" * 60}
        captured, exact = (
            capture_of(model, sequences_of(tokenizer, [fact] * 5))
            for model in (tiny_model("llama", torch.float16), tiny_model("llama", torch.float16).float())
        )
        for name, gradient in captured.value_gradients.items():
            lost = (gradient == 0) & (exact.value_gradients[name].abs() > 0)
            assert lost.float().mean() < 1e-3


class TestEconomy:
    def test_no_backward_below_the_first_edited_module(self, tokenizer):
        model = tiny_model("llama")
        grads, backward = {}, []

        def forward_hook(name):
            return lambda _module, _inputs, output: grads.__setitem__(name, output.requires_grad)

        def backward_hook(name):
            return lambda *_: backward.append(name)

        below = ["model.embed_tokens", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"]
        above = ["model.layers.2.mlp.up_proj"]
        for name in below + above:
            model.get_submodule(name).register_forward_hook(forward_hook(name))
            model.get_submodule(name).register_full_backward_hook(backward_hook(name))
        capture_of(model, sequences_of(tokenizer))
        assert grads == {name: name in above for name in below + above}
        assert backward == above

    def test_no_backward_below_even_when_the_embeddings_ask_for_gradients(self, tokenizer):
        """``enable_input_require_grads`` (PEFT, gradient checkpointing) makes every activation require a gradient."""
        model, sequences = tiny_model("llama"), sequences_of(tokenizer)
        expected = capture_of(model, sequences)
        model.enable_input_require_grads()
        backward = []
        model.model.layers[0].mlp.down_proj.register_full_backward_hook(lambda *_: backward.append(1))
        assert_same(capture_of(model, sequences), expected, rtol=1e-6)
        assert backward == []

    def test_logits_only_at_answer_positions(self, tokenizer):
        model, sequences = tiny_model("llama"), sequences_of(tokenizer)
        seen = []
        model.lm_head.register_forward_hook(lambda _module, inputs, output: seen.append(output.numel() // 300))
        captured = capture_of(model, sequences)
        assert seen == [len(captured.request)] == [sum(len(sequence.answer) for sequence in sequences)]

    def test_no_weight_gradients(self, tokenizer):
        """No ``.grad`` appears, and one that is there stays what it was, bit for bit."""
        model = tiny_model("llama")
        down = model.model.layers[2].mlp.down_proj.weight
        down.grad = torch.full_like(down, 0.5)
        capture_of(model, sequences_of(tokenizer))
        assert torch.equal(down.grad, torch.full_like(down, 0.5))
        assert all(p.grad is None for p in model.parameters() if p is not down)


class TestModelIsLeftAsFound:
    def mixed_flags(self):
        """A model in train mode but for one layer, with some parameters frozen."""
        model = tiny_model("llama").train()
        model.model.layers[1].eval()
        model.model.embed_tokens.weight.requires_grad_(False)
        model.model.layers[2].mlp.down_proj.weight.requires_grad_(False)
        return model

    def hooks_of(self, model) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    def test_flags_hooks_and_weights(self, tokenizer):
        model = self.mixed_flags()
        flags, hooks = flags_of(model), self.hooks_of(model)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        capture_of(model, sequences_of(tokenizer))
        assert flags_of(model) == flags
        assert self.hooks_of(model) == hooks
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())

    @pytest.mark.parametrize("where", ["model.layers.0", "model.layers.2", "lm_head"])
    def test_after_an_error_in_the_forward_pass(self, where, tokenizer):
        model = self.mixed_flags()

        def fail(*_):
            raise RuntimeError("broken")

        handle = model.get_submodule(where).register_forward_hook(fail)
        flags, hooks = flags_of(model), self.hooks_of(model)
        with pytest.raises(RuntimeError, match="broken"):
            capture_of(model, sequences_of(tokenizer))
        assert flags_of(model) == flags
        assert self.hooks_of(model) == hooks
        handle.remove()
        capture_of(model, sequences_of(tokenizer))

    def test_train_mode_with_dropout_gives_what_eval_mode_gives(self, tokenizer):
        model, sequences = tiny_model("gpt2"), sequences_of(tokenizer)
        assert model.config.resid_pdrop > 0
        expected = capture_of(model, sequences, modules=GPT2_MODULES)
        assert_same(capture_of(model.train(), sequences, modules=GPT2_MODULES), expected, rtol=0.0)
        assert model.training

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
    def test_where_gradients_are_switched_off(self, context, tokenizer):
        model, sequences = tiny_model("llama"), sequences_of(tokenizer)
        expected = capture_of(model, sequences)
        with context():
            captured = capture_of(model, sequences)
            assert not torch.is_grad_enabled()
        assert_same(captured, expected, rtol=0.0)

    def test_rows_hold_no_graph(self, tokenizer):
        captured = capture_of(tiny_model("llama"), sequences_of(tokenizer))
        rows = [*captured.keys.values(), *captured.value_gradients.values(), captured.losses, captured.correct]
        assert not any(tensor.requires_grad for tensor in rows)


class TestTokenizers:
    def test_prompt_and_answer_are_joined(self, tokenizer):
        """ " " + target, without its last token in the input; no special tokens."""
        (sequence,) = tokenize(tokenizer, [("ab", "cd")], None, ["request 0"])
        answer = tokenizer(" cd")["input_ids"]
        assert len(answer) == 3
        assert sequence.answer == tuple(answer)
        assert sequence.ids == tuple(tokenizer("ab")["input_ids"] + answer[:-1])
        assert sequence.first == 1  # the last token of the prompt predicts the first of the answer

    @pytest.mark.parametrize("bos", [False, True])
    @pytest.mark.parametrize("eos", [False, True])
    def test_special_tokens(self, bos, eos, tokenizer):
        """BOS opens the prompt where the tokenizer says so; EOS never stands between prompt and answer."""
        plain = sequences_of(tokenizer)
        special = sequences_of(tiny_tokenizer(bos=bos, eos=eos))
        for sequence, expected in zip(special, plain, strict=True):
            assert sequence.ids == ((1,) if bos else ()) + expected.ids
            assert sequence.answer == expected.answer

    def test_a_prompt_that_ends_with_eos_keeps_it(self):
        tokenizer = tiny_tokenizer()
        (sequence,) = tokenize(tokenizer, [("Hello</s>", "x")], None, ["request 0"], PARSED)
        assert sequence.ids[sequence.first] == tokenizer.eos_token_id

    def test_bos_changes_the_capture(self, tokenizer):
        """The special token takes part in the forward pass."""
        model = tiny_model("llama")
        plain = capture_of(model, sequences_of(tokenizer))
        opened = capture_of(model, sequences_of(tiny_tokenizer(bos=True)))
        name = next(iter(plain.keys))
        assert plain.keys[name].shape == opened.keys[name].shape
        assert not torch.allclose(plain.keys[name], opened.keys[name])

    @pytest.mark.parametrize("pad_token", ["<pad>", None])
    def test_padding_side_does_not_matter(self, pad_token, tokenizer):
        model = tiny_model("llama")
        other = tiny_tokenizer(padding_side="left")
        other.pad_token = pad_token
        expected = capture_of(model, sequences_of(tokenizer))
        assert_same(capture_of(model, sequences_of(other)), expected, rtol=0.0)

    def test_padding_is_not_seen(self, tokenizer):
        """A short request gives the same rows alone and beside long ones."""
        model = tiny_model("gpt2", torch.float64)
        sequences = sequences_of(tokenizer)
        shortest = longest_first(sequences)[-1]
        captured = capture_of(model, sequences, modules=GPT2_MODULES)
        alone = capture_of(model, [sequences[shortest]], modules=GPT2_MODULES)
        rows = captured.request == shortest
        for name in GPT2_MODULES:
            torch.testing.assert_close(captured.keys[name][rows], alone.keys[name], rtol=1e-9, atol=1e-12)


class TestBadInput:
    def test_nan_weight_names_the_request(self, tokenizer):
        """Only request 5 has the letter F, whose embedding is NaN."""
        facts = [{"prompt": f"item {index}", "target": "yes"} for index in range(9)]
        facts[5] = {"prompt": "item F", "target": "yes"}
        model = tiny_model("llama")
        (letter,) = tokenizer("F")["input_ids"]
        model.model.embed_tokens.weight.data[letter] = float("nan")
        names = [f"request {index} (id{index})" for index in range(9)]
        with pytest.raises(ValueError, match=r"^request 5 \(id5\): the loss is NaN or infinite"):
            capture_of(model, sequences_of(tokenizer, facts), names=names)

    def test_infinite_gradient_names_module_and_request(self, tokenizer):
        model = tiny_model("llama")
        model.model.layers[2].register_forward_hook(lambda _m, _i, output: _ExplodingGradient.apply(output))
        with pytest.raises(ValueError, match=r"request \d+: the value gradient at model\.layers\.2\.mlp\.down_proj is"):
            capture_of(model, sequences_of(tokenizer), modules="model.layers.2.mlp.down_proj")

    def test_module_that_takes_no_part(self, tokenizer):
        model = tiny_model("llama")
        model.spare = torch.nn.Linear(24, 16)
        flags = flags_of(model)
        with pytest.raises(ValueError, match="spare took no part in the forward pass"):
            capture_of(model, sequences_of(tokenizer), modules=["spare", LAST_TWO])
        assert flags_of(model) == flags

    def test_module_that_sees_only_some_tokens(self, tokenizer):
        """As the experts of a mixture do: its rows could not be told apart."""
        model = tiny_model("llama")
        down = model.model.layers[1].mlp.down_proj
        inner = down.forward
        down.register_forward_pre_hook(lambda _module, inputs: (inputs[0][:, :-3],))
        down.forward = lambda x: torch.nn.functional.pad(inner(x), (0, 0, 0, 3))
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj does not see every token once"):
            capture_of(model, sequences_of(tokenizer))

    @pytest.mark.parametrize(
        "pair, limit, message",
        [
            (("", "x"), None, "fact A: the prompt '' has no tokens"),
            (("x", "y" * 10), 10, "fact A: prompt and target have 11 tokens, more than the model's context of 10"),
        ],
    )
    def test_tokenize(self, pair, limit, message, tokenizer):
        with pytest.raises(ValueError, match=message):
            tokenize(tokenizer, [pair], limit, ["fact A"])

    def test_the_whole_context_can_be_used(self, tokenizer):
        (sequence,) = tokenize(tokenizer, [("x", "y" * 9)], 10, ["fact A"])
        assert len(sequence) == 10


class _ExplodingGradient(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(_context, x):
        return x.clone()

    @staticmethod
    def backward(_context, gradient):
        return gradient * float("inf")


def test_output_embedding_can_be_edited(tokenizer):
    """It sees only answer positions, unlike every other module."""
    model, sequences = tiny_model("gpt2", torch.float64), sequences_of(tokenizer)
    captured = capture_of(model, sequences, modules="lm_head")
    keys, gradients = plain_reference(model, sequences, ["lm_head"])
    torch.testing.assert_close(captured.keys["lm_head"], keys["lm_head"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(captured.value_gradients["lm_head"], gradients["lm_head"], rtol=1e-9, atol=1e-12)


def test_tapped_module_may_flatten_its_input(tokenizer):
    """Some versions of OPT hand ``[batch * length, d]`` to the MLP."""
    model, sequences = tiny_model("opt", torch.float64), sequences_of(tokenizer)
    captured = capture_of(model, sequences, modules=pattern_of("opt"))
    keys, _ = plain_reference(model, sequences, list(captured.keys))
    for name, rows in captured.keys.items():
        torch.testing.assert_close(rows, keys[name], rtol=1e-9, atol=1e-12)
