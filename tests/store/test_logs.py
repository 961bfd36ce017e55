"""Whatever a process of the service says is JSON, one line each."""

import json
import subprocess
import sys

import pytest

BEGIN = "from store.logs import configure\nconfigure('server')\n"
WAYS = {
    "an exception that nobody catches": "raise ValueError('two\\nlines')",
    "one in a thread": (
        "import threading\n"
        "def fail(): raise ValueError('two\\nlines')\n"
        "one = threading.Thread(target=fail)\none.start()\none.join()"
    ),
    "a warning": "import warnings\nwarnings.warn('two\\nlines')",
}


@pytest.mark.parametrize("way", WAYS)
def test_what_python_itself_would_print_is_json_as_well(way: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + WAYS[way]], capture_output=True, text=True, check=False
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert len(lines) == 1 and "timestamp" in lines[0]
    if "warning" not in way:
        assert lines[0]["exception"][0]["exc_type"] == "ValueError"
    assert (done.returncode != 0) == (way == "an exception that nobody catches")
