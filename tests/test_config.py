"""Configurations: the published file to ours and back, and one error that names everything wrong."""

import contextlib
import copy
import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deqa_jax.config import (
    PRESETS,
    AbstractorConfig,
    ConfigError,
    DeqaConfig,
    LanguageConfig,
    VisionConfig,
    from_published,
    to_published,
)

POSITIVE = st.integers(1, 64)
EPSILONS = st.floats(1e-12, 1e-3)


@st.composite
def configs(draw):
    heads = draw(POSITIVE)
    width = 4 * heads * draw(POSITIVE)
    patch = draw(POSITIVE)
    kv_heads = draw(POSITIVE)
    language_heads = kv_heads * draw(POSITIVE)
    return DeqaConfig(
        vision=VisionConfig(
            image_size=patch * draw(POSITIVE),
            patch_size=patch,
            hidden_size=width,
            mlp_dim=draw(POSITIVE),
            num_layers=draw(POSITIVE),
            num_heads=heads,
            layer_norm_eps=draw(EPSILONS),
        ),
        abstractor=AbstractorConfig(
            num_queries=draw(POSITIVE),
            hidden_size=width,
            mlp_dim=draw(POSITIVE),
            num_layers=draw(POSITIVE),
            num_heads=heads,
            norm_eps=1e-5,
            ffn_norm_eps=draw(EPSILONS),
        ),
        language=LanguageConfig(
            vocab_size=draw(POSITIVE),
            hidden_size=2 * language_heads * draw(POSITIVE),
            mlp_dim=draw(POSITIVE),
            num_layers=draw(POSITIVE),
            num_heads=language_heads,
            num_kv_heads=kv_heads,
            rope_theta=draw(st.floats(1.0, 1e7)),
            rms_norm_eps=draw(EPSILONS),
        ),
    )


def changed(part, **values):
    """The test model with other values in one part."""
    config = PRESETS["test"]
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **values)})


@pytest.fixture
def published():
    return copy.deepcopy(to_published(PRESETS["test"]))


# ---- there and back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", PRESETS)
def test_presets_survive_the_published_format(size):
    assert from_published(json.loads(json.dumps(to_published(PRESETS[size])))) == PRESETS[size]


@given(config=configs())
def test_any_model_survives_both_formats(config):
    assert from_published(json.loads(json.dumps(to_published(config)))) == config
    assert DeqaConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_the_published_file_is_that_of_the_test_preset(shared):
    assert from_published(json.loads((shared / "tiny" / "checkpoint" / "config.json").read_text())) == PRESETS["test"]


