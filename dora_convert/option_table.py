"""List every option of the verbs once: its default, its help, and the values that it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

METHODS = ("sum", "chain", "linear", "ties", "dare", "dare-ties", "della", "magnitude-prune")
COLLECTED = 1 << 18
"""Magnitudes of one change that are held at most while a threshold is looked for."""
SAMPLE, FEWEST, MOST = 1 << 6, 1 << 15, 1 << 19
"""A search looks at one of so many magnitudes first, at so many at least, and at so many at most."""
HELD = 3.3
"""The width of an interval of shares that holds the k-th largest, times the root of the sample's size."""
PIECE, LOWEST = 1 << 17, 16
"""Elements of a block whose changes are computed together, and the least rows of them."""
STRIP = 1 << 17
"""Elements of a block that are pruned and elected together."""
TILE_WIDTH = 1 << 11
"""The most columns of them: a product needs many rows."""


class Option(NamedTuple):
    """An option's default and help, and the values that the option takes."""

    default: Any
    help: str
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    least: int | None = None


BUDGET = "Bytes held at once, beyond Python and torch"

# fmt: off
OPTIONS = {
    "init": Option("preserve", "preserve: m = ‖W + sBA‖, same outputs; pretrained: m = ‖W‖, as the paper.",
                   choices=("preserve", "pretrained")),
    "split": Option(False, "Leave modules that cannot be DoRA as LoRA in OUT/lora."),
    "kind": Option("dora", "dora: magnitudes and factors; lora: factors alone.", choices=("dora", "lora")),
    "embeddings": Option("full", "Embeddings and heads that differ; skip leaves out norms and biases, too.",
                         choices=("full", "lora", "skip")),
    "level": Option("weights", "Compare every element of the weights, or the models' outputs.",
                    choices=("weights", "outputs")),
    "samples": Option(8, "Random inputs whose outputs are compared, for each module.", "N", least=0),
    "prompt": Option((), "Text to run the models on; repeatable.", "TEXT"),
    "prompts": Option(None, "File with one more text a line; UTF-8.", "FILE"),
    "top": Option(10, "Modules shown, those that moved most first.", "N", least=1),
    "spectrum": Option(False, "Compute all singular values of ΔW, for effective ranks of larger matrices, too."),
    "csv": Option(None, "Write the points as a table, too.", "FILE.csv"),
    "plot": Option(None, "Draw ΔM over ΔD: .png and .svg need matplotlib, .html does not.", "FILE"),
    "report": Option(None, "Write the report as a self-contained page, too.", "FILE.html"),
    "weight": Option((), "Strength, one per ADAPTER in their order.", "W"),
    "method": Option(None, "Combination of several; default sum; chain: each on the last's result.", choices=METHODS),
    "density": Option((), "Share of each change to keep; one, or one per ADAPTER.", "F"),
    "seed": Option(0, "Of dare's and della's random choices.", "N", least=0),
    "majority_sign": Option("total", "Sign to elect: of the sum, or of most changes.", choices=("total", "frequency")),
    "base": Option(None, "The base itself, for values that no record holds.", "REF"),
    "rank": Option(None, "The rank, lowered if no module has so much to give.", "N", least=1),
    "energy": Option(None, "Or the share of squared singular values to keep.", "F"),
    "max_error": Option(None, "Or the largest relative error of each module.", "F"),
    "ranks": Option("one", "one: the largest that any module needs, for all; per-module: each its own, which not all "
                    "programs read right.", choices=("one", "per-module")),
    "exact_svd": Option(False, "Never use the randomised SVD, which large matrices get."),
    "to": Option(None, "Format of the new adapter: peft, diffusers, kohya, mlx, torchtune, gguf.", "FORMAT"),
    "format": Option("peft", "Format of the new adapter.", "NAME"),
    "dtype": Option("auto", "Dtype to store, except for magnitudes; auto keeps each tensor's own.",
                    choices=("auto", "bfloat16", "float16", "float32")),
    "legacy_config": Option(False, "Write config.json's rope_parameters in the older fields, too."),
    "max_shard_size": Option(None, "Such as 5GB or 4GiB; default the base's own shards.", "SIZE"),
    "device": Option("auto", "Device that computes.", "auto|cpu|cuda[:N,…]|mps"),
    "compute_dtype": Option("auto", "Dtype of the arithmetic, rounded once at the end; auto is float64.",
                            choices=("auto", "float64", "float32")),
    "max_memory": Option(None, f"{BUDGET}; default 160MiB, on a GPU 4GiB.", "SIZE"),
    "workers": Option(None, "Threads; default one per processor, at most 4.", "N", least=1),
    "cluster": Option(None, "Run on a Ray cluster: auto, local[:N] or ray://HOST:PORT; needs the extra ray.",
                      "ADDRESS"),
    "include": Option((), "Only modules of this name; repeatable.", "GLOB"),
    "exclude": Option((), "No modules of this name; repeatable.", "GLOB"),
    "undo": Option(None, "Record that unmerge needs: norms (default; up to rounding) or exact (bit for bit).",
                   choices=("norms", "exact", "none")),
    "dequantize": Option(False, "Write a quantised base's weights dense, all of them."),
    "dequantize_touched": Option(False, "Write dense only what the adapter changes, and what servers fuse with it."),
    "requantize": Option(False, "Round changed weights of few bits to the old bits again; the loss is printed."),
    "base_as": Option(None, "Merge onto what a quantised training saw of a 16-bit BASE; needs the extra nf4.",
                      choices=("nf4", "nf4-double", "fp4", "int8")),
    "verify": Option(True, "Check a sample of the output before publishing."),
    "verify_outputs": Option(False, "Run base + adapter and the output on sample prompts before publishing."),
    "allow_unmatched": Option(False, "Warn about adapter tensors that match nothing in the base."),
    "ignore_field": Option((), "Accept a field of adapter_config.json that is refused otherwise.", "NAME"),
    "ignore_file": Option((), "Leave out a weight file beside the adapter; repeatable.", "NAME"),
    "alpha": Option(None, "The adapter's alpha, if its files do not hold it.", "A"),
    "scaling": Option(None, "The adapter's scaling itself, such as alpha/r, if its files do not hold it.", "S"),
    "axis": Option(None, "Along which side magnitudes lie, if nothing else tells.", choices=("rows", "columns")),
    "enable_lora": Option(None, "Which blocks of loralib's MergedLinear have factors.", "true,false,…"),
    "strict": Option(False, "Refuse an adapter that lacks what its config says was trained."),
    "base_model": Option(None, "The base's repo id for card and config, if only a path is known.", "ID"),
    "push_to_hub": Option(None, "Upload the result, too, while it is written.", "REPO_ID"),
    "private": Option(False, "Create the repo private; default the account's own."),
    "create_pr": Option(False, "Open a pull request instead of committing."),
    "commit_message": Option(None, "Message of the commit or the pull request.", "TEXT"),
    "no_local": Option(False, "With --push-to-hub: keep nothing on this machine, take no OUT."),
    "dry_run": Option(False, "Print the plan and write nothing."),
    "follow_links": Option(False, "Copy side files that are links to files elsewhere."),
    "overwrite": Option(False, "Replace an existing OUT."),
    "in_place": Option(False, "Change the checkpoint itself; take no OUT."),
    "allow_lossy": Option(False, "In place, do even what cannot be undone bit for bit."),
    "cache": Option(True, "Keep downloads in the Hub cache, or remove them at the end."),
    "token": Option(None, "Hub token; better is HF_TOKEN or hf auth login.", "TOKEN"),
    "on_progress": Option(None, "Called with the bytes done and the bytes in all, from worker threads."),
    "on_notice": Option(None, "Called with each notice and each warning."),
}
# fmt: on
"""All options, in the order of help and signatures."""

