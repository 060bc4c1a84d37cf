"""A process that ends without a word is spoken for; one that ends otherwise is not."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHIN = """
import os, signal, sys
from raytune_ft.last_words import spoken_for
with spoken_for(lambda: "spoken", 2) as call_off:
    {body}
"""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("os._exit(1)", "spoken\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "spoken\n"),
        ("pass", ""),
        ("sys.exit(3)", ""),
        ("call_off(); os._exit(1)", ""),
    ],
)
def test_only_a_silent_end_is_spoken_for(body: str, said: str) -> None:
    command = [sys.executable, "-c", WITHIN.format(body=body)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == said


def test_a_killed_listener_is_no_fault() -> None:
    body = "os.kill(int(open('/proc/thread-self/children').read()), signal.SIGKILL)"
    command = [sys.executable, "-c", WITHIN.format(body=body)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
