"""Whole jobs: what the result says is checked against a second computation in float64."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy.spatial.distance import pdist
from torch import nn
from torch.nn import functional

from core import artifacts, certify, exact, images, interpolate, job
from core import outcome as outcome_of
from core.errors import InvalidSpec, UnknownName, UntappableLayer
from core.models import ASSETS, Classifier, Model, Normalize
from core.outcome import NotFinite, Outcome, measure, run_alone
from core.polytope import NotAffine
from core.result import Result, claims
from core.spec import CollisionSpec
from core.taps import open_tap

CPU = torch.device("cpu")


def subject_of(**settings) -> tuple[CollisionSpec, job.Subject]:
    spec = CollisionSpec.model_validate({"preset": "paper-mnist"} | settings)
    return spec, job.Subject.open(spec, CPU)


def digit(subject: job.Subject, name: str) -> images.Loaded:
    return images.load(*images.read(f"sample:mnist/{name}"), subject.model.preprocessing)


def run(source: str = "3-0", target: str = "7-0", **settings) -> tuple[job.Job, Outcome]:
    spec, subject = subject_of(**settings)
    return run_alone(subject, spec, digit(subject, source), digit(subject, target))


@pytest.fixture(scope="module")
def paper() -> tuple[job.Job, Outcome]:
    return run()


def mlp_by_hand(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f' of fc1 and the class probabilities of mnist-mlp, in float64."""
    w = {k: v.astype(np.float64) for k, v in load_file(ASSETS / "mnist-mlp.safetensors").items()}
    pre = pixels.reshape(len(pixels), -1).astype(np.float64) @ w["fc1.weight"].T + w["fc1.bias"]
    hidden = np.maximum(np.maximum(pre, 0) @ w["fc2.weight"].T + w["fc2.bias"], 0)
    logits = hidden @ w["fc3.weight"].T + w["fc3.bias"]
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return pre, odds / odds.sum(1, keepdims=True)


def test_the_papers_setting_collides_everywhere_and_in_8_bits(paper):
    _, outcome = paper
    result = outcome.result
    assert result.converged
    assert result.cut and result.cut_proved
    assert (result.source.class_, result.target.class_) == ("3", "7")
    assert len(result.corners) == 5
    assert all(corner.l_pos < 5 for corner in result.corners)
    assert result.interpolation.samples == 2000
    assert result.interpolation.accuracy == result.interpolation.accuracy_8bit == 1
    for mean in (result.interpolation.mean_probability, result.interpolation.mean_probability_8bit):
        assert mean == pytest.approx(result.target.probability, abs=0.01)


def test_pixels_stay_valid_where_that_is_asked(paper):
    _, outcome = paper
    assert outcome.corners.min() >= 0
    assert outcome.corners.max() <= 1
    free = run(pixel_range="free", ball_samples=100)[1].corners
    assert free.min() < 0


def test_every_number_of_a_corner_is_that_of_a_float64_computation(paper):
    done, outcome = paper
    source, target = done.source.pixels, done.target.pixels
    pre, probability = mlp_by_hand(outcome.corners)
    goal, _ = mlp_by_hand(target[None])
    rounded = np.round(outcome.corners.clip(0, 1) * 255) / 255
    _, probability_8bit = mlp_by_hand(rounded)
    active = goal[0] >= 0
    first_inactive = np.flatnonzero(~active)
    for i, corner in enumerate(outcome.result.corners):
        assert corner.unit == first_inactive[i]
        others = ~active
        others[corner.unit] = False
        f, f_t = np.maximum(pre[i], 0), np.maximum(goal[0], 0)
        expected = {
            "l_pos": ((pre[i] - goal[0])[active] ** 2).sum(),
            "l_neg": pre[i][corner.unit] + np.abs(pre[i][others]).sum(),
            "violation": (f[~active] ** 2).sum(),
            "relative_residual": np.linalg.norm(f - f_t) / np.linalg.norm(f_t),
            "label": probability[i].argmax(),
            "probability": probability[i][7],
            "label_8bit": probability_8bit[i].argmax(),
            "probability_8bit": probability_8bit[i][7],
            "distance_to_source": np.linalg.norm(outcome.corners[i] - source),
            "distance_to_target": np.linalg.norm(outcome.corners[i] - target),
        }
        for name, value in expected.items():
            assert getattr(corner, name) == pytest.approx(value, rel=1e-4), name
        ratio = expected["distance_to_source"] / expected["distance_to_target"]
        assert corner.distance_ratio == pytest.approx(ratio, rel=1e-5)
    assert outcome.result.layer.active == (goal > 0).sum()


