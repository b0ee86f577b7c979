"""Make adapters with the tools themselves, merge them, and load what we write with the tools' own loaders.

    TOOLS/python tests/oracles/formats.py DORA_CONVERT

TOOLS is an environment with torch, transformers, lycoris-lora, diffusers, peft, mlx, mlx-lm and torchtune; a tool that
cannot be imported is an error. torchtune's torchao lies apart (see `torchtune_reader.py`). DORA_CONVERT is our command. Every weight is compared with the tool's own forward, in float64
where the tool computes so, within 1e-6 relative.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

BOUND = 1e-6
GOLDEN = Path(__file__).parent.parent / "golden/formats"
ONLY_SINGLE = ("diag-oft", "boft")
"""Algorithms that LyCORIS computes in float32 only."""
CONFIG = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 16, "tie_word_embeddings": False,
}  # fmt: skip
torch.manual_seed(11)


def command(*words: object) -> None:
    """Run our command; raises CalledProcessError with its message on stderr."""
    subprocess.run([sys.argv[1], *map(str, words), "--quiet"], check=True, stdout=subprocess.DEVNULL)


def make_base(folder: Path, **options: int) -> nn.Module:
    """Write a small Llama in float32, and return it in float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**(CONFIG | options)))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(folder)
    return model.double()


def largest_error(truth: dict[str, torch.Tensor], merged: Path) -> float:
    """Return the largest relative error of any weight of the truth."""
    got = load_file(merged / "model.safetensors")
    errors = [(got[name].double() - T.double()).norm() / T.double().norm() for name, T in truth.items()]
    return float(max(errors))


def weight_of(module: nn.Module, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return the weight (out, in) that a linear module applies, by its own forward."""
    dtype = next((parameter.dtype for parameter in module.parameters()), torch.float64) if dtype is None else dtype
    x = torch.eye(module.in_features, dtype=dtype)
    with torch.no_grad():
        return (module(x) - module(torch.zeros_like(x[:1]))).T


def lycoris_cases() -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the algorithms of LyCORIS that are merged."""
    for axis in (True, False):
        side = "rows" if axis else "columns"
        for algo in ("lora", "loha", "lokr"):
            yield f"{algo} DoRA by {side}", {"algo": algo, "dora_wd": True, "wd_on_output": axis}
    for algo in ("lora", "loha", "lokr", "full", "diag-oft", "boft"):
        yield algo, {"algo": algo}


def lycoris(work: Path) -> Iterator[tuple[str, float]]:
    """Yield a name and an error for each algorithm: the network's own forward against our merge of its file."""
    from lycoris import LycorisNetwork, create_lycoris

    LycorisNetwork.apply_preset({"target_name": [".*proj.*"]})
    for number, (name, options) in enumerate(lycoris_cases()):
        folder = work / f"lycoris-{number}"
        model = make_base(folder / "base")
        network = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=2.0, **options)
        network.apply_to()
        for parameter in network.parameters():
            parameter.data = (parameter.data + 0.1 * torch.randn_like(parameter)).float()
        file = folder / "adapter.safetensors"
        save_file({key: value.float().contiguous() for key, value in network.state_dict().items()}, file)
        dtype = torch.float32 if options["algo"] in ONLY_SINGLE else torch.float64
        model.to(dtype), network.to(dtype).eval()
        truth = {
            f"{key}.weight": weight_of(module, dtype)
            for key, module in model.named_modules()
            if key.endswith("proj") and isinstance(module, nn.Linear)
        }
        command("merge", folder / "base", file, folder / "out")
        yield f"LyCORIS {name}", largest_error(truth, folder / "out")


def mlx_merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return the weights that mlx-lm fuses from a base and an adapter folder."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.models import llama
    from mlx_lm.tuner.utils import load_adapters

    fields = json.loads((base / "config.json").read_text())
    model = llama.Model(llama.ModelArgs.from_dict(fields))
    model.load_weights(list(mx.load(str(base / "model.safetensors")).items()))
    model = load_adapters(model, str(adapter))
    fused = {name: module.fuse() for name, module in model.named_modules() if hasattr(module, "fuse")}
    return {f"{name}.weight": torch.tensor(np.array(layer.weight)) for name, layer in fused.items()}


SOME, ALL = ["q_proj", "v_proj", "down_proj"], [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def peft_adapter(folder: Path, model: nn.Module, targets: list[str] = SOME, *, dora: bool) -> Path:
    """Write a PEFT adapter with every parameter off its start, of a scaling that is not 1."""
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=10, target_modules=targets, use_dora=dora))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data *= 1 + 0.1 * torch.randn_like(parameter)
            parameter.data += 0.1 * torch.randn_like(parameter)
    peft.save_pretrained(folder)
    return folder


