"""What inspect says of adapters and checkpoints, from headers alone."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.cli import main

from .hubserver import COMMIT, Hub
from .hubserver import run as run_command
from .toy import (
    HIDDEN,
    VOCABULARY,
    contents,
    edit_json,
    make_adapter,
    make_base,
    write_json,
    write_shards,
)

DOWN = "model.layers.0.mlp.down_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def run(capsys):
    """Run `dora-convert inspect`; (exit code, stdout, stderr)."""

    def call(*words):
        with pytest.raises(SystemExit) as left:
            main(["inspect", *map(str, words)])
        found = capsys.readouterr()
        return left.value.code, found.out, found.err

    return call


def modules(report):
    return {module.target: module for module in report.modules}


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_dora(base, adapter):
    """A DoRA adapter: what it is, its numbers, and every module with rank, scaling and the rule that gave it."""
    report = dora_convert.inspect(adapter)
    assert isinstance(report, dora_convert.AdapterReport)
    assert (report.kind, report.format, report.method) == ("adapter", "peft", "DoRA")
    assert (report.base, report.revision, report.task) == ("base", None, "ForCausalLM")
    tensors = sum(tensor.numel() for tensor in load_file(adapter / "adapter_model.safetensors").values())
    assert (report.tensors, report.parameters, report.bytes) == (18, tensors, 4 * tensors)
    assert report.dtypes == {"F32": {"tensors": 18, "parameters": tensors, "bytes": 4 * tensors}}
    assert len(report.modules) == 6
    found = modules(report)[DOWN]
    assert (found.method, found.rank, found.scaling, found.rule) == ("DoRA", 4, 1.5, "alpha 6 / rank 4")
    assert found.kind == "model.layers.*.mlp.down_proj.weight"
    assert len(found.tensors) == 3
    assert report.refused is report.landing is None
    assert not report.faults
    assert not report.notes


def test_patterns_and_rslora(tmp_path, base):
    """rank_pattern, alpha_pattern and rsLoRA: the effective numbers of each module, and where they come from."""
    adapter = make_adapter(
        tmp_path / "lora", base, dora=False, rank=8, r=4, use_rslora=True,
        rank_pattern={"mlp.*": 8, "self_attn.*": 8}, alpha_pattern={"up_proj": 16},
    )  # fmt: skip
    report = dora_convert.inspect(adapter)
    found = modules(report)
    up, down = found["model.layers.1.mlp.up_proj.weight"], found[DOWN]
    assert (report.method, up.method, up.rank) == ("LoRA", "LoRA", 8)
    assert up.scaling == pytest.approx(16 / 8**0.5)
    assert up.rule == "alpha 16 (alpha_pattern 'up_proj') / √rank 8 (rank_pattern 'mlp.*')"
    assert down.scaling == pytest.approx(6 / 8**0.5)
    assert down.rule == "alpha 6 / √rank 8 (rank_pattern 'mlp.*')"


def test_all_that_an_adapter_can_hold(tmp_path, base):
    """Modules saved whole, trained rows, biases, and tensors of training."""
    prefix = "base_model.model"
    extra = {
        f"{prefix}.lm_head.weight": torch.ones(VOCABULARY, HIDDEN),
        f"{prefix}.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(3, HIDDEN),
        f"{prefix}.model.layers.0.mlp.up_proj.lora_B.bias": torch.ones(96),
        f"{prefix}.model.layers.0.mlp.up_proj.lora_velora_embed": torch.ones(4, dtype=torch.float16),
    }
    adapter = make_adapter(
        tmp_path / "lora", base, dora=False, extra=extra, modules_to_save=["lm_head"], lora_bias=True,
        trainable_token_indices={"embed_tokens": [1, 2, 5]},
    )  # fmt: skip
    report = dora_convert.inspect(adapter)
    found = modules(report)
    assert (found[HEAD].method, found[HEAD].shape) == ("whole", (VOCABULARY, HIDDEN))
    assert (found[EMBEDDING].method, found[EMBEDDING].rows) == ("rows", 3)
    bias = found["model.layers.0.mlp.up_proj.bias"]
    assert (bias.method, bias.scaling, bias.shape) == ("bias", 1.5, (96,))
    assert list(report.ignored.values()) == ["used in training only"]
    assert report.dtypes["F16"] == {"tensors": 1, "parameters": 4, "bytes": 8}


def test_landing(base, adapter):
    """With a base: the ledger of the plan, and what would become of the base's tensors."""
    landing = dora_convert.inspect(adapter, base.path).landing
    assert landing.fits
    assert landing.message is None
    assert landing.tensors["merged"] == 6
    assert len(landing.ledger) == 18
    assert all(entry["fate"] == "merged" for entry in landing.ledger)
    into = {tuple(entry["into"]) for entry in landing.ledger}
    assert (DOWN,) in into
    dry = dora_convert.merge(base.path, adapter, base.path.parent / "out", dry_run=True)
    assert landing.ledger == dry.ledger
    assert not landing.warnings


