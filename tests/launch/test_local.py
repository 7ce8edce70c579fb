"""Several processes on this machine: what the launcher does, and that training, infer and score run as one job."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import yaml
from small_runs import QUICK_FLAGS, rating, write_metas, write_tiny

from deqa_jax import Scorer
from deqa_jax.launch import local

PROCESSES = 2
DEVICES = 2
STEPS = 20
# `deqa`, in which a process may be ended, once it has come so far: the process, where, and the signal.
DEQA = """
import os, signal
from deqa_jax import scorer
from deqa_jax.cli import main
from deqa_jax.train import loop

process, place, number = os.environ.get("END", "none,0,0").split(",")
report, load = loop._Run._report, scorer.load_square
loaded = []

def end_at(here):
    if process == os.environ.get("JAX_PROCESS_ID", "0") and here == int(place):
        os.kill(os.getpid(), int(number))

def report_and_end(self, log, bar, step, metrics):
    report(self, log, bar, step, metrics)
    end_at(step)

def load_and_end(*arguments, **named):
    loaded.append(arguments)
    end_at(len(loaded))
    return load(*arguments, **named)

loop._Run._report, scorer.load_square = report_and_end, load_and_end
main()
"""


def run(*command, processes=1, end="none,0,0", shell=None):
    """A command as some processes of two devices, or as one of four: its status and what it says."""
    environment = {**os.environ, "XLA_FLAGS": QUICK_FLAGS, "END": end}
    whole = [sys.executable, "-c", DEQA, *map(str, command)]
    if shell is not None:
        whole = ["sh", "-c", shell, "sh", *whole]
    if processes == 1:
        environment["JAX_NUM_CPU_DEVICES"] = "4"
    else:
        launcher = [sys.executable, "-m", "deqa_jax.launch.local", "-n", str(processes), "--devices", str(DEVICES)]
        whole = [*launcher, "--", *whole]
    done = subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=900)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("several")
    write_tiny(root / "M")
    write_metas(root, "train.json", [rating(index) for index in range(16)])
    write_metas(root, "test.json", [rating(index) for index in range(20, 60)])
    return root


# ---- training ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def configuration(place):
    tree = {
        "model": str(place / "M"),
        "output": "given on the command line",
        "data": {"metas": [str(place / "train.json")], "root": str(place)},
        "evaluation": {"metas": [str(place / "test.json")], "every": STEPS, "batch_size": 8},
        "optimizer": {"learning_rate": 1e-3},
        "checkpoint": {"every": 5},
        "steps": STEPS,
        "batch_size_per_device": 2,
        "dtype": "float32",
        "remat": "none",
        "seed": 3,
    }
    (place / "run.yaml").write_text(yaml.safe_dump(tree))
    return place / "run.yaml"


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_curve(one, other):
    for ours, theirs in zip(log_of(one), log_of(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            if not isinstance(ours[name], dict):
                np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5, rtol=1e-5, err_msg=name)


def test_a_run_of_two_processes_ends_with_one_of_them_and_goes_on_with_any_number(place, configuration):
    def train(output, **options):
        return run("train", "--config_path", configuration, "--output", output, **options)

    status, _, said = train(place / "one")
    assert status == 0, said

    together = place / "together"
    status, _, said = train(together, processes=PROCESSES, end=f"1,8,{signal.SIGKILL}")
    assert status == 128 + signal.SIGKILL
    assert "process 1 was ended by SIGKILL; ending the others" in said
    assert "[0] deqa: another process of this job has ended or does not answer" in said
    assert 8 <= len(log_of(together)) < STEPS

    status, _, said = train(together, end=f"0,12,{signal.SIGTERM}")
    assert status == 1
    assert f"going on after step 5 of {STEPS}" in said
    assert f"asked to stop after step 13 of {STEPS}" in said

    status, out, said = train(together, processes=PROCESSES)
    assert status == 0, said
    assert f"going on after step 13 of {STEPS}" in said
    assert out.count(str(together / f"best-{STEPS}")) == 1

    assert_same_curve(place / "one", together)
    images = [place / "pictures" / f"{index}.png" for index in range(20, 24)]
    ours, theirs = (Scorer.from_pretrained(folder / f"best-{STEPS}")(images) for folder in (place / "one", together))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_configuration_that_fits_no_devices_is_refused_by_all(place, configuration):
    command = ("train", "--config_path", configuration, "--output", place / "never", "--mesh.tensor", 3)
    status, _, said = run(*command, processes=PROCESSES)
    assert status == 1
    for process in range(PROCESSES):
        assert f"[{process}] deqa: mesh data 1, fsdp -1, tensor 3 does not fit 4 devices; nearest: " in said
    assert not (place / "never").exists()


# ---- scoring ----------------------------------------------------------------------------------------------


def test_infer_predicts_every_image_once_though_a_process_dies_and_others_take_over(place):
    def infer(out, **options):
        return run(
            "infer", "--model", place / "M", "--meta", place / "test.json", "--root", place, "--out", out, **options
        )

    (place / "pictures" / "23.png").rename(place / "pictures" / "23.moved")
    status, _, said = infer(place / "alone")
    assert status == 1
    assert "images that could not be read: 1" in said

    out = place / "predicted"
    status, _, said = infer(out, processes=2, end=f"1,15,{signal.SIGKILL}")
    assert status == 128 + signal.SIGKILL
    parts = sorted(path.name for path in out.glob(".part-*/test.json"))
    assert parts
    before = sum(len(path.read_bytes().splitlines()) for path in out.glob(".part-*/test.json"))
    assert 0 < before < 39

    status, _, said = infer(out, processes=3)
    assert status == 1
    assert "images that could not be read: 1" in said
    assert (out / "test.json").read_bytes() == (place / "alone" / "test.json").read_bytes()
    assert (out / "errors.jsonl").read_bytes() == (place / "alone" / "errors.jsonl").read_bytes()
    assert not list(out.glob(".part-*"))

    (place / "pictures" / "23.moved").rename(place / "pictures" / "23.png")
    status, _, said = infer(out, processes=2)
    assert status == 0, said
    predicted = [json.loads(line)["id"] for line in (out / "test.json").read_text().splitlines()]
    assert predicted == [entry["id"] for entry in json.loads((place / "test.json").read_text())]
    assert not (out / "errors.jsonl").exists()


def test_score_writes_what_one_process_writes(place, tmp_path):
    command = ("score", place / "pictures", "--model", place / "M", "--format", "csv", "--output")
    assert run(*command, tmp_path / "alone")[0] == 0
    status, _, said = run(*command, tmp_path / "together", processes=3)
    assert status == 0, said
    assert (tmp_path / "together").read_bytes() == (tmp_path / "alone").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "together"]


def test_a_model_is_converted_by_each_process_that_does_not_find_it_converted(tmp_path):
    """On machines without common storage; they then read it together."""
    code = """
