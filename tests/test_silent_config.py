"""Fields of a PEFT config that do not fit its tensors: PEFT passes over them without a word."""

from __future__ import annotations

import json

import pytest

FIELDS = {
    "rank_pattern": (
        {"rank_pattern": {"query": 8}},
        "rank_pattern of adapter has keys that match no module of it: query",
    ),
    "alpha_pattern": (
        {"alpha_pattern": {"layers.0.self_attn.k_proj": 16, "layers.9.self_attn.k_proj": 16}},
        "alpha_pattern of adapter has keys that match no module of it: layers.9.self_attn.k_proj",
    ),
    "target_modules": ({"target_modules": ["k_proj"]}, "modules of adapter have factors, but target_modules"),
    "a regex": ({"target_modules": r".*\.k_proj"}, "modules of adapter have factors, but target_modules"),
    "exclude_modules": ({"exclude_modules": ["k_proj"]}, "2 modules of adapter have factors, but target_modules"),
    "layers_to_transform": ({"layers_to_transform": [1]}, "modules of adapter have factors, but target_modules"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_config_that_does_not_fit_its_tensors_is_told(tmp_path, base, adapter, run, field):
    """PEFT ignores such keys, and such tensors; --quiet keeps warnings."""
    change, told = FIELDS[field]
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    code, printed, err = run("merge", base.path, adapter, tmp_path / "out", "--quiet")
    assert (code, printed) == (0, f"{tmp_path / 'out'}\n")
    assert told in err
    assert err.startswith("warning: ")
    assert err.count("\n") == 1


def test_a_config_that_fits_is_not_doubted(tmp_path, base, adapter, run):
    change = {
        "alpha_pattern": {"layers.0.self_attn.k_proj": 16},
        "layers_to_transform": [0, 1],
        "exclude_modules": ["lm_head"],
    }
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    assert run("merge", base.path, adapter, tmp_path / "out", "--quiet")[2] == ""
