"""The names that callers may rely on."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from importlib.metadata import version

import pytest

import dora_convert
from dora_convert import errors

NAMES = {
    "AdapterReport", "AnalyzeReport", "CheckpointReport", "DoraConvertError", "DryRunReport", "HubError", "MadeDryRun",
    "MadeReport", "MalformedError", "MergeReport", "NumericalError", "OutputError", "OutputsReport",
    "PlanError", "PushReport", "Recovered", "RefError", "UnmergeReport", "UnsupportedError", "UsageError",
    "VerificationError", "VerifyReport", "__version__", "analyze", "convert", "extract", "from_lora", "inspect",
    "iter_merged", "merge", "merge_state_dict", "push", "to_lora", "trainable_share", "unmerge", "verify",
}  # fmt: skip


def test_exported_names():
    """__all__ is what is documented, and every name is there."""
    assert set(dora_convert.__all__) == NAMES
    for name in NAMES:
        assert getattr(dora_convert, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'unmerg'"):
        dora_convert.unmerg  # noqa: B018


def test_signatures_list_every_option():
    """Options are declared in groups, and yet a signature shows each one; a keyword that is not an option is named."""
    parameters = inspect.signature(dora_convert.merge).parameters
    assert parameters["device"].default == "auto"
    assert parameters["device"].annotation is str
    assert parameters["on_notice"].kind is inspect.Parameter.KEYWORD_ONLY
    assert inspect.signature(dora_convert.to_lora).parameters["max_memory"].default == "auto"
    assert "exact_svd: bool = False" in str(inspect.signature(dora_convert.extract))
    with pytest.raises(
        TypeError, match=r"merge\(\) got an unexpected keyword argument 'devise'; did you mean 'device'\?"
    ):
        dora_convert.merge("base", "adapter", "out", devise="cpu")


def test_version_is_the_distributions():
    """One version, in one place."""
    assert dora_convert.__version__ == version("dora-convert")


def test_import_is_light():
    """`import dora_convert` imports no torch."""
    code = "import sys, dora_convert; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_errors_are_one_tree_and_picklable():
    """Every error is a DoraConvertError, has a kind of its own, and survives a process boundary."""
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert all(issubclass(found, dora_convert.DoraConvertError) for found in classes)
    assert len({found.kind for found in classes}) == len(classes)
    for found in classes:
        error = found("what", hint="do this", faults=[errors.Fault("x", "y")])
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.hint, again.faults) == (found, str(error), "do this", error.faults)


def test_unsupported_is_a_not_implemented_error():
    """Each error is also the built-in one that it stands for."""
    assert issubclass(dora_convert.UnsupportedError, NotImplementedError)
    assert issubclass(dora_convert.PlanError, ValueError)