def test_landing_elsewhere(tmp_path, base, adapter):
    """A base it does not fit is an answer: what has no place there with the reason, and what has."""
    other = make_base(tmp_path / "other", layers=1)
    landing = dora_convert.inspect(adapter, other.path).landing
    assert not landing.fits
    assert len(landing.faults) == 9
    assert "no place in the base" in landing.message
    assert {entry["fate"] for entry in landing.ledger} == {"merged", "unmatched"}
    assert landing.warnings == ("adapter was trained on base; BASE is other",)


def test_landing_with_other_shapes(tmp_path, base, adapter):
    """Where shapes contradict the base, every fault is listed; there is no ledger."""
    wide = make_base(tmp_path / "wide")
    tensors = {
        name: torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 8) for name, tensor in wide.tensors.items()
    }
    write_shards(wide.path, tensors, 2)
    landing = dora_convert.inspect(adapter, wide.path).landing
    assert not landing.fits
    assert len(landing.faults) == 18
    assert not landing.ledger


def test_landing_in_a_quantised_base(base, adapter):
    """A base that is refused as a whole is an answer, too."""
    edit_json(base.path / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    landing = dora_convert.inspect(adapter, base.path).landing
    assert not landing.fits
    assert "quantised (gptq)" in landing.message


def test_faults_in_an_adapter(run, tmp_path, base):
    """An adapter that contradicts itself is described with its faults."""
    adapter = make_adapter(tmp_path / "odd", base, dora=True, use_dora=False)
    report = dora_convert.inspect(adapter)
    assert len(report.faults) == 6
    assert not report.modules
    code, out, _ = run(adapter)
    assert code == 0
    assert "would not be merged: 6 faults" in out
    assert "use_dora is not set" in out


def test_refused_methods_are_described(run, tmp_path, base):
    """Methods and fields that are not merged: said so with the reason, and all that can be told is told."""
    adapter = make_adapter(tmp_path / "moved", base, dora=False, init_lora_weights="corda")
    report = dora_convert.inspect(adapter, base.path)
    assert "does not merge" in report.refused["message"]
    assert "statistics" in report.refused["faults"][0]["why"]
    assert len(report.modules) == 6
    assert not report.landing.fits
    assert dora_convert.inspect(adapter, ignore_field=["init_lora_weights"]).refused is None
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    write_json(
        prompts / "adapter_config.json",
        {"peft_type": "PROMPT_TUNING", "base_model_name_or_path": "org/base"},
    )
    save_file({"prompt_embeddings": torch.zeros(8, HIDDEN)}, prompts / "adapter_model.safetensors")
    report = dora_convert.inspect(prompts)
    assert (report.method, report.base, report.tensors, report.modules) == (
        "PROMPT_TUNING",
        "org/base",
        1,
        (),
    )
    code, out, _ = run(prompts)
    assert code == 0
    assert "prompt_embeddings" in out
    assert "would not be merged: The adapter prompts is of peft_type 'PROMPT_TUNING'" in out


def test_an_adapter_beside_a_model(tmp_path, base, adapter):
    """A folder that is both: the adapter, and a note; naming one of its files decides."""
    write_shards(adapter, base.tensors, 1)
    report = dora_convert.inspect(adapter)
    assert report.kind == "adapter"
    assert report.notes == ("holds a model's weights, too: model.safetensors",)
    assert dora_convert.inspect(adapter / "model.safetensors").kind == "checkpoint"
    assert dora_convert.inspect(adapter / "adapter_model.safetensors").kind == "adapter"


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_sharded(base):
    """A sharded checkpoint: architecture, numbers, shards, index, what lies beside it."""
    (base.path / "pytorch_model.bin").write_bytes(b"stale")
    report = dora_convert.inspect(base.path)
    assert isinstance(report, dora_convert.CheckpointReport)
    assert (report.kind, report.format) == ("checkpoint", "safetensors")
    assert (report.architectures, report.model_type) == (("LlamaForCausalLM",), "llama")
    count = sum(tensor.numel() for tensor in base.tensors.values())
    assert (report.tensors, report.parameters, report.bytes) == (13, count, 2 * count)
    assert report.dtypes == {"BF16": {"tensors": 13, "parameters": count, "bytes": 2 * count}}
    assert report.index == "model.safetensors.index.json"
    assert [shard["tensors"] for shard in report.shards] == [7, 6]
    assert report.left_behind == ("pytorch_model.bin",)
    assert "config.json" in report.side_files
    assert report.tied is report.quantised is None
    assert report.merges == ()
    kinds = {found["kind"]: found for found in report.weights}
    assert kinds["model.layers.*.mlp.up_proj.weight"] == {
        "kind": "model.layers.*.mlp.up_proj.weight", "dtype": "BF16", "shape": (96, 40), "tensors": 2,
    }  # fmt: skip


def test_single_file(tmp_path):
    """A folder with one file, and the file itself."""
    base = make_base(tmp_path / "one", shards=1)
    for ref in (base.path, base.path / "model.safetensors"):
        report = dora_convert.inspect(ref)
        assert report.index is None
        assert [shard["file"] for shard in report.shards] == ["model.safetensors"]
        assert report.architectures == ("LlamaForCausalLM",)


def test_pickled_and_tied(tmp_path, base):
    """A torch pickle whose embedding and head share bytes: those count once."""
    folder = tmp_path / "old"
    folder.mkdir()
    tensors = dict(base.tensors)
    tensors[HEAD] = tensors[EMBEDDING]
    torch.save(tensors, folder / "pytorch_model.bin")
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    report = dora_convert.inspect(folder)
    assert report.format == "torch pickle"
    assert report.tied == {"embedding": EMBEDDING, "head": HEAD, "head_stored": True}
    distinct = sum(tensor.numel() for name, tensor in tensors.items() if name != HEAD)
    assert (report.tensors, report.parameters) == (13, distinct)


def test_tied_without_a_head(run, base):
    """A head that is not on disk is named."""
    tensors = {name: tensor for name, tensor in base.tensors.items() if name != HEAD}
    write_shards(base.path, tensors, 2)
    edit_json(base.path / "config.json", tie_word_embeddings=True)
    assert dora_convert.inspect(base.path).tied == {
        "embedding": EMBEDDING,
        "head": HEAD,
        "head_stored": False,
    }
    assert f"tied: {HEAD} is {EMBEDDING}, stored once" in run(base.path)[1]


@pytest.mark.parametrize(
    ("config", "method", "bits"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq", 4),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes", 8),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", 8),
        ({}, "unknown", None),
    ],
)
def test_quantised(run, base, config, method, bits):
    """How a checkpoint is quantised, from its config, nested ones included."""
    edit_json(base.path / "config.json", text_config={"quantization_config": config})
    report = dora_convert.inspect(base.path)
    assert report.quantised == {"method": method, "bits": bits, "tensor": None}
    assert f"quantised: {method}" in run(base.path)[1]


