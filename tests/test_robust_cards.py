"""What travels with weights: one tokenizer from one source, cards that say whose licence holds, and no path of this machine."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard

import dora_convert
from dora_convert.errors import DoraConvertError

from .hubserver import run as run_with
from .toy import contents, edit_json, make_adapter, write_json

# tokenizer, processor and chat template


def put(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def template_of(folder):
    """The chat template that transformers takes: the file, before the field."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text()
    if (folder / "chat_template.json").exists():
        return json.loads((folder / "chat_template.json").read_text())["chat_template"]
    return json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")


FIELD = {"tokenizer_config.json": '{"chat_template": "%s"}', "tokenizer.json": '"%s"'}
FILE = {"tokenizer_config.json": "{}", "chat_template.jinja": "%s", "tokenizer.json": '"%s"'}
OLD = {"tokenizer_config.json": "{}", "chat_template.json": '{"chat_template": "%s"}', "tokenizer.json": '"%s"'}


def filled(files, word):
    return {name: text.replace("%s", word) for name, text in files.items()}


@pytest.mark.parametrize("theirs", [FIELD, FILE, OLD], ids=["field", "file", "old file"])
@pytest.mark.parametrize("ours", [FIELD, FILE, OLD], ids=["field", "file", "old file"])
def test_the_adapters_template_wins(tmp_path, base, adapter, theirs, ours):
    """Wherever either keeps its template: OUT has the adapter's alone, and it is said."""
    put(base.path, filled(theirs, "of the base"))
    put(adapter, filled(ours, "of the adapter"))
    said = []
    dora_convert.merge(base.path, adapter, tmp_path / "out", undo="exact", on_notice=said.append)
    assert template_of(tmp_path / "out") == "of the adapter"
    assert not any(
        b"of the base" in data for name, data in contents(tmp_path / "out").items() if "dora_convert/" not in name
    )
    assert any("tokenizer" in text and adapter.name in text for text in said)
    dora_convert.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert {n: d for n, d in contents(tmp_path / "back").items() if "README" not in n} == {
        n: d for n, d in contents(base.path).items() if "README" not in n
    }


def test_more_templates(tmp_path, base, adapter):
    """additional_chat_templates/ belongs to the set, too."""
    put(base.path, filled(FILE, "of the base") | {"additional_chat_templates/tool.jinja": "of the base"})
    put(adapter, filled(FILE, "of the adapter"))
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert not (tmp_path / "out/additional_chat_templates/tool.jinja").exists()


def test_stale_files_of_another_tokenizer(tmp_path, base, adapter):
    """Vocabulary files of the base do not lie beside the adapter's tokenizer."""
    stale = {"added_tokens.json": "{}", "vocab.json": "{}", "merges.txt": "", "special_tokens_map.json": "{}"}
    put(base.path, filled(FILE, "of the base") | stale)
    put(adapter, filled(FILE, "of the adapter"))
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert not {*stale} & contents(tmp_path / "out").keys()


def test_a_set_in_place(tmp_path, base, adapter):
    """In place, the base's files of a set are removed with the merge, and come back with the unmerge."""
    put(base.path, filled(FILE, "of the base") | {"added_tokens.json": "{}"})
    put(adapter, filled(FIELD, "of the adapter"))
    before = contents(base.path)
    dora_convert.merge(base.path, adapter, in_place=True)
    assert template_of(base.path) == "of the adapter"
    assert not {"added_tokens.json", "chat_template.jinja"} & contents(base.path).keys()
    dora_convert.unmerge(base.path, adapter, in_place=True)
    assert contents(base.path) == before


def test_a_lone_template(tmp_path, base, adapter):
    """An adapter that brings a template and no tokenizer changes the template alone."""
    put(base.path, filled(FILE, "of the base"))
    put(adapter, {"chat_template.jinja": "of the adapter"})
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert template_of(tmp_path / "out") == "of the adapter"
    assert (tmp_path / "out/tokenizer.json").read_text() == '"of the base"'


