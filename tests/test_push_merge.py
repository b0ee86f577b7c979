"""merge --push-to-hub: beside OUT, and from Hub to Hub with nothing kept here."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard

import dora_convert

from .hubserver import run
from .test_push import SHARDS, commits, killed, made, merge  # noqa: F401 - fixtures
from .toy import Base, contents, edit_json, make_adapter, make_base


def test_merge_to_the_hub(hub, merge, made, tmp_path):
    """OUT is what it is without; the repo holds the same; shards went up before the commit; the report has the URL."""
    out = tmp_path / "out"
    done = merge(out, "--push-to-hub", "me/merged", "--private", "--json")
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(made / "merged")
    assert contents(hub.repos["me/merged"]) == contents(out)
    assert commits(hub, "me/merged") == 1
    assert len(hub.uploads) == 4
    order = [path for method, path, _ in hub.requests if method == "PUT" or "/commit/" in path]
    assert "/commit/" in order[-1]
    pushed = json.loads(done.stdout)["pushed"]
    assert (pushed["repo"], pushed["url"]) == ("me/merged", f"{hub.url}/me/merged")
    assert pushed["bytes_uploaded"] == sum(map(len, contents(out).values()))
    assert hub.state["me/merged"].private


def test_merge_killed_in_mid_upload(hub, merge, made, tmp_path):
    """Killed while its second shard goes up and run again: no shard twice, one commit, the same OUT."""
    out = tmp_path / "out"
    hub.fail("PUT")
    killed(hub, tmp_path, "PUT", "merge", made / "base", made / "adapter", out, "--push-to-hub", "me/merged")
    assert not out.exists()
    assert commits(hub, "me/merged") == 0
    done = merge(out, "--push-to-hub", "me/merged")
    assert done.returncode == 0, done.stderr
    assert len(hub.uploads) == len(set(hub.uploads)) == 4
    assert commits(hub, "me/merged") == 1
    assert contents(out) == contents(hub.repos["me/merged"]) == contents(made / "merged")


def test_merge_that_the_hub_refuses(hub, merge, made, tmp_path):
    """No room on the Hub: no OUT and no commit, and the same command without the push has the merge at once."""
    out = tmp_path / "out"
    hub.fail("objects/batch", 402, message="storage is full")
    done = merge(out, "--push-to-hub", "me/merged")
    assert done.returncode == 2
    assert "storage is full" in done.stderr
    assert not out.exists()
    assert commits(hub, "me/merged") == 0
    done = merge(out, "--json")
    assert json.loads(done.stdout)["resumed"], done.stderr
    assert contents(out) == contents(made / "merged")


def test_options_without_a_repo(merge, tmp_path):
    """--private and its siblings go with --push-to-hub."""
    for words in (["--private"], ["--create-pr"], ["--commit-message", "text"]):
        done = merge(tmp_path / "out", *words)
        assert (done.returncode, f"{words[0]} goes with --push-to-hub" in done.stderr) == (2, True)


def test_card(made):
    """Licence and languages are the base's, the pipeline its architecture's; with command, check and the way back."""
    card = ModelCard.load(made / "merged/README.md")
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "language": ["en", "de"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dora", "merged", "dora-convert"],
    }
    assert "dora-convert merge base adapter OUT" in card.text
    assert "dora-convert unmerge MERGED adapter OUT" in card.text
    assert "| wrong | 0 |" in card.text
    assert str(made) not in card.content


@pytest.fixture
def far(hub, made):
    """Base and adapter on the Hub, too."""
    hub.repos |= {"org/base": made / "base", "me/adapter": made / "adapter"}
    return ("merge", "org/base", "me/adapter", "--push-to-hub", "me/merged", "--no-local")


def same_weights(hub, made):
    """Return True if the pushed repo has the files and bytes of the local merge, apart from the inputs' names."""
    there, here = contents(hub.repos["me/merged"]), contents(made / "merged")
    named = {"README.md", "dora_convert/receipt.json"}
    return there.keys() == here.keys() and all(there[name] == here[name] for name in here.keys() - named)


def weights_on_disk(tmp_path):
    return [path for path in (tmp_path / "home").rglob("*.safetensors") if path.name != "adapter_model.safetensors"]


