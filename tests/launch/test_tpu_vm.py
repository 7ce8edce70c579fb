"""`launch/tpu_vm.sh` against a stand-in for gcloud, whose workers are folders in which the scripts' snippets run."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WHERE = ("--name", "n", "--zone", "z")
RUN = ("run", *WHERE, "--type", "v5litepod-16")
AWKWARD = [
    "a b",
    "",
    "it's",
    '"',
    "$HOME",
    "`x`",
    "\\",
    "\\n",
    "two\nlines",
    "*",
    "~",
    "é 漢 🎈",
    "!",
    "#",
    "--x=&|;<>",
    "%s",
]


def bash(text):
    return ("--", "bash", "-c", text)


# ---- making a slice, and running there --------------------------------------------------------------------


def test_a_slice_is_made_waited_for_and_used(place):
    place.set(queued=[["NOT_FOUND"], ["ACCEPTED", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "ACTIVE"]])
    status, out, err = place.run("tpu_vm.sh", *RUN, "--project", "p", "--spot", "--", "deqa", "train")
    assert (status, out) == (0, "started\n"), err
    states = [line.split(": ")[2] for line in err.splitlines() if line.startswith("tpu_vm.sh: n: ")]
    assert states == ["NONE", "ACCEPTED", "WAITING_FOR_RESOURCES", "ACTIVE"]
    (create,) = place.calls("create")
    assert create[3:] == [
        "queued-resources", "create", "n", "--node-id=n", "--zone=z", "--project=p", "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite", "--spot",
    ]  # fmt: skip
    for worker in range(2):
        folder = str(place.worker(worker) / "deqa")
        assert place.given(worker) == {"arguments": ["train"], "folder": folder, "distributed": "auto"}
    assert not place.calls("delete")
    assert "still exists and costs money" in err
    assert "tpu_vm.sh delete --name n --zone=z --project=p" in err


@pytest.mark.parametrize(
    ("kind", "version"),
    [("v4-32", "tpu-ubuntu2204-base"), ("v5p-8", "v2-alpha-tpuv5"), ("v6e-8", "v2-alpha-tpuv6e"), ("v9-8", "own")],
)
def test_a_type_has_its_usual_runtime(place, kind, version):
    more = ("--version", "own") if version == "own" else ()
    status, out, _ = place.run("tpu_vm.sh", "run", *WHERE, "--type", kind, *more, "--dry-run", "--", "deqa")
    assert status == 0
    assert f"--runtime-version={version}" in out


def test_arguments_arrive_as_they_are(place):
    status, _, err = place.run("tpu_vm.sh", *RUN, "--", "deqa", *AWKWARD)
    assert status == 0, err
    assert [place.given(worker)["arguments"] for worker in range(2)] == [AWKWARD, AWKWARD]


def test_the_project_is_installed_on_every_worker(place):
    assert place.run("tpu_vm.sh", *RUN, "--", "deqa")[0] == 0
    for worker in range(2):
        venv, install = (place.worker(worker) / "uv").read_text().splitlines()
        assert venv == "venv --quiet --python 3.12 .venv"
        wheel = place.worker(worker) / "deqa" / ".sent" / "wheel" / "deqa_jax-0.1.0-py3-none-any.whl"
        assert install.endswith(f"deqa-jax[tpu,train] @ file://{wheel}")
        assert wheel.exists()


@pytest.mark.parametrize("words", [("--config_path", "con figs/x.yaml"), ("--config_path=con figs/x.yaml",)])
def test_a_local_configuration_is_at_the_same_place_on_the_workers(place, words):
    (place.home / "con figs").mkdir()
    (place.home / "con figs" / "x.yaml").write_text("seed: 1")
    assert place.run("tpu_vm.sh", *RUN, "--", "deqa", "train", *words)[0] == 0
    for worker in range(2):
        assert (place.worker(worker) / "deqa" / "con figs" / "x.yaml").read_text() == "seed: 1"


def test_a_bucket_is_mounted_on_every_worker(place):
    status, _, err = place.run("tpu_vm.sh", *RUN, "--bucket", "gs://b", "--", "deqa")
    assert status == 0, err
    command = ["gcsfuse", "--implicit-dirs", "--rename-dir-limit=100000", "b", "bucket"]
    assert place.calls("gcsfuse", "--implicit-dirs")[-2:] == [command] * 2
    assert (place.worker(1) / "deqa" / "bucket").is_dir()


@pytest.mark.parametrize(
    "scenario", [{"queued": [["ACTIVE"]]}, {"queued": [["NOT_FOUND"]], "node": "READY"}], ids=["queued", "vm"]
)
def test_a_slice_that_is_there_is_used(place, scenario):
    place.set(**scenario)
    status, out, _ = place.run("tpu_vm.sh", *RUN, "--", "deqa")
    assert (status, out) == (0, "started\n")
    assert not place.calls("create")
    assert not place.calls("delete")


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_what_is_left_of_a_slice_is_replaced(place, state):
    place.set(queued=[[state], ["ACTIVE"]])
    assert place.run("tpu_vm.sh", *RUN, "--restarts", "0", "--", "deqa")[0] == 0
    assert len(place.calls("create")) == len(place.calls("delete")) == 1
    assert "--force" in place.calls("delete")[0]


def test_a_request_that_fails_in_the_queue_is_made_again(place):
    place.set(queued=[["NOT_FOUND"], ["WAITING_FOR_RESOURCES", "FAILED"], ["ACTIVE"]])
    status, _, err = place.run("tpu_vm.sh", *RUN, "--restarts", "1", "--", "deqa")
    assert status == 0
    assert "n was not to be had; trying again (0 restarts left)" in err


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ({"queued": [["UNAVAILABLE"]]}, "gcloud does not say how n is"),
        ({"queued": [["NOT_FOUND"]], "node": "STOPPED"}, "n is STOPPED: start it, or delete it"),
        ({"fails": {"create": 1}}, "n could not be made"),
        ({"queued": [["ACTIVE"]], "fails": {"scp": 1}}, "could not be started on n"),
        ({"fails": {"wheel": 1}}, "the wheel of"),
    ],
)
def test_what_cannot_be_done_is_said(place, scenario, message):
    place.set(**scenario)
    status, _, err = place.run("tpu_vm.sh", *RUN, "--", "deqa")
    assert status == 1
    assert message in err
    assert not place.calls("delete")
    assert len(place.calls("create")) == ("create" in scenario.get("fails", {}))


def test_a_look_that_fails_while_waiting_is_repeated(place):
    place.set(queued=[["NOT_FOUND"], ["ACCEPTED", "UNAVAILABLE", "ACTIVE"]])
    assert place.run("tpu_vm.sh", *RUN, "--", "deqa")[0] == 0
    assert len(place.calls("create")) == 1


# ---- the log, and the end ---------------------------------------------------------------------------------


def test_a_failure_shows_the_last_lines_of_every_worker(place):
    command = 'for i in $(seq 30); do echo "line $i of $(hostname)"; done; exit 3'
    place.script("remote/seq", "i=0; while [ $i -lt 30 ]; do i=$((i + 1)); echo $i; done")
    status, out, err = place.run("tpu_vm.sh", *RUN, *bash(command))
    assert status == 1
    assert out == "".join(f"line {i} of worker0\n" for i in range(1, 31))
    assert "the command failed with status 3" in err
    for worker in ("worker0", "worker1"):
        shown = [line for line in err.splitlines() if line.startswith(f"[{worker}]")]
        assert shown == [f"[{worker}] line {i} of {worker}" for i in range(11, 31)]


def test_a_command_that_is_not_there_fails(place):
    status, _, err = place.run("tpu_vm.sh", *RUN, "--", "no-such-command")
    assert status == 1
    assert "status 127" in err
    assert "no-such-command" in err


@pytest.mark.parametrize("again", [True, False], ids=["gcloud connects again", "the script connects again"])
@pytest.mark.parametrize("partial", ["", "3:li", "garbage"])
def test_no_line_is_lost_or_repeated_when_the_connection_breaks(place, again, partial):
    rules = [{"contains": "tail -n +", "lines": lines, "partial": partial, "again": again} for lines in (2, 1)]
    place.set(breaks=rules)
    lines = ["line 1", "  line\\2 ", "3:line", "", "line 5", "no end"]
    text = "\n".join(lines)
    status, out, err = place.run("tpu_vm.sh", *RUN, *bash(f"printf '%s' '{text}'"))
    assert status == 0, err
    assert out.splitlines() == lines
    assert err.count("connecting again") <= 2


def test_a_broken_connection_to_a_running_command_is_made_again(place):
    place.set(breaks=[{"contains": "tail -n +", "lines": 1}])
    go_on = place.folder / "go on"
    process = place.start("tpu_vm.sh", *RUN, *bash(f"echo one; until [ -e '{go_on}' ]; do sleep 0.05; done; echo two"))
    place.wait(lambda: len(place.calls("tail -n +")) > 1)
    go_on.touch()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "one\ntwo\n")
    assert "connecting again" in err


@pytest.mark.parametrize("job", ["exit 0", "exit 3"])
def test_the_slice_is_deleted_at_the_end_where_that_is_asked_for(place, job):
    status, _, err = place.run("tpu_vm.sh", *RUN, "--delete", *bash(job))
    assert status == int(job != "exit 0")
    assert place.calls()[-1][3:6] == ["queued-resources", "delete", "n"]
    assert "costs money" not in err


def test_a_slice_that_cannot_be_deleted_is_said_to_cost_money(place):
    place.set(fails={"delete": 1})
    status, _, err = place.run("tpu_vm.sh", *RUN, "--delete", "--", "deqa")
    assert status == 1
    assert "IT STILL COSTS MONEY" in err


# ---- slices that are taken away ---------------------------------------------------------------------------

ONCE_LONG = 'mark="$STANDINS/shared/$(hostname)"; echo one; [ -e "$mark" ] && exit; touch "$mark"; sleep 100'


@pytest.mark.parametrize("state", ["SUSPENDED", "SUSPENDING", "FAILED", "NOT_FOUND"])
def test_a_slice_that_is_taken_away_is_made_again_and_the_command_too(place, state):
    place.set(breaks=[{"contains": "tail -n +", "lines": 1, "then": state}])
    if state == "SUSPENDING":
        place.set(
            queued=[["NOT_FOUND"], ["ACTIVE"], ["ACTIVE"]],
            breaks=[{"contains": "tail -n +", "lines": 1, "then": "SUSPENDED"}],
        )
    status, out, err = place.run("tpu_vm.sh", *RUN, *bash(ONCE_LONG))
    assert (status, out) == (0, "one\none\n"), err
    assert len(place.calls("create")) == 2
    assert len(place.calls("delete")) == (state != "NOT_FOUND")
    assert "the run on n was broken off; trying again (99 restarts left)" in err


def test_a_machine_that_is_gone_while_its_request_is_active_counts_as_taken_away(place):
    place.set(queued=[["ACTIVE"], ["ACTIVE"]], node="PREEMPTED")
    status, _, err = place.run("tpu_vm.sh", *RUN, "--", "deqa")
    assert status == 0
    assert "n: PREEMPTED" in err
    assert len(place.calls("create")) == len(place.calls("delete")) == 1


def test_a_command_that_fails_as_its_slice_is_taken_away_has_not_failed(place):
    place.set(queued=[["NOT_FOUND"], ["ACTIVE", "ACTIVE", "SUSPENDED"], ["ACTIVE"]])
    command = 'mark="$STANDINS/shared/$(hostname)"; [ -e "$mark" ] && exit; touch "$mark"; exit 1'
    status, _, err = place.run("tpu_vm.sh", *RUN, *bash(command))
    assert status == 0, err
    assert len(place.calls("create")) == 2


def test_a_command_that_is_gone_without_a_status_is_started_again(place):
    process = place.start("tpu_vm.sh", *RUN, *bash(ONCE_LONG))
    runner = place.worker(0) / "deqa" / ".run" / "runner"
    place.wait(lambda: place.calls("tail -n +") and (place.folder / "shared" / "worker1").exists())
    for worker in range(2):
        os.killpg(int((place.worker(worker) / "deqa" / ".run" / "runner").read_text()), signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out in ("one\none\n", "one\n")
    assert "gone from the first worker" in err
    assert runner.exists()
    assert len(place.calls("create")) == 1


def test_restarts_are_limited(place):
    place.set(
        queued=[["NOT_FOUND"], ["ACTIVE"], ["ACTIVE"]],
        breaks=[{"contains": "tail -n +", "lines": 1, "then": "SUSPENDED"}] * 2,
    )
    status, _, err = place.run("tpu_vm.sh", *RUN, "--restarts", "1", *bash("echo one; sleep 100"))
    assert status == 1
    assert "no restarts are left" in err
    assert len(place.calls("create")) == 2


# ---- the other actions ------------------------------------------------------------------------------------


def test_a_running_command_is_found_followed_looked_at_and_stopped(place):
    command = bash('trap "echo saved; exit 1" TERM; echo up; while :; do sleep 0.1; done')
    process = place.start("tpu_vm.sh", *RUN, *command)
    logs = [place.worker(worker) / "deqa" / ".run" / "log" for worker in range(2)]
    place.wait(lambda: place.calls("tail -n +") and all("up" in log.read_text() for log in logs))

    status, out, _ = place.run("tpu_vm.sh", "status", *WHERE)
    first, *others = out.splitlines()
    assert (status, first) == (0, "n: ACTIVE")
    assert [line.partition(": running ")[0] for line in others] == ["worker0", "worker1"]

    status, _, err = place.run("tpu_vm.sh", *RUN, "--", "deqa")
    assert status == 1
    assert "another command is running on n" in err

    sent = len(place.calls("scp"))
    second = place.start("tpu_vm.sh", *RUN, *command)
    third = place.start("tpu_vm.sh", "follow", *WHERE)
    place.wait(lambda: len(place.calls("tail -n +")) == 3)
    assert len(place.calls("scp")) == sent

    assert place.run("tpu_vm.sh", "stop", *WHERE)[0] == 0
    for each in (process, second, third):
        out, err = each.communicate(timeout=60)
        assert (each.returncode, out) == (1, "up\nsaved\n")
        assert "the command failed with status 1" in err
    assert [log.read_text() for log in logs] == ["up\nsaved\n"] * 2
    assert place.run("tpu_vm.sh", "stop", *WHERE)[0] == 0
    assert "worker1: ended 1\n" in place.run("tpu_vm.sh", "status", *WHERE)[1]


def test_a_finished_command_is_shown_by_follow(place):
    place.run("tpu_vm.sh", *RUN, "--", "deqa")
    assert place.run("tpu_vm.sh", "follow", *WHERE)[:2] == (0, "started\n")


def test_following_ends_where_the_slice_is_taken_away_or_nothing_runs(place):
    place.set(queued=[["ACTIVE"]])
    place.run("tpu_vm.sh", *RUN, "--", "deqa")
    place.set(queued=[["ACTIVE"]], breaks=[{"contains": "tail -n +", "lines": 0, "then": "SUSPENDED"}])
    status, _, err = place.run("tpu_vm.sh", "follow", *WHERE)
    assert status == 1
    assert "was taken away" in err
    place.set(queued=[["ACTIVE"]])
    shutil.rmtree(place.worker(0) / "deqa")
    status, _, err = place.run("tpu_vm.sh", "follow", *WHERE)
    assert status == 1
    assert "nothing has been started on n" in err


@pytest.mark.parametrize("action", ["follow", "stop"])
def test_a_slice_that_is_not_there_cannot_be_asked(place, action):
    status, _, err = place.run("tpu_vm.sh", action, *WHERE)
    assert status == 1
    assert "n is not there to be asked (state NONE)" in err


@pytest.mark.parametrize(
    ("scenario", "kind"),
    [({"queued": [["SUSPENDED"]]}, "queued-resources"), ({"queued": [["NOT_FOUND"]], "node": "READY"}, "tpu-vm")],
)
def test_delete_deletes_what_is_there(place, scenario, kind):
    place.set(**scenario)
    assert place.run("tpu_vm.sh", "delete", *WHERE)[0] == 0
    (call,) = place.calls("delete")
    assert call[3:6] == [kind, "delete", "n"]


@pytest.mark.parametrize(
    ("scenario", "status", "message"),
    [
        ({"queued": [["NOT_FOUND"]]}, 0, "there is no n in z"),
        ({"queued": [["UNAVAILABLE"]]}, 1, "nothing was deleted"),
        ({"queued": [["ACTIVE"]], "fails": {"delete": 1}}, 1, "n could not be deleted"),
    ],
)
def test_delete_says_what_it_does_not_do(place, scenario, status, message):
    place.set(**scenario)
    found, _, err = place.run("tpu_vm.sh", "delete", *WHERE)
    assert found == status
    assert message in err


# ---- --dry-run and usage ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        (*RUN, "--delete", "--bucket", "b", "--", "deqa", "train", "--config_path", "x y.yaml", *AWKWARD),
        ("follow", *WHERE),
        ("status", *WHERE),
        ("stop", *WHERE),
        ("delete", *WHERE),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_dry_run_prints_what_a_run_does_and_does_nothing(place, arguments):
    (place.home / "x y.yaml").touch()
    at = arguments.index("--") if "--" in arguments else len(arguments)
    before = sorted(place.folder.rglob("*"))
    status, script, err = place.run("tpu_vm.sh", *arguments[:at], "--dry-run", *arguments[at:])
    assert (status, err) == (0, "")
    assert sorted(place.folder.rglob("*")) == before

    place.script("remote/uv", "mkdir -p .venv/bin; touch .venv/bin/python")
    if arguments[0] != "run":
        place.run("tpu_vm.sh", *RUN, "--", "deqa")
        place.forget()
    start = (place.folder / "scenario.json").read_text()
    assert place.run("tpu_vm.sh", *arguments)[0] == 0
    done = place.calls()
    place.forget()
    (place.folder / "scenario.json").write_text(start)
    place.close()
    for worker in range(2) if arguments[0] == "run" else ():
        shutil.rmtree(place.worker(worker))
        place.worker(worker).mkdir()
    subprocess.run(["bash", "-c", script], cwd=place.home, env=place.environment, capture_output=True, check=False)
    assert place.calls() == done


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "begin with run, follow, status, stop or delete"),
        (("start",), "'start' is nothing to do"),
        (("run", "--zone", "z", "--type", "t", "--", "x"), "--name is missing"),
        (("run", "--name", "n", "--type", "t", "--", "x"), "--zone is missing"),
        (("run", *WHERE, "--", "x"), "--type is missing"),
        (RUN, "there is no command: give it after --"),
        ((*RUN, "--"), "there is no command: give it after --"),
        ((*RUN, "deqa"), "deqa is no option: put -- before"),
        ((*RUN, "--speed", "--", "x"), "there is no option --speed"),
        ((*RUN, "--spot=yes", "--", "x"), "there is no option --spot=yes"),
        ((*RUN, "--project", "--", "x"), "--project is without its value"),
        ((*RUN, "--restarts", "many", "--", "x"), "--restarts 'many' is no number"),
        (("run", "--name", "A_b", "--zone", "z", "--type", "t", "--", "x"), "--name 'A_b' is no name"),
        (("stop", *WHERE, "--spot"), "there is no option --spot"),
        (("stop", *WHERE, "--", "x"), "stop takes no command"),
        ((*RUN, "--", "deqa", "--config_path", "../bin/gcloud"), "--config_path ../bin/gcloud cannot be"),
    ],
)
def test_bad_usage_is_one_sentence(place, arguments, message):
    status, out, err = place.run("tpu_vm.sh", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("tpu_vm.sh: ")
    assert err.count("\n") == 1
    assert not place.calls()


def test_a_configuration_with_an_absolute_path_is_refused(place):
    (place.home / "x.yaml").touch()
    status, _, err = place.run("tpu_vm.sh", *RUN, "--", "deqa", f"--config_path={place.home / 'x.yaml'}")
    assert status == 2
    assert "give it relative to this folder" in err


@pytest.mark.parametrize("tool", ["gcloud", "python3"])
def test_a_missing_tool_is_said(place, tool):
    (place.folder / "bin" / tool).unlink()
    status, _, err = place.run("tpu_vm.sh", *RUN, "--", "deqa")
    assert status == 2
    assert f"{tool} is not on the PATH: install" in err


# ---- all scripts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.sh", "slurm.sh"])
def test_help_has_an_example_and_every_option(place, script):
    status, out, err = place.run(script, "--help")
    assert (status, err) == (0, "")
    assert f"example: launch/{script}" in out
    text = (ROOT / "launch" / script).read_text()
    options = [
        line.split('"')[1::2] for line in text.splitlines() if line.strip().partition(") ")[2].startswith("parse")
    ]
    options += [line.split('"')[1::2] for line in text.splitlines() if line.strip().startswith("parse")]
    names = {name for option in options for words in option for name in words.split() if name[0].isalpha()}
    assert len(names) >= 8
    assert not [name for name in names if f"--{name}" not in out]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    scripts = sorted((ROOT / "launch").glob("*.sh"))
    assert len(scripts) == 4
    done = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.sh", "slurm.sh"])
def test_scripts_can_be_run(script):
    assert os.access(ROOT / "launch" / script, os.X_OK)
