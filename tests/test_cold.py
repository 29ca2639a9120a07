"""Slow: tests that start processes also pass with interpreters that import everything again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COLD

# Test files, and the tests in them that start processes; None means all.
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
@pytest.mark.skipif(sys.executable == COLD, reason="every interpreter is fresh here")
@pytest.mark.parametrize("file", STARTING)
def test_fresh_interpreters_behave_like_the_warm_one(file):
    chosen = ["-k", STARTING[file]] if STARTING[file] else []
    inherited = ("WARM_PYTHON", "PYTEST")  # set for this run and its workers
    environment = {k: v for k, v in os.environ.items() if not k.startswith(inherited)}
    (path,) = Path(__file__).parent.rglob(file)
    run = subprocess.run(
        [COLD, "-m", "pytest", path, *chosen],
        env={**environment, "COLD_PYTHON": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:]
