"""`launch/gke.sh` against a stand-in for kubectl, and the manifest that it fills in."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SLICE = ("--image", "reg.example/a/deqa:1@sha256:0f", "--accelerator", "tpu-v5-lite-podslice", "--topology", "4x4")
RUN = ("run", "--name", "n", *SLICE)
AWKWARD = [
    "a b",
    "",
    "it's",
    '"',
    "$(HOME) $$ $",
    "`x`",
    "\\",
    "\\n",
    "two\nlines\t\r",
    "\x01\x7f",
    "é 漢 🎈",
    "@NAME@ &",
    "x: #",
]


def manifest(place, *arguments, job=("deqa",)):
    """What is said of a run, by kubectl's own rules: `$$` in a command is a `$`."""
    status, out, err = place.run("gke.sh", *RUN, *arguments, "--dry-run", "--", *job)
    assert (status, err) == (0, "")
    return yaml.safe_load(re.search(r"<<'END'\n(.*?)\nEND\n", out, re.DOTALL)[1])


def pods(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    return job, job["template"]["spec"], job["template"]["spec"]["containers"][0]


def pod(name="n-slice-0-0-a", phase="Running", log="one\ntwo\n", **more):
    return {"name": name, "phase": phase, "log": log, **more}


# ---- the manifest -----------------------------------------------------------------------------------------


def test_the_manifest_is_a_jobset_of_one_pod_a_host(place):
    jobset = manifest(place, job=("deqa", "train"))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "n"
    assert jobset["spec"]["failurePolicy"] == {"maxRestarts": 100}
    job, spec, container = pods(jobset)
    assert (job["parallelism"], job["completions"], job["completionMode"], job["backoffLimit"]) == (4, 4, "Indexed", 0)
    assert spec["restartPolicy"] == "Never"
    assert spec["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert container["image"] == "reg.example/a/deqa:1@sha256:0f"
    assert container["command"] == ["deqa", "train"]
    assert container["env"] == [{"name": "DEQA_DISTRIBUTED", "value": "auto"}]
    assert container["resources"] == {"requests": {"google.com/tpu": 4}, "limits": {"google.com/tpu": 4}}
    assert not {"volumes", "tolerations"} & spec.keys()
    assert "volumeMounts" not in container


def test_options_add_what_they_say(place):
    jobset = manifest(place, "--spot", "--claim", "shared", "--restarts", "7")
    assert jobset["spec"]["failurePolicy"] == {"maxRestarts": 7}
    _, spec, container = pods(jobset)
    assert spec["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    (toleration,) = spec["tolerations"]
    assert toleration == {
        "key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule",
    }  # fmt: skip
    assert spec["volumes"] == [{"name": "data", "persistentVolumeClaim": {"claimName": "shared"}}]
    assert container["volumeMounts"] == [{"name": "data", "mountPath": "/data"}]


@pytest.mark.parametrize(
    ("topology", "chips", "hosts"), [("4x4", 4, 4), ("2x2x2", 4, 2), ("2x4", 8, 1), ("1x1", 1, 1), ("16x16", 4, 64)]
)
def test_hosts_follow_from_the_topology(place, topology, chips, hosts):
    job, spec, container = pods(manifest(place, "--topology", topology, "--chips-per-host", str(chips)))
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    assert spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    assert container["resources"]["limits"] == {"google.com/tpu": chips}


def test_arguments_arrive_as_they_are(place):
    _, _, container = pods(manifest(place, job=AWKWARD))
    # Kubernetes takes $$ for $, and looks after it no more.
    assert [re.sub(r"\$\$", "$", word) for word in container["command"]] == AWKWARD
    assert all(re.fullmatch(r"(\$\$|[^$])*", word) for word in container["command"])


# ---- running ----------------------------------------------------------------------------------------------


def test_a_run_is_applied_followed_and_ends_as_the_jobset(place):
    place.set(
        jobset=["absent"],
        applied=["there", "there", "there", "Completed"],
        pods=[pod(phase="Pending", log="not yet\n"), pod(), pod(log="one\ntwo\nthree\n", phase="Succeeded")],
    )
    status, out, err = place.run("gke.sh", *RUN, "--namespace", "team", "--", "deqa", *AWKWARD)
    assert (status, out) == (0, "one\ntwo\nthree\n"), err
    assert "n-slice-0-0-a: Pending\n" in err
    assert "n ended well" in err
    assert all(call[1] == "--namespace=team" for call in place.calls("kubectl"))
    _, _, container = pods(yaml.safe_load((place.folder / "manifest.yaml").read_text()))
    assert container["command"][1:] == [word.replace("$", "$$") for word in AWKWARD]


def test_a_failed_jobset_shows_the_last_lines_of_every_pod(place):
    place.set(jobset=["absent"], applied=["there", "Failed"], pods=[pod(phase="Failed", log="one\nno end")])
    status, out, err = place.run("gke.sh", *RUN, "--", "deqa")
    assert (status, out) == (1, "one\nno end\n")
    assert "n failed; the last lines of every pod:\n[pod/slice-0-1/deqa] Error\n" in err
    assert len(place.calls("--tail=20")) == 1


@pytest.mark.parametrize("cut", [0, 2, 4, 6])
def test_no_line_is_lost_or_repeated_when_a_log_breaks_off(place, cut):
    log = "one\ntwo\nthree\n"
    place.set(
        jobset=["absent"],
        applied=["there", "there", "there", "Completed"],
        pods=[pod(log=log, cut=cut), pod(log=log, cut=cut + 1), pod(log=log)],
    )
    assert place.run("gke.sh", *RUN, "--", "deqa")[:2] == (0, log)


def test_after_a_restart_the_new_pod_is_followed(place):
    place.set(
        jobset=["absent"],
        applied=["there", "there", "Completed"],
        pods=[pod("n-slice-0-0-a", log="one\ntwo\n"), pod("n-slice-0-0-b", log="again\n")],
    )
    status, out, err = place.run("gke.sh", *RUN, "--", "deqa")
    assert (status, out) == (0, "one\ntwo\nagain\n")
    assert "n-slice-0-0-b: Running" in err


def test_questions_that_fail_are_repeated(place):
    place.set(jobset=["there"] * 3 + ["Completed"], pods=[pod()], fails={"get jobset": 1, "get pods": 1, "logs": 1})
    status, out, _ = place.run("gke.sh", "follow", "--name", "n")
    assert (status, out) == (0, "one\ntwo\n")


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ({"jobset": ["Completed"]}, "n is there from before (Completed): delete it, by "),
        ({"jobset": ["Failed"]}, "n is there from before (Failed): delete it, by "),
        ({"jobset": ["absent"], "fails": {"apply": 1}}, "kubectl did not accept the JobSet"),
        ({"jobset": ["absent"], "fails": {"get jobset": 1}}, "kubectl does not say whether there is a n"),
    ],
)
def test_what_cannot_be_run_is_said(place, scenario, message):
    place.set(**scenario)
    status, _, err = place.run("gke.sh", *RUN, "--", "deqa")
    assert status == 1
    assert message in err
    assert not (place.folder / "manifest.yaml").exists()


def test_a_jobset_that_is_not_there_cannot_be_followed(place):
    place.set(jobset=["absent"])
    status, _, err = place.run("gke.sh", "follow", "--name", "n")
    assert status == 1
    assert "there is no JobSet n" in err


def test_delete_deletes_the_jobset(place):
    assert place.run("gke.sh", "delete", "--name", "n", "--namespace", "team")[0] == 0
    assert place.calls() == [["kubectl", "--namespace=team", "delete", "jobset", "n"]]
    place.set(fails={"delete": 1})
    assert place.run("gke.sh", "delete", "--name", "n")[0] == 1


# ---- --dry-run and usage ----------------------------------------------------------------------------------


def test_a_dry_run_prints_what_a_run_does_and_does_nothing(place):
    scenario = {"jobset": ["absent"], "applied": ["there", "Completed"], "pods": [pod("POD")]}
    place.set(**scenario)
    before = sorted(place.folder.rglob("*"))
    status, script, err = place.run("gke.sh", *RUN, "--claim", "c", "--dry-run", "--", "deqa", *AWKWARD)
    assert (status, err) == (0, "")
    assert sorted(place.folder.rglob("*")) == before
    place.run("gke.sh", *RUN, "--claim", "c", "--", "deqa", *AWKWARD)
    done, applied = place.calls(), (place.folder / "manifest.yaml").read_text()
    place.forget()
    place.set(**scenario)
    subprocess.run(["bash", "-c", script], env=place.environment, capture_output=True, check=True)
    assert (place.folder / "manifest.yaml").read_text() == applied
    printed = place.calls()
    assert done[: len(printed)] == printed
    assert all(call in printed for call in done)


def test_a_dry_run_of_delete_prints_it(place):
    status, out, _ = place.run("gke.sh", "delete", "--name", "n", "--dry-run")
    assert (status, shlex.split(out)) == (0, ["kubectl", "delete", "jobset", "n"])
    assert not place.calls()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "begin with run, follow or delete"),
        (("run", *SLICE, "--", "x"), "--name is missing"),
        (("run", "--name", "n", *SLICE[2:], "--", "x"), "--image is missing"),
        (("run", "--name", "n", *SLICE[:2], *SLICE[4:], "--", "x"), "--accelerator is missing"),
        (("run", "--name", "n", *SLICE[:4], "--", "x"), "--topology is missing"),
        (RUN, "there is no command"),
        ((*RUN, "--topology", "4*4", "--", "x"), "--topology '4*4' is no topology like 4x4"),
        ((*RUN, "--topology", "4", "--", "x"), "--topology '4' is no topology"),
        ((*RUN, "--topology", "2x3", "--", "x"), "the 6 chips of --topology 2x3 are no whole number of hosts of 4"),
        ((*RUN, "--topology", "1x1", "--", "x"), "set --chips-per-host"),
        ((*RUN, "--chips-per-host", "0", "--", "x"), "--chips-per-host '0' is no number of at least 1"),
        ((*RUN, "--image", 'x" evil', "--", "x"), "is no image"),
        ((*RUN, "--claim", "A", "--", "x"), "--claim 'A' is no name of a claim"),
        ((*RUN, "--restarts", "-1", "--", "x"), "--restarts '-1' is no number"),
        ((*RUN, "--name", "x" * 41, "--", "x"), "is no name of at most 40"),
        ((*RUN, "--zone", "z", "--", "x"), "there is no option --zone"),
        (("delete", "--name", "n", "--", "x"), "delete takes no command"),
    ],
)
def test_bad_usage_is_one_sentence(place, arguments, message):
    status, out, err = place.run("gke.sh", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("gke.sh: ")
    assert err.count("\n") == 1
    assert not place.calls()


def test_a_missing_kubectl_is_said(place):
    (place.folder / "bin" / "kubectl").unlink()
    status, _, err = place.run("gke.sh", *RUN, "--", "deqa")
    assert status == 2
    assert "kubectl is not on the PATH: install it" in err
