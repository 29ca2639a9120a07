"""sbatch, srun, scontrol and sacct for one job on one machine, with Slurm's variables.

The test puts copies of this file on PATH under those names. What happens is kept in `FAKE_SLURM`:
`script` as submitted, `tasks` with the process numbers, `requeued` once per requeue, `state`.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

PLACE = Path(os.environ["FAKE_SLURM"])
JOB = str(10_000 + os.getppid() % 10_000)


def sbatch(script):
    (PLACE / "script").write_text(Path(script).read_text())
    command = [sys.executable, __file__, "controller", JOB]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # or submitit waits
    subprocess.Popen(command, start_new_session=True, **quiet)
    print(f"Submitted batch job {JOB}")


def controller(job):
    """Run the script, again after each requeue."""
    text = (PLACE / "script").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    nodes, per_node = int(options["nodes"]), int(options["ntasks-per-node"])
    variables = {
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NAME": options["job-name"],
        "SLURM_NTASKS": str(nodes * per_node),
        "SLURM_NTASKS_PER_NODE": str(per_node),
        "SLURM_NNODES": str(nodes),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_JOB_NODELIST": "127.0.0.1",
    }
    (PLACE / "state").write_text("RUNNING")
    restarts = 0
    while True:
        count = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        run = subprocess.run(["bash", PLACE / "script"], env=os.environ | variables | count)
        if len(list(PLACE.glob("requeued*"))) == restarts:
            break
        restarts += 1
    (PLACE / "state").write_text("FAILED" if run.returncode else "COMPLETED")


def srun(*arguments):
    arguments, options = list(arguments), {}
    while arguments[0].startswith("--"):
        name, equals, value = arguments.pop(0).partition("=")
        if not equals and name != "--unbuffered":
            value = arguments.pop(0)
        options[name] = value
    processes = []
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        per_node = int(os.environ["SLURM_NTASKS_PER_NODE"])
        place = {
            "SLURM_PROCID": str(rank),
            "SLURM_STEP_NUM_TASKS": os.environ["SLURM_NTASKS"],
            "SLURM_LOCALID": str(rank % per_node),
            "SLURM_NODEID": str(rank // per_node),
        }
        streams = []
        for option in ("--output", "--error"):
            path = options[option].replace("%j", os.environ["SLURM_JOB_ID"])
            path = Path(path.replace("%t", str(rank)))
            path.parent.mkdir(parents=True, exist_ok=True)
            streams.append(path.open("a"))
        processes.append(
            subprocess.Popen(
                arguments, env=os.environ | place, stdout=streams[0], stderr=streams[1]
            )
        )
    (PLACE / "tasks").write_text(" ".join(str(process.pid) for process in processes))
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        if options["--kill-on-bad-exit"] == "1" and any(p.poll() for p in processes):
            time.sleep(2)
            for process in processes:
                process.kill()
    sys.exit(max(process.returncode & 255 for process in processes))


def scontrol(what, job):
    assert what == "requeue"
    assert job == os.environ["SLURM_JOB_ID"]
    (PLACE / f"requeued{time.time_ns()}").touch()


def sacct(*arguments):
    job = arguments[arguments.index("-j") + 1]
    print("JobID|State|NodeList", f"{job}|{(PLACE / 'state').read_text()}|node", sep="\n")


if __name__ == "__main__":
    commands = {"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "sacct": sacct}
    if sys.argv[1] == "controller":
        controller(sys.argv[2])
    else:
        commands[Path(sys.argv[0]).name](*sys.argv[1:])