def test_hub_to_hub(hub, far, made, tmp_path):
    """--no-local: the repo holds what a local merge writes, in one commit, and no weights stay on this machine."""
    done = run(hub, tmp_path / "home", *far, "--json")
    assert done.returncode == 0, done.stderr
    assert same_weights(hub, made)
    assert commits(hub, "me/merged") == 1
    assert weights_on_disk(tmp_path) == []
    report = json.loads(done.stdout)
    assert report["out"] == report["pushed"]["url"] == f"{hub.url}/me/merged"
    card = ModelCard(contents(hub.repos["me/merged"])["README.md"].decode())
    assert (card.data.base_model, card.data.base_model_relation) == ("org/base", "finetune")
    assert f"dora-convert merge org/base@{'a' * 40} me/adapter@{'a' * 40} OUT" in card.text


@pytest.mark.parametrize("pattern", ["PUT", "POST .*/commit/", "GET /org/base/resolve/.*model-00003"])
def test_hub_to_hub_killed(hub, far, made, tmp_path, pattern):
    """Killed in an upload, in the commit or in a download and run again: no shard twice, one commit, the same bytes."""
    if pattern == "PUT":
        hub.fail("PUT", times=2)
    killed(hub, tmp_path, pattern, *far)
    done = run(hub, tmp_path / "home", *far, "-q")
    assert (done.returncode, done.stdout) == (0, f"{hub.url}/me/merged\n"), done.stderr
    assert len(hub.uploads) == len(set(hub.uploads))
    assert commits(hub, "me/merged") == 1
    assert same_weights(hub, made)
    assert weights_on_disk(tmp_path) == []


def test_hub_to_hub_when_the_server_loses_objects(hub, far, made, tmp_path):
    """Uploaded shards that the Hub lost are merged again, because the local shards are hollow by then."""
    killed(hub, tmp_path, "POST .*/commit/", *far)
    hub.blobs.clear()
    assert run(hub, tmp_path / "home", *far).returncode == 2
    assert run(hub, tmp_path / "home", *far).returncode == 0
    assert same_weights(hub, made)


def test_from_here_to_the_hub_alone(hub, merge, made, tmp_path):
    """A local base with --no-local; OUT, or no repo, are errors."""
    done = merge("--push-to-hub", "me/merged", "--no-local")
    assert done.returncode == 0, done.stderr
    assert contents(hub.repos["me/merged"]) == contents(made / "merged")
    assert "goes with --push-to-hub" in merge("--no-local").stderr
    with pytest.raises(dora_convert.UsageError, match="no_local=True takes no OUT"):
        dora_convert.merge(made / "base", made / "adapter", tmp_path / "x", push_to_hub="me/m", no_local=True)
    with pytest.raises(dora_convert.UsageError, match="merge needs OUT"):
        dora_convert.merge(made / "base", made / "adapter", None)