def test_quantised_without_saying(base):
    """Weights that look quantised where the config does not say so: which one, as a note."""
    tensors = base.tensors | {DOWN: torch.zeros(HIDDEN, 96, dtype=torch.float8_e4m3fn)}
    write_shards(base.path, tensors, 2)
    report = dora_convert.inspect(base.path)
    assert report.quantised == {"method": "unknown", "bits": None, "tensor": DOWN}
    assert report.notes == (f"{DOWN} looks quantised, but config.json does not say so",)
    assert report.dtypes["F8_E4M3"]["bytes"] == HIDDEN * 96


def test_merged(run, tmp_path, base, adapter):
    """An earlier merge's receipt: what was merged, how it can be undone; of merges on merges, each."""
    dora_convert.merge(base.path, adapter, tmp_path / "once")
    dora_convert.merge(tmp_path / "once", adapter, tmp_path / "twice", weight=[0.5], undo="none")
    last, first = dora_convert.inspect(tmp_path / "twice").merges
    assert (last["verb"], last["undo"], last["base"]["name"]) == ("merge", "none", "once")
    assert (first["undo"], first["tensors"]) == ("norms", {"merged": 6})
    assert first["versions"]["dora_convert"] == dora_convert.__version__
    assert [(found["name"], found["kind"], found["weight"]) for found in last["adapters"]] == [
        ("adapter", "DoRA", 0.5)
    ]
    out = run(tmp_path / "twice")[1]
    assert "adapter (DoRA, weight 0.5) into once; undo none" in out
    assert "adapter (DoRA) into base; undo norms" in out


