"""How processes find each other, as far as one process can tell; several are run in `tests/launch`."""

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from deqa_jax import distributed
from deqa_jax.distributed import (
    DistributedError,
    agree,
    check_shared,
    first_goes_first,
    is_first,
    join,
    several,
    total,
    wait_for_all,
)

ADDRESS, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
WHOLE = {ADDRESS: "10.0.0.1:1234", PROCESSES: "4", PROCESS: "3"}

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What JAX is told, in place of being told."""
    made: Calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: made.append((args, kwargs)))
    return made


# ---- joining ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"DEQA_DISTRIBUTED": ""},
        {ADDRESS: "", PROCESSES: "", PROCESS: ""},
        {"SLURM_JOB_ID": "7", "JAX_PLATFORMS": ""},
    ],
)
def test_nothing_happens_where_the_environment_speaks_of_no_others(environment: dict[str, str], calls: Calls) -> None:
    join(environment)
    assert calls == []


@pytest.mark.parametrize(
    ("address", "processes", "process"),
    [("10.0.0.1:1234", "4", "3"), ("[::1]:80", "1", "0"), ("first.host:65535", "16", "00")],
)
def test_address_and_numbers_are_passed_on(address: str, processes: str, process: str, calls: Calls) -> None:
    join({ADDRESS: address, PROCESSES: processes, PROCESS: process, "DEQA_DISTRIBUTED": ""})
    [(arguments, options)] = calls
    assert arguments == (address, int(processes), int(process))
    assert options["heartbeat_timeout_seconds"] > 0
    assert options["shutdown_timeout_seconds"] > 0


@pytest.mark.parametrize("others", [{}, WHOLE, {PROCESSES: "nonsense"}, {ADDRESS: "no port"}])
def test_jax_finds_the_others_by_itself_where_it_is_told_to(others: dict[str, str], calls: Calls) -> None:
    join({"DEQA_DISTRIBUTED": "auto", **others})
    [(arguments, options)] = calls
    assert arguments == (None, None, None)
    assert options.keys() == {"heartbeat_timeout_seconds", "shutdown_timeout_seconds"}


def test_the_environment_is_that_of_this_process_if_no_other_is_given(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    join()
    assert [arguments for arguments, _ in calls] == [("10.0.0.1:1234", 4, 3)]


@pytest.mark.parametrize("value", ["1", "true", "AUTO", "auto ", "none", "0"])
def test_anything_but_auto_is_refused(value: str, calls: Calls) -> None:
    with pytest.raises(DistributedError) as raised:
        join({"DEQA_DISTRIBUTED": value, **WHOLE})
    assert str(raised.value) == f"DEQA_DISTRIBUTED is auto or not set, not {value!r}"
    assert calls == []


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ([ADDRESS], [PROCESSES, PROCESS]),
        ([PROCESSES], [ADDRESS, PROCESS]),
        ([PROCESS], [ADDRESS, PROCESSES]),
        ([ADDRESS, PROCESSES], [PROCESS]),
        ([ADDRESS, PROCESS], [PROCESSES]),
        ([PROCESSES, PROCESS], [ADDRESS]),
    ],
)
def test_a_part_of_the_three_is_refused_and_the_rest_named(
    given: list[str], missing: list[str], empty: bool, calls: Calls
) -> None:
    environment = {name: WHOLE[name] for name in given} | (dict.fromkeys(missing, "") if empty else {})
    with pytest.raises(DistributedError) as raised:
        join(environment)
    assert str(raised.value) == f"{', '.join(given)} without {', '.join(missing)}: set all three, or none"
    assert calls == []


@pytest.mark.parametrize(
    ("processes", "process"),
    [("4", "4"), ("4", "5"), ("0", "0"), ("1", "1"), ("-1", "0"), ("4", "-1"), ("four", "0"), ("4", "x"), ("4", "1.0")],
)
def test_numbers_that_do_not_fit_are_refused(processes: str, process: str, calls: Calls) -> None:
    with pytest.raises(DistributedError) as raised:
        join({ADDRESS: "host:1", PROCESSES: processes, PROCESS: process})
    assert str(raised.value) == f"{PROCESS} {process} of {PROCESSES} {processes}: processes are numbered from 0"
    assert calls == []


@pytest.mark.parametrize("address", ["host", "host:", "host:port", "10.0.0.1", "host:12a"])
def test_an_address_without_a_port_is_refused(address: str, calls: Calls) -> None:
    with pytest.raises(DistributedError) as raised:
        join({**WHOLE, ADDRESS: address})
    assert str(raised.value) == f"{ADDRESS} {address}: give host:port of the first process"
    assert calls == []


@pytest.mark.parametrize("environment", [WHOLE, {"DEQA_DISTRIBUTED": "auto"}], ids=["told", "auto"])
@pytest.mark.parametrize(
    "error",
    [RuntimeError("barrier timed out"), ValueError("coordinator_address is None"), OSError("refused")],
)
def test_processes_that_do_not_find_each_other_are_an_error_that_says_so(
    environment: dict[str, str], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def initialize(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(DistributedError) as raised:
        join(environment)
    assert str(raised.value) == f"the processes of this job do not find each other: {error}"
    assert raised.value.__cause__ is error


def test_jax_takes_the_options_that_it_is_given() -> None:
    """The stand-in above takes any."""
    parameters = inspect.signature(jax.distributed.initialize).parameters
    assert list(parameters)[:3] == ["coordinator_address", "num_processes", "process_id"]
    assert parameters.keys() >= {"heartbeat_timeout_seconds", "shutdown_timeout_seconds"}


# ---- one process ------------------------------------------------------------------------------------------


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one process only, nobody is waited for or asked."""
    from jax.experimental import multihost_utils

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("there is nobody")

    monkeypatch.setattr(distributed, "_wait", fail)
    for name in ("process_allgather", "broadcast_one_to_all", "sync_global_devices"):
        monkeypatch.setattr(multihost_utils, name, fail)


