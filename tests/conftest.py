"""What the tests share: small arithmetic data, made once, and computing in float32."""
import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))                     # so that plain `pytest` finds the modules, too

import data  # noqa: E402
import train  # noqa: E402
from data import arithmetic  # noqa: E402
from engine import hardware  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A data folder that holds a small arithmetic, made once."""
    folder = tmp_path_factory.mktemp("data")
    data.load("arithmetic", folder=folder, problems=300)
    return folder


@pytest.fixture(scope="session")
def task(folder):
    """The small arithmetic, for tests that read it only."""
    return data.load("arithmetic", folder=folder, problems=300)


@pytest.fixture(scope="session")
def scripts_folder(folder, tmp_path_factory):
    """The same data for the scripts: meta.json names the default number of problems, so that
    data.load takes the small files as they are."""
    copy = tmp_path_factory.mktemp("scripts_data")
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    meta = data.read_meta(copy / "arithmetic")
    meta["made_with"] |= dataclasses.asdict(arithmetic.Knobs())
    data.write_meta(copy / "arithmetic", meta)
    return copy


@pytest.fixture
def computing_in(monkeypatch):
    """Call it with a dtype: everything is computed on the CPU in it, whatever the machine has."""
    def computing_in(dtype):
        for room in (hardware, train):
            monkeypatch.setattr(room, "hardware", lambda cfg: (torch.device("cpu"), dtype, None))

    return computing_in


@pytest.fixture
def float32(computing_in):
    computing_in(torch.float32)
