"""Finding the modules to edit, and refusing those that cannot be."""

from __future__ import annotations

import re
from typing import ClassVar

import pytest
import torch
import transformers
from torch import nn

import stableedit_cpp as se
from stableedit_cpp.model.modules import describe_linear_maps, find_modules
from stableedit_cpp.model.outputs import as_patterns, default_edit_modules, output_projections
from support.tiny import ARCHITECTURES, FACTS, LAYERS, VOCABULARY, pattern_of, tiny_model, tiny_tokenizer


def names(model, patterns) -> list[str]:
    return [module.name for module in find_modules(model, patterns)]


@pytest.fixture(scope="module")
def llama():
    """Only looked at."""
    return tiny_model("llama")


class TestNamesAndPatterns:
    def test_exact_name(self, llama):
        (module,) = find_modules(llama, ["model.layers.1.mlp.down_proj"])
        assert module.name == "model.layers.1.mlp.down_proj"
        assert module.module is llama.model.layers[1].mlp.down_proj
        assert module.layout == "linear"
        assert module.shape == (24, 16)

    def test_conv1d(self):
        (module,) = find_modules(tiny_model("gpt2"), "transformer.h.0.mlp.c_proj")
        assert module.layout == "conv1d"
        assert module.weight.shape == (24, 16)
        assert module.shape == (24, 16)

    @pytest.mark.parametrize(
        "pattern, layers",
        [
            ("model.layers.*.mlp.down_proj", [0, 1, 2]),
            ("model.layers.?.mlp.down_proj", [0, 1, 2]),
            ("model.layers.[12].mlp.down_proj", [1, 2]),
            ("model.layers.[!1].mlp.down_proj", [0, 2]),
            ("model.layers.{0,2}.mlp.down_proj", [0, 2]),
            ("*.{2,0}.mlp.down_proj", [0, 2]),
            ("*down_proj", [0, 1, 2]),
            ("model.layers.1.mlp.down_proj", [1]),
        ],
    )
    def test_patterns(self, pattern, layers, llama):
        assert names(llama, pattern) == [f"model.layers.{layer}.mlp.down_proj" for layer in layers]

    def test_braces_multiply(self, llama):
        found = names(llama, "model.layers.{0,1}.mlp.{up,down}_proj")
        assert found == [f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("up", "down")]

    def test_order_of_the_model_and_no_repeats(self, llama):
        layer = "model.layers.{}.mlp.down_proj".format
        assert names(llama, [layer(2), layer(0), layer("*"), layer(0)]) == [layer(0), layer(1), layer(2)]

    def test_pattern_takes_only_linear_maps(self, llama):
        """``*.mlp*`` also matches the MLP itself and its activation."""
        found = names(llama, "model.layers.0.mlp*")
        assert found == [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]

    @pytest.mark.parametrize(
        "pattern", ["model.layers.7.mlp.down_proj", "layers.0.mlp.down_proj", "*.fc_out", "", "*x*y"]
    )
    def test_nothing_matches(self, pattern, llama):
        with pytest.raises(ValueError) as error:
            find_modules(llama, [pattern])
        message = str(error.value)
        assert f"no linear map for {pattern!r} (nothing matches)" in message
        assert "model.layers.{0..2}.mlp.down_proj  (24 -> 16)" in message
        assert "lm_head  (16 -> 300)" in message

    def test_one_bad_name_among_good_ones(self, llama):
        with pytest.raises(ValueError, match=r"no linear map for 'lm_heat'"):
            find_modules(llama, ["lm_head", "lm_heat"])

    def test_pattern_of_other_things(self, llama):
        with pytest.raises(ValueError, match=r"it matches only model\.layers\.0\.mlp\.act_fn"):
            find_modules(llama, "*.act_fn")

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_description_covers_every_linear_map(self, architecture):
        """Every group that an error message lists can be found again by its first layer."""
        model = tiny_model(architecture)
        text = describe_linear_maps(model)
        described = 0
        for line in text.splitlines():
            name, k, v = re.fullmatch(r"    (\S+)  \((\d+) -> (\d+)\)", line).groups()
            first = re.sub(r"\{(\d+)\.\.\d+\}", r"\1", name)
            (module,) = find_modules(model, first)
            assert module.shape == (int(k), int(v))
            described += LAYERS if first != name else 1
        linear = [m for m in model.modules() if isinstance(m, (nn.Linear, transformers.pytorch_utils.Conv1D))]
        assert described == len(linear)