def test_layers_left_out(hub, tmp_path):
    """With --no-local, each of the base's files comes once, and stays until the record holds its left-out tensors."""
    base = make_base(tmp_path / "base", shards=3, layers=3)
    two = Base(base.path, {name: tensor for name, tensor in base.tensors.items() if ".2." not in name})
    adapter = make_adapter(tmp_path / "adapter", two, dora=True, layer_replication=[[0, 1], [0, 1]])
    hub.repos |= {"org/base": base.path}
    words = ("org/base", adapter, tmp_path / "out", "--no-cache", "--undo", "exact", "--workers", "1")
    done = run(hub, tmp_path / "home", "merge", *words)
    assert done.returncode == 0, done.stderr
    assert [hub.seen(f"GET /org/base/resolve/.*{shard}") for shard in SHARDS] == [2, 2, 2]  # header, file
    dora_convert.unmerge(tmp_path / "out", adapter, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(base.path)


def test_unmerge_what_was_pushed(hub, far, made, tmp_path):
    """A dry run of unmerge reads headers only and names no file; the base comes back bit for bit from the repo."""
    assert run(hub, tmp_path / "home", *far, "--undo", "exact").returncode == 0
    hub.requests.clear()
    words = ("unmerge", "me/merged", "me/adapter", tmp_path / "again")
    done = run(hub, tmp_path / "other", *words, "--dry-run", "-q")
    assert done.returncode == 0, done.stderr
    assert [hub.seen(f"GET .*{shard}") for shard in SHARDS] == [1, 1, 1]
    assert not any("model-0000" in path.name for path in (tmp_path / "other").rglob("*"))
    done = run(hub, tmp_path / "other", *words, "--base", "org/base", "--json")
    assert done.returncode == 0, done.stderr
    assert "--base is not read" in done.stderr
    assert contents(tmp_path / "again") == contents(made / "base")
    assert [hub.seen(f"GET /org/base/.*{shard}") for shard in SHARDS] == [1, 1, 1]  # headers


def test_dry_run_of_hub_to_hub(hub, far, tmp_path):
    """It names the repo that the output would go to, and does not create it."""
    done = run(hub, tmp_path / "home", *far, "--dry-run", "-q")
    assert (done.returncode, done.stdout) == (0, "me/merged\n"), done.stderr
    assert hub.created == []


def test_card_of_a_single_file(hub, tmp_path):
    """A base that is one file: the repo's card has the base's id, which OUT's files do not say, and the checks."""
    base = make_base(tmp_path / "base", shards=1)
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    words = (base.path / "model.safetensors", adapter, tmp_path / "out", "--base-model", "org/base")
    done = run(hub, tmp_path / "home", "merge", *words, "--push-to-hub", "me/merged")
    assert done.returncode == 0, done.stderr
    card = ModelCard(contents(hub.repos["me/merged"])["README.md"].decode())
    assert card.data.base_model == "org/base"
    assert "| wrong | 0 |" in card.text


@pytest.mark.parametrize(
    "words",
    [("to-lora", "base", "adapter", "--rank", "3"), ("extract", "base", "merged", "--rank", "3", "--kind", "lora")],
    ids=lambda words: words[0],
)
def test_adapters_that_are_made_go_up(hub, made, tmp_path, words):
    """--push-to-hub with verbs that write adapters: the repo holds what OUT holds."""
    verb, *refs = words[:3]
    inputs = [made / ref for ref in refs]
    call = (verb, *inputs, tmp_path / "out", *words[3:], "--push-to-hub", "me/made", "--json")
    done = run(hub, tmp_path / "home", *call)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pushed"]["repo"] == "me/made"
    assert contents(hub.repos["me/made"]) == contents(tmp_path / "out")


@pytest.mark.parametrize("options", [(), ("--no-local",)])
def test_paths_in_a_streamed_upload(hub, tmp_path, options):
    """A path in the base's config stays in OUT, and is left out of what goes up; the upload says so."""
    base = make_base(tmp_path / "base", shards=2)
    edit_json(base.path / "config.json", _name_or_path="/home/me/base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    out = () if options else (tmp_path / "out",)
    done = run(hub, tmp_path / "home", "merge", base.path, adapter, *out, "--push-to-hub", "me/m", *options)
    assert done.returncode == 0, done.stderr
    assert "config.json goes up without _name_or_path" in done.stderr
    assert not [name for name, data in contents(hub.repos["me/m"]).items() if b"/home/me" in data]
    if out:
        assert (tmp_path / "out/config.json").read_bytes() == (base.path / "config.json").read_bytes()


def test_an_adapter_that_cannot_be_uploaded(hub, tmp_path):
    """It is refused before anything is computed; with the base's repo id it goes up."""
    base = make_base(tmp_path / "base")
    lora = make_adapter(tmp_path / "lora", base, dora=False, base_model_name_or_path="/home/me/base")
    words = ["from-lora", base.path, lora, tmp_path / "out", "--push-to-hub", "me/dora"]
    done = run(hub, tmp_path / "home", *words)
    assert done.returncode == 2
    assert "/home/me/base" in done.stderr
    assert "--base-model" in done.stderr
    assert not (tmp_path / "out").exists()
    assert run(hub, tmp_path / "home", *words, "--base-model", "org/base").returncode == 0
    there = contents(hub.repos["me/dora"])
    assert json.loads(there["adapter_config.json"])["base_model_name_or_path"] == "org/base"
