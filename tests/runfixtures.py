"""The fixtures of every room that trains: one tiny model folder, one file of preferences, one thread."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny import tiny_folder
from tinyrun import make_data


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """In a room whose conftest imports it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return tiny_folder("llava_onevision", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), 6)