def test_damaged_receipt(run, tmp_path, base):
    """A receipt that cannot be read hides nothing else; nor does one of another shape."""
    (base.path / "dora_convert").mkdir()
    receipt = base.path / "dora_convert/receipt.json"
    receipt.write_text("{")
    report = dora_convert.inspect(base.path)
    assert "cannot be read as JSON" in report.merges[0]["error"]
    assert "cannot be read as JSON" in run(base.path)[1]
    receipt.write_text('{"adapters": [1], "versions": [], "options": 3, "tensors": {"a": null}}')
    assert run(base.path)[0] == 0


def test_bases_without_config(base):
    """A checkpoint without config.json is one, with a note."""
    (base.path / "config.json").unlink()
    report = dora_convert.inspect(base.path)
    assert (report.architectures, report.model_type) == ((), None)
    assert "no config.json" in report.notes[0]


def test_an_empty_index(run, base):
    """An index that names nothing makes a checkpoint of nothing."""
    write_json(base.path / "model.safetensors.index.json", {"weight_map": {}})
    code, out, _ = run(base.path)
    assert code == 0
    assert "0 tensors" in out


def test_a_lone_adapter_file(tmp_path, adapter):
    """An adapter's tensors without its config: said so."""
    (adapter / "adapter_config.json").unlink()
    report = dora_convert.inspect(adapter / "adapter_model.safetensors")
    assert any("is an adapter's, but there is no adapter_config.json" in note for note in report.notes)


# --- the command line -------------------------------------------------------------------------------------------------


def test_adapter_table(run, base, adapter):
    """Layers are counted together, with what was decided in the last lines; -v lists each module."""
    code, out, err = run(adapter, "--base", base.path)
    assert (code, err) == (0, "")
    assert re.search(r"model\.layers\.\*\.mlp\.down_proj +2 +DoRA +4 +1\.5 +alpha 6 / rank", out)
    assert "merged: DoRA, rank 4, scaling 1.5" in out
    assert "adapter: adapter, DoRA in the peft format" in out
    assert f"fits {base.path}: 13 tensors, 6 merged, 0 replaced, 0 added, 7 copied" in out
    assert "model.layers.1.mlp.down_proj" in run(adapter, "-v")[1]


def test_checkpoint_table(run, base):
    """A checkpoint's tensors by kind; -v lists its shards."""
    code, out, err = run(base.path)
    assert (code, err) == (0, "")
    assert re.search(r"model\.layers\.\*\.mlp\.up_proj\.weight +2 +BF16 +96 × 40", out)
    assert "checkpoint: base, LlamaForCausalLM (llama)" in out
    assert "stored as safetensors: model.safetensors.index.json, 2 shards" in out
    assert "model-00001-of-00002.safetensors  7 tensors" in run(base.path, "-v")[1]


def test_misfit_is_an_answer(run, tmp_path, base, adapter):
    """Exit code 0; at most ten faults, all with -v and --json."""
    empty = make_base(tmp_path / "empty", layers=0)
    code, out, _ = run(adapter, "--base", empty.path)
    assert code == 0
    assert "does not fit" in out
    assert "… and 8 more" in out
    assert "more" not in run(adapter, "--base", empty.path, "-v")[1]
    landing = json.loads(run(adapter, "--base", empty.path, "--json")[1])["landing"]
    assert len(landing["faults"]) == 18
    assert {"what", "why"} == landing["faults"][0].keys()