def test_the_polytope_is_measured_as_a_float64_computation_measures_it(paper):
    _, outcome = paper
    result = outcome.result
    distances = pdist(outcome.corners.reshape(5, -1).astype(np.float64))
    assert result.polytope.mean_pairwise_distance == pytest.approx(distances.mean(), rel=1e-9)
    natural = json.loads((ASSETS / "natural_distance.json").read_text())[0]["distance"]
    assert result.polytope.spread == pytest.approx(distances.mean() / natural, rel=1e-9)
    weights = outcome.samples.weights
    mixtures = np.tensordot(weights, outcome.corners.astype(np.float64), 1)
    for suffix, pixels in (("", mixtures), ("_8bit", np.round(mixtures * 255) / 255)):
        _, probability = mlp_by_hand(pixels)
        recorded = outcome.samples.arrays()[f"probability{suffix}"]
        # In 8 bits a mixture on the edge between two values may be rounded either way.
        assert recorded == pytest.approx(probability[:, 7], abs=1e-5 if not suffix else 1e-3)
        seen = result.interpolation.model_dump()[f"accuracy{suffix}"]
        assert seen == (probability.argmax(1) == 7).mean()
        mean = result.interpolation.model_dump()[f"mean_probability{suffix}"]
        assert mean == pytest.approx(recorded.mean())


def test_the_same_job_gives_the_same_result_twice(paper):
    _, outcome = run()
    assert np.array_equal(outcome.corners, paper[1].corners)
    times = {"seconds", "measuring_seconds"}
    assert outcome.result.model_dump(exclude=times) == paper[1].result.model_dump(exclude=times)


def test_a_seed_changes_the_samples_only():
    one, other = (run(seed=seed, ball_samples=0)[1] for seed in (0, 1))
    assert np.array_equal(one.corners, other.corners)
    assert not np.array_equal(one.samples.weights, other.samples.weights)


def test_a_result_survives_json(paper):
    result = paper[1].result
    text = result.model_dump_json()
    assert type(result).model_validate_json(text) == result
    assert json.loads(text)["target"]["class"] == "7"
    assert json.loads(text)["provenance"]["spec"]["preset"] == "paper-mnist"


def test_samples_and_ball_can_be_left_out():
    outcome = run(interpolation={"samples": 0}, ball_samples=0)[1]
    assert outcome.result.interpolation is None
    assert outcome.result.ball is None
    assert outcome.samples is None


def test_the_ball_has_the_distance_of_the_nearest_corner_as_its_radius(paper):
    corners = paper[1].corners.astype(np.float64).reshape(5, -1)
    nearest = np.linalg.norm(corners - corners.mean(0), axis=1).min()
    assert paper[1].result.ball.radius == pytest.approx(nearest, rel=1e-4)


def test_defaults_reach_both_thresholds_on_every_shipped_layer():
    for model, layer in (("mnist-mlp", "fc1"), ("mnist-mlp", "fc2"), ("mnist-cnn", "fc1")):
        done, outcome = run(preset=None, model=model, layer=layer, ball_samples=0)
        assert outcome.result.converged, (model, layer)
        for corner in outcome.result.corners:
            assert corner.l_pos < 0.01 * done.goal.energy * 1.001
            assert corner.violation < 0.01 * done.goal.energy * 1.001


def test_a_threshold_out_of_reach_leaves_the_best_state_and_says_so():
    done, outcome = run(l_pos_threshold=1e-6, max_steps=60)
    assert not outcome.result.converged
    assert {c.reason for c in outcome.result.corners} == {"max_steps"}
    start, _ = mlp_by_hand(done.source.pixels[None])
    goal, _ = mlp_by_hand(done.target.pixels[None])
    untouched = ((start - goal)[goal >= 0] ** 2).sum()
    assert all(corner.l_pos < untouched / 10 for corner in outcome.result.corners)


