"""Merge at the end of a training: a callback for the Trainer of transformers, and so for those of TRL.

    >>> from dora_convert.integrations.trainer import MergeCallback
    >>> trainer.add_callback(MergeCallback("merged"))  # doctest: +SKIP

Needs the extra `dora-convert[trainer]`.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..settings import require_extra

require_extra("trainer", "MergeCallback")

from transformers import TrainerCallback  # noqa: E402 - after the message that says what to install

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from ..reports.merge import MergeReport

logger = logging.getLogger("dora_convert")
CONFIG = "adapter_config.json"
ADAPTER = "adapter"
"""The folder in the trainer's output for an adapter that no checkpoint of the training holds."""


class MergeCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Merges the trained adapter into its base when the training ends, in the process that saves.

    The adapter is read from the training's last checkpoint if that is of the last step, since sharded trainings
    gather it there; else it is saved beside the checkpoints first. The base is read from its files or the Hub,
    not from the model in memory, which may be quantised.
    """

    def __init__(
        self, out: str | os.PathLike[str] | None = None, *, base: str | os.PathLike[str] | None = None, **options: Any
    ) -> None:
        """Take the folder of the result, by default `merged` in the trainer's output, and options of `merge`.

        `base` is the base in full precision; None for the one that the adapter names.
        """
        self.out, self.base, self.options = out, base, options
        self.report: MergeReport | None = None
        """The report of the merge, after the training."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Find or save the adapter, and merge it.

        Raises UsageError for a model without an adapter, and the errors of `merge`.
        """
        del control
        folder = Path(str(args.output_dir))
        adapter = folder / f"checkpoint-{state.global_step}"
        if not (adapter / CONFIG).exists():
            adapter = self._save(objects.get("model"), folder / ADAPTER, writes=state.is_world_process_zero)
        if state.is_world_process_zero:
            from ..api import public
            from ..verbs.merge import merge

            out = self.out or folder / "merged"
            self.report = public(merge)(self.base, adapter, out, **self.options)  # type: ignore[assignment]
            logger.info("merged the trained adapter: %s", self.report.out if self.report else out)

    def _save(self, model: Any, folder: Path, *, writes: bool) -> Path:
        """Save a model's adapter and return its folder; every process takes part."""
        if not hasattr(model, "peft_config"):
            raise UsageError(
                "The trained model has no adapter.", hint="MergeCallback is for models of PEFT: get_peft_model(…)"
            )
        model.save_pretrained(str(folder), is_main_process=writes)
        return folder
