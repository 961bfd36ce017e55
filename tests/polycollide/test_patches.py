"""`polycollide patches` as a user types it."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from core.models import ASSETS
from polycollide.cli import app

PHOTOS = ASSETS / "photos"
SMALL = ("--size", "16", "--stride", "4", "--resize", "64")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where sets are, for these tests."""
    monkeypatch.setenv("POLYCOLLIDE_PATCHES", str(tmp_path / "sets"))
    return tmp_path / "sets"


def call(*arguments: str) -> Result:
    """Calls the command in a terminal 80 columns wide."""
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["patches", *arguments])


def refused(*arguments: str) -> str:
    """The one sentence of a command that fails."""
    result = call(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_a_set_is_built_listed_shown_and_deleted(root):
    built = call("build", str(PHOTOS), "--name", "six", *SMALL)
    assert built.exit_code == 0, built.stderr
    assert "six: 6 images, 1014 patches of 16 x 16 pixels" in built.stdout
    assert "2 files skipped:" in built.stdout and "manifest.json is no PNG" in built.stdout
    row = next(line.split() for line in call("list").stdout.splitlines() if "six" in line)
    assert row[:7] == ["six", "6", "1014", "16", "4", "64", "exact"]
    shown = call("info", "six").stdout
    assert "1014, 16 x 16 every 4" in shown and "README.md is no PNG" in shown
    told = json.loads(call("info", "six", "--json").stdout)
    assert told == json.loads((root / "six" / "set.json").read_text())
    assert told["sha256"] in shown
    assert call("delete", "six").exit_code == 0
    assert list(root.iterdir()) == [] and "six" not in call("list").stdout


def test_the_defaults_are_the_papers_geometry():
    assert "1734 patches of 32 x 32" in call("build", str(PHOTOS), "--name", "six").stdout


def test_what_cannot_be_done_is_said_in_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    build = ("build", str(PHOTOS), "--name")
    assert "larger" in refused(*build, "a", "--size", "225")
    assert "stride" in refused(*build, "a", "--stride", "0")
    assert "no name" in refused(*build, "a/b")
    assert "did you mean 'faiss'" in refused(*build, "a", "--backend", "fais")
    assert "no files" in refused("build", str(tmp_path / "empty"), "--name", "a")
    assert "no folder" in refused("build", str(tmp_path / "nowhere"), "--name", "a")
    assert call(*build, "six", *SMALL).exit_code == 0
    assert "already" in refused(*build, "six")
    for command in ("info", "delete"):
        assert "did you mean 'six'" in refused(command, "sixt")


def test_a_place_where_nothing_can_be_written_is_said(root):
    root.write_text("a file")
    assert "cannot be used" in refused("build", str(PHOTOS), "--name", "six")


def test_sets_that_cannot_be_used_are_listed_with_the_reason(root):
    assert call("build", str(PHOTOS), "--name", "good", *SMALL).exit_code == 0
    for name in ("cut", "older", "unfinished"):
        shutil.copytree(root / "good", root / name)
    (root / "cut" / "images.u8").write_bytes(b"")
    (root / "older" / "set.json").write_text('{"schema_version": 0}')
    (root / "unfinished" / "set.json").unlink()
    lines = {line.split()[0]: line for line in call("list").stdout.splitlines() if line.strip()}
    assert "1014" in lines["good"]
    assert "images.u8" in lines["cut:"] and "another version" in lines["older:"]
    assert "not built to its end" in lines["unfinished:"]


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(tmp_path, root):
    """In a terminal of its own, interrupted once the bar shows that images are being read."""
    many = tmp_path / "many"
    many.mkdir()
    data = (PHOTOS / "animal_koala.jpg").read_bytes()
    for i in range(200):
        (many / f"{i:03}.jpg").write_bytes(data + bytes([i % 256, i // 256]))
    command = [sys.executable, "-m", "polycollide", "patches", "build", str(many), "--name", "many"]
    command += ["--size", "64", "--stride", "64", "--resize", "224"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        shown = b""
        while b"32/200" not in shown:
            shown += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:  # the terminal's end
            pass
        assert process.wait() == 130
    assert b"Stopped; the same command goes on" in shown
    kept = (root / "many" / "images.u8").stat().st_size
    assert 32 <= kept // (224 * 224 * 3) < 200
    assert "not built to its end" in refused("info", "many")
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "many: 200 images" in again.stdout
