"""Fixtures that several test files share: the models."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tiny_models import NAMES, tiny_folder, tiny_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched and converted on first use."""
    spec = importlib.util.spec_from_file_location("deploy_smollm2", ROOT / "deploy" / "smollm2.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder: Path = module.folder()
    return folder


@pytest.fixture(scope="session")
def tiny_models() -> dict[str, PreTrainedModel]:
    """Tiny random models by architecture. Tests leave them as they are."""
    return {name: tiny_model(name) for name in NAMES}


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same models as folders."""
    parent = tmp_path_factory.mktemp("models")
    return {name: tiny_folder(name, parent) for name in NAMES}
