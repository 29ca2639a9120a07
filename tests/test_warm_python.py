"""The warm interpreter exits, and is killed by signals, like a fresh one."""

import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import os, signal, sys, time
print(os.getcwd(), os.environ["ONE"], *sys.argv[1:], __name__, sep=chr(10), flush=True)
print("torch" in sys.modules, file=sys.stderr)
what = sys.stdin.readline().strip()
if what == "exit":
    sys.exit(7)
open("process", "w").write(str(os.getpid()))
while True:
    time.sleep(0.1)
"""


def start(folder):
    # A background job of a shell ignores SIGINT, and so would the processes that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    (folder / "script.py").write_text(SCRIPT)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-u", str(folder / "script.py"), "a b", "ü"]
    environment = {**os.environ, "ONE": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


def test_it_has_the_arguments_streams_and_status_of_a_process(tmp_path):
    process = start(tmp_path)
    out, err = process.communicate("exit\n", timeout=120)
    assert out.split("\n") == [str(tmp_path), "1", "a b", "ü", "__main__", ""]
    assert process.returncode == 7
    if "WARM_PYTHON" in os.environ:
        assert err == "True\n"


@pytest.mark.parametrize(
    ("number", "status"), [("SIGKILL", -9), ("SIGTERM", -15), ("SIGINT", -2), ("SIGUSR2", -12)]
)
def test_a_signal_ends_it_and_its_fork(number, status, tmp_path):
    process = start(tmp_path)
    process.stdin.write("wait\n")
    process.stdin.flush()
    file, end = tmp_path / "process", time.monotonic() + 120
    while not file.is_file() or not file.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.Signals[number])
    process.communicate(timeout=60)
    assert process.returncode == status
    while time.monotonic() < end:
        try:
            os.kill(int(file.read_text()), 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("its fork is still running")
