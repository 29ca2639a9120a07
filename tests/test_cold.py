"""Slow: what is claimed of processes also holds for interpreters that import everything anew."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COLD

# Each file, and the tests in it that start processes; None for all.
STARTING = {
    "test_devices.py": None,
    "test_launchers.py": None,
    "test_loggers.py": "sweep",
    "test_pipeline.py": "devices",
    "test_ranks.py": None,
    "test_shards.py": "two_ranks",
    "test_sweeps.py": "two_ranks",
    "test_tasks.py": "killed",
}


@pytest.mark.slow
@pytest.mark.skipif(sys.executable == COLD, reason="all tests are cold here")
@pytest.mark.parametrize("file", STARTING)
def test_fresh_interpreters_do_what_the_warm_one_does(file):
    chosen = ["-k", STARTING[file]] if STARTING[file] else []
    ours = ("WARM_PYTHON", "PYTEST")  # of this run and of its workers
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    run = subprocess.run(
        [COLD, "-m", "pytest", Path(__file__).with_name(file), *chosen],
        env={**environment, "COLD_PYTHON": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:]
