"""push and merge --push-to-hub, against a real HTTP server on loopback that a real huggingface_hub talks to."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import dora_convert

from .hubserver import run, start
from .toy import contents, edit_json, make_adapter, make_base

BASE_CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\n- de\npipeline_tag: text-generation\n---\n# the base\n"
SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base of three shards, a DoRA adapter, and both merged."""
    root = tmp_path_factory.mktemp("made")
    base = make_base(root / "base", shards=3)
    (base.path / "README.md").write_text(BASE_CARD)
    adapter = make_adapter(root / "adapter", base, dora=True)
    dora_convert.merge(base.path, adapter, root / "merged")
    return root


@pytest.fixture
def merged(made, tmp_path):
    """A merged checkpoint of three shards."""
    return shutil.copytree(made / "merged", tmp_path / "merged")


@pytest.fixture
def push(hub, tmp_path):
    """Run `dora-convert push` in a process of its own."""

    def call(*words, **environment):
        done = run(hub, tmp_path / "home", "push", *words, **environment)
        assert "hf_secret" not in done.stdout + done.stderr
        return done

    return call


def commits(hub, repo):
    return len(hub.state[repo].commits) - 1


@pytest.fixture
def merge(hub, made, tmp_path):
    """Run `dora-convert merge` of base and adapter in a process of its own."""

    def call(*words, **environment):
        return run(hub, tmp_path / "home", "merge", made / "base", made / "adapter", *words, **environment)

    return call


def test_push(hub, push, merged):
    """All files of the folder arrive in one commit; the folder stays as it was; the answer is the URL."""
    before = contents(merged)
    done = push(merged, "me/merged", "-q")
    assert (done.returncode, done.stdout) == (0, f"{hub.url}/me/merged\n"), done.stderr
    assert contents(hub.repos["me/merged"]) == contents(merged) == before
    assert commits(hub, "me/merged") == 1
    assert hub.created == [{"name": "merged", "organization": "me"}]
    assert {token for *_, token in hub.requests if token} == {"Bearer hf_secret"}


def test_report(hub, push, merged):
    """--json names repo, URL, commit, every file and the bytes; pushed again, nothing is new and there is no commit."""
    report = json.loads(push(merged, "me/merged", "--json").stdout)
    files = contents(merged)
    assert report["repo"] == "me/merged"
    assert report["commit"] == hub.state["me/merged"].commits[-1]
    assert {file["path"]: file["bytes"] for file in report["files"]} == {n: len(d) for n, d in files.items()}
    assert {file["state"] for file in report["files"]} == {"uploaded"}
    assert report["bytes_uploaded"] == sum(map(len, files.values()))
    again = json.loads(push(merged, "me/merged", "--json").stdout)
    assert {file["state"] for file in again["files"]} == {"unchanged"}
    assert (again["bytes_uploaded"], again["commit"]) == (0, report["commit"])
    assert commits(hub, "me/merged") == 1


def test_options(hub, push, merged):
    """--private, a name without an owner, --commit-message and --create-pr, which leaves the branch as it is."""
    assert push(merged, "alone", "--private", "--commit-message", "A message").returncode == 0
    assert hub.created == [{"name": "alone", "organization": "me", "visibility": "private"}]
    assert hub.messages == ["A message"]
    edit_json(merged / "config.json", extra=1)
    done = push(merged, "me/alone", "--create-pr", "-q")
    assert done.stdout == f"{hub.url}/me/alone/discussions/1\n", done.stderr
    assert commits(hub, "me/alone") == 1


def test_private_repos_that_are_public(hub, push, merged):
    """--private does not put a model into a public repo."""
    assert push(merged, "me/merged").returncode == 0
    done = push(merged, "me/merged", "--private")
    assert done.returncode == 2
    assert "me/merged exists and is public" in done.stderr