def test_json(run, base, adapter):
    """--json: one document with the fields of the contract."""
    report = json.loads(run(adapter, "--base", base.path, "--json")[1])
    assert {
        "schema", "command", "version", "seconds", "kind", "format", "ref", "method", "base", "revision", "task", "tensors",
        "parameters", "bytes", "dtypes", "modules", "ignored", "faults", "refused", "landing", "notes",
    } <= report.keys()  # fmt: skip
    assert (report["schema"], report["command"], report["kind"]) == (1, "inspect", "adapter")
    assert {"target", "kind", "method", "rank", "scaling", "rule", "tensors"} <= report["modules"][0].keys()
    report = json.loads(run(base.path, "--json")[1])
    assert {
        "schema", "command", "version", "seconds", "kind", "format", "architectures", "model_type", "shards", "index",
        "tied", "quantised", "side_files", "left_behind", "merges", "weights",
    } <= report.keys()  # fmt: skip


def test_quiet(run, base, adapter):
    """--quiet: one line."""
    assert run(adapter, "-q") == (0, "adapter adapter\n", "")
    assert run(base.path, "-q") == (0, "checkpoint base\n", "")


def test_names_are_text(run, base):
    """Tensor names cannot colour the terminal, break its lines or be taken for rich's markup."""
    name = "model.[/red]\x1b[31m\nred"
    write_shards(base.path, base.tensors | {f"{name}.weight": torch.ones(3)}, 1)
    (base.path / "model.safetensors.index.json").unlink()
    code, out, err = run(base.path)
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert r"model.[/red]\x1b[31m\nred.weight" in out


def test_errors(run, tmp_path, base, adapter):
    """Neither adapter nor checkpoint, a folder of adapters, and damage: exit code 2 and a clear message."""
    (tmp_path / "empty").mkdir()
    many = tmp_path / "many"
    many.mkdir()
    make_adapter(many / "style", base, dora=False)
    torn = make_base(tmp_path / "torn", shards=1).path / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    bad = make_adapter(tmp_path / "bad", base, dora=False, lora_alpha="16")
    (adapter / "notes.txt").write_text("x")
    for words, message in [
        ([tmp_path / "empty"], "holds no safetensors weights"),
        ([many], "these folders inside it do: style"),
        ([torn], "truncated or has trailing bytes"),
        ([tmp_path / "torn"], "truncated or has trailing bytes"),
        ([bad], "lora_alpha must be"),
        ([tmp_path / "none"], "does not exist"),
        ([adapter / "notes.txt"], "no weight file that is read"),
        ([adapter, "--base", tmp_path / "empty"], "holds no safetensors weights"),
    ]:
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert message in err
        assert "Traceback" not in err
    assert json.loads(run(many, "--json")[2])["error"]["kind"] == "reference"


def test_base_for_a_checkpoint(run, base, adapter):
    """--base belongs to adapters; exchanged, the error has the command that was meant."""
    code, _, err = run(base.path, "--base", adapter)
    assert code == 2
    assert f"Hint: {shlex.join(['dora-convert', 'inspect', str(adapter), '--base', str(base.path)])}\n" in err