import os
os.environ["XDG_CACHE_HOME"] = os.environ["JAX_PROCESS_ID"]
from deqa_jax import Scorer, distributed

class Opened(Scorer):
    def __init__(self, checkpoint):
        print(checkpoint.folder, sum(float(abs(leaf).sum()) for leaf in checkpoint.restore().values()))

distributed.join()
Opened.from_pretrained("deqa-tiny")
distributed.leave()
"""
    launcher = [sys.executable, "-m", "deqa_jax.launch.local", "-n", "2", "--devices", "1", "--"]
    done = subprocess.run([*launcher, sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in sorted(done.stdout.splitlines()) if "deqa-tiny" in line]
    assert [line[1].split("/")[0] for line in lines] == ["0", "1"]
    assert len({line[2] for line in lines}) == 1


def test_score_of_different_files_is_refused(place, tmp_path):
    (tmp_path / "own-1.png").symlink_to(place / "pictures" / "21.png")
    (tmp_path / "own-0.png").symlink_to(place / "pictures" / "22.png")
    # Each process is given the file of its number.
    shell = f'exec "$@" {tmp_path}/own-$JAX_PROCESS_ID.png --model {place / "M"} --output {tmp_path / "F"}'
    status, _, said = run("score", processes=2, shell=shell)
    assert status == 2
    for process in range(2):
        assert f"[{process}] deqa: the processes were given different files" in said
    assert not (tmp_path / "F").exists()


def test_score_of_several_processes_needs_a_file(place):
    status, _, said = run("score", place / "pictures", "--model", place / "M", processes=2)
    assert status == 2
    assert "[0] deqa: several processes need --output FILE, in a folder that all of them share" in said


# ---- the launcher -----------------------------------------------------------------------------------------


def launched(capfd, *arguments):
    with pytest.raises(SystemExit) as exit:
        local.main([*arguments])
    captured = capfd.readouterr()
    return exit.value.code, captured.out, captured.err


def python(code):
    return sys.executable, "-c", f"import os, signal, sys, time; process = os.environ['JAX_PROCESS_ID']; {code}"


def test_every_process_knows_its_number_and_where_the_first_is(capfd):
    code = "print(os.environ['JAX_NUM_PROCESSES'], os.environ['JAX_COORDINATOR_ADDRESS'], 'error' * 2, sep='|')"
    status, out, _ = launched(capfd, "-n", "3", "--", *python(code))
    assert status == 0
    lines = sorted(out.splitlines())
    assert [line[:7] for line in lines] == ["[0] 3|1", "[1] 3|1", "[2] 3|1"]
    assert len({line[3:] for line in lines}) == 1


def test_devices_are_those_of_the_cpu(capfd):
    code = "print(os.environ.get('JAX_PLATFORMS'), os.environ.get('JAX_NUM_CPU_DEVICES'))"
    assert launched(capfd, "-n", "1", "--devices", "5", "--", *python(code))[1] == "[0] cpu 5\n"


def test_the_status_is_that_of_the_first_to_fail_and_the_others_are_ended(capfd, monkeypatch):
    monkeypatch.setattr(local, "_PATIENCE_SECONDS", 0.1)
    code = "time.sleep(600) if process == '0' else sys.exit('no more')"
    status, _, said = launched(capfd, "-n", "2", "--", *python(code))
    assert status == 1
    assert "[1] no more\n" in said
    assert "process 1 failed with status 1; ending the others\n" in said


def test_a_process_that_a_signal_ends_counts_as_in_a_shell(capfd):
    status, _, said = launched(capfd, "-n", "1", "--", *python("os.kill(os.getpid(), signal.SIGKILL)"))
    assert status == 137
    assert "process 0 was ended by SIGKILL" in said


def test_a_signal_reaches_every_process():
    code = "signal.signal(signal.SIGTERM, lambda *x: sys.exit(7)); print('ready', flush=True); time.sleep(600)"
    command = [sys.executable, "-m", "deqa_jax.launch.local", "-n", "2", "--", *python(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        assert sorted(launcher.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
        launcher.send_signal(signal.SIGTERM)
        _, said = launcher.communicate(timeout=60)
        assert launcher.returncode == 7
    assert "failed with status 7" in said


def test_a_dry_run_prints_the_commands(capfd):
    local.main(["-n", "2", "--devices", "4", "--dry-run", "--", "deqa", "score", "a b", "--model", "M"])
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2
    for process, line in enumerate(lines):
        assert line.startswith("env JAX_COORDINATOR_ADDRESS=127.0.0.1:")
        assert line.endswith(
            " JAX_NUM_PROCESSES=2 JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 "
            f"JAX_PROCESS_ID={process} deqa score 'a b' --model M"
        )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--", "true"], "the following arguments are required: -n/--processes"),
        (["-n", "0", "--", "true"], "'0' is no number of at least 1"),
        (["-n", "two", "--", "true"], "'two' is no number of at least 1"),
        (["-n", "2", "--devices", "-1", "--", "true"], "--devices"),
        (["-n", "2"], "the following arguments are required: -- COMMAND"),
        (["-n", "2", "--", "no-such-command"], "no-such-command: No such file or directory"),
    ],
)
def test_bad_usage(capfd, arguments, reason):
    status, out, said = launched(capfd, *arguments)
    assert status == 2
    assert out == ""
    assert reason in said