def test_dry_run(hub, push, merged):
    """--dry-run lists the files and asks the Hub nothing."""
    done = push(merged, "me/merged", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert {file["path"] for file in json.loads(done.stdout)["files"]} == contents(merged).keys()
    assert hub.requests == []


def killed(hub, tmp_path, pattern, *words):
    """Run a command and kill it while the server holds a request that matches."""
    fault = hub.fail(pattern, hold=True)
    process = start(hub, tmp_path / "home", *words)
    assert fault.reached.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    fault.released.set()


def test_killed_in_mid_upload(hub, push, merged, tmp_path):
    """Killed during the third file and run again: none goes up twice, and there is one commit."""
    hub.fail("PUT", hold=False, times=2)
    killed(hub, tmp_path, "PUT", "push", merged, "me/merged")
    assert len(hub.uploads) == 2
    assert commits(hub, "me/merged") == 0
    asked = hub.seen("objects/batch")
    done = push(merged, "me/merged", "--json")
    assert done.returncode == 0, done.stderr
    assert len(hub.uploads) == len(set(hub.uploads)) == 4  # three shards and the undo record
    assert hub.seen("objects/batch") - asked < 4  # the journal has what was up a moment before the end
    assert commits(hub, "me/merged") == 1
    assert contents(hub.repos["me/merged"]) == contents(merged)
    sizes = [file["bytes"] for file in json.loads(done.stdout)["files"]]
    assert 0 < json.loads(done.stdout)["bytes_uploaded"] < sum(sizes)


def test_killed_before_the_commit_and_after_it(hub, push, merged, tmp_path):
    """Killed when all is up: only the commit is left; when that is done, too: nothing is."""
    killed(hub, tmp_path, "POST .*/commit/", "push", merged, "me/merged")
    uploads = list(hub.uploads)
    assert push(merged, "me/merged").returncode == 0
    assert hub.uploads == uploads
    assert commits(hub, "me/merged") == 1
    assert push(merged, "me/merged", HF_HOME=str(tmp_path / "elsewhere")).returncode == 0
    assert hub.uploads == uploads
    assert commits(hub, "me/merged") == 1


def test_changed_between_two_runs(hub, push, merged, tmp_path):
    """The journal's entry of a file does not count once the file has changed."""
    killed(hub, tmp_path, "POST .*/commit/", "push", merged, "me/merged")
    (merged / "dora_convert/receipt.json").unlink()
    shard = merged / SHARDS[0]
    shard.write_bytes(shard.read_bytes()[:-2] + b"\1\2")
    assert push(merged, "me/merged").returncode == 0
    assert contents(hub.repos["me/merged"]) == contents(merged)


def test_objects_that_the_server_has_lost(hub, push, merged, tmp_path):
    """A commit that is refused for that clears the journal: the next run uploads again."""
    killed(hub, tmp_path, "POST .*/commit/", "push", merged, "me/merged")
    hub.blobs.clear()
    assert push(merged, "me/merged").returncode == 2
    assert push(merged, "me/merged").returncode == 0
    assert contents(hub.repos["me/merged"]) == contents(merged)


def test_folders_that_are_no_whole_model(hub, push, merged, tmp_path):
    """A missing shard, an unfinished output, no model at all, no folder: exit code 2, and no word to the Hub."""
    (tmp_path / "empty").mkdir()
    unfinished = tmp_path / "out.partial"
    merged.rename(unfinished)
    (unfinished / ".lock").touch()
    cases = [
        (unfinished, "is an unfinished output"),
        (tmp_path / "empty", "is empty"),
        (tmp_path / "absent", "does not exist"),
        (unfinished / SHARDS[0], "is a file"),
    ]
    for folder, message in cases:
        done = push(folder, "me/merged")
        assert done.returncode == 2
        assert message in done.stderr
    (unfinished / ".lock").unlink()
    (unfinished / SHARDS[1]).unlink()
    done = push(unfinished, "me/merged")
    assert (done.returncode, SHARDS[1] in done.stderr) == (2, True)
    assert hub.requests == []


def test_tensors_that_are_not_what_the_receipt_says(hub, push, merged):
    """One bit of a merged tensor: exit code 1 and its name, before anything is sent."""
    receipt = json.loads((merged / "dora_convert/receipt.json").read_text())
    table = json.loads((merged / "model.safetensors.index.json").read_text())["weight_map"]
    shard = merged / table[next(iter(receipt["tensors"]))]
    data = bytearray(shard.read_bytes())
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as file:
        last = list(file.offset_keys())[-1]
    data[-1] ^= 1
    shard.write_bytes(data)
    if last not in receipt["tensors"]:
        pytest.fail("the last tensor of this shard should be a merged one")
    done = push(merged, "me/merged")
    assert done.returncode == 1
    assert last in done.stderr
    assert hub.requests == []


def test_copied_tensors_that_are_not_what_the_receipt_says(hub, push, made, tmp_path):
    """An exact merge's receipt has the hashes of what no adapter touched, too."""
    dora_convert.merge(made / "base", made / "adapter", tmp_path / "exact", undo="exact")
    table = json.loads((tmp_path / "exact/model.safetensors.index.json").read_text())["weight_map"]
    shard = tmp_path / "exact" / table["model.norm.weight"]
    tensors = load_file(shard)
    tensors["model.norm.weight"][1] += 1
    save_file(tensors, shard, {"format": "pt"})
    done = push(tmp_path / "exact", "me/merged")
    assert done.returncode == 1
    assert "model.norm.weight" in done.stderr
    assert hub.requests == []


def test_adapters(hub, push, tmp_path):
    """An adapter goes up without what training left beside it; its card says whose adapter it is, never by a path."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    (adapter / "optimizer.pt").write_bytes(b"x")
    (adapter / "checkpoint-10").mkdir()
    (adapter / "checkpoint-10/adapter_model.safetensors").write_bytes(b"x")
    done = push(adapter, "me/adapter", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["left_behind"] == ["checkpoint-10/adapter_model.safetensors", "optimizer.pt"]
    there = contents(hub.repos["me/adapter"])
    assert there.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = ModelCard(there["README.md"].decode())
    assert card.data.library_name == "peft"
    assert card.data.base_model is None
    assert str(tmp_path) not in card.content
    assert push(adapter, "me/adapter", "--base-model", "org/base").returncode == 0
    card = ModelCard(contents(hub.repos["me/adapter"])["README.md"].decode())
    assert (card.data.base_model, card.data.base_model_relation) == ("org/base", "adapter")
    assert card.data.tags == ["dora", "dora-convert"]


def test_a_model_without_its_paths_can_be_unmerged(hub, push, tmp_path):
    """A path in config.json is left out of what goes up; the receipt that goes up vouches for no other config.json."""
    base = make_base(tmp_path / "base")
    edit_json(base.path / "config.json", _name_or_path="/home/me/base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    before = contents(tmp_path / "out")
    done = push(tmp_path / "out", "me/out")
    assert done.returncode == 0, done.stderr
    assert "config.json goes up without _name_or_path" in done.stderr
    assert contents(tmp_path / "out") == before
    dora_convert.unmerge(hub.repos["me/out"], adapter, tmp_path / "back")
    config = json.loads((base.path / "config.json").read_text())
    del config["_name_or_path"]
    assert json.loads((tmp_path / "back/config.json").read_text()) == config


def test_files_edited_since_the_merge(hub, push, merged):
    """They go up, and it is said that unmerge will not take them."""
    edit_json(merged / "config.json", extra=1)
    done = push(merged, "me/merged", "--dry-run")
    assert done.returncode == 0
    assert "edited since the merge" in done.stderr
    assert "config.json" in done.stderr


def test_base_that_an_adapter_names(hub, push, tmp_path):
    """It is on the card where the Hub has it."""
    base = make_base(tmp_path / "base")
    hub.repos["org/base"] = base.path
    for name, there in (("org/base", "org/base"), ("models/llama", None)):
        adapter = make_adapter(tmp_path / name.replace("/", "-"), base, dora=False, base_model_name_or_path=name)
        assert push(adapter, "me/adapter").returncode == 0
        card = ModelCard(contents(hub.repos["me/adapter"])["README.md"].decode())
        assert card.data.base_model == there


def test_readme_of_the_users(hub, push, merged):
    """A README that somebody wrote is kept: in the folder, and in the repo against a card; a card makes way."""
    card = (merged / "README.md").read_text()
    (merged / "README.md").write_text("mine\n")
    assert push(merged, "me/merged").returncode == 0
    assert contents(hub.repos["me/merged"])["README.md"] == b"mine\n"
    (merged / "README.md").write_text(card)
    assert push(merged, "me/merged").returncode == 0
    assert contents(hub.repos["me/merged"])["README.md"] == b"mine\n"
    (hub.repos["me/merged"] / "README.md").write_text(card)
    (merged / "README.md").write_text("mine again\n")
    assert push(merged, "me/merged").returncode == 0
    assert contents(hub.repos["me/merged"])["README.md"] == b"mine again\n"
    edited = card.replace("merged", "merged with care", 1)
    (hub.repos["me/merged"] / "README.md").write_text(edited)
    (merged / "README.md").write_text(card)
    assert push(merged, "me/merged").returncode == 0
    assert contents(hub.repos["me/merged"])["README.md"].decode() == edited


def test_stale_weights(hub, push, merged):
    """Weights that a loader would take for the model's are deleted in the same commit; other files stay."""
    assert push(merged, "me/merged").returncode == 0
    repo = hub.repos["me/merged"]
    for name in ("model.safetensors", "model-00004-of-00004.safetensors", "pytorch_model.bin", "notes.txt", "q4.gguf"):
        (repo / name).write_bytes(b"x")
    done = push(merged, "me/merged", "--json")
    assert done.returncode == 0, done.stderr
    stale = ["model-00004-of-00004.safetensors", "model.safetensors", "pytorch_model.bin"]
    assert json.loads(done.stdout)["deleted"] == stale
    assert contents(repo).keys() == {*contents(merged), "notes.txt", "q4.gguf"}
