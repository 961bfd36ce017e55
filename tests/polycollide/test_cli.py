"""The command as a user runs it: in this process where only words matter, else in its own."""

import errno
import json
import os
import pty
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from polycollide import results
from polycollide.cli import app
from polycollide.options import PRESETS

PAIR = ("--source", "sample:mnist/3-0", "--target", "sample:mnist/7-0")
PAPER = ("run", *PAIR, "--preset", "paper-mnist")
FILES = {"result.json", "figure.png", "curves.png", "snapshots.png", results.LIST}
FILES |= {"corners.npz", "samples.npz", "snapshots.npz", "hull.png", "worst.png"}


def call(*arguments: str) -> Result:
    """Calls the command in a terminal 80 columns wide."""
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, arguments)


def refused(*arguments: str) -> str:
    """The one sentence of a command that fails."""
    result = call(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return out, call(*PAPER, "--out", str(out))


def test_run_prints_every_corner_and_the_measures_aligned(demo):
    _, result = demo
    assert result.exit_code == 0, result.stderr
    *lines, files = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "no regions.png: Images with a side under 64 pixels have none."
    assert set(files.partition(": ")[2].split(", ")) >= FILES - {results.LIST}
    header = next(i for i, line in enumerate(lines) if "L_pos" in line)
    assert [line.split()[0] for line in lines[header + 2 : header + 7]] == list("01234")
    assert "100.0 % (99.8 to 100.0) seen as 7" in result.stdout
    looks = r"between corners +SSIM 0\.\d{3}, low-pass share 0\.\d{3}, LPIPS -"
    assert re.search(looks, result.stdout)


def test_run_writes_everything_a_result_has(demo):
    out, _ = demo
    assert {path.name for path in out.iterdir()} == FILES | {f"corner-{i}.png" for i in range(5)}
    result = json.loads((out / "result.json").read_text())
    assert result["converged"] is True
    with np.load(out / "corners.npz") as arrays:
        corners = arrays["corners"]
    assert corners.shape == (5, 1, 28, 28)
    for i, corner in enumerate(corners):
        with Image.open(out / f"corner-{i}.png") as png:
            assert np.array_equal(np.asarray(png), np.round(corner[0] * 255))
    with np.load(out / "samples.npz") as samples:
        assert samples["weights"].shape == (2000, 5)
        assert samples["probability"].min() == result["interpolation"]["min_probability"]
    with np.load(out / "snapshots.npz") as snapshots:
        assert snapshots["images"].shape == (len(snapshots["steps"]), 5, 1, 28, 28)
        assert 0 < len(snapshots["steps"]) <= 6
    for picture in ("figure.png", "curves.png", "snapshots.png"):
        with Image.open(out / picture) as drawn:
            assert min(drawn.size) > 100


def test_a_downloaded_corner_is_seen_again_as_the_result_says(demo):
    out, _ = demo
    result = json.loads((out / "result.json").read_text())
    again = json.loads(call(*PAPER[:2], str(out / "corner-0.png"), *PAPER[3:], "--json").stdout)
    assert again["source"]["label"] == result["corners"][0]["label_8bit"]
    assert again["source"]["probability"] == pytest.approx(
        result["corners"][0]["probability_8bit"], rel=1e-6
    )
    assert again["notes"] == []


def test_json_alone_goes_to_standard_output():
    result = call(*PAPER, "--json", "--set", "ball_samples=0")
    assert json.loads(result.stdout)["ball"] is None


def test_settings_reach_the_spec_and_win_over_the_preset():
    settings = ("beta=0.1", "units=[0,[5,6]]", "interpolation.samples=50", "negative=hinge")
    settings += ("interpolation.sampler=paper", "l_pos_threshold.relative=0.1", "seed=3")
    sets = [part for setting in settings for part in ("--set", setting)]
    result = json.loads(call(*PAPER, "--corners", "2", "--json", *sets).stdout)
    spec = result["provenance"]["spec"]
    assert spec["preset"] == "paper-mnist"
    assert (spec["beta"], spec["negative"], spec["seed"]) == (0.1, "hinge", 3)
    assert spec["interpolation"] == {"samples": 50, "sampler": "paper"}
    assert spec["l_pos_threshold"] == {"relative": 0.1}
    assert [corner["unit"] for corner in result["corners"]] == [0, [5, 6]]


def test_figures_can_be_left_out(tmp_path):
    assert call(*PAPER, "--set", "figures=false", "--out", str(tmp_path)).exit_code == 0
    assert not {"figure.png", "curves.png", "snapshots.png"} & {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("run", *PAIR, "--preset", "paper-mnis"), "did you mean 'paper-mnist'"),
        ((*PAPER, "--model", "mnist-mpl"), "There is no model 'mnist-mpl'; did you mean"),
        ((*PAPER, "--layer", "fc9"), "There is no layer 'fc9'; did you mean 'fc2' or 'fc1'"),
        ((*PAPER, "--layer", "fc3"), "not followed by ReLU"),
        ((*PAPER, "--set", "betta=1"), "There is no setting 'betta'; did you mean 'beta'"),
        ((*PAPER, "--set", "beta"), "--set takes NAME=VALUE, not 'beta'"),
        ((*PAPER, "--set", "beta=-1"), "beta"),
        ((*PAPER, "--set", "interpolation.sample=5"), "There is no setting 'sample'; did you mean"),
        ((*PAPER, "--set", "beta.relative=-1"), "beta.relative: Input should be greater than 0"),
        ((*PAPER, "--corners", "300"), "corners: Input should be less than or equal to 256"),
        (("run", *PAIR, "--model", "mnist-mlp"), "layer: it is missing; give it"),
        ((*PAPER, "--device", "tpu"), "There is no device 'tpu' here; take cpu"),
        (("run", *PAIR[:3], "sample:mnist/7-9", *PAPER[5:]), "There is no sample 'mnist/7-9'"),
        (("run", *PAIR[:3], "/no/such.png", *PAPER[5:]), "no/such.png"),
        (("run", *PAIR[:3], PAIR[1], *PAPER[5:]), "the same image"),
        (("layers", "--model", "mnist-mpl"), "did you mean 'mnist-mlp'"),
        (("reproduce", "tabel1"), "There is no experiment 'tabel1'; did you mean 'table1'"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(arguments, sentence):
    assert sentence in refused(*arguments)


def test_a_broken_image_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but not for long")
    sentence = refused("run", "--source", str(tmp_path / "broken.png"), *PAIR[2:], *PAPER[5:])
    assert "broken.png" in sentence


def test_an_output_folder_that_cannot_be_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be used" in refused(*PAPER, "--out", str(tmp_path / "file" / "out"))


def test_words_in_brackets_are_taken_as_they_are():
    sentence = refused("run", "--source", "photo[/b] [final].png", *PAIR[2:], *PAPER[5:])
    assert "'photo[/b] [final].png' cannot be read" in sentence


def test_a_folder_used_again_holds_the_new_result_only(tmp_path):
    (tmp_path / "corner-house.png").write_text("the user's own")
    assert call(*PAPER, "--out", str(tmp_path)).exit_code == 0
    few = ("--corners", "2", "--set", "interpolation.samples=0", "--set", "snapshots=0")
    assert call(*PAPER, *few, "--out", str(tmp_path)).exit_code == 0
    left = {path.name for path in tmp_path.iterdir()}
    assert left == FILES - {"samples.npz", "snapshots.npz", "snapshots.png", "hull.png"} | {
        *("corner-0.png", "corner-1.png", "corner-house.png")
    }


QUICK = (
    "--corners",
    "1",
    "--set",
    "max_steps=2",
    "--set",
    "ball_samples=0",
    "--set",
    "worst_starts=0",
)


@pytest.mark.parametrize("own", ["figure.png", "corner-7.png", "result.json", "worst.png"])
def test_a_users_own_file_stays_whatever_its_name(tmp_path, own):
    out = tmp_path / "out"
    out.mkdir()
    (out / own).write_text("the user's own")
    sentence = refused(*PAPER, *QUICK, "--out", str(out))
    assert f"{out} has {own} that no earlier result left there so" in sentence
    assert [(file.name, file.read_text()) for file in out.iterdir()] == [(own, "the user's own")]
    assert call(*PAPER, *QUICK, "--out", str(out), "--force").exit_code == 0
    assert json.loads((out / "result.json").read_text())["corners"]


def test_a_file_of_a_result_that_a_user_has_changed_is_the_users(tmp_path):
    assert call(*PAPER, *QUICK, "--out", str(tmp_path)).exit_code == 0
    (tmp_path / "figure.png").write_text("drawn on")
    assert "figure.png" in refused(*PAPER, *QUICK, "--out", str(tmp_path))
    assert (tmp_path / "figure.png").read_text() == "drawn on"
    (tmp_path / "figure.png").unlink()
    assert call(*PAPER, *QUICK, "--out", str(tmp_path)).exit_code == 0


def test_a_full_disk_leaves_the_earlier_result_and_names_a_file(tmp_path, monkeypatch):
    results.write(tmp_path, {"corner-0.png": b"earlier", "result.json": b"{}"})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    whole = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name == "corners.npz":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    sentence = call(*PAPER, *QUICK, "--out", str(tmp_path)).stderr
    assert (
        sentence == f"Error: {tmp_path / 'corners.npz'} cannot be used: No space left on device.\n"
    )
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_numbers_that_are_names_and_numbers_without_end_are_understood():
    assert call(*PAPER, "--set", "target_class=7", "--set", "ball_samples=0").exit_code == 0
    assert "seed" in refused(*PAPER, "--set", "seed=" + "9" * 5000)


def test_a_client_without_the_core_extra_is_told_what_to_install():
    code = """if True:
        import sys
        class NoTorch:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "torch":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, NoTorch())
        sys.argv = ["polycollide", "models"]
        from polycollide.cli import main
        main()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pip install '.[core]'" in done.stderr


def test_what_was_mistyped_is_said_before_torch_is_opened(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails
    monkeypatch.delitem(sys.modules, "polycollide.local", raising=False)
    for arguments, sentence in (
        (("--preset", "paper-mnis"), "did you mean 'paper-mnist'"),
        (("--preset", "paper-mnist", "--corners", "0"), "corners: Input should be greater"),
        (("--preset", "paper-mnist", "--set", "betta=2"), "did you mean 'beta'"),
        (("--preset", "paper-mnist", "--set", "beta"), "--set takes NAME=VALUE"),
        (("--preset", "paper-mnist", "--source", "none.png"), "'none.png' cannot be read"),
    ):
        assert sentence in refused("run", *PAIR, *arguments)
    with pytest.raises(ModuleNotFoundError, match="torch"):  # so the names above did not need it
        app(PAPER, standalone_mode=False)


def test_help_names_every_preset_and_the_version_is_told():
    from core.spec import PRESETS as KNOWN

    assert set(PRESETS) == set(KNOWN)
    assert all(name in " ".join(call("run", "--help").stdout.split()) for name in KNOWN)
    assert call("--version").stdout == f"polycollide {metadata.version('polycollide')}\n"


def test_whoever_has_read_enough_json_ends_the_command_silently():
    ours, theirs = os.pipe()
    os.close(ours)  # long before anything is printed
    command = [sys.executable, "-m", "polycollide", *PAPER, "--json", "--set", "figures=false"]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, check=False, text=True)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("command", [["--help"], ["run", "--help"], ["--version"]])
def test_whoever_has_read_enough_ends_a_command_silently_and_a_full_disk_is_said(command):
    code = "import sys; from polycollide.cli import main; main()"
    argv = [sys.executable, "-c", code, *command]
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(argv, stdout=theirs, stderr=subprocess.PIPE, check=False, text=True)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (1, "")
    with open("/dev/full", "w") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, check=False, text=True)
    said = "Error: A file, or standard output, cannot be used: No space left on device.\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_a_run_needs_no_home_no_locale_no_window_and_no_assertions(tmp_path):
    env = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    env |= {"MPLBACKEND": "no-such-window", "LC_ALL": "C", "PYTHONUTF8": "0"}
    env |= {"PYTHONCOERCECLOCALE": "0", "COLUMNS": "80", "PYTHONIOENCODING": "latin1"}
    command = [sys.executable, "-O", "-m", "polycollide", *PAPER, "--out", "ergebnis-大"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "result.json" in done.stdout.decode("latin1")
    here = json.loads(call(*PAPER, "--json").stdout)
    (out,) = tmp_path.iterdir()
    there = json.loads((out / "result.json").read_text())
    assert there["polytope"]["mean_pairwise_distance"] == here["polytope"]["mean_pairwise_distance"]


def test_layers_lists_shapes_cuts_active_units_and_the_dimension_bound():
    plain = call("layers", "--model", "mnist-cnn")
    assert [line.split()[:2] for line in plain.stdout.splitlines()[3:9]] == [
        ["conv1", "relu"],
        ["pool1", "max_pool"],
        ["conv2", "relu"],
        ["pool2", "max_pool"],
        ["fc1", "relu"],
        ["fc2", "relu"],
    ]
    result = json.loads(call(*PAPER, "--json").stdout)
    active = result["layer"]["active"]
    rows = call("layers", "--model", "mnist-mlp", *PAIR[2:]).stdout.splitlines()[3:5]
    assert rows[0].split() == ["fc1", "relu", "256", "256", "yes", str(active), str(784 - active)]
    assert len(rows[1].split()) == 6  # deeper, the layer is not affine in the image


def test_models_lists_what_ships_as_ready():
    rows = {line.split()[0]: line for line in call("models").stdout.splitlines() if line.strip()}
    assert "yes" in rows["mnist-mlp"]
    assert "224" in rows["vgg16"]


def test_table1_prints_our_rows_beside_the_papers():
    result = call("reproduce", "table1", "--pairs", "2")
    assert result.exit_code == 0, result.stderr
    rows = {line.split("  ")[0].strip(): line for line in result.stdout.splitlines()}
    assert "1.28" in rows["distance apart"]
    assert "2 of 2" in rows["pairs converged"]
    assert max(map(len, result.stdout.splitlines())) <= 90
    listed = json.loads(call("reproduce", "table1", "--pairs", "2", "--json").stdout)
    assert {len(results) for results in listed.values()} == {2}
    distances = [r["polytope"]["mean_pairwise_distance"] for r in listed["paper-mnist"]]
    assert f"{np.mean(distances):.2f}±{np.std(distances):.2f}" in rows["distance apart"]


def test_beyond_the_paper_stand_hulls_and_exact_corners_with_proofs():
    result = call("reproduce", "table1", "--beyond", "--pairs", "1")
    assert result.exit_code == 0, result.stderr
    rows = {line.split("  ")[0].strip(): line.split() for line in result.stdout.splitlines()}
    assert rows["certified"][1:] == ["1", "of", "1"] * 5
    spread = [float(value.split("±")[0]) for value in rows["spread"][2:]]
    assert spread[0] < 0.1 < 0.3 < min(spread[1:])
    assert "anywhere" in rows
    assert max(len(line) for line in result.stdout.splitlines() if "of 1" in line) <= 80


def test_ctrl_c_keeps_what_is_done(tmp_path):
    """In a terminal of its own, interrupted once the bar shows that steps are being taken."""
    command = [sys.executable, "-m", "polycollide", *PAPER, "--out", str(tmp_path / "out")]
    command += ["--set", "l_pos_threshold=1e-9", "--set", "max_steps=1000000"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        shown = b""
        while b"rows left" not in shown:
            shown += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:  # the terminal's end
            pass
        assert process.wait() == 130
    for word in (b"step ", b"worst L_pos", b"steps/s", b"Stopping"):
        assert word in shown
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert {corner["reason"] for corner in result["corners"]} == {"stopped"}
    assert result["interpolation"]["samples"] == 2000
    assert {p.name for p in (tmp_path / "out").iterdir()} >= FILES


def test_the_command_needs_no_torch_until_a_job_runs():
    code = "import sys, polycollide.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
