"""`launch/slurm.sh` against stand-ins for sbatch, srun and scontrol; and what JAX makes of what it gives."""

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest

AWKWARD = ["a b", "", "it's", '"', "$HOME", "`x`", "\\", "two\nlines", "*", "~", "é 漢 🎈", "#", "--x=&|;<>"]
SAY = [sys.executable, "-c", "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"]
STOPPABLE = ["bash", "-c", 'trap "echo saved; exit 1" TERM; echo up; while :; do sleep 0.05; done']
JOB = {"SLURM_JOB_ID": "77"}


def submitted(place):
    (call,) = place.calls("sbatch")
    return call


def stopped(place, *arguments, command=STOPPABLE, **environment):
    """What a job does that gets SIGTERM as it runs: status, output and errors."""
    process = place.start("slurm.sh", *arguments, "--", *command, **JOB, **environment)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_outside_of_an_allocation_a_job_is_submitted(place):
    options = ("--nodes", "2", "--gpus-per-node", "4", "--time", "1:00:00", "--partition", "p", "--account=a")
    status, _, err = place.run("slurm.sh", *options, "--job-name", "j", "--cpus-per-task", "8", "--", "deqa", "train")
    assert (status, err) == (0, "")
    *given, wrap = submitted(place)
    assert given == [
        "sbatch", "--job-name=j", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--gpus-per-node=4",
        "--cpus-per-task=8", "--time=1:00:00", "--partition=p", "--account=a", "--requeue", "--signal=B:TERM@120",
        "--open-mode=append", "--output=%x-%j.log",
    ]  # fmt: skip
    assert wrap.startswith("--wrap=exec bash ")


def test_what_is_not_given_is_left_to_the_cluster(place):
    assert place.run("slurm.sh", "--", "deqa")[0] == 0
    given = " ".join(submitted(place))
    assert "--nodes=1 --ntasks=1 --ntasks-per-node=1 --gpus-per-node=1 --requeue" in given
    assert not [name for name in ("--time", "--partition", "--account", "--cpus-per-task") if name in given]


def test_the_job_that_is_submitted_runs_the_command_with_its_arguments(place):
    venv = place.folder / "a venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    assert place.run("slurm.sh", "--venv", str(venv), "--cpus-per-task", "8", "--", *SAY, *AWKWARD)[0] == 0
    script = submitted(place)[-1].removeprefix("--wrap=")
    environment = place.environment | JOB
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=True)
    arguments, environment = json.loads(done.stdout)
    assert arguments == AWKWARD
    assert environment["DEQA_DISTRIBUTED"] == "auto"
    assert environment["PATH"].split(":")[0] == str(venv / "bin")
    (srun,) = place.calls("srun")
    assert srun[1:3] == ["--gpu-bind=none", "--cpus-per-task=8"]


def test_a_failure_is_said_and_not_repeated(place):
    status, _, err = place.run("slurm.sh", "--", "bash", "-c", "exit 3", **JOB)
    assert (status, err) == (1, "slurm.sh: the command failed with status 3\n")
    assert not place.calls("scontrol")


def test_a_refused_job_is_said(place):
    place.set(fails={"sbatch": 1})
    status, _, err = place.run("slurm.sh", "--", "deqa")
    assert status == 1
    assert "the job was not accepted" in err


# ---- SIGTERM ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [None, "1"])
def test_a_stopped_job_saves_itself_and_is_queued_again(place, count):
    environment = {} if count is None else {"SLURM_RESTART_COUNT": count}
    status, out, err = stopped(place, "--restarts", "2", **environment)
    assert (status, out) == (0, "saved\n"), err
    assert place.calls("scontrol")[-1] == ["scontrol", "requeue", "77"]


def test_restarts_are_limited(place):
    status, out, err = stopped(place, "--restarts", "2", SLURM_RESTART_COUNT="2")
    assert (status, out) == (1, "saved\n")
    assert "no restarts are left: submit it again to go on" in err
    assert not place.calls("requeue")


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PREEMPTED"])
def test_a_job_that_is_cancelled_or_queued_again_by_slurm_is_left_alone(place, state):
    place.set(job_state=state)
    status, out, err = stopped(place)
    assert (status, out) == (1, "saved\n")
    assert f"the job is not to run again ({state})" in err
    assert not place.calls("requeue")


def test_a_command_that_ends_well_in_spite_of_the_signal_is_done(place):
    command = ["bash", "-c", 'trap "echo done; exit 0" TERM; echo up; while :; do sleep 0.05; done']
    status, out, _ = stopped(place, command=command)
    assert (status, out) == (0, "done\n")
    assert not place.calls("scontrol")


def test_a_job_that_cannot_be_queued_again_says_so(place):
    place.set(fails={"requeue": 1})
    status, _, err = stopped(place)
    assert status == 1
    assert "could not be queued again" in err


# ---- JAX --------------------------------------------------------------------------------------------------


def test_jax_has_each_process_take_its_own_gpu_of_all_that_its_node_has(monkeypatch):
    # As srun sets them, for the second process on the second of two nodes with four GPUs each.
    from jax._src.clusters import ClusterEnv

    step = {"SLURM_STEP_NODELIST": "node[07-08]", "SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
    for name in [name for name in os.environ if name.startswith(("SLURM_", "JAX_COORDINATOR", "OMPI_", "KUBERNETES"))]:
        monkeypatch.delenv(name)
    for name, value in (JOB | step | {"TPU_SKIP_MDS_QUERY": "1"}).items():
        monkeypatch.setenv(name, value)
    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 300)
    assert found == (f"node07:{65535 - 4096 + 1 + 77}", 8, 5, [1])


# ---- --dry-run and usage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", [{}, JOB], ids=["outside", "inside"])
def test_a_dry_run_prints_what_a_run_does_and_does_nothing(place, environment):
    arguments = ("--", "true", *AWKWARD)
    status, out, err = place.run("slurm.sh", "--nodes", "2", "--dry-run", *arguments, **environment)
    assert (status, err) == (0, "")
    assert not place.calls()
    assert place.run("slurm.sh", "--nodes", "2", *arguments, **environment)[0] == 0
    assert place.calls() == [shlex.split(out)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is no command: give it after --"),
        (("--nodes", "2"), "there is no command: give it after --"),
        (("--nodes", "none", "--", "x"), "--nodes 'none' is no number of at least 1"),
        (("--gpus-per-node", "0", "--", "x"), "--gpus-per-node '0' is no number of at least 1"),
        (("--restarts", "x", "--", "x"), "--restarts 'x' is no number"),
        (("--time", "--", "x"), "--time is without its value"),
        (("--gpus", "2", "--", "x"), "there is no option --gpus"),
        (("deqa", "train"), "deqa is no option: put -- before"),
        (("--venv", "/nowhere", "--", "x"), "--venv /nowhere has no bin/python"),
    ],
)
def test_bad_usage_is_one_sentence(place, arguments, message):
    status, out, err = place.run("slurm.sh", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("slurm.sh: ")
    assert err.count("\n") == 1
    assert not place.calls()


@pytest.mark.parametrize(("tool", "environment"), [("sbatch", {}), ("srun", JOB)])
def test_a_missing_tool_is_said(place, tool, environment):
    (place.folder / "bin" / tool).unlink()
    status, _, err = place.run("slurm.sh", "--", "deqa", **environment)
    assert status == 2
    assert f"{tool} is not on the PATH: install SLURM's commands" in err