@pytest.mark.parametrize(("goal", "reached"), [(0.3, True), (3.0, False)])
def test_a_hull_says_whether_it_collides_and_whether_it_came_as_far_as_its_goal(goal, reached):
    hull = {"preset": "hull", "model": "mnist-mlp", "layer": "fc2", "certify": None}
    settings = hull | {"max_steps": 400, "hull": {"goal": goal, "diversity": 1.0}}
    done, outcome = run(**settings, ball_samples=0, worst_starts=0)
    result = outcome.result
    assert result.collides
    assert result.goal_reached is reached is (result.polytope.spread >= goal)
    assert result.converged is reached
    assert {c.reason for c in result.corners} == {"converged" if reached else "max_steps"}
    assert all(corner.converged for corner in result.corners)
    inside = result.interpolation
    over = np.maximum(
        outcome.samples.floats.l_pos / done.group.l_pos_threshold,
        outcome.samples.floats.violation / done.group.violation_threshold,
    )
    assert inside.under_thresholds == (over < 1).mean()
    assert inside.max_over_threshold == over.max()
    assert inside.max_relative_residual == outcome.samples.floats.residual.max()
    assert artifacts.pictures(done, outcome)()["figure.png"]


def test_a_corner_that_is_the_target_has_no_ratio_and_its_result_can_be_read_again():
    settings = {"model": "mnist-cnn", "layer": "conv1", "solver": "exact", "corners": 2}
    spec, subject = subject_of(preset=None, worst_starts=8, ball_samples=20, **settings)
    black = images.to_png(np.zeros((1, 28, 28), np.float32))
    target = images.load("black.png", black, subject.model.preprocessing)
    _, outcome = run_alone(subject, spec, digit(subject, "3-0"), target)
    result = outcome.result
    assert [c.distance_to_target for c in result.corners] == [0, 0]
    assert [c.distance_ratio for c in result.corners] == [None, None]
    assert Result.model_validate_json(result.model_dump_json()) == result


