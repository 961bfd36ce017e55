"""What a job asks for: settings, their bounds, and presets. Torch-free; every room reads it."""

import hashlib
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)

from core.errors import InvalidSpec, UnknownName

# Of this form of settings: to be raised with every change that who knows the form before cannot
# read (a field, a value, a wider bound). Workers leave jobs of a newer form to newer workers.
SCHEMA_VERSION = 1
MAX_CORNERS = 256
# Units that a job may name in all: eight sets of all 4096 of VGG-16's FC-6. A spec then has under
# 400 KB, however it names them.
MAX_UNITS = 2**15
# Of the pictures of a result, in bytes: frames and text, and images enlarged, as many as are shown.
SHEETS, ENLARGED, SHOWN = 2**20, 8, 34
Unit = Annotated[int, Field(ge=0, lt=2**31)]
UnitSet = Annotated[list[Unit], Field(min_length=1, max_length=4096)]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\w.()#:+-]+$")]
# ImageNet's classes have spaces and apostrophes in their names.
ClassName = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if type(value) is int else value),
    Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$"),
]
Loss = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
# Clopper-Pearson at 100 000 already resolves 3 in 100 000; more only fills disks.
Samples = Annotated[int, Field(ge=0, le=100_000)]


_STORED = {"stored": True}


class Strict(BaseModel):
    """Immutable; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Relative(Strict):
    """A number in units of the target's own features, so that it suits networks of any scale.

    For a threshold the unit is the target's feature energy ||f(t)||^2, for beta it is alpha times
    the root mean square of f'(t) over active units, for gamma alpha times the energy over R(P) of
    equation 5's weights.
    """

    relative: Annotated[float, Field(gt=0, le=1e3, allow_inf_nan=False)]


Threshold = Loss | Relative


class Interpolation(Strict):
    """How the polytope is sampled."""

    samples: Samples = Field(2000, description="Points drawn from the simplex of the corners.")
    sampler: Literal["uniform", "paper"] = Field(
        "uniform",
        description="`uniform` is Dirichlet(1). `paper` draws each weight from what the earlier "
        "ones left, so that points crowd the first corner.",
    )


class Hull(Strict):
    """How the whole hull of the corners is optimised, where `objective` is `hull`.

    The other terms are weighed against alpha L_pos in units of the target's feature energy.
    """

    points: int = Field(
        5, ge=1, le=64, description="Points between the corners that have to collide, too."
    )
    sampling: Literal["uniform", "worst"] = Field(
        "uniform",
        description="The points are drawn afresh every 10 steps, uniformly; `worst` ones move from "
        "there to where they collide least.",
    )
    diversity: Weight = Field(1.0, description="Weight of the spread.")
    goal: float = Field(
        1.0, gt=0, le=10, description="The spread, as in results, beyond which no more is gained."
    )
    low_pass: float = Field(
        0.0,
        ge=0,
        le=64,
        description="Corners are driven apart in what a Gaussian of so many pixels leaves of them: "
        "as things differ, not as noise does. 0: in their pixels.",
    )
    margin: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="The part of the target's own margin (its logit minus the next) that corners "
        "and points have to keep; 0 looks at the layer alone.",
    )
    source: Weight = Field(
        0.0, description="Weight of the squared distance to the source, over the natural one's."
    )


class Patches(Strict):
    """What images are composed of, where `parametrization` is `patches` (section 4 of the paper).

    Windows as large as the set's patches cover the source image. Each gets its nearest patch of
    the set, with the patch's surroundings.
    """

    set: Name | None = Field(
        None, description="A name that `polycollide patches list` shows; windows have its size."
    )
    stride: int = Field(12, ge=1, le=1024, description="Pixels from one window to the next.")
    surround: int = Field(
        16, ge=0, le=1024, description="Pixels that each side of a patch's surroundings has."
    )
    source: bool = Field(
        False, description="Whether the source image's own patches, if in the set, may be taken."
    )


class Certify(Strict):
    """How far a proof is sought that the hull of the corners has the target's class throughout.

    The clock ends it where the number of sub-simplices does not.
    """

    hull: Literal["float", "8bit"] = Field(
        "float", description="Of the corners as they are, or as their 8-bit files hold them."
    )
    subsimplices: int = Field(20_000, ge=1, le=1_000_000, description="Bounded at most.")
    seconds: float = Field(
        10.0,
        gt=0,
        le=86400,
        description="Spent at most; as many again on the edges, if that leaves it open.",
    )


class CollisionSpec(Strict):
    """One job's settings: everything but the two images.

    Losses are the paper's (section 2): alpha L_pos + beta L_neg + gamma R. Images are in [0, 1],
    so a learning rate given for 0-255 pixels is to be divided by 255^2 for `gd` and `momentum`.
    """

    schema_version: Annotated[
        int, Field(ge=1, le=SCHEMA_VERSION), AfterValidator(lambda _: SCHEMA_VERSION)
    ] = Field(SCHEMA_VERSION, description="Of this form of settings; older ones become this one.")
    preset: str | None = Field(
        None, description="Settings to start from; whatever else is set here wins over them."
    )
    model: Name = Field(description="A name that `polycollide models` lists.")
    weights: Name | None = Field(
        None, description="Which of the model's weights, such as `IMAGENET1K_V1`."
    )
    layer: Name = Field(
        description="A layer that `polycollide layers` lists: a module's path, `#1` behind it for "
        "the second call of a module that runs twice."
    )
    target_class: ClassName | None = Field(
        None,
        description="The class, by name or index, that the target must have: a job whose target "
        "the network takes for something else is refused.",
    )
    corners: int = Field(5, ge=1, le=MAX_CORNERS, description="K, the corners of the polytope.")
    objective: Literal["corners", "plain", "hull"] = Field(
        "corners",
        description="`corners` gives each corner a unit of its own (L_pos and L_neg); `plain` is "
        "equation 1, ||f(x) - f(t)||^2, and gives every corner the same image; `hull` is `corners` "
        "with points between them that collide as well, and drives the corners apart.",
    )
    hull: Hull = Field(Hull(), description="Settings of the objective `hull`.")
    parametrization: Literal["pixels", "patches"] = Field(
        "pixels",
        description="What is optimised: `pixels` of the corners, which begin as the source; or, of "
        "natural `patches` laid over it, how much each counts at each pixel.",
    )
    patches: Patches = Field(Patches(), description="Settings of the parametrization `patches`.")
    solver: Literal["gradient", "exact", "null_space"] = Field(
        "gradient",
        description="`exact` finds corners of the polytope itself by linear programs, one a unit; "
        "`null_space` leaves no unit free: f' is the target's all over (Ozbulak et al. 2022). Both "
        "are for layers that are affine in the image, where mixtures of corners collide as well.",
    )
    source_budget: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = Field(
        None, description="How far these may move any pixel from the source; null: anywhere."
    )
    units: (
        Literal["first", "random", "reachable"]
        | Annotated[list[Unit | UnitSet], Field(min_length=1, max_length=MAX_CORNERS)]
    ) = Field(
        "first",
        description="The inactive unit, or set of units, that each corner pushes away (at a max "
        "pool: that lose the maximum): the first ones (the paper's), random ones, those whose "
        "gradient at the source can most lower them, or a list with one entry a corner.",
    )
    alpha: float = Field(1.0, gt=0, le=1e9, description="Weight of L_pos.")
    beta: Weight | Relative = Field(Relative(relative=1.0), description="Weight of L_neg.")
    gamma: Weight | Relative = Field(
        0.0, description="Weight of the total variation R(P) of the weights of patches."
    )
    negative: Literal["absolute", "hinge"] = Field(
        "hinge",
        description="What the other inactive units pay: |f'| as in the paper, or relu(f'), which "
        "is the constraint itself.",
    )
    pixel_range: Literal["valid", "free"] = Field(
        "valid", description="Whether pixels are kept in [0, 1] at every step."
    )
    optimizer: Literal["gd", "momentum", "adam"] = Field(
        "adam",
        description="`gd` is a plain gradient step; `momentum` averages gradients 0.99 to 0.01.",
    )
    learning_rate: float = Field(0.01, gt=0, le=1e6, description="Step size on [0, 1] pixels.")
    schedule: Literal["constant", "rising", "cosine"] = Field(
        "constant", description="How the rate moves over max_steps: up from 0, or down to 0."
    )
    l_pos_threshold: Threshold = Field(
        Relative(relative=0.01), description="A corner has converged under this L_pos ..."
    )
    violation_threshold: Threshold | None = Field(
        Relative(relative=0.01),
        description="... and under this violation; null tests L_pos alone, as the paper does.",
    )
    max_steps: int = Field(2000, ge=1, le=1_000_000, description="Steps a corner may take.")
    max_seconds: float = Field(
        3600.0, gt=0, le=7 * 86400, description="Seconds the optimisation may take."
    )
    interpolation: Interpolation = Field(
        Interpolation(), description="How the polytope between the corners is sampled."
    )
    ball_samples: Samples = Field(2000, description="Points of the ball of Appendix B; 0: none.")
    worst_starts: int = Field(
        64,
        ge=0,
        le=4096,
        description="Starts of the search for the worst point of the polytope, at most: corners, "
        "midpoints of two, the centroid (of these, where they are more, the worst), then uniform "
        "draws; 0: none.",
    )
    certify: Certify | None = Field(None, description="Whether a proof is sought.")
    snapshots: int = Field(
        6,
        ge=0,
        le=64,
        description="Intermediate images kept per corner, every 10 steps at most (Appendix C).",
    )
    figures: bool = Field(True, description="Whether pictures of the result are drawn.")
    precision: Literal["fp32", "bf16", "tf32"] = Field(
        "fp32", description="Of the optimisation; results are always measured in fp32."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Of random units and of every sample.")

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("preset"), str):
            return data
        if info.context == _STORED:  # the preset has said what it had to say, at that time
            return data
        if data["preset"] not in PRESETS:
            raise ValueError(str(UnknownName("preset", data["preset"], PRESETS)))
        return _over(PRESETS[data["preset"]], data)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if isinstance(self.units, list) and len(self.units) != self.corners:
            raise ValueError(
                f"units lists {len(self.units)} entries for {self.corners} corners; "
                "give one entry for each corner."
            )
        if isinstance(self.units, list):
            named = sum(1 if isinstance(each, int) else len(each) for each in self.units)
            if named > MAX_UNITS:
                raise ValueError(
                    f"units names {named:,} units in all, over {MAX_UNITS:,}; name fewer."
                )
        if self.objective == "hull" and self.corners < 2:
            raise ValueError("A hull has two corners or more; give corners, or another objective.")
        if self.solver == "gradient" and self.source_budget is not None:
            raise ValueError("source_budget bounds the exact solver; set solver to exact as well.")
        asked = self.objective, self.pixel_range, self.parametrization
        if self.solver != "gradient" and asked != ("corners", "valid", "pixels"):
            raise ValueError("The exact solver takes objective corners and valid pixels.")
        if self.parametrization == "patches" and self.patches.set is None:
            raise ValueError("Patches come from a patch set; set patches.set to a set's name.")
        return self

    @classmethod
    def stored(cls, data: Any) -> Self:
        """Settings as they were written, resolved: no preset of today's is applied to them.

        What their form did not have yet is as if it were not there. Raises pydantic's
        ValidationError on a newer form.
        """
        return data if isinstance(data, cls) else cls.model_validate(data, context=_STORED)

    @property
    def rows(self) -> int:
        """Images that the job has in each pass."""
        return self.corners + (self.hull.points if self.objective == "hull" else 0)

    def file_bytes(self, image: Sequence[int]) -> int:
        """Bytes that the files of a result come to at most, for an `image` [C, H, W].

        What `core.artifacts` encodes, where it is stored and not deflated, and the pictures on
        the way: snapshots are thinned as they become too many, so that some are shown and dropped.
        """
        values = math.prod(image)
        arrays = 4 * values * (self.corners * (1 + self.snapshots) + 1)
        thinned = max(0.0, math.log2(self.max_steps / (20 * max(1, self.snapshots))))
        shown = math.ceil(self.snapshots * (2 + thinned))
        pngs = (values + 1024) * (self.corners * (1 + shown) + 1)
        samples = self.interpolation.samples * (4 * self.corners + 32)
        sheets = SHEETS + ENLARGED * min(self.corners + 2, SHOWN) * values
        return arrays + pngs + samples + 2**16 + self.figures * sheets

    def check_files(self, image: Sequence[int], limit: int) -> None:
        """Raises InvalidSpec where the files of a result could come to more than `limit` bytes."""
        if (most := self.file_bytes(image)) > limit:
            raise InvalidSpec(
                f"A result of {self.corners} corners and {self.snapshots} snapshots of "
                f"{'x'.join(map(str, image))} has files of up to {most / 2**20:,.0f} MiB, over "
                f"{limit / 2**20:,.0f} MiB; ask for fewer corners or snapshots."
            )

    @property
    def patch_set(self) -> str | None:
        """The patch set that the job needs, if any."""
        return self.patches.set if self.parametrization == "patches" else None

    @property
    def batch_key(self) -> str:
        """Jobs with the same key can share one engine's forward and backward pass."""
        shared = (self.model, self.weights, self.layer, self.precision)
        loop = (self.optimizer, self.objective == "plain")
        p = self.patches
        laid = (p.set, p.stride, p.surround) if self.parametrization == "patches" else ()
        return hashlib.sha256(repr((*shared, *loop, *laid)).encode()).hexdigest()[:16]


