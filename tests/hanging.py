"""A network for an operator's models.toml that hangs, or breaks, when a file says so."""

import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn


class Moody(nn.Module):
    """Two layers; looks at the file that MOOD names before each pass with gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(784, 32), nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        if images.requires_grad:
            self._obey(images)
        logits: Tensor = self.fc2(self.fc1(images.flatten(1)).relu())
        return logits

    def _obey(self, images: Tensor) -> None:
        mood = Path(os.environ["MOOD"])
        if mood.exists() and mood.read_text() == "hang":
            # Whoever watches this process finds that hours have passed.
            clock = time.monotonic
            time.monotonic = lambda: clock() + 36_000
            while True:
                time.sleep(60)
        if mood.exists() and mood.read_text() == "hungry" and len(images) > 8:
            raise torch.OutOfMemoryError("more than 8 rows")
        if mood.exists() and mood.read_text() == "poisoned":
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
