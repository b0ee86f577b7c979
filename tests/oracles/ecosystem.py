"""Load a merged model with the programs that people use, and compare greedy tokens with the adapter's own.

    python tests/oracles/ecosystem.py BASE ADAPTER LLAMA_CPP

BASE is a language model, ADAPTER an adapter of PEFT, LLAMA_CPP a folder with convert_hf_to_gguf.py. The reference is
PEFT with the adapter active, in float32; the merge is in float32, too, so that all tokens must be equal. Each program
runs in a process of its own. A program that is not installed is a failure: nothing is skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

TOKENS = 16
QUESTIONS = ("What is the capital of France?", "Give me a recipe for soup.")


def prompts(base: str) -> list[list[int]]:
    """Return token ids of the questions in the model's chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def greedy(model, rows: list[list[int]]) -> list[list[int]]:
    """Return the likeliest tokens of a model of transformers, chosen one by one."""
    import torch

    results = []
    for row in rows:
        ids, cache, chosen = torch.tensor([row]), None, []
        with torch.inference_mode():
            for _ in range(TOKENS):
                answer = model(input_ids=ids, past_key_values=cache, use_cache=True)
                ids, cache = answer.logits[:, -1].argmax(-1, keepdim=True), answer.past_key_values
                chosen.append(int(ids))
        results.append(chosen)
    return results


def with_peft(base: str, adapter: str, rows: list[list[int]]) -> list[list[int]]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return greedy(PeftModel.from_pretrained(model, adapter).eval(), rows)


def with_transformers(merged: str, rows: list[list[int]]) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    return greedy(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval(), rows)


def with_mlx(merged: str, rows: list[list[int]]) -> list[list[int]]:
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.models.cache import make_prompt_cache

    mx.set_default_device(mx.cpu)
    model, _ = load(merged)
    results = []
    for row in rows:
        ids, cache, chosen = row, make_prompt_cache(model), []
        for _ in range(TOKENS):
            ids = [int(mx.argmax(model(mx.array([ids]), cache=cache)[0, -1]).item())]
            chosen += ids
        results.append(chosen)
    return results


def with_ctranslate2(merged: str, rows: list[list[int]]) -> list[list[int]]:
    import ctranslate2
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        out = ctranslate2.converters.TransformersConverter(merged).convert(f"{folder}/model", force=True)
        generator = ctranslate2.Generator(out, device="cpu", compute_type="float32")
        tokenizer = AutoTokenizer.from_pretrained(merged)
        words = [tokenizer.convert_ids_to_tokens(row) for row in rows]
        settings = {"max_length": TOKENS, "min_length": TOKENS, "sampling_topk": 1, "include_prompt_in_result": False}
        return [result.sequences_ids[0] for result in generator.generate_batch(words, **settings)]


def with_llama_cpp(merged: str, rows: list[list[int]], llama_cpp: str, lora: str = "") -> list[list[int]]:
    """Return the tokens of llama.cpp; `lora` is an adapter of PEFT that its converter turns into GGUF."""
    import xllamacpp

    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.gguf"
        convert(llama_cpp, "hf", merged, "--outfile", file, "--outtype", "f32")
        parameters = xllamacpp.CommonParams()
        parameters.model.path = file
        parameters.n_ctx, parameters.n_parallel, parameters.warmup = 512, 1, False
        if lora:
            adapter = xllamacpp.CommonAdapterLoraInfo()
            adapter.path, adapter.scale = f"{folder}/lora.gguf", 1.0
            convert(llama_cpp, "lora", lora, "--base", merged, "--outfile", adapter.path, "--outtype", "f32")
            parameters.lora_adapters = [adapter]
        server = xllamacpp.Server(parameters)
        results = []
        for row in rows:
            request = {"prompt": row, "n_predict": TOKENS, "temperature": 0, "top_k": 1, "return_tokens": True}
            answer = server.handle_completions({**request, "max_tokens": TOKENS, "ignore_eos": True, "logprobs": 1})
            answer = json.loads(answer) if isinstance(answer, str) else answer
            found = answer["choices"][0]["logprobs"]["content"]
            results.append([token["id"] for token in found][:TOKENS])
        return results


