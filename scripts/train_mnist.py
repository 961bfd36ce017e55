"""Train the MNIST networks that the project ships, and write the digits and distances beside them.

    python scripts/train_mnist.py                      # downloads MNIST, rewrites core/assets
    python scripts/train_mnist.py --data DIR --out DIR # from local idx, idx.gz or npz files

The same seed gives the same weights, bit for bit, on the same kind of processor and torch version.
MNIST is by Yann LeCun and Corinna Cortes, CC BY-SA 3.0.
"""

import argparse
import gzip
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from core.models import ASSETS, SHIPPED

Bytes = NDArray[np.uint8]

LEARNING_RATE = 1e-3
BATCH = 128
PAIRS = 100_000
IDX = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class Mnist:
    """Raw bytes: images `[N, 28, 28]` and labels `[N]`."""

    train_images: Bytes
    train_labels: Bytes
    test_images: Bytes
    test_labels: Bytes

    def sha256(self) -> str:
        """Of the arrays' bytes in the order above, so that idx and npz files agree."""
        digest = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="folder with idx, idx.gz or train.npz and test.npz files"
    )
    parser.add_argument("--model", choices=[*SHIPPED, "all"], default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=ASSETS, help="default: core/assets")
    options = parser.parse_args()

    try:
        data = read(options.data) if options.data else download()
    except (OSError, ValueError, RuntimeError) as error:
        parser.error(f"MNIST cannot be read: {error}")
    options.out.mkdir(parents=True, exist_ok=True)
    names = list(SHIPPED) if options.model == "all" else [options.model]
    networks = []
    for name in names:
        network = train(name, data, seed=options.seed, epochs=options.epochs)
        right = predict(network, pixels(data.test_images)).argmax(1).numpy() == data.test_labels
        metadata = {
            "model": name,
            "test_accuracy": f"{right.mean():.4f}",
            "data_sha256": data.sha256(),
            "seed": str(options.seed),
            "epochs": str(options.epochs),
            "torch": torch.__version__,
        }
        file = options.out / f"{name}.safetensors"
        file.write_bytes(sorted_header(save(network.state_dict(), metadata)))
        print(json.dumps({"file": str(file), **metadata}), flush=True)
        networks.append(network)
    if options.model == "all":
        write_samples(networks, data, options.out / "mnist")
        write_natural_distance(data, options.out / "natural_distance.json")


def train(name: str, data: Mnist, *, seed: int, epochs: int) -> nn.Module:
    """Adam on the cross-entropy of mini-batches, every random number from `seed`."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    network = SHIPPED[name]()
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    images = pixels(data.train_images)
    labels = torch.from_numpy(data.train_labels).long()
    for epoch in range(epochs):
        order = torch.randperm(len(images))
        for start in range(0, len(images), BATCH):
            rows = order[start : start + BATCH]
            loss = nn.functional.cross_entropy(network(images[rows]), labels[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        print(f"{name}: epoch {epoch + 1} of {epochs}, last loss {loss.item():.4f}", flush=True)
    return network.eval()


def sorted_header(content: bytes) -> bytes:
    """safetensors writes its metadata in a random order: sort it, so that files can be compared."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":"))
    return content[:8] + header.encode().ljust(size) + content[8 + size :]


def pixels(images: Bytes) -> Tensor:
    """Bytes `[N, 28, 28]` -> `[N, 1, 28, 28]` in [0, 1]."""
    return torch.from_numpy(images).unsqueeze(1).float() / 255


@torch.no_grad()
def predict(network: nn.Module, images: Tensor) -> Tensor:
    """Probabilities `[N, 10]`."""
    starts = range(0, len(images), 1000)
    return torch.cat([network(images[start : start + 1000]).softmax(1) for start in starts])


def write_samples(networks: list[nn.Module], data: Mnist, folder: Path) -> None:
    """The first two test digits of each class that every network is sure of, and right about."""
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = pixels(data.test_images), torch.from_numpy(data.test_labels).long()
    sure = torch.stack([predict(n, images).gather(1, labels[:, None]) > 0.9 for n in networks])
    usable = sure.all(0).squeeze(1)
    for digit in range(10):
        chosen = (usable & (labels == digit)).nonzero().flatten()[:2]
        for number, row in enumerate(chosen.tolist()):
            Image.fromarray(data.test_images[row]).save(folder / f"{digit}-{number}.png")


def write_natural_distance(data: Mnist, file: Path) -> None:
    """How far natural images lie apart: the mean L2 distance of pixels in [0, 1]."""
    generator = np.random.default_rng(0)
    images = data.test_images.reshape(len(data.test_images), -1).astype(np.float64) / 255
    first = generator.integers(len(images), size=PAIRS)
    second = (first + generator.integers(1, len(images), size=PAIRS)) % len(images)
    distances = [
        np.linalg.norm(images[a] - images[b], axis=1)
        for a, b in zip(np.split(first, 100), np.split(second, 100), strict=True)
    ]
    entries = [
        {
            "shape": [1, 28, 28],
            "distance": round(float(np.concatenate(distances).mean()), 4),
            "pairs": PAIRS,
            "of": "MNIST test images",
        },
        {
            "shape": [3, 224, 224],
            "distance": round(37538.22 / 255, 4),
            "of": "ImageNet images (the paper's 37538.22 for 224 x 224 on the 0-255 scale)",
        },
    ]
    file.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def download() -> Mnist:
    """torchvision's download, into the user's cache."""
    from torchvision.datasets import MNIST

    cache = Path.home() / ".cache" / "polycollide"
    MNIST(cache, download=True)
    return read(cache / "MNIST" / "raw")


def read(folder: Path) -> Mnist:
    """`train.npz` and `test.npz` (images, labels), or the four idx files, gzipped or not."""
    arrays = []
    for part in ("train", "test"):
        archive = folder / f"{part}.npz"
        if archive.is_file():
            with np.load(archive) as content:
                arrays += [content["images"], content["labels"]]
        else:
            arrays.append(read_idx(folder / f"{IDX[part]}-images-idx3-ubyte"))
            arrays.append(read_idx(folder / f"{IDX[part]}-labels-idx1-ubyte"))
    return Mnist(*arrays)


def read_idx(file: Path) -> Bytes:
    """LeCun's format: two zeros, the type (8: uint8), the rank, big-endian sizes, the bytes."""
    if file.is_file():
        content = file.read_bytes()
    else:
        with gzip.open(file.with_name(file.name + ".gz")) as stream:
            content = stream.read()
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{file} is not an idx file of bytes")
    rank = content[3]
    shape = np.frombuffer(content, ">u4", rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()


if __name__ == "__main__":
    main()