def test_the_base_keeps_its_processor(tmp_path, base, adapter):
    """A tokenizer without a processor does not take the base's processor away: images go on working."""
    put(base.path, filled(FILE, "of the base") | {"preprocessor_config.json": '{"size": 3}'})
    put(adapter, filled(FIELD, "of the adapter"))
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert (tmp_path / "out/preprocessor_config.json").read_text() == '{"size": 3}'


def test_two_adapters_with_tokenizers(tmp_path, base, adapter):
    """Of several adapters with tokenizers that differ, one set is taken whole, and which one is said."""
    second = make_adapter(tmp_path / "second", base, dora=True, seed=7)
    put(adapter, filled(FILE, "one"))
    put(second, filled(FIELD, "two"))
    said = []
    dora_convert.merge(base.path, [adapter, second], tmp_path / "out", on_notice=said.append)
    found = template_of(tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_text() == f'"{found}"'
    name = {"one": "adapter", "two": "second"}[found]
    assert any("tokenizer" in text and name in text for text in said)


# cards


def card(folder):
    return ModelCard((folder / "README.md").read_text(), ignore_metadata_errors=True)


def readme(folder, **fields):
    lines = "".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items())
    (folder / "README.md").write_text(f"---\n{lines}---\n# a card\n")


LICENCES = [
    ("apache-2.0", "cc-by-nc-4.0", "cc-by-nc-4.0"),
    ("cc-by-nc-4.0", "apache-2.0", "cc-by-nc-4.0"),
    ("mit", "gpl-3.0", "gpl-3.0"),
    ("llama3.1", "apache-2.0", "llama3.1"),
    ("apache-2.0", "llama3.1", "llama3.1"),
    ("apache-2.0", None, "apache-2.0"),
    (None, "cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0"),
    ("mit", "apache-2.0", "apache-2.0"),
    ("cc-by-nc-4.0", "gpl-3.0", None),
    ("apache-2.0", "other", "other"),
]


@pytest.mark.parametrize(("of_base", "of_adapter", "wanted"), LICENCES)
@pytest.mark.parametrize("verb", ["merge", "to_lora"])
def test_the_stricter_licence(tmp_path, base, of_base, of_adapter, wanted, verb):
    """What is made of two works bears the stricter licence of them, and says both; None where neither holds the other."""
    lora = make_adapter(tmp_path / "lora", base, dora=False)
    readme(base.path, **({"license": of_base} if of_base else {}))
    readme(lora, **({"license": of_adapter} if of_adapter else {}))
    said, options = [], {"rank": 2} if verb == "to_lora" else {}
    getattr(dora_convert, verb)(base.path, lora, tmp_path / "out", on_notice=said.append, **options)
    found = card(tmp_path / "out")
    if wanted:
        assert found.data.license == wanted
    else:
        assert found.data.license in ("other", None)
    if of_base and of_adapter:
        assert of_base in found.text or found.data.license == of_base
        assert of_adapter in found.text or found.data.license == of_adapter
        assert any("licen" in text and of_adapter in text for text in said)


def test_datasets_and_languages(tmp_path, base, adapter):
    """Datasets of the adapter's card are those of what was made of it."""
    readme(base.path, license="mit", datasets=["org/pretraining"], language=["en"])
    readme(adapter, datasets=["org/facts"], language=["de"])
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    data = card(tmp_path / "out").data
    assert "org/facts" in data.datasets
    assert set(data.language) == {"en", "de"}


def test_usage(tmp_path, base, adapter):
    """A card shows how the model is loaded; an adapter's, how it is loaded onto its base."""
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert "AutoModelForCausalLM.from_pretrained" in card(tmp_path / "out").text
    dora_convert.from_lora(
        base.path, make_adapter(tmp_path / "lora", base, dora=False), tmp_path / "new", base_model="org/base"
    )
    assert "PeftModel.from_pretrained" in card(tmp_path / "new").text