def overflowing(scale: float) -> Model:
    """Its first layer gives numbers as large as `scale`."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.ReLU(), nn.Linear(20, 4))
    network.requires_grad_(False)
    for parameter in network[1].parameters():
        parameter.mul_(scale)
    network[3].weight.div_(scale)
    return Model(
        name="overflowing",
        classifier=Classifier(Normalize("L", mean=(0.0,), std=(1.0,)), network).eval(),
        preprocessing=images.Preprocessing("L", (28, 28)),
        classes=tuple("abcd"),
        weights="random",
        weights_sha256="0" * 64,
    )


def test_activations_whose_squares_overflow_are_refused_before_the_work():
    spec = CollisionSpec(model="overflowing", layer="1", max_steps=20)
    subject = job.Subject.of(overflowing(1e25), spec)
    with pytest.raises(InvalidSpec, match="squares overflow float32; give another layer"):
        run_alone(subject, spec, digit(subject, "3-0"), digit(subject, "7-0"))


def test_a_measure_that_is_no_number_refuses_the_result_and_names_itself(monkeypatch):
    spec, subject = subject_of(max_steps=20, ball_samples=0)
    pair = digit(subject, "3-0"), digit(subject, "7-0")

    def no_number(*_: object) -> torch.Tensor:
        return torch.full((5,), math.inf)

    monkeypatch.setattr(outcome_of, "violation", no_number)
    with pytest.raises(NotFinite, match=r"float32 does not hold \(corners\.0\.violation\)"):
        run_alone(subject, spec, *pair)


def test_without_a_hull_there_is_no_goal(paper):
    assert paper[1].result.goal_reached is None
    assert paper[1].result.collides is paper[1].result.converged is True


def test_a_job_told_to_stop_is_measured_where_it_is():
    spec, subject = subject_of(l_pos_threshold=1e-6)
    pair = digit(subject, "3-0"), digit(subject, "7-0")
    _, outcome = run_alone(subject, spec, *pair, should_stop=lambda: True)
    assert {corner.reason for corner in outcome.result.corners} == {"stopped"}
    assert outcome.result.interpolation.samples == 2000


def test_progress_is_told_between_strides():
    spec, subject = subject_of()
    told = []
    pair = digit(subject, "3-0"), digit(subject, "7-0")
    run_alone(
        subject, spec, *pair, on_progress=lambda g: told.append((g.age, g.latest[:, 0].max()))
    )
    ages, worst = zip(*told, strict=True)
    assert list(ages[:3]) == [10, 20, 30]
    assert worst[0] > worst[2]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": "mnist-mpl"}, UnknownName, "did you mean 'mnist-mlp'"),
        ({"layer": "fc11"}, UnknownName, "did you mean 'fc1'"),
        ({"layer": "fc3"}, UntappableLayer, "not followed by ReLU"),
        ({"target_class": "8"}, InvalidSpec, "takes it for '7'"),
        ({"target_class": "seven"}, UnknownName, "There is no class 'seven'"),
        ({"corners": 256}, InvalidSpec, r"has \d+ inactive units .* too few for 256"),
        ({"units": [256], "corners": 1}, InvalidSpec, "There is no unit 256"),
    ],
)
def test_a_job_that_cannot_be_is_refused_with_what_to_do(settings, error, message):
    with pytest.raises(error, match=message):
        run(**settings)


def test_an_active_unit_is_refused(paper):
    active = int(torch.nonzero(paper[0].goal.active)[0])
    with pytest.raises(InvalidSpec, match=f"Unit {active} is active .* list inactive units"):
        run(units=[active, 0, 5, 6, 7])


def test_source_equal_to_target_is_refused():
    with pytest.raises(InvalidSpec, match="same image; give two different"):
        run("3-0", "3-0")


def test_the_target_class_may_be_given_by_name_or_number():
    assert run(target_class="7", corners=1, ball_samples=0)[1].result.target.label == 7


def test_an_image_of_another_size_is_resized_and_the_result_says_so(tmp_path):
    spec, subject = subject_of(ball_samples=0)
    big = np.kron(digit(subject, "3-0").pixels[0], np.ones((3, 3)))[None]
    loaded = images.load("big.png", images.to_png(big), subject.model.preprocessing)
    _, outcome = run_alone(subject, spec, loaded, digit(subject, "7-0"))
    assert len(outcome.result.notes) == 1
    assert "big.png" in outcome.result.notes[0]
    assert "84" in outcome.result.notes[0]


def test_equation_1_gives_one_image_and_says_so():
    _, outcome = run(objective="plain", corners=3, max_steps=100)
    assert "all corners are the same image" in outcome.result.warnings[0]
    assert outcome.result.polytope.mean_pairwise_distance == 0
    assert all(corner.unit is None for corner in outcome.result.corners)


def test_tf32_on_a_cpu_runs_in_fp32_and_says_so():
    _, outcome = run(precision="tf32", ball_samples=0)
    assert "ran in fp32" in outcome.result.warnings[0]
    assert outcome.result.provenance.precision == "fp32"


BRANCHY = """
import torch
from torch import nn