QUANTISED = {"all": "--dequantize", "touched": "--dequantize-touched", "again": "--requantize"}
"""Options by what they make of quantised weights."""
REPEATED = ("include", "exclude", "ignore_field", "ignore_file")
"""Options that may be given several times."""


@dataclass(frozen=True)
class Combination:
    """The way in which several changes of one tensor become one."""

    method: str = "sum"
    densities: tuple[float, ...] = ()
    """For each adapter, the share of its change that is kept; empty if the method keeps all."""
    seed: int = 0
    majority_sign: str = "total"

    def __post_init__(self) -> None:
        if self.method not in METHODS or not all(0 < density <= 1 for density in self.densities):
            raise ValueError("not a known method, or a density that is not a share")

    @property
    def is_sum(self) -> bool:
        """True if weighted changes are added up."""
        return self.method in ("sum", "linear")

    @property
    def prunes(self) -> bool:
        """True if only the elements of largest magnitude are kept."""
        return self.method in ("ties", "magnitude-prune")

    @property
    def draws(self) -> bool:
        """True if the elements that are kept are drawn at random."""
        return self.method in ("dare", "dare-ties", "della")

    @property
    def elects(self) -> bool:
        """True if only the changes of the majority's sign count."""
        return self.method in ("ties", "dare-ties", "della")

    @property
    def words(self) -> list[str]:
        """The options that ask for it on the command line; none for a sum."""
        words = [] if self.method == "sum" else [f"--method {self.method}"]
        several = len(set(self.densities)) > 1
        words += [f"--density {density!r}" for density in (self.densities if several else self.densities[:1])]
        words += [f"--seed {self.seed}"] if self.seed else []
        return words + (["--majority-sign frequency"] if self.majority_sign != "total" else [])

    def cost(
        self, count: int, matrix: tuple[int, int], block: int, width: int, *, rank: int = 0, whole: bool = False
    ) -> int:
        """Return the bytes that combining `count` edits needs: for a block, and for a tensor's thresholds.

        `rank` is that of all edits together. Changes of a `whole` block are computed at once, else of pieces.
        """
        if self.method == "chain":
            return 2 * block * width
        piece = block if whole else min(block, piece_height(matrix[1]) * matrix[1])
        total = count * piece * width + (32 * piece if self.draws else 0)
        total += min(STRIP, piece) * (2 * width + count + 4)
        return total + (9 * block + self._search_cost(count, matrix, rank) if self.prunes else 0)

    def _search_cost(self, count: int, matrix: tuple[int, int], rank: int) -> int:
        """Return the bytes that searches for thresholds need: for numbers, for factors in three forms, for norms."""
        (rows, columns), numel = matrix, matrix[0] * matrix[1]
        exact = (count + 3) * min(numel, COLLECTED) * 8
        quick = 8 * count * sample_size(numel) + (count + 3) * held_elements(numel) * 20
        factors = rank * 20 * columns + min(12 * rank * rows, 12 * count * COLLECTED) + 32 * count * rows
        return max(exact, quick if held_elements(numel) <= COLLECTED else 0) + factors


def piece_height(columns: int) -> int:
    """Return how many rows of changes are computed together."""
    return max(LOWEST, PIECE // max(1, columns))


def sample_size(numel: int) -> int:
    """Return how many magnitudes of a change a search for its threshold looks at first."""
    return max(1, min(max(numel // SAMPLE, FEWEST), MOST, numel))


def held_elements(numel: int) -> int:
    """Return how many elements of a change a search holds: those near the k-th largest of the sample."""
    return min(numel, math.ceil(HELD * numel / math.sqrt(sample_size(numel))))


SUM = Combination()


def combines(given: Mapping[str, Any]) -> bool:
    """Return True if options ask for another combination than the default."""
    return any(given[name] != OPTIONS[name].default for name in ("method", "density", "seed", "majority_sign"))