@pytest.mark.parametrize("verb", ["merge", "from_lora", "to_lora"])
def test_the_base_that_the_adapter_names(tmp_path, base, verb):
    """A local copy of the base has no repo id; the adapter names one on the Hub."""
    lora = make_adapter(tmp_path / "lora", base, dora=False, base_model_name_or_path="org/base")
    getattr(dora_convert, verb)(base.path, lora, tmp_path / "out", **({"rank": 2} if verb == "to_lora" else {}))
    assert card(tmp_path / "out").data.base_model == "org/base"


@pytest.mark.parametrize("named", ["/home/me/base", "./base", "base", "C:\\models\\base", "~/base", "org/another"])
def test_names_that_are_no_repo(tmp_path, base, named):
    """A path, or the name of another model, is not put into a card."""
    lora = make_adapter(tmp_path / "lora", base, dora=False, base_model_name_or_path=named)
    dora_convert.merge(base.path, lora, tmp_path / "out")
    assert not getattr(card(tmp_path / "out").data, "base_model", None)
    assert "/home/me" not in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.35.0"},
        {"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.36.0"},
    ],
)
def test_diffusers(tmp_path, base, adapter, config):
    """library_name is that of the library which loads it."""
    write_json(base.path / "config.json", config)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert card(tmp_path / "out").data.library_name == "diffusers"


# push


def pushed(hub, tmp_path, *words):
    return run_with(hub, tmp_path / "home", "push", *words)


def test_base_model_of_our_own_card(tmp_path, base, adapter, hub):
    """--base-model goes into a card of ours that nobody has edited; the folder stays as it is."""
    out = tmp_path / "out"
    dora_convert.merge(base.path, adapter, out)
    before = contents(out)
    done = pushed(hub, tmp_path, out, "me/out", "--base-model", "org/base")
    assert done.returncode == 0, done.stderr
    data = card(hub.repos["me/out"]).data
    assert data.base_model == "org/base"
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert contents(out) == before


def test_base_model_of_an_edited_card(tmp_path, base, adapter, hub):
    """In a card that somebody wrote, base_model is set where it is missing, and the text stays; said."""
    out = tmp_path / "out"
    dora_convert.merge(base.path, adapter, out)
    (out / "README.md").write_text("---\nlicense: mit\n---\n# mine\n\nWords.\n")
    done = pushed(hub, tmp_path, out, "me/out", "--base-model", "org/base")
    assert done.returncode == 0, done.stderr
    found = card(hub.repos["me/out"])
    assert (found.data.base_model, found.data.license) == ("org/base", "mit")
    assert "Words." in found.text
    assert "README.md" in done.stderr


def local_adapter(tmp_path, base, named="/home/me/base"):
    """An adapter as PEFT saves it after training on a folder."""
    adapter = make_adapter(tmp_path / "peft", base, dora=True, base_model_name_or_path=named)
    readme(adapter, base_model=named, library_name="peft", tags=[f"base_model:adapter:{named}"])
    return adapter


@pytest.mark.parametrize("named", ["/home/me/base", "./base", "../base", "~/base", "C:\\Users\\me\\base", "/x"])
def test_local_paths_are_not_pushed(tmp_path, base, hub, named):
    """A path in config or card is an error that names the file and the way out."""
    adapter = local_adapter(tmp_path, base, named)
    done = pushed(hub, tmp_path, adapter, "me/adapter")
    assert done.returncode == 2
    assert "adapter_config.json" in done.stderr
    assert "--base-model" in done.stderr
    assert not hub.uploads


