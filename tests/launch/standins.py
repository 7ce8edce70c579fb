"""Stand-ins for the tools that the launch scripts call: `standins.py TOOL ARGUMENT…`, put on the PATH by conftest.py.

The folder $STANDINS has calls.jsonl, every call, and scenario.json, how things are and what happens to them:

    queued       states of the slice's request in the queue, a list for each time that it is made; each look takes one,
                 the last one stays
    node         state of its machine; without, READY if the request is ACTIVE
    breaks       what happens to ssh with `contains` in its snippet: after `lines` lines comes `partial` and the end of
                 the connection, which gcloud makes anew (`again`) or not; the slice is `then` in that state
    jobset       states of the JobSet; `applied`, those once it is made
    pods         names, phases and logs of its first pod; after `cut` characters a log breaks off
    job_state    of the SLURM job
    fails        calls that fail: their text, and how often
"""

import contextlib
import fcntl
import json
import os
import signal
import sys
from pathlib import Path

PLACE = Path(os.environ.get("STANDINS", "."))


@contextlib.contextmanager
def scenario():
    """The scenario, held while it is changed."""
    with (PLACE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = PLACE / "scenario.json"
        values = json.loads(path.read_text())
        yield values
        path.write_text(json.dumps(values))


def take(states):
    return states.pop(0) if len(states) > 1 else states[0]


def main(tool, arguments):
    call = [tool, *arguments]
    with scenario() as now, (PLACE / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(call) + "\n")
        for text, times in now.get("fails", {}).items():
            if text in " ".join(call) and times:
                now["fails"][text] -= 1
                print(f"ERROR: {tool}: no", file=sys.stderr)
                return 1
    return {"gcloud": gcloud, "kubectl": kubectl, "python3": python3, "srun": srun, "scontrol": scontrol}.get(
        tool, lambda _: 0
    )(arguments)


def option(arguments, name):
    return next((x.partition("=")[2] for x in arguments if x.startswith(f"--{name}=")), "")


def python3(arguments):
    folder = Path(arguments[arguments.index("--wheel-dir") + 1])
    (folder / "deqa_jax-0.1.0-py3-none-any.whl").touch()
    return 0


# ---- gcloud -----------------------------------------------------------------------------------------------


def gcloud(arguments):
    _, _, kind, action, *rest = arguments
    if action == "ssh":
        return ssh(rest)
    if action == "scp":
        import shutil  # a slow import, and most calls do without

        for worker in workers("all"):
            shutil.copytree(rest[1], worker / "deqa" / Path(rest[1]).name)
        return 0
    with scenario() as now:
        if action == "create":
            import shutil

            for worker in workers("all"):
                end_processes(worker)
                shutil.rmtree(worker)
                worker.mkdir()
            now["queued"] = now["queued"][1:] or [["ACTIVE"]]
            return 0
        if action == "delete":
            now["queued"][0] = ["NOT_FOUND"]
            now.pop("node", None)
            return 0
        if kind == "queued-resources":
            state = now["state"] = take(now["queued"][0])
        elif "node" in now:
            state = now["node"] = now["node"]
        else:
            state = "READY" if now["state"] == "ACTIVE" else "NOT_FOUND"
    if state in ("NOT_FOUND", "UNAVAILABLE"):
        print(f"ERROR: (gcloud.compute.tpus.{kind}.describe) {state}: resource", file=sys.stderr)
        return 1
    print(state)
    print("Updates are available for some components.", file=sys.stderr)
    return 0


def workers(which):
    return [PLACE / f"worker{i}" for i in (range(2) if which == "all" else [int(which)])]


def end_processes(worker):
    with contextlib.suppress(OSError, ValueError):
        os.killpg(int((worker / "deqa" / ".run" / "runner").read_text()), signal.SIGKILL)


def ssh(arguments):
    import subprocess

    snippet = next(x.partition("=")[2] for x in arguments if x.startswith("--command="))
    with scenario() as now:
        if "ACTIVE" not in now["state"] and now.get("node") != "READY":
            return 255
        broken = next((rule for rule in now.get("breaks", []) if rule["contains"] in snippet), None)
        if broken:
            now["breaks"].remove(broken)
    statuses = []
    for worker in workers(option(arguments, "worker")):
        environment = {"HOME": str(worker), "PATH": f"{PLACE / 'remote'}:{PLACE / 'tools'}", "STANDINS": str(PLACE)}
        process = subprocess.Popen(
            ["bash", "-c", snippet], env=environment, cwd=worker, stdout=subprocess.PIPE, start_new_session=True
        )
        if broken:
            # One line more: the first is empty.
            for _ in range(broken["lines"] + 1):
                sys.stdout.buffer.write(process.stdout.readline())
            sys.stdout.write(broken.get("partial", ""))
            sys.stdout.flush()
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if "then" in broken:
                for each in workers("all"):
                    end_processes(each)
                with scenario() as now:
                    now["queued"][0] = [broken["then"]]
                    now["state"] = broken["then"]
            return ssh(arguments) if broken.get("again") else 255
        for line in process.stdout:
            sys.stdout.buffer.write(line)
            sys.stdout.flush()
        statuses.append(process.wait())
    return next(filter(None, statuses), 0)


# ---- kubectl ----------------------------------------------------------------------------------------------


def kubectl(arguments):
    action = next(x for x in arguments if not x.startswith("--"))
    if action == "apply":
        (PLACE / "manifest.yaml").write_text(sys.stdin.read())
        with scenario() as now:
            now["jobset"] = now.pop("applied")
    elif action == "get" and "jobset" in arguments:
        with scenario() as now:
            state = take(now["jobset"])
        print({"absent": "", "there": "name\nSuspended"}.get(state, f"name\nStartupPolicyCompleted\n{state}"))
    elif action == "get":
        with scenario() as now:
            if now["pods"]:
                now["pod"] = pod = take(now["pods"])
                print("old-pod Failed", f"{pod['name']} {pod['phase']}", sep="\n")
    elif action == "logs" and "--follow" in arguments:
        pod = json.loads((PLACE / "scenario.json").read_text())["pod"]
        assert arguments[-1] == pod["name"]
        print(pod["log"][: pod.get("cut")], end="")
    elif action == "logs":
        print("[pod/slice-0-1/deqa] Error")
    return 0


# ---- SLURM ------------------------------------------------------------------------------------------------


def srun(arguments):
    words = [x for x in arguments if not x.startswith("--")]
    os.execvp(words[0], arguments[arguments.index(words[0]) :])


def scontrol(arguments):
    if "show" in arguments:
        state = json.loads((PLACE / "scenario.json").read_text()).get("job_state", "RUNNING")
        print(f"JobId={arguments[-1]} JobName=deqa JobState={state} Reason=None Restarts=0")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