@pytest.mark.usefixtures("nobody")
def test_one_process_is_the_first_and_has_the_sum_and_waits_for_nobody() -> None:
    assert is_first()
    assert not several()
    assert total(0) == 0
    assert total(7) == 7
    assert agree(b"anything")
    wait_for_all()
    done = []
    with first_goes_first():
        done.append("block")
    assert done == ["block"]


@pytest.mark.usefixtures("nobody")
def test_one_process_shares_any_folder_with_itself_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    check_shared(tmp_path)
    check_shared(tmp_path / "not" / "there")
    assert list(tmp_path.iterdir()) == []


# ---- several, without the others --------------------------------------------------------------------------


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], list[str]]:
    """Makes this process one of several whose others are always in time; says when they are waited for."""

    def become(index: int, count: int) -> list[str]:
        waits: list[str] = []
        monkeypatch.setattr(jax, "process_index", lambda: index)
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(distributed, "_wait", lambda name, seconds: waits.append(name))
        return waits

    return become


@pytest.mark.parametrize("index", [0, 1, 2])
def test_only_process_0_is_the_first(index: int, process: Callable[[int, int], list[str]]) -> None:
    process(index, 3)
    assert is_first() == (index == 0)


@pytest.mark.parametrize(("index", "expected"), [(0, ["block", "wait", "wait"]), (1, ["wait", "block", "wait"])])
def test_the_others_wait_for_the_first_and_it_then_for_them(
    index: int, expected: list[str], process: Callable[[int, int], list[str]]
) -> None:
    waits, order = process(index, 2), []
    with first_goes_first():
        order += ["wait"] * len(waits)
        order.append("block")
    order += ["wait"] * (len(waits) - order.count("wait"))
    assert order == expected


@pytest.mark.parametrize("index", [0, 1])
def test_where_the_first_fails_the_others_try_it_too(index: int, process: Callable[[int, int], list[str]]) -> None:
    waits = process(index, 2)
    with pytest.raises(OSError, match="not here"), first_goes_first():
        raise OSError("not here")
    assert len(waits) == 1


def test_no_two_waits_have_the_same_name(process: Callable[[int, int], list[str]]) -> None:
    waits = process(1, 2)
    for _ in range(3):
        wait_for_all()
    assert len(set(waits)) == len(waits) == 3


def test_the_sum_is_over_all_processes(
    process: Callable[[int, int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jax.experimental import multihost_utils

    process(0, 3)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda one: one * [1, 10, 100])
    found = total(2)
    assert found == 222
    assert isinstance(found, int)


@pytest.mark.parametrize(("others", "expected"), [([b"a", b"a"], True), ([b"a", b"b"], False), ([b"", b"b"], False)])
def test_processes_agree_if_all_say_the_same(
    others: list[bytes], expected: bool, process: Callable[[int, int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jax.experimental import multihost_utils

    def gather(one: np.ndarray) -> np.ndarray:
        return np.stack([one, *(np.frombuffer(hashlib.sha256(text).digest(), np.uint8) for text in others)])

    waits = process(0, 3)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    assert agree(b"a") is expected
    assert waits


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("blind", [[], [1], [1, 3]])
def test_processes_that_do_not_see_a_folder_are_named(
    index: int,
    blind: list[int],
    process: Callable[[int, int], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from jax.experimental import multihost_utils

    folder = tmp_path / "run" / "here"
    signs: list[Path] = []
    waits = process(index, 4)

    def broadcast(token: np.ndarray) -> np.ndarray:
        if index:  # the first process writes on its machine, which this one sees or does not
            folder.mkdir(parents=True)
            signs.append(folder / f".shared-{bytes(token).hex()}")
            if index not in blind:
                signs[0].touch()
        waits.append("broadcast")
        return token

    def gather(mine: np.ndarray) -> np.ndarray:
        waits.append("gather")
        assert bool(mine) == (index not in blind)
        return np.array([number not in blind for number in range(4)])

    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    if blind:
        with pytest.raises(DistributedError) as raised:
            check_shared(folder)
        assert f"{folder}: processes {', '.join(map(str, blind))} do not see" in str(raised.value)
    else:
        check_shared(folder)
    # Nobody looks before the sign is there, and it stays until all have looked.
    start, end = waits.index("broadcast"), waits.index("gather")
    assert end - start > 1
    assert len(waits) - end > 1
    assert folder.is_dir()
    # The first process alone removes its sign.
    assert list(folder.iterdir()) == (signs if index and index not in blind else [])
