"""Configs: every field is checked, JSON goes both ways, presets are the published settings."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stableedit_cpp import StableEditConfig, UltraEditConfig, load_config

BOTH = [StableEditConfig, UltraEditConfig]
MODULES = ["model.layers.1.mlp.down_proj"]
NOT_POSITIVE = [0, 0.0, -1e-6, -1, float("nan"), float("inf"), -float("inf"), 10**400, "1", True, None, [1.0]]
NOT_A_COUNT = [0, -1, 1.0, 2.5, "2", True, None, float("nan")]


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize(
    ("field", "value"),
    [(name, value) for name in ("step_size", "ridge") for value in NOT_POSITIVE]
    + [
        (name, value)
        for name in ("turn_size", "micro_batch", "max_passes", "max_tokens_per_forward")
        for value in NOT_A_COUNT
    ]
    + [("past_key_weight", value) for value in (-1e-9, -1, float("nan"), float("inf"), 10**400, "0.1", None, False)]
    + [("take_probability", value) for value in (-0.1, 1, 1.0, float("nan"), "0.5", None, True)]
    + [("retries_feed_statistics", value) for value in (0, 1, "true", None)]
    + [("statistics", value) for value in ("pooled", "", None, 1, ["shared"])]
    + [("edit_modules", value) for value in ([], "", [""], [1], ["a", None], 5, 0, True)],
)
def test_out_of_range(cls, field, value):
    check_rejected(cls, field, value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("floor", value) for value in (-1e-9, -1, float("nan"), float("inf"), 10**400, "0.1", None, False)]
    + [("refresh", value) for value in (-0.1, 1.1, float("nan"), "0.1", None, True)]
    + [("floor_mode", value) for value in ("percent", "", None, 0)]
    + [("whitening", value) for value in ("Full", "", None, True)]
    + [("warm_up_whitening", value) for value in ("half", "", False)],
)
def test_stableedit_out_of_range(field, value):
    check_rejected(StableEditConfig, field, value)


@pytest.mark.parametrize("value", [1, 0, "true", None])
def test_ultraedit_out_of_range(value):
    check_rejected(UltraEditConfig, "unbiased_batches", value)


def check_rejected(cls, field, value):
    with pytest.raises(ValueError) as error:
        cls(**{field: value})
    assert field in str(error.value)
    assert repr(value) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("whitening", ["none", "diagonal", "full"])
def test_warm_up_whitens_no_more_than_the_stream(whitening):
    order = ["none", "diagonal", "full"]
    assert StableEditConfig(whitening=whitening).warm_up_whitening == order[min(order.index(whitening), 1)]
    for stronger in order[order.index(whitening) + 1 :]:
        with pytest.raises(ValueError, match=f"warm_up_whitening must be one of .*, not '{stronger}'"):
            StableEditConfig(whitening=whitening, warm_up_whitening=stronger)


def test_fields_are_by_name_only_and_frozen():
    with pytest.raises(TypeError):
        StableEditConfig(MODULES)
    with pytest.raises(TypeError, match="step_sise"):
        StableEditConfig(step_sise=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        StableEditConfig().step_size = 1.0


def test_edit_modules_may_be_one_name_or_any_sequence():
    assert StableEditConfig(edit_modules="a.*").edit_modules == ["a.*"]
    assert StableEditConfig(edit_modules=("a", "b")).edit_modules == ["a", "b"]
    names = ["a"]
    config = StableEditConfig(edit_modules=names)
    names.append("b")
    assert config.edit_modules == ["a"]


@pytest.mark.parametrize("value", [0, 0.0, 1])
def test_a_floor_of_zero_is_allowed(value):
    assert StableEditConfig(floor=value).floor == value


CHANGED = {
    "edit_modules": MODULES,
    "step_size": 1e-6,
    "ridge": 2.5,
    "statistics": "per_module",
    "turn_size": 7,
    "micro_batch": 3,
    "max_passes": 2,
    "take_probability": 0.25,
    "retries_feed_statistics": False,
    "past_key_weight": 0.5,
    "max_tokens_per_forward": 99,
}
CONFIGS = [
    StableEditConfig(),
    StableEditConfig(**CHANGED, whitening="diagonal", warm_up_whitening="none", floor=0, floor_mode="absolute"),
    StableEditConfig.published(step_size=1e-6),
    UltraEditConfig(),
    UltraEditConfig(**CHANGED, unbiased_batches=True),
    UltraEditConfig.published(step_size=2e-6, edit_modules=MODULES),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_json_round_trip(tmp_path, config):
    text = config.to_json()
    assert type(config).from_json(text) == config
    document = json.loads(text)
    assert document["format"] == "stableedit-config"
    assert document["version"] == 1
    assert document["editor"] == config.editor
    for field in dataclasses.fields(config):
        assert document[field.name] == getattr(config, field.name)
    path = tmp_path / "config.json"
    path.write_text(text)
    loaded = load_config(path)
    assert loaded == config
    assert type(loaded) is type(config)


@given(
    step_size=st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False),
    floor=st.floats(min_value=0, allow_infinity=False, allow_nan=False),
    turn_size=st.integers(min_value=1),
    names=st.none() | st.lists(st.text(min_size=1), min_size=1),
)
def test_json_keeps_every_bit(step_size, floor, turn_size, names):
    config = StableEditConfig(step_size=step_size, floor=floor, turn_size=turn_size, edit_modules=names)
    assert StableEditConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("cls", BOTH)
def test_absent_fields_take_their_defaults(cls):
    assert cls.from_json("{}") == cls()
    assert cls.from_json('{"step_size": 1e-5}') == cls(step_size=1e-5)


def test_fields_of_earlier_versions():
    """A sketch of the past keys kept too little of what exact ones give; who did without it reads on."""
    config = StableEditConfig(past_key_weight=0.02)
    text = config.to_json().replace('"past_key_weight"', '"past_key_rank": null, "past_key_weight"')
    assert StableEditConfig.from_json(text) == config
    with pytest.raises(ValueError, match="past_key_rank is no longer a field, and nothing but null can be read for it"):
        StableEditConfig.from_json(text.replace("null", "64"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1, column 1: not valid JSON"),
        ('{"step_size": 1e-4,\n "ridge": }', "line 2, column 11: not valid JSON"),
        ("[]", "expected a JSON object with the fields of StableEditConfig"),
        ('{"step_sise": 1}', "StableEditConfig has no field 'step_sise', did you mean 'step_size'?"),
        ('{"turnsize": 1}', "did you mean 'turn_size'?"),
        ('{"zzz": 1}', "no field 'zzz'; known are: edit_modules, step_size"),
        ('{"unbiased_batches": true}', "no field 'unbiased_batches'"),
        ('{"editor": "ultraedit"}', "config of the editor 'ultraedit'; StableEditConfig is for 'stableedit'"),
        (
            '{"version": 2}',
            "of version 2 and may have fields of another meaning; this stableedit reads versions up to 1",
        ),
        (
            '{"version": 9, "ridge": 1, "tilt": 2, "lean": 3}',
            "of version 9 and may have fields of another meaning, among them 'tilt', 'lean', unknown",
        ),
        ('{"version": 0}', "not a stableedit-config of version 1 (version is 0)"),
        ('{"version": "1"}', "version is '1'"),
        ('{"version": null}', "version is None"),
        ('{"format": "something-else"}', "not a stableedit-config"),
        ('{"step_size": -1}', "step_size must be greater than 0, not -1"),
        ('{"step_size": NaN}', "step_size must be a finite number, not nan"),
        ('{"step_size": "1e-4"}', "step_size must be a finite number, or 'auto', not '1e-4'"),
        ('{"edit_modules": 5}', "edit_modules must be a list of module names or patterns, not 5"),
    ],
)
def test_bad_json(tmp_path, text, words):
    with pytest.raises(ValueError) as error:
        StableEditConfig.from_json(text)
    assert words in str(error.value)
    path = tmp_path / "config.json"
    path.write_text(text)
    if "ultraedit" not in text:
        with pytest.raises(ValueError) as error:
            load_config(path)
        assert words in str(error.value)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("editor", ['"grace"', "[]", "{}", "null", "1"])
def test_config_file_of_an_unknown_editor(tmp_path, editor):
    path = tmp_path / "config.json"
    path.write_text(f'{{"editor": {editor}}}')
    with pytest.raises(ValueError, match=r"unknown editor .*; known are: .*stableedit, .*ultraedit"):
        load_config(path)


def test_config_file_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "missing.json")
    with pytest.raises(IsADirectoryError):
        load_config(tmp_path)
    (tmp_path / "latin1.json").write_bytes(b'{"edit_modules": ["caf\xe9"]}')
    with pytest.raises(ValueError, match=r"latin1\.json is not UTF-8 text"):
        load_config(tmp_path / "latin1.json")


def test_published_presets():
    config = StableEditConfig.published(edit_modules=MODULES, step_size=1e-6)
    assert (config.edit_modules, config.step_size) == (MODULES, 1e-6)
    assert (config.whitening, config.warm_up_whitening) == ("full", "diagonal")
    assert (config.floor, config.floor_mode) == (1e-6, "absolute")
    assert (config.ridge, config.statistics) == (10.0, "shared")
    assert (config.turn_size, config.micro_batch, config.max_passes) == (100, 10, 1)
    config = UltraEditConfig.published(edit_modules=MODULES, step_size=2e-6)
    assert (config.ridge, config.statistics, config.unbiased_batches) == (1.0, "shared", True)
    assert (config.turn_size, config.micro_batch, config.max_passes) == (100, 10, 1)


@pytest.mark.parametrize("cls", BOTH)
def test_presets_need_a_step_size_and_take_changes(cls):
    with pytest.raises(TypeError, match="step_size"):
        cls.published()
    assert cls.published(step_size=1e-6, ridge=3.0, turn_size=170).ridge == 3.0
    with pytest.raises(ValueError, match="ridge must be greater than 0, not -1"):
        cls.published(step_size=1e-6, ridge=-1)


def test_closed_loop_preset():
    config = StableEditConfig.closed_loop()
    assert config.max_passes > 1 and config.past_key_weight > 0 and not config.retries_feed_statistics
    assert config.step_size < StableEditConfig.one_pass().step_size
    assert StableEditConfig.closed_loop(turn_size=7, max_passes=3).turn_size == 7


def test_defaults():
    config = StableEditConfig()
    assert (config.whitening, config.floor_mode, config.statistics) == ("full", "relative", "shared")
    assert (config.turn_size, config.micro_batch, config.max_passes) == (100, 10, 10)
    assert (config.step_size, config.centred, config.take_probability) == ("auto", None, 0.4)
    assert (config.anchors, config.replays, config.past_key_weight) == (96, 192, 0.02)
    assert not config.retries_feed_statistics
    assert (config.chat_template, config.end_of_answer) == (None, True)
    assert UltraEditConfig().ridge == 1.0
    assert config.edit_modules is None


# What version 0.1 did with its defaults.
EARLIER = {"step_size": 3.5e-4, "max_passes": 1, "take_probability": 0.0, "past_key_weight": 0.0}
EARLIER |= {"retries_feed_statistics": True, "frozen_statistics": False}
LATER = {
    "chat_template": False,
    "end_of_answer": False,
    "prompt_rows": False,
    "anchors": 0,
    "replays": 0,
    "centred": True,
}


@pytest.mark.parametrize("config", [StableEditConfig.one_pass(), UltraEditConfig()], ids=str)
def test_the_default_of_version_0_1(config):
    fields = dataclasses.asdict(config)
    expected = EARLIER | {name: value for name, value in LATER.items() if name in fields}
    assert {name: fields[name] for name in expected} == expected


@pytest.mark.parametrize("config", [StableEditConfig.one_pass(), UltraEditConfig()], ids=str)
def test_a_config_file_of_version_0_1_means_what_it_meant(config):
    """It has no field that came later; one that was written by hand, without a version, takes today's defaults."""
    document = json.loads(config.to_json())
    earlier = {name: value for name, value in document.items() if name not in LATER}
    assert type(config).from_json(json.dumps(earlier)) == config
    earlier = {name: value for name, value in earlier.items() if name not in EARLIER or name == "step_size"}
    assert type(config).from_json(json.dumps({**earlier, "max_passes": 1})) == config  # one from before these
    by_hand = type(config).from_json(json.dumps({"step_size": 1e-4}))
    assert by_hand == type(config)(step_size=1e-4)


def test_presets_with_a_step_of_their_own_are_one_pass_with_changes():
    one, published = StableEditConfig.one_pass(), StableEditConfig.published(step_size=1e-6)
    assert published == dataclasses.replace(one, step_size=1e-6, floor=1e-6, floor_mode="absolute", refresh=0.0)
    closed = StableEditConfig.closed_loop()
    changes = {"step_size": 2e-4, "max_passes": 5, "take_probability": 0.4, "past_key_weight": 0.02}
    assert closed == dataclasses.replace(one, **changes, retries_feed_statistics=False)
