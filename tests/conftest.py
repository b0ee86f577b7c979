"""Fixtures: a toy checkpoint and adapters written by hand, without PEFT or transformers."""

from __future__ import annotations

import importlib.metadata
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub reads it
os.environ.setdefault("TQDM_DISABLE", "1")

from .toy import Base, make_adapter, make_base


def pytest_report_header(config):
    names = ("torch", "safetensors", "huggingface_hub", "peft", "transformers")
    return "with " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


@pytest.fixture
def base(tmp_path) -> Base:
    """A bf16 checkpoint of two layers in two shards, with side files."""
    return make_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path, base):
    """A DoRA adapter of rank 4 on both layers of that checkpoint."""
    return make_adapter(tmp_path / "adapter", base, dora=True)
