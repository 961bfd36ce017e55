"""What a job answers: `result.json`, and later the API's answer. Torch-free.

Distances are Euclidean on [0, 1] pixels. A *probability* is always that of the target's class, as
the network gives it to the image in question; `*_8bit` is measured on images rounded to 8 bits, as
a user downloads them.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

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
    steps: int = Field(description="To the state that is kept, the best one seen.")
    converged: bool = Field(
        description="Under its thresholds; in a hull all corners are, or none, and points between."
    )
    reason: Literal["converged", "max_steps", "max_seconds", "diverged", "stopped"] = Field(
        description="Why it took no further step: a hull ends as `converged` at its goal only."
    )
    label: int
    class_: str = Field(alias="class")
    probability: float
    label_8bit: int
    probability_8bit: float
    distance_to_source: float
    distance_to_target: float
    distance_ratio: float | None = Field(
        description="distance_to_source / distance_to_target: above 1 it resembles the target "
        "more; null where it is the target."
    )


class Polytope(_Model):
    mean_pairwise_distance: float
    pairwise_distance: list[list[float]]
    natural_distance: float = Field(description="Mean between random images of this shape.")
    natural_distance_of: str = Field(
        description="What that was taken of: in colour ImageNet's images by the paper's 37538.22 "
        "(224 x 224, 0-255), in grey MNIST's; at other sizes scaled with the root of the pixels."
    )
    spread: float = Field(description="mean_pairwise_distance / natural_distance")
    # Results of earlier versions have none of these. Means are over pairs of different corners,
    # null where no pair has a value.
    mean_ssim: float | None = None
    ssim: list[list[float]] | None = Field(
        None,
        description="Structural similarity (Wang et al. 2004), the mean over channels: 1 where two "
        "corners are alike. Null under 11 pixels a side, and past 2^28 values in all pairs.",
    )
    mean_low_pass_share: float | None = None
    low_pass_share: list[list[float | None]] | None = Field(
        None,
        description="||L d|| / ||d|| of the difference d, L a Gaussian with a sigma of 4 pixels: "
        "0.07 for white noise, near 1 for what is coarse. Null where d is 0.",
    )
    mean_perceptual: float | None = None
    perceptual: list[list[float | None]] | None = Field(
        None, description="LPIPS by AlexNet, where its weights are on the machine."
    )
    perceptual_missing: str | None = Field(None, description="Why, and what to do about it.")


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
    # What the convergence of a hull rests on are a few points between its corners, drawn afresh;
    # these are of all samples. Results of earlier versions have none of them.
    max_relative_residual: float | None = Field(None, description="The worst sample's.")
    under_thresholds: float | None = Field(
        None, description="Fraction under the thresholds that corners have to meet."
    )
    max_over_threshold: float | None = Field(
        None,
        description="The worst sample's L_pos or violation, over its threshold: above 1 it is "
        "further from the target's features than a corner may be.",
    )
    max_relative_residual_8bit: float | None = None
    under_thresholds_8bit: float | None = None
    max_over_threshold_8bit: float | None = None


class Ball(_Model):
    """Appendix B: around the centroid, as wide as the nearest corner."""

    radius: float = Field(description="Of the ball, in which points are drawn.")
    samples: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    # Results of earlier versions have none of these.
    clipped: bool | None = Field(
        None, description="Whether points were brought back to valid pixels: then they lie nearer."
    )
    least_radius: float | None = Field(None, description="At which a point was looked at.")
    mean_radius: float | None = None
    largest_radius: float | None = None


class Worst(_Model):
    """The point of the polytope with the least margin that a search has found.

    The margin is the logit of the target's class minus the greatest other one: negative where the
    network takes the point for something else. `*_8bit` is of that image, rounded.
    """

    weights: list[float] = Field(description="Of the corners; they add up to 1.")
    margin: float
    probability: float
    label: int
    class_: str = Field(alias="class")
    margin_8bit: float
    probability_8bit: float
    label_8bit: int


class Edges(_Model):
    """What is known of the lines between every two corners, where nothing is proved of their hull.

    On a line the network is piecewise linear. So where all lines were walked, piece by piece, no
    point on them has a margin under `least_margin`, but for the rounding of float64.
    """

    least_margin: float = Field(
        description="Of the walked part, and of the midpoints of all lines: the target's logit "
        "minus the greatest other one."
    )
    weights: list[float] = Field(description="Of the corners, where that is.")
    label: int = Field(description="What the network takes that point for.")
    pieces: int
    fraction: float = Field(description="Of the lines' length, walked in the time allowed.")
    seconds: float
    expected_seconds: float | None = Field(
        description="That all would take, by proportion; null where all were walked, or nothing."
    )


class Certificate(_Model):
    """What is proved of all infinitely many points between the corners of `hull`.

    `certified`: each has the target's class, by a margin of at least `bound`. `refuted`: the
    mixture `weights` has not. `unknown`: for `reason`. The proof is of the network in exact
    arithmetic; evaluated in float32, its logits are nowhere off by more than `float32_error`.
    """

    outcome: Literal["certified", "refuted", "unknown"]
    hull: Literal["float", "8bit"] = Field(description="Of the float corners or of the 8-bit ones.")
    bound: float | None = Field(description="Below every margin; null where not even that is.")
    certified_fraction: float = Field(description="Of the hull's volume.")
    subsimplices: int = Field(description="Into which the hull was cut for it.")
    seconds: float
    weights: list[float] | None
    reason: str | None
    float32_error: float | None
    holds_in_float32: bool | None = Field(
        None,
        description="Whether `bound` is over twice `float32_error`, so that an evaluation in "
        "float32 gives each point the class, too. Null where nothing is certified, and in results "
        "of earlier versions.",
    )
    edges: Edges | None = Field(
        None, description="Walked where the outcome is unknown and the network can be read."
    )


class Exact(_Model):
    """The polytope of pixels that share the target's activations, and what is least in it."""

    source_budget: float | None
    dimension: int = Field(description="Of its affine hull.")
    dimension_paper: int = Field(description="The paper's d - n_p.")
    unbounded: list[bool] = Field(
        description="Of each corner's unit: whether it had no bound if pixels had none."
    )
    least_distance_to_source: float
    least_distance_to_target: float
    collision_error: float = Field(description="The corners' largest ||f(x) - f(t)|| / ||f(t)||.")


