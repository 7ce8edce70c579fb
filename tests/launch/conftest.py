"""A place to run the launch scripts in, where nothing but stand-ins can be called."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STANDINS = Path(__file__).with_name("standins.py")
TOOLS = (
    "bash cat cksum cp dirname env grep head ls mkdir mv nohup rm sed setsid sh sleep sort tail tee tr true false touch"
)
# What a worker's DEQA is: it says what it was given, and does what its first argument says.
DEQA = """
import json, os, pathlib, signal, sys, time
print("started", flush=True)
given = {"arguments": sys.argv[1:], "folder": os.getcwd(), "distributed": os.environ.get("DEQA_DISTRIBUTED")}
pathlib.Path("given.json").write_text(json.dumps(given))
"""


class Place:
    """The scripts' world: a folder, tools on the PATH, and what they were called with."""

    def __init__(self, folder):
        self.folder = folder
        self.home = folder / "home"
        self.processes = []
        for name in ("bin", "remote", "tools", "home", "worker0", "worker1", "shared"):
            (folder / name).mkdir()
        for tool in TOOLS.split():
            (folder / "tools" / tool).symlink_to(shutil.which(tool))
        for tool in ("gcloud", "kubectl", "python3", "sbatch", "srun", "scontrol"):
            self._standin("bin", tool)
        for tool in ("sudo", "curl", "lsb_release", "gcsfuse"):
            self._standin("remote", tool)
        self.script("remote/mountpoint", "exit 1")
        self.script("remote/hostname", 'echo "${HOME##*/}"')
        self.script("remote/python3", "exit 1")
        self.script(
            "remote/uv", 'echo "$@" >> ~/uv\n[ "$1" != venv ] || { mkdir -p .venv/bin; touch .venv/bin/python; }'
        )
        self.script("remote/deqa", DEQA, sys.executable)
        self.environment = {
            "PATH": f"{folder / 'bin'}:{folder / 'tools'}",
            "HOME": str(self.home),
            "STANDINS": str(folder),
            "DEQA_POLL_SECONDS": "0.01",
        }
        self.set()

    def _standin(self, where, tool):
        self.script(f"{where}/{tool}", f'exec {sys.executable} -IS {STANDINS} {tool} "$@"')

    def script(self, name, text, interpreter="/bin/sh"):
        path = self.folder / name
        path.write_text(f"#!{interpreter}\n{text}")
        path.chmod(0o755)

    def set(self, **scenario):
        """What happens, as in standins.py."""
        scenario = {"queued": [["NOT_FOUND"], ["ACTIVE"]], "state": "", **scenario}
        (self.folder / "scenario.json").write_text(json.dumps(scenario))

    def start(self, script, *arguments, **environment):
        process = subprocess.Popen(
            ["bash", ROOT / "launch" / script, *arguments],
            cwd=self.home,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def run(self, script, *arguments, **environment):
        """Status, output and errors of a script."""
        process = self.start(script, *arguments, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def calls(self, *words):
        """Every call that has all the words."""
        path = self.folder / "calls.jsonl"
        calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in calls if all(any(word in part for part in call) for word in words)]

    def forget(self):
        (self.folder / "calls.jsonl").unlink(missing_ok=True)

    def given(self, worker=0):
        return json.loads((self.worker(worker) / "deqa" / "given.json").read_text())

    def worker(self, number):
        return self.folder / f"worker{number}"

    def wait(self, condition):
        for _ in range(600):
            if condition():
                return
            time.sleep(0.05)
        raise AssertionError("it never happened")

    def close(self):
        """Ends what a failed test leaves: the scripts first, which would start their commands again."""
        for process in self.processes:
            if process.poll() is None:
                end_group(process.pid)
            process.communicate()
        for runner in self.folder.glob("worker*/deqa/.run/runner"):
            end_group(int(runner.read_text() or 0))


def end_group(number):
    """Ends a process and all that it started, where there is one."""
    if number > 1:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(number, signal.SIGKILL)


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    yield place
    place.close()
