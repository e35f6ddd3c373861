"""A tiny model folder, a tiny reward model and a file of criticised answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewarddata import critiqued_file, reward_folder
from runfixtures import model_folder, one_thread

__all__ = ["model_folder", "one_thread"]


@pytest.fixture(scope="session")
def critiqued(tmp_path_factory) -> Path:
    return critiqued_file(tmp_path_factory.mktemp("critiqued"), 6)


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory) -> Path:
    return reward_folder(tmp_path_factory.mktemp("reward") / "model")