class Provenance(_Model):
    versions: dict[str, str]
    weights: str
    weights_sha256: str
    source_sha256: str = Field(description="Of the file as it was given.")
    target_sha256: str
    patch_set_sha256: str | None = Field(None, description="Of its geometry and its images.")
    spec: Annotated[CollisionSpec, BeforeValidator(CollisionSpec.stored)]
    seed: int
    device: str
    precision: str


class Result(_Model):
    schema_version: Literal[1] = 1
    converged: bool = Field(
        description="All that was asked for is reached: `collides`, and of a hull `goal_reached`."
    )
    collides: bool | None = Field(
        None,
        description="Every corner is under its thresholds, and in a hull the points between them "
        "that were drawn; null in results of earlier versions.",
    )
    goal_reached: bool | None = Field(
        None, description="Whether the spread is that of `hull.goal`; null without a hull."
    )
    steps: int = Field(description="Taken until the last corner ended.")
    seconds: float = Field(description="Of the optimisation, company included.")
    measuring_seconds: float
    cut: bool = Field(
        description="Whether the layer's activations decide the logits: tested on sample images, "
        "the source and the corners."
    )
    cut_proved: bool | None = Field(
        None,
        description="Whether that follows from the network's operations for every image, too. "
        "Null in results of earlier versions.",
    )
    warnings: list[str]
    notes: list[str] = Field(description="What was done to the images to fit the network.")
    missing: dict[str, str] = Field(
        {}, description="Files that results can have and this one has not, by name, and why."
    )
    layer: LayerResult
    source: Seen
    target: Seen
    corners: list[CornerResult]
    polytope: Polytope
    interpolation: InterpolationResult | None
    ball: Ball | None
    # Results of earlier versions have none of these.
    worst: Worst | None = None
    certificate: Certificate | None = None
    exact: Exact | None = None
    provenance: Provenance


def claims(result: Result) -> Iterator[tuple[str, str]]:
    """What a result says of all points between its corners, beyond samples: name and sentence."""
    if worst := result.worst:
        kept = worst.label == result.target.label
        taken = "still the target's class" if kept else f"taken for {worst.class_}, a violation"
        kept_8bit = worst.label_8bit == result.target.label
        rounded = "" if kept_8bit == kept else ", another class" if kept else ", the target's class"
        yield (
            "Worst point found",
            f"margin {worst.margin:.3g}, {taken}; in 8 bits {worst.margin_8bit:.3g}{rounded}",
        )
    if proof := result.certificate:
        of = "8-bit corners" if proof.hull == "8bit" else "float corners"
        told = f"{proof.certified_fraction:.1%} of the hull of the {of}; {proof.reason}"
        if proof.outcome == "certified":
            told = f"every point between the {of} has a margin of at least {proof.bound:.3g}"
            if proof.holds_in_float32 is not None:
                told += ", in float32 too" if proof.holds_in_float32 else ", if not in float32"
        elif proof.outcome == "refuted":
            told = f"a point between the {of} has another class"
        walked = f"; {_walked(proof.edges)}" if proof.edges else ""
        yield "Proof", f"{proof.outcome}: {told}".rstrip(".") + walked
    if exact := result.exact:
        yield (
            "Exact polytope",
            f"dimension {exact.dimension} (the paper's d - n_p: {exact.dimension_paper}); least "
            f"distance to source {exact.least_distance_to_source:.2f}, to target "
            f"{exact.least_distance_to_target:.2f}; collision error {exact.collision_error:.1e}",
        )


def _walked(edges: Edges) -> str:
    count = len(edges.weights) * (len(edges.weights) - 1) // 2
    between = "the edge" if count == 1 else f"the {count} edges"
    least = f"a margin of at least {edges.least_margin:.3g}"
    if edges.fraction == 1:
        told = f"every point on {between} between them has {least}"
        return f"{told} ({edges.pieces} linear pieces)"
    told = f"of {between} between them {100 * edges.fraction:.2g} % was walked"
    told += f" in {edges.seconds:.0f} s"
    if edges.expected_seconds is None:
        return told
    return f"{told}, with {least}; all would take about {_rough(edges.expected_seconds)}"


def _rough(seconds: float) -> str:
    for unit, length in (("years", 31_557_600), ("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.0f} s"