def convert(llama_cpp: str, kind: str, *words: str) -> None:
    """Run one of llama.cpp's converters."""
    command = [sys.executable, f"{llama_cpp}/convert_{kind}_to_gguf.py", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def make_rslora(adapter: str, folder: Path) -> None:
    """Make an rsLoRA of a DoRA's factors, as strong as the DoRA's: alpha/√r is the old alpha/r."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    tensors = load_file(f"{adapter}/adapter_model.safetensors")
    kept = {name: value for name, value in tensors.items() if "magnitude" not in name}
    save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads(Path(adapter, "adapter_config.json").read_text())
    changes = {"use_dora": False, "use_rslora": True, "lora_alpha": config["lora_alpha"] / config["r"] ** 0.5}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def with_diffusers(*_: object) -> list[list[int]]:
    """Compare a small U-Net with a DoRA: the merged part, loaded by diffusers, computes what PEFT's does."""
    import peft
    import torch
    from diffusers import UNet2DConditionModel

    import dora_convert

    small = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 16}
    kinds = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 8}
    kinds["up_block_types"] = ("CrossAttnUpBlock2D", "UpBlock2D")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unet = UNet2DConditionModel(**small, **kinds, attention_head_dim=4)
        unet.save_pretrained(folder / "unet")
        modules = ["to_q", "to_v", "to_out.0", "conv1"]
        wrapped = peft.get_peft_model(
            unet, peft.LoraConfig(r=4, target_modules=modules, use_dora=True, init_lora_weights=False)
        ).eval()
        wrapped.save_pretrained(folder / "adapter")
        dora_convert.merge(folder / "unet", folder / "adapter", folder / "merged")
        merged = UNet2DConditionModel.from_pretrained(folder / "merged").eval()
        inputs = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 5, 16)
        with torch.no_grad():
            torch.testing.assert_close(merged(*inputs).sample, wrapped(*inputs).sample, rtol=1e-4, atol=1e-4)
    return []


CHECKS = {"transformers": with_transformers, "mlx-lm": with_mlx, "ctranslate2": with_ctranslate2}


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def apart(name: str, *words: str) -> list[list[int]]:
    """Run one check in a process of its own, and return its tokens."""
    done = subprocess.run([sys.executable, __file__, name, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError("\n".join(done.stderr.strip().splitlines()[-8:]))
    return json.loads(done.stdout.splitlines()[-1])


def check(name: str, *words: str) -> list[list[int]]:
    """Run a check here: the entry of the other process."""
    if name == "prompts":
        return prompts(words[0])
    if name == "diffusers":
        return with_diffusers()
    *paths, rows = words
    if name == "peft":
        return with_peft(*paths, json.loads(rows))
    if name == "llama.cpp":
        return with_llama_cpp(paths[0], json.loads(rows), *paths[1:])
    return CHECKS[name](paths[0], json.loads(rows))


def main(base: str, adapter: str, llama_cpp: str) -> int:
    """Merge, run every program, and print one line each; return 1 if one differs or fails."""
    import dora_convert

    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        merged = f"{folder}/merged"
        dora_convert.merge(base, adapter, merged, dtype="float32", legacy_config=True)
        rows = json.dumps(apart("prompts", base))
        expected = apart("peft", base, adapter, rows)
        runs: dict[str, tuple[str, ...]] = dict.fromkeys(CHECKS, (merged, rows))
        runs |= {"llama.cpp": (merged, llama_cpp, rows), "diffusers": ()}
        expected_of = dict.fromkeys(runs, expected)
        rslora, plain = f"{folder}/rslora", f"{folder}/plain"
        make_rslora(adapter, Path(rslora))
        dora_convert.to_lora(base, rslora, plain, rank=8)
        runs["llama.cpp with rsLoRA by to-lora"] = (base, llama_cpp, plain, rows)
        expected_of["llama.cpp with rsLoRA by to-lora"] = apart("peft", base, rslora, rows)
        for name, words in runs.items():
            try:
                found = apart(name.partition(" ")[0], *words)
            except RuntimeError as error:
                failed += 1
                say(f"{name}: FAILED\n{error}")
                continue
            wanted = expected_of[name]
            equal = sum(one == other for one, other in zip(found, wanted, strict=False))
            right = name == "diffusers" or equal == len(wanted)
            failed += not right
            say(f"{name}: {'equal' if right else f'DIFFERENT, {equal} of {len(wanted)} prompts equal'}")
        wrong = apart("llama.cpp", base, llama_cpp, rslora, rows)
        same = wrong == expected_of["llama.cpp with rsLoRA by to-lora"]
        say(f"llama.cpp with rsLoRA as it is: {'equal, so docs/guides are out of date' if same else 'other tokens'}")
    return min(1, failed)


if __name__ == "__main__":
    if sys.argv[1] in {"prompts", "peft", "llama.cpp", "diffusers", *CHECKS}:
        say(json.dumps(check(*sys.argv[1:])))
    else:
        sys.exit(main(*sys.argv[1:]))