class Branchy(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.top = nn.Linear(48, 9), nn.Linear(48, 9), nn.Linear(18, 4)

    def forward(self, x):
        x = x.flatten(1)
        return self.top(torch.cat([self.left(x).relu(), self.right(x).relu()], 1).relu())
"""


def register(
    name: str, code: str, side: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network with random weights, as an operator would."""
    import hashlib

    from safetensors.torch import save_file

    namespace: dict[str, type] = {}
    exec(code, namespace)
    torch.manual_seed(0)
    weights = folder / f"{name}.safetensors"
    save_file(namespace[name.capitalize()]().state_dict(), weights)
    (folder / f"{name}_net.py").write_text(code)
    (folder / "models.toml").write_text(
        f"""[[models]]
        name = "{name}"
        factory = "{name}_net:{name.capitalize()}"
        weights = "{name}.safetensors"
        sha256 = "{hashlib.sha256(weights.read_bytes()).hexdigest()}"
        classes = ["a", "b", "c", "d"]
        [models.preprocessing]
        crop = {side}
        """
    )
    monkeypatch.setenv("POLYCOLLIDE_MODELS", str(folder / "models.toml"))


def photos(subject: job.Subject) -> list[images.Loaded]:
    files = [images.read(f"sample:photos/{name}") for name in ("animal_panda", "fish_fish25")]
    return [images.load(*file, subject.model.preprocessing) for file in files]


@pytest.fixture
def branchy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network whose branches are no cuts, its joint is one."""
    register("branchy", BRANCHY, 4, tmp_path, monkeypatch)


@pytest.mark.usefixtures("branchy")
@pytest.mark.parametrize(("layer", "cut"), [("left", False), ("relu()#2", True)])
def test_a_layer_that_is_no_cut_is_warned_of(layer, cut):
    settings = {"preset": None, "model": "branchy", "layer": layer, "corners": 2, "max_steps": 20}
    spec, subject = subject_of(**settings)
    if not cut:
        _, outcome = run_alone(subject, spec, *photos(subject))
        assert outcome.result.cut is False
        assert any("'left' is no cut" in said for said in outcome.result.warnings)
    else:
        assert subject.cut


class Opening(nn.Module):
    """Around `fc1` leads a way that only bright images take: no sample digit."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(784, 30), nn.Linear(30, 10)

    def forward(self, x):
        x = x.flatten(1)
        return self.fc2(self.fc1(x).relu()) + 9 * (x.mean(1, keepdim=True) - 0.6).relu() * x[:, :10]


def test_a_side_path_that_only_the_jobs_own_images_open_makes_it_no_cut():
    spec, shipped = subject_of(corners=2, max_steps=5)
    model = replace(shipped.model, classifier=Classifier(Normalize("L"), Opening()))
    subject = job.Subject.of(model, spec)
    assert (subject.cut, subject.cut_proved) == (True, False)
    source, target = digit(subject, "3-0"), digit(subject, "7-0")
    result = run_alone(subject, spec, source, target)[1].result
    assert (result.cut, result.cut_proved) == (True, False)
    bright = replace(source, pixels=np.ones_like(source.pixels))
    result = run_alone(subject, spec, bright, target)[1].result
    assert (result.cut, result.cut_proved) == (False, False)
    assert any("'fc1' is no cut" in said for said in result.warnings)


def test_a_relative_beta_is_in_units_of_the_active_features(paper):
    goal = paper[0].goal
    active = goal.pre[goal.active].double().numpy()
    spec = CollisionSpec(preset="paper-mnist", beta={"relative": 0.5}, alpha=3.0)
    assert job._beta(spec, goal) == pytest.approx(1.5 * np.sqrt((active**2).mean()), rel=1e-5)


@pytest.mark.usefixtures("branchy")
def test_a_target_that_activates_nothing_is_refused():
    spec, subject = subject_of(preset=None, model="branchy", layer="left")
    with torch.no_grad():
        subject.model.classifier.network.left.bias.fill_(-100)
    with pytest.raises(InvalidSpec, match="activates no unit"):
        job.prepare(subject, spec, *photos(subject), key="job")


def test_corners_that_share_their_units_are_warned_of():
    _, outcome = run(units=[0, 0], corners=2, ball_samples=0)
    assert "push the same units" in outcome.result.warnings[0]


def test_a_network_that_gives_no_finite_numbers_is_refused():
    spec, subject = subject_of()
    with torch.no_grad():
        subject.model.classifier.network.fc3.bias[2] = torch.nan
    with pytest.raises(InvalidSpec, match="mnist-mlp gives numbers that are not finite for the so"):
        job.prepare(subject, spec, digit(subject, "3-0"), digit(subject, "7-0"), key="job")


def test_life_is_told_between_chunks_of_measuring(paper):
    _, subject = subject_of()
    told = []
    measure(subject, paper[0], on_chunk=lambda: told.append(0))
    # Chunks of floats, of 8-bit images and of the ball, and steps towards the worst point.
    chunks = 3 * -(-2000 // interpolate.ROWS)
    assert chunks < len(told) <= chunks + certify.STEPS + 1


def test_layers_are_described_in_plain_values_with_every_name_that_opens_them():
    _, subject = subject_of(model="mnist-cnn", layer="fc1")
    model = subject.model
    layers = list(job.describe(model))
    named = {layer.name: (layer.kind, layer.affine) for layer in layers}
    assert list(named.items()) == [
        ("conv1", ("relu", True)),
        ("pool1", ("max_pool", False)),
        ("conv2", ("relu", False)),
        ("pool2", ("max_pool", False)),
        ("fc1", ("relu", False)),
        ("fc2", ("relu", False)),
    ]
    assert json.loads(json.dumps(vars(layers[0]))) == {
        "name": "conv1",
        "names": ["conv1", "relu1"],
        "kind": "relu",
        "shape": [16, 28, 28],
        "units": 16 * 28 * 28,
        "cut": True,
        "cut_proved": True,
        "affine": True,
    }
    probe = job.reference_images(model)[:1]
    for layer in layers:
        for name in layer.names:
            tap = open_tap(model.classifier.normalize, model.classifier.network, name, probe)
            assert tap.layer.shape == layer.shape


def windows_by_hand(layer: str, pixels: np.ndarray) -> torch.Tensor:
    """What the 2 x 2 windows of a pool of mnist-cnn see, [N, C, H, W, 4] in float64."""
    h, w = torch.from_numpy(pixels).double(), weights_by_hand()
    for conv in ("conv1", "conv2"):
        h = functional.conv2d(h, w[f"{conv}.weight"], w[f"{conv}.bias"], padding=1).relu()
        n, c, height, width = h.shape
        h = h.view(n, c, height // 2, 2, width // 2, 2).transpose(3, 4).flatten(4)
        if conv[-1] == layer[-1]:
            return h
        h = h.amax(4)
    raise AssertionError


def weights_by_hand() -> dict[str, torch.Tensor]:
    weights = load_file(ASSETS / "mnist-cnn.safetensors")
    return {k: torch.from_numpy(v).double() for k, v in weights.items()}


def from_pool_on(layer: str, pooled: torch.Tensor) -> torch.Tensor:
    """The logits of mnist-cnn."""
    h, w = pooled, weights_by_hand()
    if layer == "pool1":
        h = functional.conv2d(h, w["conv2.weight"], w["conv2.bias"], padding=1).relu()
        h = h.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5))
    h = h.flatten(1)
    for fc in ("fc1", "fc2", "fc3"):
        h = (h if fc == "fc1" else h.relu()) @ w[f"{fc}.weight"].T + w[f"{fc}.bias"]
    return h


@pytest.mark.parametrize(
    ("layer", "settings"),
    [
        ("pool1", {"units": "first"}),
        ("pool2", {"units": "reachable"}),
        ("pool2", {"preset": "hull", "max_steps": 400, "certify": None}),
        ("pool2", {"objective": "plain", "corners": 1, "l_pos_threshold": {"relative": 0.02}}),
    ],
)
def test_corners_at_a_max_pool_collide_from_there_on(layer, settings):
    without = {"preset": None, "model": "mnist-cnn", "ball_samples": 0, "worst_starts": 0}
    done, outcome = run(**without | {"layer": layer} | settings)
    result = outcome.result
    assert result.collides
    assert result.cut
    seen = windows_by_hand(layer, outcome.corners)
    goal = windows_by_hand(layer, done.target.pixels[None])
    told = [corner.relative_residual for corner in result.corners]
    missed = (seen.amax(4) - goal.amax(4)).flatten(1).norm(dim=1) / goal.amax(4).norm()
    assert told == pytest.approx(missed.tolist(), rel=1e-3)
    assert max(told) < 0.2
    assert from_pool_on(layer, seen.amax(4)).argmax(1).tolist() == [7] * len(told)
    assert [corner.label for corner in result.corners] == [7] * len(told)
    # One active unit in each window, but that all are in a window of zeros.
    first = functional.one_hot(goal.argmax(4), 4).bool()
    active = first | (goal.amax(4, keepdim=True) == 0)
    l_pos = ((seen - goal).square() * active).flatten(1).sum(1)
    above = ((seen - goal.amax(4, keepdim=True)).relu().square() * ~active).flatten(1).sum(1)
    assert [c.l_pos for c in result.corners] == pytest.approx(l_pos.tolist(), rel=1e-3)
    assert [c.violation for c in result.corners] == pytest.approx(above.tolist(), rel=1e-3)
    assert int(done.goal.positive.sum()) == int((goal.amax(4) > 0).sum())
    if units := [unit for (unit,) in done.units or []]:
        assert len({tuple(corner.flatten()) for corner in outcome.corners}) == 5
        side = 2 * goal.shape[3]
        for unit in units:
            row, column = unit // side % side, unit % side
            place = (unit // side**2, row // 2, column // 2, row % 2 * 2 + column % 2)
            assert not active[0][place]


POOLING = """
import torch
from torch import nn

class Pooling(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.pool = nn.MaxPool2d(3, 2, padding=1, ceil_mode=True)
        self.top = nn.Linear(6 * 6 * 6, 4)

    def forward(self, x):
        return self.top(self.pool(self.conv(x)).relu().flatten(1))
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_pool_with_overlapping_padded_windows_and_no_relu_before_it_collides(
    tmp_path, monkeypatch, precision
):
    register("pooling", POOLING, 12, tmp_path, monkeypatch)
    settings = {"model": "pooling", "layer": "pool", "units": "reachable", "corners": 3}
    settings |= {"precision": precision, "ball_samples": 0}
    spec, subject = subject_of(preset=None, **settings)
    done, outcome = run_alone(subject, spec, *photos(subject))
    assert outcome.result.converged
    assert outcome.result.cut
    assert outcome.result.polytope.mean_pairwise_distance > 0.1
    with torch.no_grad():
        network = copy.deepcopy(subject.model.classifier).double()
        pixels = np.concatenate([outcome.corners, done.target.pixels[None]])
        features = network.network.conv(network.normalize(torch.from_numpy(pixels).double()))
        assert (features < 0).any()
        padded = functional.pad(features, (1, 2, 1, 2), value=-math.inf)
        pooled = padded.unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5)).flatten(1)
        logits = network.network.top(pooled.relu())
    assert pooled.shape == (4, 216)
    missed = (pooled[:3] - pooled[3]).norm(dim=1) / pooled[3].norm()
    told = [corner.relative_residual for corner in outcome.result.corners]
    assert told == pytest.approx(missed.tolist(), rel=1e-3)
    assert logits.argmax(1).tolist() == [outcome.result.target.label] * 4


def test_the_exact_solver_takes_no_pool_though_it_be_affine(tmp_path, monkeypatch):
    register("pooling", POOLING, 12, tmp_path, monkeypatch)
    spec, subject = subject_of(preset=None, model="pooling", layer="pool", solver="exact")
    with pytest.raises(NotAffine, match=r"'pool' is a max pool, .* has no layer that is"):
        run_alone(subject, spec, *photos(subject))


def test_exact_corners_are_in_the_result_with_what_is_least():
    _, found = run(preset=None, model="mnist-mlp", layer="fc1", solver="exact", corners=2)
    result = found.result
    assert result.converged
    assert result.exact.collision_error < 1e-5
    assert result.exact.dimension == result.exact.dimension_paper == 784 - result.layer.active
    assert result.exact.least_distance_to_target == 0
    for corner in result.corners:
        assert corner.distance_to_source >= result.exact.least_distance_to_source
        assert corner.l_pos < 1e-6
    assert result.worst.margin > 0


def test_null_space_collisions_share_every_pre_activation():
    _, subject = subject_of(preset=None, model="mnist-mlp", layer="fc1", corners=2)
    done, found = run(preset=None, model="mnist-mlp", layer="fc1", corners=2, solver="null_space")
    pre = subject.tap(torch.from_numpy(found.corners))
    assert torch.allclose(pre, done.goal.pre.expand_as(pre), atol=1e-4)
    assert [corner.unit for corner in found.result.corners] == [None, None]
    assert found.result.exact.dimension == found.result.exact.dimension_paper == 784 - 256
    # The digit's black pixels leave that space little room.
    assert 0 < found.result.polytope.spread < 0.1


def test_a_polytope_that_is_the_target_alone_is_warned_of():
    _, found = run(preset=None, model="mnist-cnn", layer="conv1", solver="exact", corners=2)
    assert found.result.exact.dimension == 0
    assert any("the target alone" in said for said in found.result.warnings)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"layer": "fc2"}, NotAffine),
        ({"layer": "fc1", "source_budget": 0.3}, exact.InfeasibleBudget),
    ],
)
def test_the_exact_solver_says_why_it_cannot(settings, error):
    with pytest.raises(error):
        run(preset=None, model="mnist-mlp", solver="exact", **settings)


@pytest.mark.parametrize("hull", ["float", "8bit"])
def test_a_certificate_is_of_the_hull_that_was_asked_for(hull):
    _, found = run(certify={"hull": hull})
    proof = found.result.certificate
    assert (proof.outcome, proof.hull, proof.certified_fraction) == ("certified", hull, 1)
    assert 0 < proof.bound <= found.result.worst.margin
    assert proof.holds_in_float32 is (proof.bound > 2 * proof.float32_error)
    said = dict(claims(found.result))["Proof"]
    assert said.startswith("certified: every point")
    assert said.endswith(", in float32 too")


def test_a_violation_is_shown_and_refutes():
    """Free pixels, whose mixtures lose the class once they are clipped to 8 bits."""
    _, found = run(beta=1.0, pixel_range="free", learning_rate=0.005, certify={"hull": "8bit"})
    assert found.result.certificate.outcome == "refuted"
    assert found.result.worst.margin_8bit < 0
    assert "another class" in " ".join(text for _, text in claims(found.result))


def certified_between(*corners: dict[str, float]) -> Result:
    """Of a job whose corners are these mixtures of digits, and proved by one simplex if at all."""
    found, _ = run(corners=len(corners), max_steps=1, certify={"subsimplices": 1}, worst_starts=0)
    _, subject = subject_of()
    found.group.corners = torch.stack(
        [
            sum(part * torch.from_numpy(digit(subject, name).pixels) for name, part in mix.items())
            for mix in corners
        ]
    )
    return measure(subject, found).result


def test_where_nothing_is_proved_the_edges_are_walked():
    result = certified_between({"7-0": 0.6, "1-0": 0.4}, {"7-1": 1.0})
    proof = result.certificate
    assert (proof.outcome, proof.edges.fraction) == ("unknown", 1)
    assert proof.edges.least_margin > 0 and proof.edges.pieces > 50
    assert (proof.edges.label, sum(proof.edges.weights)) == (7, 1)
    said = dict(claims(result))["Proof"]
    assert said.startswith("unknown: ")
    assert said.endswith(
        "used up; every point on the edge between them has a margin of at least "
        f"{proof.edges.least_margin:.3g} ({proof.edges.pieces} linear pieces)"
    )
    partly = {"fraction": 2e-4, "seconds": 10.0, "expected_seconds": None}
    assert _said_of_edges(result, partly) == "of the edge between them 0.02 % was walked in 10 s"
    for expected, told in ((5e4, "14 hours"), (3e6, "35 days"), (3e8, "10 years"), (90, "90 s")):
        said = _said_of_edges(result, partly | {"expected_seconds": expected})
        assert said.endswith(f"; all would take about {told}")


def _said_of_edges(result: Result, changes: dict[str, float | None]) -> str:
    proof = result.certificate
    changed = proof.model_copy(update={"edges": proof.edges.model_copy(update=changes)})
    said = dict(claims(result.model_copy(update={"certificate": changed})))["Proof"]
    return said.split("used up; ")[1]


def test_a_violation_on_an_edge_refutes():
    """Between two 7s, neither at the corners nor half way, where a certificate looks by itself."""
    result = certified_between({"7-0": 0.45, "1-0": 0.55}, {"7-1": 0.7, "0-1": 0.3})
    proof = result.certificate
    assert (proof.outcome, proof.edges, proof.reason) == ("refuted", None, None)
    assert proof.weights[1] == pytest.approx(0.35, abs=0.05)
    assert "another class" in dict(claims(result))["Proof"]
