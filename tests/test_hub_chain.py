"""Chains of adapters on the Hub: one names another's repo as its base."""

from __future__ import annotations

import json

from .hubserver import COMMIT
from .test_hub import hub, merge  # noqa: F401
from .toy import contents, make_adapter, make_base


def test_a_chain_of_repos(hub, tmp_path):
    """An adapter whose base is another adapter's repo: named with it, the chain is said; alone, it is followed."""
    root = hub.repos["org/base"].parent
    base = make_base(tmp_path / "base")
    sft = make_adapter(root / "sft", base, dora=True, seed=2, base_model_name_or_path="org/base")
    dpo = make_adapter(root / "dpo", base, dora=True, seed=3, base_model_name_or_path="me/sft")
    hub.repos |= {"me/sft": sft, "me/dpo": dpo}
    summed = merge(hub, tmp_path, "org/base", "me/sft", "me/dpo", tmp_path / "sum")
    assert summed.returncode == 0, summed.stderr
    assert "--method chain" in summed.stderr
    mixed = merge(hub, tmp_path, "org/base", "me/sft", dpo, tmp_path / "mixed")
    assert "--method chain" in mixed.stderr
    done = merge(hub, tmp_path, "me/dpo", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["method"], report["base"]) == ("chain", f"org/base@{COMMIT['main']}")
    assert [name.partition("@")[0] for name in report["adapters"]] == ["me/sft", "me/dpo"]
    near = merge(hub, tmp_path, hub.repos["org/base"], sft, dpo, tmp_path / "near", "--method", "chain")
    assert near.returncode == 0, near.stderr
    remote, local = contents(tmp_path / "out"), contents(tmp_path / "near")
    assert all(remote[name] == local[name] for name in local if name.endswith(".safetensors"))
