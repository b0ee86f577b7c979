"""Make the golden quantised bases again with the real tools, and compare; merge with --base-as and compare.

    python tests/oracles/quantised.py        compressed-tensors, bitsandbytes, torchao, transformers installed
    python tests/oracles/quantised.py --mlx  mlx installed

Ends with an error for the first difference; says what it has compared. Tools that are not installed are an error.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT.parent), str(ROOT / "golden/quantised")]

import make  # noqa: E402 - the script beside the golden files


def golden_bases(*, mlx: bool) -> None:
    """Make every base again, and compare the truth and all bytes of weights with the stored ones."""
    with tempfile.TemporaryDirectory() as where:
        folder = make.Folder(where)
        for maker in [make.make_mlx] if mlx else make.MAKERS.values():
            maker(folder)
        stored = json.loads((ROOT / "golden/quantised/truth.json").read_text())
        for kind, truth in folder.truth.items():
            assert truth == stored[kind], f"{kind}: the tools decode other values than the stored ones"
        kinds = [kind for kind in folder.truth if same_tensors(Path(where) / kind, ROOT / "golden/quantised" / kind)]
    print(f"{len(folder.truth)} bases have the stored truth, {len(kinds)} of them the very same bytes")  # noqa: T201


def same_tensors(one: Path, other: Path) -> bool:
    """Return True if two weight files have the same tensors; they may be in another order."""
    return tensors_of(one / "model.safetensors") == tensors_of(other / "model.safetensors")


def tensors_of(path: Path) -> dict[str, bytes]:
    """Return the bytes of every tensor of a file."""
    raw = path.read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:length])
    header.pop("__metadata__", None)
    return {
        name: raw[length + entry["data_offsets"][0] : length + entry["data_offsets"][1]]
        for name, entry in header.items()
    }


def base_as() -> None:
    """Merge with --base-as: the result must be that of --dequantize onto the base that bitsandbytes saves."""
    import torch
    from safetensors.torch import load_file, save_file

    import dora_convert
    from tests.quantised_bases import make_adapter

    with tempfile.TemporaryDirectory() as where:
        root = Path(where)
        dense = root / "dense"
        dense.mkdir()
        save_file(
            {n: torch.tensor(v).bfloat16() for n, v in make.weights().items()},
            dense / "model.safetensors",
            {"format": "pt"},
        )
        (dense / "config.json").write_text(json.dumps(make.CONFIG))
        for option, kind in {
            "nf4": "bnb-nf4",
            "nf4-double": "bnb-nf4-double",
            "fp4": "bnb-fp4",
            "int8": "bnb-int8",
        }.items():
            golden = ROOT / "golden/quantised" / kind
            adapter = make_adapter(root / option, golden, dora=True)
            report = dora_convert.merge(dense, adapter, root / f"{option}-as", base_as=option, device="cpu")
            dora_convert.merge(golden, adapter, root / f"{option}-real", dequantize=True, device="cpu")
            one, two = (load_file(root / f"{option}-{what}/model.safetensors") for what in ("as", "real"))
            for name, tensor in one.items():
                assert torch.equal(tensor, two[name]), f"{option}: {name}"
            verdict = dora_convert.verify(dense, adapter, root / f"{option}-as", base_as=option, device="cpu")
            assert verdict.verdict == "agree", verdict.problems
            assert report.verified.wrong_elements == 0
            print(f"--base-as {option} is the merge onto the base that bitsandbytes saves")  # noqa: T201


def distance(folder: Path) -> float:
    """Return how far the outputs of a checkpoint in transformers are from those of its dense values."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tests.quantised_bases import dense_values

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
    dense = AutoModelForCausalLM.from_config(
        LlamaConfig(**{k: v for k, v in make.CONFIG.items() if k != "dtype"})
    ).float()
    dense.load_state_dict({name: value.float() for name, value in dense_values(folder).items()})
    ids = torch.arange(16)[None]
    with torch.no_grad():
        wanted = dense(ids).logits
        return float((model(ids).logits.float() - wanted).norm() / wanted.norm())


def loads() -> None:
    """Load merges in transformers, and compare the weights with ours, where the tool runs on this machine."""
    import torch
    from transformers import AutoModelForCausalLM

    import dora_convert
    from tests.quantised_bases import make_adapter

    loaded = []
    with tempfile.TemporaryDirectory() as where:
        for number, (kind, choice) in enumerate(
            [(kind, {}) for kind in ("ct-fp8-rows", "ct-int8-rows", "bnb-int8", "torchao-int8", "torchao-fp8")]
            + [
                (kind, {"dequantize_touched": True})
                for kind in ("bnb-nf4", "ct-int4", "torchao-int4", "bnb-nf4-double")
            ]
            + [(kind, {"requantize": True}) for kind in ("ct-int4", "torchao-int4")]
        ):
            golden, root = ROOT / "golden/quantised" / kind, Path(where) / str(number)
            root.mkdir()
            adapter = make_adapter(root / "adapter", golden, dora=True)
            dora_convert.merge(golden, adapter, root / "out", device="cpu", **choice)
            if kind.startswith("bnb-nf4"):  # bitsandbytes does not run such small weights on a CPU: they only load
                AutoModelForCausalLM.from_pretrained(root / "out", dtype=torch.bfloat16, device_map="cpu")
            else:
                error = distance(root / "out")
                assert error < 0.05, f"{kind} {choice}: {error}"
            loaded.append(f"{kind} {' '.join(choice)}".strip())
    print(f"transformers loads and runs {len(loaded)} merges: {', '.join(loaded)}")  # noqa: T201


if __name__ == "__main__":
    golden_bases(mlx="--mlx" in sys.argv)
    if "--mlx" not in sys.argv:
        base_as()
        loads()
