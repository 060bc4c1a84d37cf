"""A run's status is honest: `running` only while the process that drives it is there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raytune_ft.training.guarding import liveness
from raytune_ft.training.run_folder import RunFolder, write_json

DRIVER = """
import sys, time
from raytune_ft.training.run_folder import RunFolder
RunFolder(sys.argv[1]).create("a", "model: {path: m}\\n")
print("created", flush=True)
time.sleep(60)
"""


def test_a_killed_driver_leaves_an_interrupted_run(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "created\n"
        assert RunFolder(tmp_path).status() == "running"
        driver.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, driver.pid, os.WEXITED | os.WNOWAIT)
        assert RunFolder(tmp_path).status() == "interrupted", "ended, and not yet waited for"
        driver.wait()
    assert RunFolder(tmp_path).status() == "interrupted"
    RunFolder(tmp_path).update(status="done")
    assert RunFolder(tmp_path).status() == "done"


def test_its_number_may_have_gone_to_another_process() -> None:
    own = liveness.this_process()
    assert not liveness.is_gone(own)
    assert liveness.is_gone({**own, "began": "an earlier boot 17"})


IN_ANOTHER_CONTAINER = {**liveness.this_process(), "numbers": "pid:[1]", "pid": 2**22}


@pytest.mark.parametrize(
    "driver",
    [None, {"host": "another-host", "pid": 2**22, "began": "x 1"}, IN_ANOTHER_CONTAINER],
)
def test_what_nobody_here_can_tell_stands_as_written(tmp_path: Path, driver: object) -> None:
    write_json(tmp_path / "run.json", {"status": "running", "driver": driver})
    assert RunFolder(tmp_path).status() == "running"