@pytest.mark.parametrize("words", [["{adapter}", "--base", "{base}"], ["{base}", "--json"], ["-h"]])
def test_nothing_heavy_is_imported(base, adapter, words):
    """Looking at headers does without torch."""
    command = ["inspect", *(word.format(base=base.path, adapter=adapter) for word in words)]
    code = f"""
import sys
from dora_convert.cli import main
try:
    main({command})
except SystemExit as left:
    assert not left.code, left.code
heavy = {{"torch", "safetensors", "huggingface_hub", "transformers", "peft", "numpy"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_inspecting_changes_nothing(run, tmp_path, base, adapter):
    """No file is written, neither beside the inputs nor in them."""
    before = contents(tmp_path)
    run(adapter, "--base", base.path)
    run(base.path)
    assert contents(tmp_path) == before


# --- the Hub ----------------------------------------------------------------------------------------------------------

MOST = 8192
"""Bytes that are asked for of a weight file without an index; of others, what the index lets expect."""


@pytest.fixture
def hub(tmp_path):
    """A Hub with a base in shards that are larger than their headers, its merged copy, and adapters."""
    root = tmp_path / "hub"
    root.mkdir()
    base = make_base(root / "base", shards=1)
    (base.path / "model.safetensors").unlink()
    base.tensors[EMBEDDING] = torch.ones(4000, HIDDEN, dtype=torch.bfloat16)
    base.tensors[HEAD] = torch.ones(4000, HIDDEN, dtype=torch.bfloat16)
    write_shards(base.path, base.tensors, 2)
    (base.path / "pytorch_model.bin").write_bytes(b"x" * 300_000)
    adapter = make_adapter(root / "adapter", base, dora=True, base_model_name_or_path="org/base")
    (adapter / "model.safetensors").write_bytes(b"x" * 300_000)
    (root / "many").mkdir()
    make_adapter(root / "many" / "style", base, dora=False)
    single = make_base(root / "single", shards=1)
    save_file({EMBEDDING: torch.ones(8000, HIDDEN)}, single.path / "model.safetensors")
    (single.path / "config.json").unlink()
    old = root / "old"
    old.mkdir()
    torch.save(base.tensors, old / "pytorch_model.bin")
    write_json(old / "config.json", {"model_type": "llama"})
    repos = {"org/base": base.path, "me/adapter": adapter, "me/many": root / "many", "org/old": old,
             "org/single": single.path}  # fmt: skip
    server = Hub(repos, root)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def remote(hub, tmp_path):
    """Run `dora-convert` in a process of its own, which reads its environment once; (exit code, stdout, stderr)."""

    def call(*words, **environment):
        done = run_command(hub, tmp_path / "cache", *words, **{"HF_TOKEN": "", **environment})
        return done.returncode, done.stdout, done.stderr

    return call


def weights_sent(hub):
    """Bytes that were sent of every weight file."""
    found = {}
    for name, size in hub.sent:
        if name.endswith((".safetensors", ".bin")):
            found[name] = found.get(name, 0) + size
    return found


def test_remote_checkpoint(hub, remote, tmp_path):
    """A checkpoint on the Hub: the same report as of its folder, from the head of each shard."""
    code, out, err = remote("inspect", "org/base", "--json")
    assert code == 0, err
    sent = weights_sent(hub)
    assert sent.keys() == {f"org/base/model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert max(sent.values()) < 2000
    assert len(hub.sent) == 4  # config, index, and each header at once
    assert not any(path.suffix == ".safetensors" for path in (tmp_path / "cache").rglob("*"))
    far, near = json.loads(out), json.loads(remote("inspect", hub.repos["org/base"], "--json")[1])
    assert (far["repo"], far["commit"]) == ("org/base", COMMIT["main"])
    assert far["ref"] == far["title"] == f"org/base@{COMMIT['main']}"
    differ = {name for name in near if near[name] != far[name]} - {"seconds"}
    assert differ == {"title", "ref", "repo", "commit"}


def test_remote_single_file(hub, remote, tmp_path):
    """Without a config and an index: the one weight file's head, and no more of it."""
    code, out, err = remote("inspect", "org/single@v2", "--json")
    assert code == 0, err
    assert json.loads(out)["parameters"] == 8000 * HIDDEN
    assert weights_sent(hub) == {"org/single/model.safetensors": MOST}


def test_remote_long_header(hub, remote):
    """A header of more than 100 kB comes by a second request, of its length."""
    path = hub.repos["org/single"] / "model.safetensors"
    save_file({f"model.layers.{n}.weight": torch.ones(400) for n in range(2000)}, path)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    code, out, err = remote("inspect", "org/single", "--json")
    assert code == 0, err
    assert json.loads(out)["tensors"] == 2000
    assert weights_sent(hub) == {"org/single/model.safetensors": 8 + length}


def test_remote_merge(hub, remote, tmp_path):
    """The receipt of a merged model on the Hub."""
    dora_convert.merge(hub.repos["org/base"], hub.repos["me/adapter"], tmp_path / "merged")
    hub.repos["org/merged"] = tmp_path / "merged"
    code, out, err = remote("inspect", "org/merged", "--json")
    assert code == 0, err
    assert [found["kind"] for found in json.loads(out)["merges"][0]["adapters"]] == ["DoRA"]


