"""What people type and mean: each error names the cause and what to type, and no option destroys what is not ours."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import dora_convert

from .toy import Base, contents, make_adapter, make_base, stopped

# --overwrite


def model(path):
    """A merge of ours."""
    base = make_base(path.with_name("for-" + path.name))
    dora_convert.merge(base.path, make_adapter(path.with_name("of-" + path.name), base, dora=True), path)


def lora(path):
    """An adapter of ours."""
    base = make_base(path.with_name("for-" + path.name))
    dora_convert.from_lora(base.path, make_adapter(path.with_name("of-" + path.name), base, dora=False), path)


def foreign_model(path):
    make_base(path)


def foreign_adapter(path):
    make_adapter(path, make_base(path.with_name("for-" + path.name)), dora=True)


def receipt_alone(path):
    """A folder of the same name as our record, and somebody's work."""
    path.mkdir()
    (path / "dora_convert").mkdir()
    (path / "dora_convert/notes.txt").write_text("x")
    (path / "thesis.tex").write_text("x")


def config_alone(path):
    path.mkdir()
    (path / "config.json").write_text("{}")


KINDS = {
    "a model of ours": model, "an adapter of ours": lora, "a model": foreign_model, "an adapter": foreign_adapter,
    "a folder of that name": receipt_alone, "a config": config_alone,
}  # fmt: skip


@pytest.mark.parametrize("there", KINDS)
@pytest.mark.parametrize("verb", ["merge", "from-lora"])
def test_overwrite_replaces_what_is_ours_and_of_its_kind(tmp_path, base, run, verb, there):
    """A model never takes an adapter's place, an adapter no model's, and nothing the place of what this tool did not write."""
    source, out = make_adapter(tmp_path / "lora", base, dora=False), tmp_path / "out"
    KINDS[there](out)
    before = contents(out)
    code, _, err = run(verb, base.path, source, out, "--overwrite")
    if there == {"merge": "a model of ours", "from-lora": "an adapter of ours"}[verb]:
        assert code == 0, err
        assert contents(out) != before
        return
    assert code == 2
    assert contents(out) == before
    assert str(out) in err
    assert "not replaced" in err


def test_an_empty_folder_may_be_replaced(tmp_path, base, adapter, run):
    """mkdir OUT before a merge is harmless."""
    (tmp_path / "out").mkdir()
    code, _, err = run("merge", base.path, adapter, tmp_path / "out", "--overwrite")
    assert code == 0, err


@pytest.mark.parametrize("last", [foreign_adapter, foreign_model, lora, model])
@pytest.mark.parametrize("options", [(), ("--overwrite",), ("--dry-run",)])
def test_out_was_forgotten(tmp_path, base, adapter, run, last, options):
    """The last word is an adapter or a base: did you forget OUT?"""
    last(tmp_path / "facts")
    before = contents(tmp_path)
    code, _, err = run("merge", base.path, adapter, tmp_path / "facts", *options)
    if last is model and "--overwrite" in options:
        assert code == 0
        return
    assert code == 2
    if last is not model:
        assert "forget OUT" in err
        assert "--overwrite" not in err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("verb", ["from-lora", "to-lora", "extract", "unmerge"])
def test_out_was_forgotten_elsewhere(tmp_path, base, run, verb):
    """BASE LORA and no OUT."""
    source = make_adapter(tmp_path / "lora", base, dora=False)
    options = ["--rank", "2"] if verb in ("to-lora", "extract") else []
    before = contents(tmp_path)
    code, _, err = run(verb, base.path, source, *options, "--overwrite")
    assert code == 2
    assert "OUT" in err
    assert contents(tmp_path) == before


# REF


