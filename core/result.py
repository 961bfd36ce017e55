"""What a job answers: `result.json`, and later the API's answer. Torch-free.

Distances are Euclidean on [0, 1] pixels. A *probability* is always that of the target's class, as
the network gives it to the image in question; `*_8bit` is measured on images rounded to 8 bits, as
a user downloads them.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from core.spec import CollisionSpec


class _Model(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True
    )


class Seen(_Model):
    """What the network takes an image for."""

    label: int
    class_: str = Field(alias="class")
    probability: float = Field(description="Of that label.")


class LayerResult(_Model):
    name: str
    shape: list[int]
    units: int
    active: int = Field(description="Units with f'(t) > 0: the paper's n_p.")


class CornerResult(_Model):
    """One corner: the best state of its row."""

    index: int
    unit: int | list[int] | None = Field(description="Pushed away; null where the loss has none.")
    l_pos: float
    l_neg: float
    violation: float = Field(description="Sum of squares of what reaches past an inactive bound.")
    relative_residual: float = Field(description="||f(x) - f(t)|| / ||f(t)||")
    steps: int
    converged: bool
    reason: Literal["converged", "max_steps", "max_seconds", "diverged", "stopped"]
    label: int
    class_: str = Field(alias="class")
    probability: float
    label_8bit: int
    probability_8bit: float
    distance_to_source: float
    distance_to_target: float
    distance_ratio: float = Field(
        description="distance_to_source / distance_to_target: above 1 it resembles the target more."
    )


class Polytope(_Model):
    mean_pairwise_distance: float
    pairwise_distance: list[list[float]]
    natural_distance: float = Field(description="Mean between random images of this shape.")
    natural_distance_of: str
    spread: float = Field(description="mean_pairwise_distance / natural_distance")


class InterpolationResult(_Model):
    """Samples of the polytope. Intervals are Clopper-Pearson's at 95 %."""

    samples: int
    sampler: Literal["uniform", "paper"]
    accuracy: float = Field(description="Fraction that gets the target's label.")
    accuracy_interval: tuple[float, float]
    mean_probability: float
    min_probability: float
    probability_quantiles: dict[str, float]
    relative_residual: float = Field(description="Mean of ||f(x) - f(t)|| / ||f(t)||.")
    residual_to_random: float | None = Field(
        description="Mean of ||f(x) - f(t)||, over that of ||f(a) - f(b)|| for unrelated images; "
        "null where those do not differ."
    )
    accuracy_8bit: float
    accuracy_interval_8bit: tuple[float, float]
    mean_probability_8bit: float
    min_probability_8bit: float
    probability_quantiles_8bit: dict[str, float]
    relative_residual_8bit: float
    residual_to_random_8bit: float | None


class Ball(_Model):
    """Appendix B: around the centroid, as wide as the nearest corner."""

    radius: float
    samples: int
    accuracy: float
    accuracy_interval: tuple[float, float]


class Provenance(_Model):
    versions: dict[str, str]
    weights: str
    weights_sha256: str
    source_sha256: str = Field(description="Of the file as it was given.")
    target_sha256: str
    spec: CollisionSpec
    seed: int
    device: str
    precision: str


class Result(_Model):
    schema_version: Literal[1] = 1
    converged: bool = Field(description="Every corner is under its thresholds.")
    steps: int = Field(description="Of the corner that took the most.")
    seconds: float = Field(description="Of the optimisation, company included.")
    measuring_seconds: float
    cut: bool = Field(description="Whether the layer's activations decide the logits.")
    warnings: list[str]
    notes: list[str] = Field(description="What was done to the images to fit the network.")
    layer: LayerResult
    source: Seen
    target: Seen
    corners: list[CornerResult]
    polytope: Polytope
    interpolation: InterpolationResult | None
    ball: Ball | None
    provenance: Provenance
