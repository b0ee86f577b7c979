"""dora-convert merge: the command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
from typing_extensions import Unpack

from ..options import MergeOptions
from . import REF, command, takes
from .sink import Sink


@command("merge")
@click.argument("refs", type=REF, nargs=-1, metavar="[BASE] ADAPTER... OUT", required=True)
@takes(MergeOptions)
def merge(refs: tuple[str, ...], *, sink: Sink, **keywords: Unpack[MergeOptions]) -> None:
    """Fold LoRA and DoRA adapters into a base checkpoint.

    BASE and ADAPTER are folders or Hub repos (org/name[@revision]). Without BASE, the base that the adapter
    names is used. OUT is a new folder with the base's files, its weights merged, and a record of what was
    done in OUT/dora_convert.

    \b
    Examples:
      dora-convert merge ./base ./adapter ./merged
      dora-convert merge ./adapter ./merged --dry-run
      dora-convert merge --in-place ./model ./adapter
      dora-convert merge org/base ./style ./facts ./merged --weight 0.5 --weight 1
      dora-convert merge org/base me/adapter --push-to-hub me/merged --no-local
    """
    if len(refs) < (1 if keywords["no_local"] else 2):
        inputs_and_out = "an ADAPTER and OUT, and mostly a BASE before them"
        raise click.UsageError(f"merge needs {'a BASE and an ADAPTER' if keywords['in_place'] else inputs_and_out}.")
    from ..verbs.merge import merge as verb

    has_out = not (keywords["in_place"] or keywords["no_local"])
    inputs, out = (refs[:-1], refs[-1]) if has_out else (refs, None)
    base, adapters = (inputs[0], inputs[1:]) if len(inputs) > 1 else (None, inputs)
    report = verb(base, adapters, out, **keywords)
    sink.show(report, report.out)
    if sink.for_people and not hasattr(report, "plan"):
        for line in next_steps(Path(report.out)):
            sink.notice(line)


def next_steps(out: Path) -> Iterator[str]:
    """Yield commands that run a merged language model, one a server; nothing for other models and for repos."""
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    names = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(names, list) or not any(str(name).endswith("ForCausalLM") for name in names):
        return
    folder = shlex.quote(str(out) if not str(out).startswith("-") else f"./{out}")
    yield "next, one of:"
    yield f"  vLLM       vllm serve {folder}"
    yield f"  llama.cpp  python convert_hf_to_gguf.py {folder} --outfile model.gguf"
    yield f"  MLX        mlx_lm.generate --model {folder} --prompt Hello"
    yield f"  Ollama     echo FROM {folder} > Modelfile; ollama create merged -f Modelfile"