def leaves(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


NUMBERS = [
    path
    for path, value in leaves(to_published(PRESETS["test"]))
    if isinstance(value, int | float) and not isinstance(value, bool)
]


def put(tree, path, value):
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


def remove(tree, path):
    for key in path[:-1]:
        tree = tree[key]
    del tree[path[-1]]


@pytest.mark.parametrize("path", NUMBERS, ids=".".join)
def test_every_published_number_is_read(path, published):
    put(published, path, 2 * dict(leaves(published))[path])
    with contextlib.suppress(ConfigError):
        assert from_published(published) != PRESETS["test"]


def test_entries_of_no_concern_are_ignored(published):
    published |= {"torch_dtype": "float16", "use_cache": True, "transformers_version": "4.31.0"}
    assert from_published(published) == PRESETS["test"]


def test_fixed_entries_may_be_absent(published):
    for path in (("attention_bias",), ("rope_scaling",), ("visual_config", "visual_abstractor", "grid_size")):
        remove(published, path)
    assert from_published(published) == PRESETS["test"]


def test_whole_numbers_may_stand_for_real_ones(published):
    published["rope_theta"] = 10000
    theta = from_published(published).language.rope_theta
    assert theta == 10000.0
    assert isinstance(theta, float)


def test_another_abstractor_epsilon_cannot_be_published():
    with pytest.raises(ConfigError, match=r"norm_eps 0\.001"):
        to_published(changed("abstractor", norm_eps=1e-3))


def test_the_published_model_has_65_visual_tokens_of_1025():
    full = PRESETS["full"]
    assert (full.num_visual_tokens, full.vision.grid_size, full.vision.num_tokens) == (65, 32, 1025)
    assert full.language.head_dim == 128


# ---- errors -----------------------------------------------------------------------------------------------


DERIVED = ("num_channels", "grid_size", "encoder_hidden_size")


@pytest.mark.parametrize("path", [path for path in NUMBERS if path[-1] not in DERIVED], ids=".".join)
def test_a_missing_number_is_named(path, published):
    remove(published, path)
    with pytest.raises(ConfigError, match=rf"{'.'.join(path)}: missing"):
        from_published(published)


def test_everything_wrong_is_named_at_once(published):
    published |= {"attention_bias": True, "rope_scaling": {"type": "linear", "factor": 2.0}}
    published |= {"tie_word_embeddings": True, "hidden_size": "64", "num_hidden_layers": 3.0, "vocab_size": True}
    published["visual_config"]["visual_model"]["hidden_act"] = "gelu"
    del published["visual_config"]["visual_model"]["image_size"]
    del published["rms_norm_eps"]
    with pytest.raises(ConfigError) as caught:
        from_published(published)
    message = str(caught.value)
    assert message.startswith("config.json: ")
    for part in (
        "attention_bias: True is not supported",
        "rope_scaling: {'type': 'linear', 'factor': 2.0} is not supported",
        "tie_word_embeddings: True is not supported",
        "visual_config.visual_model.hidden_act: 'gelu' is not supported",
        "visual_config.visual_model.image_size: missing",
        "rms_norm_eps: missing",
        "hidden_size: '64' is not a whole number",
        "num_hidden_layers: 3.0 is not a whole number",
        "vocab_size: True is not a whole number",
    ):
        assert part in message


def test_a_grid_that_is_not_the_vision_towers_is_refused(published):
    published["visual_config"]["visual_abstractor"] |= {"grid_size": 16, "encoder_hidden_size": 1}
    with pytest.raises(ConfigError, match=r"grid_size: 16 .*only 32.*encoder_hidden_size: 1 .*only 48"):
        from_published(published)


def test_a_wrong_grid_is_named_beside_the_other_faults(published):
    published["attention_bias"] = True
    published["visual_config"]["visual_abstractor"]["grid_size"] = 16
    with pytest.raises(ConfigError) as caught:
        from_published(published)
    assert "attention_bias" in str(caught.value)
    assert "grid_size" in str(caught.value)


def test_sizes_that_do_not_fit_are_named_as_those_of_a_published_file(published):
    published |= {"num_attention_heads": 5, "num_key_value_heads": 5}
    with pytest.raises(ConfigError, match=r"config.json: .*hidden_size 64 is not a multiple of its 5 heads"):
        from_published(published)


@pytest.mark.parametrize("part", ["visual_config", "visual_model"])
def test_a_part_that_is_no_object_is_missing(part, published):
    target = published if part == "visual_config" else published["visual_config"]
    target[part] = 3
    with pytest.raises(ConfigError, match="image_size: missing"):
        from_published(published)


def test_missing_and_unknown_entries_of_ours_are_named_at_once():
    values = dataclasses.asdict(PRESETS["test"])
    del values["vision"]["patch_size"], values["language"]
    values["abstractor"]["num_querys"] = 64
    values["decoder"] = {}
    with pytest.raises(ConfigError) as caught:
        DeqaConfig.from_dict(values)
    for part in ("vision.patch_size: missing", "language: missing", "abstractor.num_querys: unknown"):
        assert part in str(caught.value)
    assert "decoder: unknown" in str(caught.value)


@pytest.mark.parametrize("value", ["48", None, [48], 48.5, float("nan"), True], ids=repr)
def test_an_entry_of_ours_that_is_no_size_is_refused(value):
    values = dataclasses.asdict(PRESETS["test"])
    values["vision"]["mlp_dim"] = value
    with pytest.raises(ConfigError, match=r"vision\.mlp_dim"):
        DeqaConfig.from_dict(values)


def test_a_part_of_ours_that_is_no_object_is_refused():
    with pytest.raises(ConfigError, match="vision"):
        DeqaConfig.from_dict({**dataclasses.asdict(PRESETS["test"]), "vision": 3})


@pytest.mark.parametrize(
    ("part", "values", "complaint"),
    [
        ("vision", {"num_layers": 0}, "vision.num_layers must be a positive whole number, not 0"),
        ("language", {"rms_norm_eps": -1e-5}, "language.rms_norm_eps must be positive"),
        ("language", {"rms_norm_eps": float("nan")}, "language.rms_norm_eps"),
        ("vision", {"num_heads": 5}, "vision.hidden_size 48 is not a multiple of its 5 heads"),
        ("abstractor", {"num_heads": 5}, "abstractor.hidden_size 48 is not a multiple of its 5 heads"),
        ("language", {"num_heads": 6, "num_kv_heads": 6}, "language.hidden_size 64 is not a multiple of its 6 heads"),
        ("vision", {"patch_size": 13}, "448 is not a multiple of patch_size 13"),
        ("vision", {"hidden_size": 64}, "abstractor.hidden_size 48 must equal vision.hidden_size 64"),
        ("language", {"num_kv_heads": 3}, "4 heads do not share 3 key/value heads"),
        ("language", {"num_kv_heads": 8}, "4 heads do not share 8 key/value heads"),
        ("language", {"hidden_size": 60}, "head_dim 15 is odd"),
    ],
    ids=str,
)
def test_impossible_sizes_are_refused(part, values, complaint):
    with pytest.raises(ConfigError, match=complaint):
        changed(part, **values)


def test_widths_need_room_for_two_dimensional_positions():
    config = PRESETS["test"]
    with pytest.raises(ConfigError, match="50 is not a multiple of 4"):
        dataclasses.replace(
            config,
            vision=dataclasses.replace(config.vision, hidden_size=50, num_heads=2),
            abstractor=dataclasses.replace(config.abstractor, hidden_size=50, num_heads=2),
        )


def test_impossible_sizes_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        changed("vision", patch_size=13, num_heads=5, hidden_size=64)
    for part in ("patch_size 13", "5 heads", "must equal"):
        assert part in str(caught.value)


def test_configurations_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["test"].vision.num_layers = 3


def test_no_number_of_the_model_has_a_default():
    for part in (VisionConfig, AbstractorConfig, LanguageConfig, DeqaConfig):
        assert all(field.default is dataclasses.MISSING for field in dataclasses.fields(part))