def test_remote_adapter_and_base(hub, remote, tmp_path):
    """An adapter is small and comes whole, but for a model beside it; of its base there come headers."""
    code, out, err = remote("inspect", "me/adapter", "--base", "org/base@v2", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["notes"] == ["holds a model's weights, too: model.safetensors"]
    assert report["landing"]["fits"]
    assert report["landing"]["base"] == f"org/base@{COMMIT['v2']}"
    sent = weights_sent(hub)
    assert sent.keys() == {
        "me/adapter/adapter_model.safetensors",
        *(f"org/base/model-0000{n}-of-00002.safetensors" for n in (1, 2)),
    }
    assert all(size < 2000 for name, size in sent.items() if name.startswith("org/base"))
    local = dora_convert.inspect(hub.repos["me/adapter"], hub.repos["org/base"]).to_dict()
    assert report["landing"]["ledger"] == json.loads(json.dumps(local["landing"]["ledger"]))


def test_remote_subfolders(hub, remote):
    """A repo of adapters lists them; one of them is named with its folder."""
    code, _, err = remote("inspect", "me/many")
    assert code == 2
    assert "these folders inside it do: style" in err
    assert "Hint: name one of them, such as hf://me/many/style" in err
    assert weights_sent(hub) == {}
    code, out, err = remote("inspect", "hf://me/many/style", "-q")
    assert (code, out) == (0, f"adapter hf://me/many@{COMMIT['main']}/style\n"), err


def test_remote_pickles(hub, remote, tmp_path):
    """Torch's pickles are not read from afar; a copy in the cache is."""
    code, _, err = remote("inspect", "org/old")
    assert code == 2
    assert "Hint: hf download org/old" in err
    assert weights_sent(hub) == {}
    assert remote("merge", "org/old", "me/adapter", tmp_path / "out")[0] == 0
    code, out, err = remote("inspect", "org/old", "--json")
    assert code == 0, err
    assert json.loads(out)["format"] == "torch pickle"


def test_offline(hub, remote, tmp_path):
    """Without a connection, the cached copy counts; where there is none, that is said."""
    assert remote("merge", "org/base", "me/adapter", tmp_path / "out")[0] == 0
    for ref in ("org/base", "me/adapter"):
        code, out, err = remote("inspect", ref, "-q", HF_HUB_OFFLINE="1")
        assert (code, out.split()[1]) == (0, f"{ref}@{COMMIT['main']}"), err
    code, _, err = remote("inspect", "org/single", HF_HUB_OFFLINE="1")
    assert code == 2
    assert "the Hub cannot be reached" in err


def test_remote_damage(hub, remote):
    """Missing repos and shards, indexes that are wrong, headers that are none: exit code 2 and a message."""
    assert "neither a local path nor a repo" in remote("inspect", "org/none")[2]
    shard = hub.repos["org/base"] / "model-00002-of-00002.safetensors"
    data, index = shard.read_bytes(), hub.repos["org/base"] / "model.safetensors.index.json"
    for damage in (
        b"",
        b"\xff" * 300,
        (100).to_bytes(8, "little") + b"[" * 100,
        (2).to_bytes(8, "little") + b"[]",
        data.replace(b'"BF16"', b'"BF17"'),
        data.replace(b'"shape":[', b'"shape":[7,'),
        data.replace(b'"shape":[', b'"shape":["'),
    ):
        shard.write_bytes(damage)
        code, _, err = remote("inspect", "org/base")
        assert code == 2
        assert "the header of model-00002-of-00002.safetensors is damaged" in err
    shard.unlink()
    assert "names 1 files that are not there" in remote("inspect", "org/base")[2]
    shard.write_bytes(data)
    table = json.loads(index.read_text())["weight_map"] | {"model.more.weight": shard.name}
    edit_json(index, weight_map=table)
    (Path(index.parent) / "README.md").write_text("another commit")
    code, _, err = remote("inspect", "org/base@v2")
    assert code == 2
    assert "is wrong about 1 tensors" in err


def test_remote_token(hub, remote):
    """--token goes to the Hub, with range requests, too, and nowhere else."""
    code, out, err = remote("inspect", "org/base", "--token", "hf_secret", "-v")
    assert code == 0
    assert "hf_secret" not in out + err
    assert {token for _, path, token in hub.requests if "/base" in path} == {"Bearer hf_secret"}