def written(work: Path) -> Iterator[tuple[str, float]]:
    """Yield an error for each format that a tool loads: its fused weights against our merge of the PEFT original."""
    for dora in (False, True):
        folder = work / f"written-{dora}"
        model = make_base(folder / "base").float()
        adapter = peft_adapter(folder / "peft", model, dora=dora)
        command("merge", folder / "base", adapter, folder / "out")
        merged, kind = load_file(folder / "out/model.safetensors"), "DoRA" if dora else "LoRA"

        def error(truth: dict[str, torch.Tensor], merged: dict[str, torch.Tensor] = merged) -> float:
            return float(max((merged[k].double() - T.double()).norm() / T.double().norm() for k, T in truth.items()))

        command("convert", adapter, folder / "mlx", "--to", "mlx")
        yield f"mlx-lm loads our {kind}", error(mlx_merged(folder / "base", folder / "mlx"))
        command("convert", adapter, folder / "kohya", "--to", "kohya")
        yield f"LyCORIS loads our {kind}", error(lycoris_merged(folder / "base", folder / "kohya/adapter.safetensors"))


def torchtune(work: Path) -> Iterator[tuple[str, float]]:
    """Yield an error for our files of torchtune: the weights that its layers apply against our merge."""
    for dora in (False, True):
        folder, kind = work / f"torchtune-{dora}", "DoRA" if dora else "LoRA"
        model = make_base(folder / "base", hidden_size=32).float()  # torchtune has no head_dim of its own
        adapter = peft_adapter(folder / "peft", model, ALL, dora=dora)
        command("merge", folder / "base", adapter, folder / "out")
        command("convert", adapter, folder / "own", "--to", "torchtune", "--base", folder / "base")
        reader = Path(__file__).parent / "torchtune_reader.py"
        words = (sys.executable, reader, folder / "base", folder / "own", folder / "applied.safetensors")
        subprocess.run([*map(str, words)], check=True)
        yield f"torchtune loads our {kind}", largest_error(load_file(folder / "applied.safetensors"), folder / "out")


def peft(work: Path) -> Iterator[tuple[str, float]]:
    """Yield an error for files of other formats that we write as PEFT's: PEFT's merge against ours."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    for dora in (False, True):
        folder, kind = work / f"peft-{dora}", "DoRA" if dora else "LoRA"
        adapter = peft_adapter(folder / "peft", make_base(folder / "base").float(), ALL, dora=dora)
        command("merge", folder / "base", adapter, folder / "out")
        command("convert", adapter, folder / "mlx", "--to", "mlx")
        command("convert", folder / "mlx", folder / "back", "--to", "peft", "--base", folder / "base")
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), folder / "back")
        truth = model.double().merge_and_unload().state_dict()
        yield f"PEFT loads our {kind} that was mlx-lm's", largest_error(dict(truth), folder / "out")


def lycoris_merged(base: Path, file: Path) -> dict[str, torch.Tensor]:
    """Return the weights that LyCORIS applies when it loads a file."""
    from lycoris import create_lycoris_from_weights
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base).double()
    network, _ = create_lycoris_from_weights(1.0, str(file), model)
    network.apply_to()
    network.double().eval()
    names = {name.replace(".", "_"): name for name, _ in model.named_modules()}
    loaded = {names[lora.lora_name.removeprefix("lycoris_")] for lora in network.loras}
    return {f"{name}.weight": weight_of(model.get_submodule(name)) for name in loaded}


def diffusers(work: Path) -> Iterator[tuple[str, float]]:
    """Yield an error for golden adapters of pipelines: the UNet that diffusers fuses against our merge."""
    from diffusers import UNet2DConditionModel

    base = GOLDEN / "base-0"
    for case in ("kohya-lora-sd15", "diffusers-dora"):
        folder, (file,) = work / case, (GOLDEN / case).iterdir()
        command("merge", base, file, folder / "out")
        command("convert", file, folder / "new", "--to", "diffusers", "--base", base)
        unet = UNet2DConditionModel.from_pretrained(base / "unet")
        before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
        unet.load_lora_adapter(load_file(folder / "new/pytorch_lora_weights.safetensors"), prefix="unet")
        unet.fuse_lora()
        names = {name.replace(".base_layer", ""): name for name in unet.state_dict() if "lora_" not in name}
        fused = {plain: unet.state_dict()[name] for plain, name in names.items()}
        changed = {name for name, tensor in fused.items() if not torch.equal(tensor, before[name])}
        merged = load_file(next((folder / "out/unet").glob("*.safetensors")))
        assert changed
        yield f"diffusers loads our {case}", float(max((merged[k] - fused[k]).norm() / fused[k].norm() for k in fused))


def main() -> None:
    """Run every comparison; exit with 1 if one is off."""
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        suites: tuple[Callable[[Path], Iterator[tuple[str, float]]], ...] = (
            lycoris,
            written,
            torchtune,
            peft,
            diffusers,
        )
        for suite in suites:
            for name, error in suite(Path(folder)):
                wrong += not error < BOUND
                sys.stdout.write(f"{'ok ' if error < BOUND else 'OFF'} {error:.1e}  {name}\n")
                sys.stdout.flush()
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
