"""What changes while it is read, or after it was written: never a mixture, never restored or pushed unnoticed."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.errors import DoraConvertError

from .toy import VOCABULARY, contents, edit_json, make_adapter, stopped

SHARD = "model-00002-of-00002.safetensors"


def other_tensors(path):
    """The same file with other numbers: header and size stay."""
    tensors = {name: tensor + 1 for name, tensor in load_file(path).items()}
    save_file(tensors, path.with_name("new"), {"format": "pt"})
    return path.with_name("new")


def renamed(path):
    """Replaced by rename, as a download or an editor does."""
    other_tensors(path).rename(path)


def like_rsync(path):
    """Replaced with the same time, as rsync -t and cp -p do."""
    before, new = path.stat(), other_tensors(path)
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.rename(path)


def rewritten(path):
    """Written over, with the time set back."""
    before, new = path.stat(), other_tensors(path)
    path.write_bytes(new.read_bytes())
    new.unlink()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def edited(path):
    """A text of the same size."""
    path.write_bytes(path.read_bytes().replace(b"128", b"129").replace(b'"lora_alpha": 6', b'"lora_alpha": 7'))


CHANGES = {
    "base renamed": ("base/" + SHARD, renamed),
    "base like rsync": ("base/" + SHARD, like_rsync),
    "base rewritten": ("base/" + SHARD, rewritten),
    "adapter renamed": ("adapter/adapter_model.safetensors", renamed),
    "adapter rewritten": ("adapter/adapter_model.safetensors", rewritten),
    "config of the adapter": ("adapter/adapter_config.json", edited),
    "side file": ("base/tokenizer_config.json", edited),
}


def once(act, path):
    """A progress callback that does something when it is first called."""
    done = []

    def progress(*_):
        if not done:
            done.append(act(path))

    return progress


def refused(error, path):
    """The message names the file, says that it changed, and does not blame the disk."""
    text = error.text() + (error.hint or "")
    assert path.name in text
    assert "chang" in text
    assert "disk" not in text
    assert "memory" not in text


@pytest.mark.parametrize("change", CHANGES)
def test_inputs_that_change_while_they_are_merged(tmp_path, base, adapter, change):
    """Nothing is published, the file is named, and the same command then merges what is there now."""
    name, act = CHANGES[change]
    path = tmp_path / name
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.merge(base.path, adapter, tmp_path / "out", on_progress=once(act, path), workers=1)
    refused(caught.value, path)
    assert not (tmp_path / "out").exists()
    dora_convert.merge(base.path, adapter, tmp_path / "fresh")
    try:
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    except DoraConvertError as error:
        assert "overwrite=True" in (error.hint or "")  # noqa: PT017 - an error is allowed, not wanted
        dora_convert.merge(base.path, adapter, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("act", [renamed, like_rsync, rewritten])
@pytest.mark.parametrize("verb", ["from_lora", "to_lora", "extract", "unmerge", "verify"])
def test_other_verbs(tmp_path, base, verb, act):
    """Adapters made of a base that changes meanwhile, and bases recovered or compared: refused in the same way."""
    lora = make_adapter(tmp_path / "lora", base, dora=False)
    dora_convert.merge(base.path, lora, tmp_path / "merged")
    path = (tmp_path / "merged" if verb == "unmerge" else base.path) / SHARD
    progress, out = once(act, path), tmp_path / "out"
    with pytest.raises(DoraConvertError) as caught:  # noqa: PT012
        if verb == "from_lora":
            dora_convert.from_lora(base.path, lora, out, on_progress=progress, workers=1)
        elif verb == "to_lora":
            dora_convert.to_lora(base.path, lora, out, rank=2, on_progress=progress, workers=1)
        elif verb == "extract":
            dora_convert.extract(base.path, tmp_path / "merged", out, rank=2, on_progress=progress, workers=1)
        elif verb == "verify":
            dora_convert.verify(base.path, lora, tmp_path / "merged", on_progress=progress, workers=1)
        else:
            dora_convert.unmerge(tmp_path / "merged", lora, out, on_progress=progress, workers=1)
    refused(caught.value, path)
    assert not out.exists()


@pytest.mark.parametrize("act", [renamed, like_rsync, rewritten])
@pytest.mark.parametrize("file", [SHARD, "model-00001-of-00002.safetensors"])
def test_a_base_replaced_between_two_runs(tmp_path, base, adapter, act, file):
    """An interrupted merge is not continued with another base, though its size and time are the same."""
    with stopped():
        dora_convert.merge(base.path, adapter, tmp_path / "out", workers=1)
    act(base.path / file)
    dora_convert.merge(base.path, adapter, tmp_path / "fresh")
    try:
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    except DoraConvertError as error:
        assert "overwrite=True" in (error.hint or "")  # noqa: PT017 - an error is allowed, not wanted
        return
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_base_that_was_read(tmp_path, base, adapter):
    """Reading a base changes its access time only: such an interrupted merge goes on."""
    with stopped():
        dora_convert.merge(base.path, adapter, tmp_path / "out", workers=1)
    for path in base.path.iterdir():
        path.read_bytes()
    assert dora_convert.merge(base.path, adapter, tmp_path / "out").resumed


def linked(path):
    """Another name for the file, as hard-linking backups make."""
    os.link(path, path.parent.parent / f"another {path.name}")


@pytest.mark.parametrize("act", [lambda path: path.chmod(0o640), linked], ids=["chmod", "link"])
def test_what_changes_no_contents(tmp_path, base, adapter, act):
    """Other permissions and another name change the file's ctime, too: the merge goes on, and is resumed."""
    with stopped():
        dora_convert.merge(base.path, adapter, tmp_path / "out", workers=1)
    act(base.path / "model-00001-of-00002.safetensors")
    touch = once(act, base.path / SHARD)
    assert dora_convert.merge(base.path, adapter, tmp_path / "out", on_progress=touch, workers=1).resumed