class TestRefusals:
    @pytest.mark.parametrize("name, kind", [("model.embed_tokens", "Embedding"), ("model.layers.0.mlp", "LlamaMLP")])
    def test_not_a_linear_map(self, name, kind, llama):
        with pytest.raises(ValueError, match=rf"{name} is a {kind}, not a linear map"):
            find_modules(llama, name)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
    def test_quantised_dtype(self, dtype):
        model = tiny_model("llama")
        down = model.model.layers[1].mlp.down_proj
        down.weight = nn.Parameter(down.weight.detach().to(dtype), requires_grad=False)
        with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.down_proj has quantised weights \({dtype}\); load"):
            find_modules(model, pattern_of("llama"))
        assert len(find_modules(model, "model.layers.[02].mlp.down_proj")) == 2  # the others can be edited

    def test_quantised_tensor_subclass(self):
        class PackedInt4(torch.Tensor):
            """As torchao and others wrap quantised weights: it claims to be float32."""

        model = tiny_model("llama")
        down = model.model.layers[1].mlp.down_proj
        down.weight = nn.Parameter(down.weight.detach().as_subclass(PackedInt4))
        with pytest.raises(ValueError, match=r"down_proj has quantised weights \(PackedInt4\)"):
            find_modules(model, "model.layers.1.mlp.down_proj")

    def test_tied_output_embedding(self):
        model = tiny_model("llama")
        assert names(model, "lm_head") == ["lm_head"]
        model.lm_head.weight = model.model.embed_tokens.weight
        with pytest.raises(ValueError, match=r"lm_head shares its weight with model\.embed_tokens\.weight; editing"):
            find_modules(model, "lm_head")

    def test_two_layers_with_one_weight(self):
        model = tiny_model("llama")
        model.model.layers[0].mlp.down_proj.weight = model.model.layers[2].mlp.down_proj.weight
        with pytest.raises(ValueError, match=r"shares its weight with model\.layers\.2\.mlp\.down_proj\.weight"):
            find_modules(model, "model.layers.0.mlp.down_proj")

    def test_meta_device(self):
        model = tiny_model("llama")
        model.model.layers[1].mlp.down_proj.to("meta")
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj is not in memory \(meta device\)"):
            find_modules(model, pattern_of("llama"))

    def test_the_editors_refuse_as_well(self, llama):
        """Before anything is changed; ``edit_modules`` may be one name."""
        before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
        for editor, config in ((se.StableEdit, se.StableEditConfig), (se.UltraEdit, se.UltraEditConfig)):
            with pytest.raises(ValueError, match="no linear map for 'nowhere'"):
                editor(llama, tiny_tokenizer(), config(edit_modules="nowhere"))
        assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())


