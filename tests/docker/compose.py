"""The containers, for real: what `make compose-test` runs. Needs a Docker engine, of any age.

Builds the images, brings them up with docker-compose.cpu.yml under a project and secrets of its
own, runs a job over HTTP, kills the worker's container in the middle of another, and takes
everything down again, volumes included. The images' layers stay, so a second run is quick.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
PROJECT = "polycollide-compose-test"
FILES = ["--file", "docker-compose.yml", "--file", "docker-compose.cpu.yml"]
OURS = ["api", "reconciler", "sweeper", "worker-cpu"]
SERVICES = ["postgres", "redis", *OURS]
PACKAGES_MB = 300  # of Python in the API's image, at most

PAIR = {"source": "sample:mnist/3-0", "target": "sample:mnist/7-0"}
SPEC = {"model": "mnist-mlp", "layer": "fc1", "corners": 3}
# Never converges, so it runs for as long as it may.
LONG = SPEC | {"l_pos_threshold": 1e-12, "max_steps": 1_000_000, "max_seconds": 30}


class Failed(Exception):
    """Something is not as it must be; the message says what."""


class Compose:
    """docker-compose on our project."""

    def __init__(self, secrets: Path, port: int) -> None:
        self._command = [*_compose(), "--project-name", PROJECT, *FILES]
        self._env = os.environ | {
            "POLYCOLLIDE_SECRETS": str(secrets),
            "POLYCOLLIDE_PUBLISH": f"127.0.0.1:{port}",
        }

    def run(self, *args: str) -> None:
        """Its output goes to the terminal."""
        subprocess.run([*self._command, *args], cwd=ROOT, env=self._env, check=True)

    def ask(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Its output comes back."""
        return subprocess.run(
            [*self._command, *args], cwd=ROOT, env=self._env, capture_output=True, text=True
        )

    def inside(self, service: str, *command: str) -> str:
        """What a command says in a service's container."""
        done = self.ask("exec", "-T", service, *command)
        expect(done.returncode == 0, f"{command} in {service}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def container(self, service: str) -> str:
        """Its id, also when it has ended."""
        return self.ask("ps", "--all", "--quiet", service).stdout.strip()

    def state(self, service: str) -> dict[str, Any]:
        """What the engine says about a service's container."""
        said = docker("inspect", "--format", "{{json .State}}", self.container(service))
        state: dict[str, Any] = json.loads(said)
        return state

    def health(self, service: str) -> str:
        """healthy, unhealthy or starting."""
        return str(self.state(service).get("Health", {}).get("Status", "without a health check"))


def main() -> int:
    """The exit status."""
    try:
        with up() as (compose, url):
            check_images(compose)
            key = compose.inside("api", "polycollide", "keys", "create", "test")
            headers = {"Authorization": f"Bearer {key}"}
            with httpx.Client(base_url=url, headers=headers, timeout=70) as client:
                run_a_job(client)
                build_a_patch_set(compose, client)
                kill_a_worker(compose, client)
            end_in_good_order(compose)
    except (Failed, httpx.HTTPError, subprocess.CalledProcessError) as error:
        print(f"compose-test failed: {error}", file=sys.stderr)
        return 1
    say("All is well.")
    return 0


@contextmanager
def up() -> Iterator[tuple[Compose, str]]:
    """Everything, healthy; its end leaves nothing but images."""
    with tempfile.TemporaryDirectory(prefix=f"{PROJECT}-") as folder:
        port = free_port()
        compose = Compose(Path(folder), port)
        subprocess.run(["sh", "docker/secrets.sh", folder], cwd=ROOT, check=True)
        # An earlier test may have been killed.
        compose.run("down", "--volumes", "--remove-orphans")
        say("Builds the images; the first time this takes many minutes.")
        compose.run("build")
        say("Comes up.")
        try:
            compose.run("up", "--detach")
            for service in SERVICES:
                wait_for_health(compose, service)
            yield compose, f"http://127.0.0.1:{port}"
        except BaseException:
            print(compose.ask("ps").stdout, compose.ask("logs", "--tail", "40").stdout)
            raise
        finally:
            say("Comes down.")
            compose.run("down", "--volumes", "--remove-orphans")


def wait_for_health(compose: Compose, service: str) -> None:
    """Until its health check has passed."""
    until(f"{service} is healthy", lambda: compose.health(service) == "healthy")


def check_images(compose: Compose) -> None:
    """Users, sizes, and that nothing starts with a default secret."""
    for service in OURS:
        user = compose.inside(service, "id", "-u")
        expect(user != "0", f"{service} runs as root.")
        writable = compose.ask("exec", "-T", service, "touch", "/opt/polycollide/x").returncode == 0
        expect(not writable, f"{service} can write to its image.")
    say("None of ours runs as root.")

    finds_torch = "import importlib.util as u; print(u.find_spec('torch') is not None)"
    expect(compose.inside("api", "python", "-c", finds_torch) == "False", "The API has torch.")
    packages = "import sysconfig; print(sysconfig.get_path('purelib'))"
    folder = compose.inside("api", "python", "-c", packages)
    size = int(compose.inside("api", "du", "-sm", folder).split()[0])
    expect(size < PACKAGES_MB, f"The API's Python packages take {size} MB.")
    say(f"The API's Python packages take {size} MB, without torch.")

    default = ["-e", "POLYCOLLIDE_DATABASE_PASSWORD=polycollide", "reconciler"]
    refused = compose.ask("run", "--rm", "--no-deps", "-T", *default)
    said = refused.stdout + refused.stderr
    expect(refused.returncode != 0 and "default password" in said, f"It took a default: {said}")
    say("A default password is refused.")


def run_a_job(client: httpx.Client) -> None:
    """From submission to a corner's picture."""
    refused = httpx.get(client.base_url.join("/v1/jobs"))
    expect(refused.status_code == 401, f"Without a key: {refused.status_code}")
    job = submit(client, SPEC)
    job = until("the job is done", lambda: final(client, job["id"]))
    expect(job["status"] == "succeeded", f"The job ended as {job['status']}: {job['error']}")
    corners = job["urls"]["corners"]
    expect(len(corners) == SPEC["corners"], f"The job has {len(corners)} corners.")
    picture = client.get(corners[0]).raise_for_status()
    expect(picture.content.startswith(b"\x89PNG\r\n\x1a\n"), "A corner is no PNG.")
    say(f"A job succeeded in {job['result']['seconds']:.1f} s; its corner is a PNG.")


def build_a_patch_set(compose: Compose, client: httpx.Client) -> None:
    """In the volume that the worker only reads; it tells of the set while it runs."""
    find = "from importlib.resources import files; print(files('core') / 'assets' / 'photos')"
    photos = compose.inside("worker-cpu", "python", "-c", find)
    compose.run("run", "--rm", "-T", "patches", "build", photos, "--name", "photos")
    until("the worker has the patch set", lambda: patch_sets(client))
    (found,) = patch_sets(client)
    expect(found["images"] == 6, f"The patch set has {found['images']} images.")
    path = "/var/lib/polycollide/patches/photos/x"
    writable = compose.ask("exec", "-T", "worker-cpu", "touch", path).returncode == 0
    expect(not writable, "The worker can write to its patch sets.")


def kill_a_worker(compose: Compose, client: httpx.Client) -> None:
    """In the middle of a job, which another attempt finishes."""
    job = submit(client, LONG)
    until("the long job runs", lambda: get(client, job["id"])["progress"])
    say("Kills the worker.")
    worker = compose.container("worker-cpu")
    docker("kill", "--signal", "KILL", worker)
    if not compose.state("worker-cpu")["Running"]:
        # What an operator kills, the restart policy leaves alone.
        docker("start", worker)
    job = until("the long job is done", lambda: final(client, job["id"]))
    ended = f"{job['status']} in attempt {job['attempt']}"
    expect(ended == "succeeded in attempt 2", f"The long job ended as {ended}: {job['error']}")
    say(f"The long job {ended}, after {job['result']['seconds']:.0f} s.")
    wait_for_health(compose, "worker-cpu")


def end_in_good_order(compose: Compose) -> None:
    """Asked to stop, our containers end by themselves: none is killed after its grace."""
    compose.run("stop", *OURS)
    for service in OURS:
        status = compose.state(service)["ExitCode"]
        expect(status in (0, 143), f"{service} ended with status {status}.")
    say("Our containers stopped in good order.")


def submit(client: httpx.Client, spec: dict[str, Any]) -> dict[str, Any]:
    """The job that was accepted."""
    answer = client.post("/v1/jobs", json=PAIR | {"spec": spec})
    expect(answer.status_code == 202, f"Submission: {answer.status_code} {answer.text}")
    job: dict[str, Any] = answer.json()
    return job


def patch_sets(client: httpx.Client) -> list[dict[str, Any]]:
    """Those that jobs can name."""
    answer = client.get("/v1/patch-sets").raise_for_status()
    found: list[dict[str, Any]] = answer.json()["patch_sets"]
    return found


def get(client: httpx.Client, job_id: str, wait: int = 0) -> dict[str, Any]:
    """A job as it is, or as it is when it has ended or some seconds are over."""
    answer = client.get(f"/v1/jobs/{job_id}", params={"wait": wait}).raise_for_status()
    job: dict[str, Any] = answer.json()
    return job


def final(client: httpx.Client, job_id: str) -> dict[str, Any] | None:
    """The job, once it has ended."""
    job = get(client, job_id, wait=10)
    return job if job["status"] in ("succeeded", "failed", "canceled") else None


def until(what: str, ask: Callable[[], T | None], within: float = 240) -> T:
    """Asks again and again until the answer is yes."""
    began = time.monotonic()
    while not (answer := ask()):
        if time.monotonic() - began > within:
            raise Failed(f"Not in {within:g} s: {what}.")
        time.sleep(1)
    say(f"After {time.monotonic() - began:.0f} s: {what}.")
    return answer


def expect(condition: bool, otherwise: str) -> None:
    """Ends the test unless the condition holds."""
    if not condition:
        raise Failed(otherwise)


def docker(*args: str) -> str:
    """What the engine answers."""
    done = subprocess.run(["docker", *args], capture_output=True, text=True)
    expect(done.returncode == 0, f"docker {args[0]}: {done.stderr}")
    return done.stdout.strip()


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def say(line: str) -> None:
    """Tells how far we are."""
    print(f"compose-test: {line}", flush=True)


def _compose() -> list[str]:
    """`docker compose`, or its older form."""
    if shutil.which("docker"):
        if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
            return ["docker", "compose"]
        if shutil.which("docker-compose"):
            return ["docker-compose"]
    raise Failed("It needs docker and its compose.")


if __name__ == "__main__":
    sys.exit(main())