def test_local_paths_are_replaced(tmp_path, base, hub):
    """With --base-model what goes up has its name in the paths' places, in config, card and tags; said; files here stay."""
    adapter = local_adapter(tmp_path, base)
    before = contents(adapter)
    done = pushed(hub, tmp_path, adapter, "me/adapter", "--base-model", "org/base")
    assert done.returncode == 0, done.stderr
    found = contents(hub.repos["me/adapter"])
    assert not [name for name, data in found.items() if b"/home/me" in data]
    assert json.loads(found["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert card(hub.repos["me/adapter"]).data.base_model == "org/base"
    assert "adapter_config.json" in done.stderr
    assert "README.md" in done.stderr
    assert contents(adapter) == before


@pytest.mark.parametrize("field", ["_name_or_path", "tokenizer_file"])
def test_local_paths_of_a_model(tmp_path, base, adapter, hub, field):
    """A base that was loaded from a folder says so in its config.json; that goes up in no file."""
    edit_json(base.path / "config.json", _name_or_path="/home/me/base")
    edit_json(base.path / "tokenizer_config.json", name_or_path="/home/me/base", **{field: "/home/me/base"})
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    done = pushed(hub, tmp_path, tmp_path / "out", "me/out")
    if done.returncode:
        assert done.returncode == 2
        assert "/home/me/base" in done.stderr
        return
    found = contents(hub.repos["me/out"])
    assert not [name for name, data in found.items() if b"/home/me" in data]


# configs of transformers 5


ROPE = {
    "plain": ({"rope_type": "default", "rope_theta": 500000.0}, {"rope_theta": 500000.0}),
    "llama 3": (
        {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0},
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
    ),
    "partial": (
        {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
        {"rope_theta": 10000.0, "partial_rotary_factor": 0.4},
    ),
}


@pytest.mark.parametrize("kind", ROPE)
@pytest.mark.parametrize("nested", [False, True])
def test_legacy_config(tmp_path, base, adapter, run, kind, nested):
    """--legacy-config writes what older loaders read beside what newer ones do; without it config.json stays as it is."""
    new, old = ROPE[kind]
    fields = {"text_config": {"rope_parameters": new}} if nested else {"rope_parameters": new}
    edit_json(base.path / "config.json", **fields)
    before = (base.path / "config.json").read_bytes()
    code, _, err = run("merge", base.path, adapter, tmp_path / "out", "--legacy-config")
    assert code == 0, err
    config = json.loads((tmp_path / "out/config.json").read_text())
    found = config["text_config"] if nested else config
    assert found["rope_parameters"] == new
    assert {name: found.get(name) for name in old} == old
    dora_convert.merge(base.path, adapter, tmp_path / "plain")
    assert (tmp_path / "plain/config.json").read_bytes() == before
    dora_convert.merge(base.path, adapter, tmp_path / "python", legacy_config=True)
    assert contents(tmp_path / "python")["config.json"] == contents(tmp_path / "out")["config.json"]
    dora_convert.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert (tmp_path / "back/config.json").read_bytes() == before


def test_rope_by_kind_of_layer(tmp_path, base, adapter):
    """Gemma 3 has a rope for each kind of layer, which older configs name rope_local_base_freq."""
    new = {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    edit_json(base.path / "config.json", rope_parameters=new)
    dora_convert.merge(base.path, adapter, tmp_path / "out", legacy_config=True)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1000000.0, 10000.0)


def test_legacy_config_without_a_rope(tmp_path, base, adapter):
    """An option that has no effect says so; in place, where config.json cannot change, it is refused."""
    report = dora_convert.merge(base.path, adapter, tmp_path / "out", legacy_config=True)
    assert any("legacy_config=True" in text for text in report.warnings)
    edit_json(base.path / "config.json", rope_parameters=ROPE["plain"][0])
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.merge(base.path, adapter, in_place=True, legacy_config=True)
    assert "config.json" in str(caught.value.faults)


def test_old_configs_are_not_contradicted(tmp_path, base, adapter):
    """A config that has both forms already keeps both; where they contradict each other, that is an error."""
    edit_json(base.path / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5.0}, rope_theta=7.0)
    with pytest.raises(DoraConvertError, match="rope_theta"):
        dora_convert.merge(base.path, adapter, tmp_path / "out", legacy_config=True)