@pytest.mark.parametrize(
    ("ref", "repo"),
    [
        ("https://huggingface.co/org/name", "org/name"),
        ("https://huggingface.co/org/name/", "org/name"),
        ("http://huggingface.co/org/name", "org/name"),
        ("https://www.huggingface.co/org/name", "org/name"),
        ("https://hf.co/org/name", "org/name"),
        ("huggingface.co/org/name", "org/name"),
        ("https://huggingface.co/org/name/tree/main", "org/name@main"),
        ("https://huggingface.co/org/name/tree/v2", "org/name@v2"),
        ("https://huggingface.co/org/name/tree/main/sub", "org/name@main/sub"),
        ("https://huggingface.co/org/name?library=transformers", "org/name"),
        ("https://huggingface.co/org/name#usage", "org/name"),
        ("https://huggingface.co/org/name/blob/main/config.json", "org/name@main"),
    ],
)
@pytest.mark.parametrize("verb", ["inspect", "merge"])
def test_page_addresses(tmp_path, adapter, run, ref, repo, verb):
    """The address of a model's page is the repo that it names: nothing but that the Hub cannot be reached is wrong."""
    words = ["inspect", ref] if verb == "inspect" else ["merge", ref, adapter, tmp_path / "out"]
    code, _, err = run(*words)
    assert code == 2
    assert repo.partition("@")[0] in err
    assert "does not exist" not in err
    assert "offline" in err.lower() or "HF_HUB_OFFLINE" in err or "reached" in err
    _, _, plain = run(*[word if word != ref else (f"hf://{repo}" if "/sub" in repo else repo) for word in words])
    assert err == plain


@pytest.mark.parametrize(
    ("ref", "says"),
    [
        ("https://huggingface.co/datasets/org/name", "dataset"),
        ("https://huggingface.co/spaces/org/name", "space"),
        ("https://huggingface.co/org", "org/name"),
        ("https://example.com/org/name", "huggingface.co"),
        ("https://github.com/org/name", "huggingface.co"),
        ("hf://x", "hf://org/name"),
        ("hf://", "hf://org/name"),
        ("hf:org/name", "hf://org/name"),
        ("org/name@", "revision"),
        ("hf://org/name@", "revision"),
        ("@v2", "org/name"),
        ("org/name@v2@v3", "revision"),
        ("ftp://host/model", "ftp"),
        ("file:///models/base", "file"),
        ("org\\name", "org/name"),
    ],
)
def test_refs_that_are_nearly_right(run, ref, says):
    """The cause and what to type, for what is nearly a REF."""
    code, _, err = run("inspect", ref)
    assert code == 2
    assert says in err
    assert "org/name" in err or "huggingface.co" in err or "path" in err
    assert "this is a bug" not in err


def test_offline_is_named(run):
    """Nothing is fetched where HF_HUB_OFFLINE says so: the variable is named, not the network."""
    code, _, err = run("inspect", "org/name")
    assert code == 2
    assert "HF_HUB_OFFLINE" in err
    assert "org/name" in err