# after a merge


@pytest.fixture
def replacing(tmp_path, base):
    """A DoRA that replaces an embedding, too: its record holds norms, rows and their numbers."""
    extra = {"base_model.model.model.embed_tokens.weight": torch.randn(VOCABULARY, 40).bfloat16()}
    return make_adapter(tmp_path / "replacing", base, dora=True, extra=extra, modules_to_save=["embed_tokens"])


def flip(path, name, place, bit):
    """Flip one bit of a tensor in a safetensors file: the file's size and header stay."""
    raw = bytearray(path.read_bytes())
    size = int.from_bytes(raw[:8], "little")
    start, stop = json.loads(raw[8 : 8 + size])[name]["data_offsets"]
    raw[8 + size + start + int(place * (stop - start - 1))] ^= 1 << bit
    path.write_bytes(raw)


@pytest.mark.parametrize("undo", ["norms", "exact"])
@pytest.mark.parametrize("bit", [0, 6])
@pytest.mark.parametrize("kind", ["norm/0/", "rows/", "index/", "file/", "ulps/"])
def test_bits_of_the_undo_record(tmp_path, base, replacing, kind, bit, undo):
    """A bit that flipped in what the way back is made of: nothing is restored from it, and push refuses it."""
    out = tmp_path / "out"
    dora_convert.merge(base.path, replacing, out, undo=undo)
    record = out / "dora_convert/undo.safetensors"
    names = [name for name in sorted(load_file(record)) if name.startswith(kind)]
    if not names:
        pytest.skip("such a record has none")
    flip(record, names[-1], 0.5, bit)
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.unmerge(out, replacing, tmp_path / "back")
    assert "undo" in caught.value.text() + (caught.value.hint or "")
    assert not (tmp_path / "back").exists()
    with pytest.raises(DoraConvertError, match="receipt") as caught:
        dora_convert.push(out, "me/out", dry_run=True)
    assert "undo.safetensors" in caught.value.text()
    with pytest.raises(DoraConvertError):
        dora_convert.unmerge(out, replacing, in_place=True, allow_lossy=True)


@pytest.mark.parametrize("undo", ["norms", "exact", "none"])
@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_untouched_tensors_that_were_changed_since(tmp_path, base, adapter, name, undo):
    """What no adapter touched and somebody trained or damaged: not given back as the base's, not pushed as ours."""
    out = tmp_path / "out"
    dora_convert.merge(base.path, adapter, out, undo=undo)
    for path in out.glob("*.safetensors"):
        if name in load_file(path):
            flip(path, name, 0.5, 3)
    if undo != "none":
        with pytest.raises(DoraConvertError) as caught:
            dora_convert.unmerge(out, adapter, tmp_path / "back")
        assert name in caught.value.text()
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.push(out, "me/out", dry_run=True)
    assert name in caught.value.text()


def test_untouched_tensors_in_place(tmp_path, adapter, base):
    """In place, too, what lies beside the changed tensors is hashed: a changed one is not called the base."""
    dora_convert.merge(base.path, adapter, in_place=True)
    for path in base.path.glob("*.safetensors"):
        if "lm_head.weight" in load_file(path):
            flip(path, "lm_head.weight", 0.5, 3)
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.unmerge(base.path, adapter, in_place=True)
    assert "lm_head.weight" in caught.value.text()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json", "modeling_toy.py"])
def test_side_files_that_were_changed_since(tmp_path, base, adapter, name):
    """unmerge gives no edited file back as the base's."""
    out = tmp_path / "out"
    dora_convert.merge(base.path, adapter, out)
    (out / name).write_bytes((out / name).read_bytes() + b"\n")
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.unmerge(out, adapter, tmp_path / "back")
    assert name in caught.value.text()


def test_an_edited_card_is_pushed(tmp_path, base, adapter):
    """People write into README.md: that is no damage."""
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    (tmp_path / "out/README.md").write_text("# mine\n")
    assert dora_convert.push(tmp_path / "out", "me/out", dry_run=True).dry_run


def test_a_receipt_that_was_edited(tmp_path, base, adapter):
    """Hashes of the receipt itself that were changed to fit: at least what does not fit the adapter is told."""
    out = tmp_path / "out"
    dora_convert.merge(base.path, adapter, out)
    edit_json(out / "dora_convert/receipt.json", tensors={})
    with pytest.raises(DoraConvertError):
        dora_convert.unmerge(out, adapter, tmp_path / "back")
