"""What every test shares: no network, one thread, one seed, and the markers that need something of the machine."""

from __future__ import annotations

import importlib.util
import os

# Before torch and transformers are imported. The tensors are small: a second thread costs more than it brings.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# The same examples in every run: a red test stays red until it is mended.
hypothesis.settings.register_profile("lora-lite", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("lora-lite")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for marker in item.iter_markers("optional_backend"):
        for module in marker.args:
            if importlib.util.find_spec(module.partition(".")[0]) is None or importlib.util.find_spec(module) is None:
                pytest.skip(f"needs the package {module}, which the constraints leave out")
