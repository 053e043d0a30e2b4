"""slurm/pretrain.sbatch as it is, on this machine: srun and scontrol are stand-ins, torchrun and
train.py are not. One node with two processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_train import log_of, options

import checkpoint

ROOT = Path(__file__).parents[1]
SMALL = dict(batch_ramp_samples=0, checkpoint_early_every=0)  # what config/pretrain.py sets
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
case "$1" in
    show) echo localhost ;;
    requeue) echo "$@" >>"$(dirname "$0")/requeued" ;;
esac
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux")


def test_the_signal_goes_to_the_script_alone():
    # Sent to torchrun as well, it would end the job before anything is saved.
    assert "#SBATCH --signal=B:USR1@" in (ROOT / "slurm/pretrain.sbatch").read_text()


@pytest.fixture
def cluster(tmp_path):
    """A folder with the stand-ins; after a requeue its file `requeued` holds the arguments."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return folder


def start(cluster, *args):
    """The job as SLURM starts it: bash in the folder it was submitted from, and what is set."""
    path = [cluster, Path(sys.executable).parent, os.environ["PATH"]]
    allocation = dict(
        SLURM_JOB_ID=str(os.getpid()),
        SLURM_JOB_NODELIST="localhost",
        SLURM_JOB_NUM_NODES="1",
        SLURM_GPUS_ON_NODE="2",
        SLURM_CPUS_PER_TASK="2",
        OMP_NUM_THREADS="1",
        PATH=":".join(map(str, path)),
    )
    command = ["bash", "slurm/pretrain.sbatch", *args]
    with open(cluster / "log", "a") as log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | allocation,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def end(job, cluster):
    """(exit code, what was requeued) at the end of the job."""
    try:
        code = job.wait(timeout=150)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGTERM)  # torchrun ends its processes
        raise AssertionError((cluster / "log").read_text()) from None
    requeued = cluster / "requeued"
    return code, requeued.read_text().splitlines() if requeued.exists() else []


@pytest.mark.slow
def test_a_job_that_is_told_to_stop_saves_and_queues_itself_until_the_run_is_finished(
    tiny_data, cluster
):
    once = [f"requeue {os.getpid()}"]
    # Slow steps, most of each validation, so that the signal comes before the last.
    job = start(cluster, *options(tiny_data, **SMALL, eval_every=1, eval_samples=400))
    log = tiny_data / "out" / "run" / "log.csv"
    until = time.monotonic() + 120
    while time.monotonic() < until and not (log.exists() and len(log_of(tiny_data)) >= 2):
        time.sleep(0.05)
    assert len(log_of(tiny_data)) >= 2, (cluster / "log").read_text()
    job.send_signal(signal.SIGUSR1)
    assert end(job, cluster) == (0, once), (cluster / "log").read_text()
    stopped = checkpoint.latest(tiny_data / "out" / "run")
    checkpoint.verify(stopped)
    step = checkpoint.read_state(stopped)["step"]
    assert 2 <= step < 20

    job = start(cluster, *options(tiny_data, **SMALL))
    assert end(job, cluster) == (0, once), (cluster / "log").read_text()
    assert [int(row["training_steps"]) for row in log_of(tiny_data)] == list(range(1, 21))
    text = (cluster / "log").read_text()
    assert f": {20 - step} steps left" in text and ": 0 steps left" in text


def test_mistyped_options_start_nothing(tiny_data, cluster):
    (cluster / "srun").write_text(f"#!/bin/bash\ntouch {cluster}/started\n")
    code, requeued = end(start(cluster, *options(tiny_data, sampels=160)), cluster)
    assert code == 1 and not requeued and not (cluster / "started").exists()
    assert "did you mean '--samples'?" in (cluster / "log").read_text().splitlines()[-1]


@pytest.mark.slow
def test_a_job_that_fails_after_some_steps_is_queued_again(tiny_data, cluster):
    """A machine that broke breaks the job, not the chain; the same error again at once ends it."""
    step = tiny_data / "out/run/checkpoints/step0000004"
    # Without the variable torchrun's restarts fail.
    begun = f"echo store=$TORCH_DISABLE_SHARE_RDZV_TCP_STORE $@\nmkdir -p {step}\n"
    begun += f"touch {step}/manifest.json\nexit 9\n"
    (cluster / "srun").write_text("#!/bin/bash\n" + begun)
    job = ["config/pretrain.py", *options(tiny_data, **SMALL)]
    once = [f"requeue {os.getpid()}"]
    assert end(start(cluster, *job), cluster) == (0, once)
    command = (cluster / "log").read_text()
    assert "store=1 " in command and " --max-restarts=3 " in command
    assert " --shutdown-timeout=" in command
    assert command.split(" train.py ")[1].split("\n")[0].split() == job
    assert end(start(cluster, *job), cluster) == (9, once)
