"""The networks that a worker has loaded, and what is opened in them. The least used goes first."""

from collections import OrderedDict

import torch

from core import models
from core.job import Subject
from core.models import Model
from core.spec import CollisionSpec

MAX_NETWORKS = 4  # VGG-16, a large one, takes 550 MB


class Bench:
    """Loads networks on `device` and keeps the last `MAX_NETWORKS`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._networks: OrderedDict[tuple[str, str | None], Model] = OrderedDict()
        self._subjects: dict[str, tuple[tuple[str, str | None], Subject]] = {}

    def load(self, spec: CollisionSpec) -> None:
        """Loads the network of `spec` unless it is here. Raises as `models.load` does."""
        name = (spec.model, spec.weights)
        if name not in self._networks:
            loaded = models.load(spec.model, weights=spec.weights, device=self._device)
            self._networks[name] = loaded
            if len(self._networks) > MAX_NETWORKS:
                gone, _ = self._networks.popitem(last=False)
                self._subjects = {k: s for k, s in self._subjects.items() if s[0] != gone}
        self._networks.move_to_end(name)

    def subject(self, spec: CollisionSpec) -> Subject:
        """The network of `spec`, opened at its layer.

        Raises:
            UnknownName, ModelUnavailable, UntappableLayer: as `Subject.open` does.
        """
        self.load(spec)
        name = (spec.model, spec.weights)
        if spec.batch_key not in self._subjects:
            opened = Subject.of(self._networks[name], spec)
            self._subjects[spec.batch_key] = (name, opened)
        return self._subjects[spec.batch_key][1]