@pytest.mark.parametrize(("word", "name"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_short_names_of_dtypes(tmp_path, base, adapter, run, word, name):
    """bf16, fp16 and fp32 are accepted, too, in Python and on the command line."""
    code, _, err = run("merge", base.path, adapter, tmp_path / "out", "--dtype", word)
    assert code == 0, err
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == name
    dora_convert.merge(base.path, adapter, tmp_path / "again", dtype=word)


@pytest.mark.parametrize("word", ["half", "int8", "fp8", "BF16 ", "torch.bfloat16x"])
def test_dtypes_that_are_none(tmp_path, base, adapter, run, word):
    code, _, err = run("merge", base.path, adapter, tmp_path / "out", "--dtype", word)
    assert code == 2
    assert "bfloat16" in err


@pytest.mark.parametrize(
    ("glob", "count"), [("k_proj", 2), ("mlp.up_proj", 2), ("*.k_proj", 2), ("*up_proj", 2), ("model.layers.0.*", 3)]
)
def test_include_by_the_end_of_a_name(tmp_path, base, adapter, run, glob, count):
    """--include k_proj means what PEFT's target_modules mean: a name, or the end of one."""
    code, out, err = run("merge", base.path, adapter, tmp_path / "out", "--include", glob, "--json")
    assert code == 0, err
    assert json.loads(out)["tensors"]["merged"] == count
    _, out, _ = run("merge", base.path, adapter, tmp_path / "less", "--exclude", glob, "--json")
    assert json.loads(out)["tensors"]["merged"] == 6 - count


@pytest.mark.parametrize("option", ["--include", "--exclude"])
@pytest.mark.parametrize("glob", ["q_prj", "*.o_proj", "proj", "model.layers.9.*"])
def test_globs_that_match_nothing(tmp_path, base, adapter, run, option, glob):
    """What matches no module is named, and so are the modules that there are; one that leaves nothing out is a warning."""
    code, _, err = run("merge", base.path, adapter, tmp_path / "out", option, glob)
    assert code == (2 if option == "--include" else 0)
    assert f"{option} {glob}" in err
    assert "k_proj" in err
    assert "up_proj" in err


# folders


def test_an_empty_folder(tmp_path, adapter, run):
    (tmp_path / "empty").mkdir()
    for words in (["inspect", tmp_path / "empty"], ["merge", tmp_path / "empty", adapter, tmp_path / "out"]):
        code, _, err = run(*words)
        assert code == 2
        assert "is empty" in err


@pytest.mark.parametrize("name", ["model.ckpt", "last.ckpt", "v1-5-pruned.ckpt"])
def test_a_folder_of_ckpt_files(tmp_path, adapter, run, name):
    """Which file it is, and how it becomes readable."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / name).write_bytes(b"x")
    code, _, err = run("merge", tmp_path / "old", adapter, tmp_path / "out")
    assert code == 2
    assert name in err
    assert "safetensors" in err
    assert "Hint" in err


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_out_is_a_file(tmp_path, base, adapter, run, options):
    """--overwrite is not proposed for what it does not replace."""
    (tmp_path / "out").write_text("x")
    code, _, err = run("merge", base.path, adapter, tmp_path / "out", *options)
    assert code == 2
    assert "is a file" in err
    assert "--overwrite" not in err
    assert (tmp_path / "out").read_text() == "x"


@pytest.mark.parametrize("verb", ["inspect", "push", "verify", "merge", "unmerge"])
def test_an_output_that_is_unfinished(tmp_path, base, adapter, run, verb):
    """X is asked for, and there is only X.partial: it is unfinished, and the command that began it resumes it."""
    with stopped():
        dora_convert.merge(base.path, adapter, tmp_path / "x", workers=1)
    words = {
        "inspect": ["inspect", tmp_path / "x"],
        "push": ["push", tmp_path / "x", "me/x"],
        "verify": ["verify", base.path, adapter, tmp_path / "x"],
        "merge": ["merge", tmp_path / "x", adapter, tmp_path / "y"],
        "unmerge": ["unmerge", tmp_path / "x", adapter, tmp_path / "y"],
    }[verb]
    code, _, err = run(*words)
    assert code == 2
    assert "x.partial" in err
    assert "unfinished" in err
    assert "same command" in err or "command that began it" in err


@pytest.mark.skipif(torch.cuda.is_available() or torch.version.cuda is not None, reason="needs a CPU build of torch")
def test_cuda_without_cuda(tmp_path, base, adapter, run):
    """A CPU build of torch finds no device on any machine: that is the cause, and installing another the way out."""
    code, _, err = run("merge", base.path, adapter, tmp_path / "out", "--device", "cuda")
    assert code == 2
    assert "CPU" in err
    assert "build" in err
    assert "pytorch.org" in err


def test_a_gpt2_adapter_on_a_llama(tmp_path, base, run):
    """Another architecture, not 24 wrong names: both are named."""
    torch.manual_seed(0)
    tensors = {f"transformer.h.{n}.attn.c_attn.weight": torch.randn(24, 72) for n in range(4)}
    gpt2 = Base(tmp_path / "gpt2", tensors)
    adapter = make_adapter(
        tmp_path / "adapter",
        gpt2,
        dora=False,
        targets=("c_attn",),
        base_model_name_or_path="openai-community/gpt2",
        fan_in_fan_out=True,
    )
    code, _, err = run("merge", base.path, adapter, tmp_path / "out")
    assert code == 2
    assert "gpt2" in err.lower()
    assert "llama" in err.lower()


@pytest.mark.parametrize("given", ["x", "X"])
def test_hints_are_commands(tmp_path, base, adapter, run, given):
    """A hint that is a command can be typed as it stands, for names with blanks, too."""
    folder = tmp_path / f"a b {given}"
    shutil.copytree(adapter, folder)
    code, _, err = run("merge", folder, base.path, tmp_path / "out")
    assert code == 2
    hint = next(line for line in err.splitlines() if line.startswith("Hint: "))
    assert f"'{folder}'" in hint


@pytest.mark.parametrize(("kept", "words"), [(0, "is empty"), (100, "truncated"), (-10, "truncated")])
def test_damaged_file_as_adapter(tmp_path, base, adapter, kept, words):
    """A damaged file is called damaged, not of an unknown format."""
    data = (adapter / "adapter_model.safetensors").read_bytes()
    (tmp_path / "lora.safetensors").write_bytes(data[:kept])
    with pytest.raises(dora_convert.MalformedError) as caught:
        dora_convert.merge(base.path, tmp_path / "lora.safetensors", tmp_path / "out")
    assert words in f"{caught.value} {caught.value.hint}"
