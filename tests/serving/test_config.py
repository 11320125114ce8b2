"""What a user sees of the configuration: defaults, and an error for every mistake."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from serving.config import ServeConfig, load_config
from sharding.errors import ConfigError
from sharding.model.rotation import Stretch


def _complaint(**options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(options)
    return str(caught.value)


def test_a_model_is_enough() -> None:
    config = load_config({"model": "smollm2"})
    assert (config.stages, config.context, config.port) == (2, None, 8000)


def test_http_is_not_open_to_the_network_unless_asked() -> None:
    assert load_config({"model": "smollm2"}).host == "127.0.0.1"


def test_numbers_may_come_as_text() -> None:
    """`serve run serving.app:build stages=3` gives every argument as text."""
    assert load_config({"model": "smollm2", "stages": "3"}).stages == 3


def test_a_misspelt_key_is_refused_with_the_nearest_one() -> None:
    complaint = _complaint(model="smollm2", stagse=4)
    assert "stagse: no such key; did you mean 'stages'?" in complaint


def test_a_key_like_no_other_is_refused_with_all_keys() -> None:
    complaint = _complaint(model="smollm2", zzz=4)
    assert "zzz: no such key; known: " in complaint
    assert all(key in complaint for key in ServeConfig.model_fields)


def test_every_mistake_has_its_line() -> None:
    """One mistake a run would take four runs to find four."""
    _, *lines = _complaint(stages=0, threads="many", port=70000).splitlines()
    assert sorted(line.split(":")[0].strip() for line in lines) == [
        "model",
        "port",
        "stages",
        "threads",
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", ""),
        ("model_name", ""),
        ("stages", 0),
        ("stages", 65),
        ("stages", 2.5),
        ("context", 0),
        ("kv_tokens", 0),
        ("threads", 0),
        ("max_waiting", -1),
        ("ingress_replicas", 0),
        ("port", 0),
        ("port", 65536),
        ("host", ""),
        ("kernels", "warp"),
        ("rope_scaling", "ntk"),
        ("rope_scale", 0.5),
        ("rope_scale", float("nan")),
        ("yarn_orig_ctx", 0),
        ("api_key_file", ""),
    ],
)
def test_a_value_out_of_range_is_refused_with_key_and_value(key: str, value: object) -> None:
    options: dict[str, object] = {"model": "smollm2", key: value}
    assert f"{key}: {value!r} should " in _complaint(**options)


def test_yes_is_not_one_stage() -> None:
    """YAML reads `stages: yes` as true, which Python would take for the number 1."""
    assert "stages: true is neither" in _complaint(model="smollm2", stages=True)


@pytest.mark.parametrize(
    "origin",
    ["chat.example.org", "https://a.example/", "ftp://a", "https://A.org", "https://*.a.org", ""],
)
def test_an_origin_is_spelt_as_browsers_send_it(origin: str) -> None:
    """One with a path or without a scheme would match no page and do nothing."""
    assert "cors_origins.1: " in _complaint(
        model="x", cors_origins=["http://localhost:3000", origin]
    )
    assert load_config({"model": "x", "cors_origins": ["*"]}).cors_origins == ("*",)


def test_the_prefix_cache_is_switched_by_yes_and_no() -> None:
    given = [load_config({"model": "x", "prefix_cache": value}) for value in (False, "false", True)]
    assert [config.prefix_cache for config in given] == [False, False, True]
    assert "prefix_cache" in _complaint(model="x", prefix_cache="perhaps")


def test_kv_below_the_context_is_refused_with_both_numbers() -> None:
    """A request of the full context could never start and would wait for ever."""
    complaint = _complaint(model="smollm2", context=4096, kv_tokens=2048)
    assert "2048" in complaint
    assert "4096" in complaint


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"rope_scale": 4}, "rope_scale needs rope_scaling: linear or yarn"),
        ({"yarn_orig_ctx": 4096}, "yarn_orig_ctx needs rope_scaling"),
        ({"rope_scaling": "yarn"}, "rope_scaling yarn needs rope_scale, such as 4"),
        ({"rope_scaling": "none", "rope_scale": 4}, "goes with rope_scaling linear or yarn"),
    ],
)
def test_half_a_rotary_scaling_is_refused(options: dict[str, object], complaint: str) -> None:
    assert complaint in _complaint(model="smollm2", **options)


def test_a_rotary_scaling_is_what_was_asked_for() -> None:
    options = {"model": "smollm2", "rope_scaling": "yarn", "rope_scale": "4"}
    assert load_config(options).stretch == Stretch("yarn", 4.0)
    assert load_config({"model": "smollm2"}).stretch is None


@pytest.mark.parametrize("options", [None, "smollm2", ["model", "smollm2"]])
def test_what_is_no_mapping_is_refused(options: object) -> None:
    """An empty `args:` in YAML is None."""
    with pytest.raises(ConfigError, match="a mapping of keys to values is expected"):
        load_config(options)


def test_a_key_that_is_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="8000: no such key"):
        load_config({"model": "smollm2", 8000: "port"})


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"model": "smollm2"}, "smollm2"),
        ({"model": "models/Llama-3.2-1B.Q4_1.gguf"}, "Llama-3.2-1B.Q4_1"),
        ({"model": "big-00001-of-00003.gguf"}, "big"),
        ({"model": "models/x.gguf", "model_name": "house-model"}, "house-model"),
    ],
)
def test_clients_ask_for_the_file_s_name_or_the_given_one(
    options: dict[str, str], name: str
) -> None:
    assert load_config(options).served_name == name


def test_a_configuration_cannot_change_after_it_was_checked() -> None:
    config = load_config({"model": "smollm2"})
    with pytest.raises(ValidationError):
        config.stages = 0


def test_every_option_is_described() -> None:
    """The command line's help is made of these."""
    assert [key for key, field in ServeConfig.model_fields.items() if not field.description] == []