def _over(preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What is given, over the preset; settings that hold others, each of those by itself."""
    merged = preset | given
    for name, value in given.items():
        own = value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value
        if isinstance(own, dict) and isinstance(preset.get(name), dict):
            merged[name] = preset[name] | own
    return merged


# Each fixes whatever decides a result but the seed. `paper-*`: what the paper or the authors' code
# states; the comment names what they leave open.
PRESETS: dict[str, dict[str, Any]] = {
    # Open in the paper: alpha and beta (a larger beta spreads more, but leaves some pairs of digits
    # above the threshold), the rate, and the pixel range (corners with free pixels do not collide
    # once they are rounded to 8 bits).
    "paper-mnist": {
        "model": "mnist-mlp",
        "layer": "fc1",
        "corners": 5,
        "objective": "corners",
        "parametrization": "pixels",
        "solver": "gradient",
        "units": "first",
        "alpha": 1.0,
        "beta": 0.15,
        "gamma": 0.0,
        "negative": "absolute",
        "pixel_range": "valid",
        "optimizer": "gd",
        "learning_rate": 0.01,
        "schedule": "constant",
        "l_pos_threshold": 5.0,
        "violation_threshold": None,
        "max_steps": 5000,
        "max_seconds": 3600.0,
        "interpolation": {"samples": 2000, "sampler": "uniform"},
        "ball_samples": 2000,
        "worst_starts": 64,
        "certify": None,
        "precision": "fp32",
    },
    # alpha is 100 on TensorFlow's half-squared norm, the rate 0.01 on 0-255 pixels. Open: when to
    # stop (the code runs up to a million steps without a test).
    "paper-vgg16-pixels": {
        "model": "vgg16",
        "layer": "classifier.0",
        "corners": 5,
        "objective": "corners",
        "parametrization": "pixels",
        "solver": "gradient",
        "units": "first",
        "alpha": 50.0,
        "beta": 10.0,
        "gamma": 0.0,
        "negative": "absolute",
        "pixel_range": "valid",
        "optimizer": "momentum",
        "learning_rate": 0.01 / 255**2,
        "schedule": "constant",
        "l_pos_threshold": {"relative": 0.01},
        "violation_threshold": None,
        "max_steps": 10_000,
        "max_seconds": 86400.0,
        "interpolation": {"samples": 2000, "sampler": "uniform"},
        "ball_samples": 2000,
        "worst_starts": 64,
        "certify": None,
        "precision": "fp32",
    },
    # Ours, for any network and layer: chosen on ten pairs of digits that no table reports.
    "hull": {
        "corners": 5,
        "objective": "hull",
        "parametrization": "pixels",
        "solver": "gradient",
        "units": "first",
        "alpha": 1.0,
        "beta": {"relative": 0.3},
        "gamma": 0.0,
        "negative": "hinge",
        "pixel_range": "valid",
        "optimizer": "adam",
        "learning_rate": 0.02,
        "schedule": "cosine",
        "l_pos_threshold": {"relative": 0.01},
        "violation_threshold": {"relative": 0.01},
        "max_steps": 2000,
        "max_seconds": 3600.0,
        "hull": {
            "points": 5,
            "sampling": "uniform",
            "diversity": 3.0,
            "goal": 1.0,
            "low_pass": 0.0,
            "margin": 0.0,
            "source": 0.0,
        },
        "interpolation": {"samples": 2000, "sampler": "uniform"},
        "ball_samples": 2000,
        "worst_starts": 64,
        "certify": {"hull": "float", "subsimplices": 20_000, "seconds": 10.0},
        "precision": "fp32",
    },
    # With a set of 32 px patches, as in the text. alpha is 100 on TensorFlow's half-squared
    # norm; beta and gamma are the first of the three pairs the paper names. The gradient by control
    # parameters does not depend on the scale of pixels, so the rate needs no conversion. Open: the
    # rate (at first this one moves pixels about as far as the preset above does), and when to stop.
    "paper-vgg16-patches-text": {
        "model": "vgg16",
        "layer": "classifier.0",
        "corners": 5,
        "objective": "corners",
        "parametrization": "patches",
        "patches": {"stride": 12, "surround": 16, "source": False},
        "solver": "gradient",
        "units": "first",
        "alpha": 50.0,
        "beta": 10.0,
        "gamma": 100.0,
        "negative": "absolute",
        "pixel_range": "valid",
        "optimizer": "gd",
        "learning_rate": 2e-4,
        "schedule": "rising",
        "l_pos_threshold": {"relative": 0.01},
        "violation_threshold": None,
        "max_steps": 30_000,
        "max_seconds": 86400.0,
        "interpolation": {"samples": 2000, "sampler": "uniform"},
        "ball_samples": 2000,
        "worst_starts": 64,
        "certify": None,
        "precision": "fp32",
    },
    # The same by the authors' code, with a set of 56 px patches. Six times as many sources lie over
    # a pixel, so that a step moves it a third as far: hence this rate.
    "paper-vgg16-patches-code": {
        "model": "vgg16",
        "layer": "classifier.0",
        "corners": 5,
        "objective": "corners",
        "parametrization": "patches",
        "patches": {"stride": 7, "surround": 28, "source": False},
        "solver": "gradient",
        "units": "first",
        "alpha": 50.0,
        "beta": 10.0,
        "gamma": 100.0,
        "negative": "absolute",
        "pixel_range": "valid",
        "optimizer": "gd",
        "learning_rate": 5e-4,
        "schedule": "rising",
        "l_pos_threshold": {"relative": 0.01},
        "violation_threshold": None,
        "max_steps": 30_000,
        "max_seconds": 86400.0,
        "interpolation": {"samples": 2000, "sampler": "uniform"},
        "ball_samples": 2000,
        "worst_starts": 64,
        "certify": None,
        "precision": "fp32",
    },
    # Ours, for any network and layer. No proof is sought: those of networks that take photographs
    # do not end.
    "patches": {
        "corners": 5,
        "objective": "hull",
        "parametrization": "patches",
        "patches": {"stride": 12, "surround": 16, "source": False},
        "solver": "gradient",
        "units": "first",
        "alpha": 1.0,
        "beta": {"relative": 1.0},
        "gamma": {"relative": 0.1},
        "negative": "hinge",
        "pixel_range": "valid",
        "optimizer": "adam",
        "learning_rate": 0.3,
        "schedule": "cosine",
        "l_pos_threshold": {"relative": 0.04},
        "violation_threshold": {"relative": 0.02},
        "max_steps": 500,
        "max_seconds": 3600.0,
        "hull": {
            "points": 5,
            "sampling": "uniform",
            "diversity": 4.0,
            "goal": 0.2,
            "low_pass": 4.0,
            "margin": 0.0,
            "source": 0.0,
        },
        "interpolation": {"samples": 2000, "sampler": "uniform"},
        "ball_samples": 2000,
        "worst_starts": 64,
        "certify": None,
        "precision": "fp32",
    },
}
