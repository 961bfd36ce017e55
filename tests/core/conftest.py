"""What several of these tests start from: the shipped networks and digits."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from core.models import ASSETS, Model, load


@pytest.fixture(scope="session")
def digits() -> Tensor:
    """The 20 shipped digits in [0, 1], [20, 1, 28, 28], two of each class in turn."""
    files = sorted((ASSETS / "mnist").glob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    return torch.from_numpy(pixels).unsqueeze(1) / 255


@pytest.fixture(scope="session")
def mlp() -> Model:
    return load("mnist-mlp")


@pytest.fixture(scope="session")
def cnn() -> Model:
    return load("mnist-cnn")
