"""Every digit is made to look like every other one to the network: 90 jobs in one batch.

    polycollide up &                   # or POLYCOLLIDE_URL and POLYCOLLIDE_API_KEY of a service
    python examples/batch_submit.py --corners 5

Prints how far apart the corners of each pair lie, and writes every result to digits.jsonl.
"""

import argparse
import sys
from itertools import permutations
from pathlib import Path

import numpy as np

from polycollide import Batch, Client


def show(batch: Batch) -> None:
    """One line that is written over again and again."""
    counts = {status: count for status, count in batch.request_counts.items() if count}
    print(f"\r\033[K{counts}", end="", file=sys.stderr, flush=True)


def main() -> None:
    """Submits, waits, collects."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mnist-mlp")
    parser.add_argument("--layer", default="fc1")
    parser.add_argument("--corners", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("digits.jsonl"))
    options = parser.parse_args()

    spec = {"model": options.model, "layer": options.layer, "corners": options.corners}
    # An image may also be a path, an array or bytes: each distinct one is uploaded once.
    items = [
        {
            "custom_id": f"{source} {target}",
            "source": f"sample:mnist/{source}-0",
            "target": f"sample:mnist/{target}-0",
            "spec": spec,
        }
        for source, target in permutations(range(10), 2)
    ]
    spread = np.full((10, 10), np.nan)
    with Client() as client:
        batch = client.batch(items, labels=["digits"])
        for refused in batch.errors:
            print(f"{refused.custom_id}: {refused.message}")
        client.wait_batch(batch, on_progress=show)
        print(file=sys.stderr)
        with options.out.open("w") as lines:
            for item in client.iter_results(batch):
                lines.write(f"{item.model_dump_json()}\n")
                source, target = map(int, (item.custom_id or "").split())
                if item.result:
                    spread[source, target] = item.result["polytope"]["spread"]
                elif item.error:
                    print(f"{item.custom_id}: {item.error.message}")

    print("Spread of the corners; rows are sources, columns are targets")
    print("     " + "".join(f"{target:7d}" for target in range(10)))
    for source, row in enumerate(spread):
        print(f"{source:5d}" + "".join(" " * 7 if np.isnan(s) else f"{s:7.3f}" for s in row))


if __name__ == "__main__":
    main()