class TestDefaults:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_every_architecture(self, architecture):
        """In three layers the last third is the last layer."""
        model = tiny_model(architecture)
        assert default_edit_modules(model) == [pattern_of(architecture).replace("*", str(LAYERS - 1))]
        editor = se.StableEdit(model, tiny_tokenizer())
        assert [module.name for module in editor.modules] == default_edit_modules(model, automatic=True)
        assert editor.modules[0].name == output_projections(model, "attention")[-1]

    @pytest.mark.parametrize(
        "layers, expected", [(30, [22, 24, 26, 28]), (32, [23, 25, 27, 29]), (4, [2, 3]), (1, [0])]
    )
    def test_depths(self, layers, expected):
        """SmolLM2 has 30 layers, and these are the layers of docs/method.md."""
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 30}
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=layers, **sizes))
        assert default_edit_modules(model) == [f"model.layers.{layer}.mlp.down_proj" for layer in expected]
        late = {30: range(20, 29), 32: range(21, 31), 4: [2], 1: [0]}[layers]
        attention = [f"model.layers.{layer}.self_attn.o_proj" for layer in late]
        assert default_edit_modules(model, automatic=True) == attention

    @pytest.mark.parametrize(
        "kind, sizes, expected",
        [
            ("Lfm2", {}, "feed_forward.w2"),
            ("FalconH1", {"mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_ssm": 32}, "feed_forward.down_proj"),
            ("Jamba", {"use_mamba_kernels": False}, "feed_forward.down_proj"),
            ("RecurrentGemma", {}, "mlp_block.down_proj"),
            ("Phi3", {}, "mlp.down_proj"),  # one map for gate and up
            ("Bloom", {}, "mlp.dense_4h_to_h"),
            ("GPTBigCode", {}, "mlp.c_proj"),  # with two heads, query, key and value look like a gate and up
            ("Qwen2Moe", {}, "mlp.shared_expert.down_proj"),
            ("DeepseekV3", {}, "mlp.shared_experts.down_proj"),  # and not the MLP of the first layers
        ],
    )
    def test_an_mlp_is_known_by_its_shape(self, kind, sizes, expected):
        with torch.device("meta"):
            config = getattr(transformers, f"{kind}Config")(**self.SMALL, **sizes)
            model = transformers.AutoModelForCausalLM.from_config(config)
        found = default_edit_modules(model)
        assert {name.split(".", 3)[-1] for name in found} == {expected}
        assert all(int(name.split(".")[2]) >= 4 for name in found)

    @pytest.mark.parametrize("kind", ["JetMoe", "Bert"])
    def test_none_where_there_is_no_such_mlp(self, kind):
        config = getattr(transformers, f"{kind}Config")(num_hidden_layers=2, vocab_size=30)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        with pytest.raises(ValueError, match="no default edit_modules are known for"):
            default_edit_modules(model)

    @pytest.mark.parametrize("dense", [[0], [0, 1, 2], [0, 1, 2, 3, 4]])
    def test_dense_first_layers_alone_are_no_default(self, dense):
        """Editing layer 0 of a mixture of experts in silence, because it alone has an MLP, ruins all that is above."""
        with torch.device("meta"):
            config = transformers.Qwen3MoeConfig(**self.SMALL, mlp_only_layers=dense)
            model = transformers.AutoModelForCausalLM.from_config(config)
        assert output_projections(model, "mlp") == []
        layers = {int(name.split(".")[2]) for name in default_edit_modules(model)}
        assert min(layers) >= 5 and all(".experts." in name for name in default_edit_modules(model))
        attention = [f"model.layers.{layer}.self_attn.o_proj" for layer in (5, 6)]
        assert default_edit_modules(model, automatic=True) == attention

    def test_an_mlp_where_there_is_no_attention(self):
        """Between layers of Mamba, of which every second has an MLP, say."""
        model = tiny_model("llama")
        for layer in model.model.layers:
            layer.self_attn = nn.Identity()
        assert default_edit_modules(model, automatic=True) == ["model.layers.2.mlp.down_proj"]

    @pytest.mark.parametrize(
        "architecture, expected",
        [
            ("llama", "model.layers.{0..2}.self_attn.o_proj"),
            ("gpt2", "transformer.h.{0..2}.attn.c_proj"),
            ("gptj", "transformer.h.{0..2}.attn.out_proj"),
            ("gpt_neox", "gpt_neox.layers.{0..2}.attention.dense"),
            ("opt", "model.decoder.layers.{0..2}.self_attn.out_proj"),
            ("falcon", "transformer.h.{0..2}.self_attention.dense"),
            ("phi", "model.layers.{0..2}.self_attn.dense"),
            ("mpt", "transformer.blocks.{0..2}.attn.out_proj"),
        ],
    )
    def test_outputs_of_attention(self, architecture, expected):
        assert as_patterns(output_projections(tiny_model(architecture), "attention")) == expected

    @pytest.mark.parametrize(
        "names, expected",
        [
            (["a.3.b", "a.4.b", "a.5.b"], "a.{3..5}.b"),
            (["a.3.b", "a.5.b"], "a.{3,5}.b"),
            (["a.3.b", "a.3.c", "head"], "a.3.b a.3.c head"),
        ],
    )
    def test_names_as_patterns(self, names, expected):
        assert as_patterns(names) == expected

    SMALL: ClassVar = {"hidden_size": 16, "num_hidden_layers": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    SMALL |= {"intermediate_size": 24, "vocab_size": 30, "pad_token_id": 0}

    TEXT: ClassVar = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    TEXT |= {"num_key_value_heads": 1, "vocab_size": VOCABULARY, "head_dim": 8, "pad_token_id": 0}
    MROPE: ClassVar = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    TOWER: ClassVar = {"hidden_size": 16, "num_hidden_layers": 9, "num_attention_heads": 2, "intermediate_size": 24}
    TOWER |= {"image_size": 8, "patch_size": 4}

    @pytest.mark.parametrize(
        "kind, text, vision, expected",
        [
            (
                "Qwen2VL",
                {"model_type": "qwen2_vl_text", "rope_parameters": MROPE},
                {"depth": 9, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
                "model.language_model.layers.2.mlp.down_proj",
            ),
            (
                "Llava",
                {"model_type": "llama"},
                {"model_type": "clip_vision_model"} | TOWER,
                "model.language_model.layers.2.mlp.down_proj",
            ),
            ("Gemma3", {}, TOWER, "model.language_model.layers.2.mlp.down_proj"),
        ],
    )
    def test_a_vision_tower_is_not_the_language_model(self, kind, text, vision, expected, tokenizer):
        """It has three times as many layers, as wide as those of the language model."""
        config = getattr(transformers, f"{kind}Config")(text_config=self.TEXT | text, vision_config=vision)
        model = transformers.AutoModelForImageTextToText.from_config(config).eval()
        tower = [name for name, _ in model.named_modules() if ".8." in name and "fc2" in name]
        assert len(tower) == 1
        assert default_edit_modules(model) == [expected]
        report = se.StableEdit(model, tokenizer, se.StableEditConfig.one_pass(max_passes=2)).edit([FACTS[0]])
        assert report.edits == 1

    def test_unknown_architecture(self):
        model = nn.ModuleDict({"first": nn.Linear(3, 4), "act": nn.ReLU()})
        with pytest.raises(ValueError, match=r"no default edit_modules are known for ModuleDict; name them"):
            default_edit_modules(model)
        with pytest.raises(ValueError, match=r"first  \(3 -> 4\)"):
            default_edit_modules(model)
        with pytest.raises(ValueError, match="no linear maps"):
            default_edit_modules(nn.ReLU())
