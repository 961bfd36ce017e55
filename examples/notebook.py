# ruff: noqa: E402 - a notebook imports where it needs
"""One job from a notebook: paste the cells, or open this file where `# %%` makes them.

Start a service with `polycollide up`, or set POLYCOLLIDE_URL and POLYCOLLIDE_API_KEY.
"""

# %% A 3 that the network is to take for a 7, five times over
from polycollide import Client

client = Client()
SEVEN = "sample:mnist/7-0"
job = client.submit("sample:mnist/3-0", SEVEN, model="mnist-mlp", layer="fc1", corners=5)
job = client.wait(job, on_progress=lambda job: print(job.status, job.status_reason or ""))
result = job.check().result  # raises JobFailed with a sentence where there is none

# %% What was found
print(f"converged: {result['converged']} in {result['steps']} steps")
print(f"spread: {result['polytope']['spread']:.3f} of the distance between natural images")
for corner in result["corners"]:
    print(
        f"corner {corner['index']} pushes unit {corner['unit']}: a {corner['class']} "
        f"({corner['probability']:.4f}), {corner['distance_to_source']:.2f} from the source, "
        f"{corner['distance_to_target']:.2f} from the target"
    )

# %% The corners as an array [K, C, H, W] in [0, 1], and mixtures of them
import numpy as np

corners = client.corners(job)
weights = np.random.default_rng(0).dirichlet(np.ones(len(corners)), size=10)
mixtures = np.tensordot(weights, corners, axes=1)

# %% What the network made of 2000 mixtures: floats, and as you would download them
samples = client.samples(job)
for kind in ("", "_8bit"):
    hits = samples[f"label{kind}"] == result["target"]["label"]
    print(f"{hits.mean():.2%} of {len(hits)} mixtures{kind} are taken for the target")

# %% What it makes of a mixture of our own: any array can be an image of a job
cheap = {"corners": 1, "interpolation": {"samples": 0}, "ball_samples": 0, "figures": False}
judge = client.submit(mixtures[0], SEVEN, model="mnist-mlp", layer="fc1", **cheap)
seen = client.wait(judge).check().result["source"]
print(f"the first mixture is taken for a {seen['class']} (probability {seen['probability']:.4f})")

# %% Above the corners, below the mixtures (needs matplotlib)
import matplotlib.pyplot as plt

figure, axes = plt.subplots(2, len(corners), figsize=(2 * len(corners), 4))
for row, images in zip(axes, (corners, mixtures), strict=True):
    for axis, image in zip(row, images, strict=False):
        axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1)
        axis.axis("off")
plt.show()
