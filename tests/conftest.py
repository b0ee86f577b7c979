"""Fixtures: a toy checkpoint and adapters written by hand, without PEFT or transformers."""

from __future__ import annotations

import gc
import importlib.metadata
import os

import fsspec
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub reads it
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch does: models this small make threads wait
os.environ.pop("CI", None)  # where it is set, pytest shows differences in full: an hour for megabytes

import torch
from hypothesis import settings

from dora_convert.storage import refs

from . import spawner
from .commands import exit_code
from .hubserver import Hub
from .toy import Base, make_adapter, make_base

settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")  # for other examples: --hypothesis-profile default


def pytest_report_header(config):
    names = ("torch", "safetensors", "huggingface_hub", "peft", "transformers")
    return "with " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def pytest_configure():
    """Have nobody wait for the disk: no machine loses its power here."""
    os.fsync = spawner.looked_at


def pytest_collection_finish():
    """Have garbage collections leave alone what lasts as long as the tests: two million objects, a second for each."""
    gc.freeze()


@pytest.fixture
def base(tmp_path) -> Base:
    """A bf16 checkpoint of two layers in two shards, with side files."""
    return make_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path, base):
    """A DoRA adapter of rank 4 on both layers of that checkpoint."""
    return make_adapter(tmp_path / "adapter", base, dora=True)


@pytest.fixture
def run(capsys):
    """Run a command line; (exit code, stdout, stderr)."""

    def call(*words):
        code, found = exit_code(*words), capsys.readouterr()
        return code, found.out, found.err

    return call


@pytest.fixture(params=["zip", "legacy"])
def save(request, tmp_path):
    """torch.save in one of its two formats; returns the file."""

    def saver(value, name="pytorch_model.bin", **options):
        torch.save(value, tmp_path / name, _use_new_zipfile_serialization=request.param == "zip", **options)
        return tmp_path / name

    saver.format = request.param
    return saver


@pytest.fixture
def hub(tmp_path):
    """An empty Hub."""
    root = tmp_path / "hub"
    root.mkdir()
    server = Hub({}, root)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def store(monkeypatch, tmp_path):
    """An empty object store in memory; the user's cache is a temporary folder."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    monkeypatch.setattr(refs, "STORES", ("s3", "memory"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    yield system
    system.store.clear()
