"""What a program computes and what it sends: counted, as XLA's own cost analysis counts the body of a loop once."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

# ---- arithmetic -------------------------------------------------------------------------------------------


def count_flops(jaxpr: Any) -> int:
    """Floating-point operations of all matrix products in a jaxpr, bodies of scans as often as they run.

    Where platforms do it differently, those of an accelerator: attention takes some products twice on CPU.

    >>> import jax, jax.numpy as jnp
    >>> def twice(x):
    ...     return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=2)[0]
    >>> count_flops(jax.make_jaxpr(twice)(jnp.ones((3, 3))).jaxpr)
    108
    """
    total = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        elif name == "scan":
            total += parameters["length"] * count_flops(parameters["jaxpr"].jaxpr)
        elif name == "cond":
            branches = [count_flops(branch.jaxpr) for branch in parameters["branches"]]
            # Of platforms to choose from, that which is not named: an accelerator.
            platforms = parameters.get("branches_platforms") or ()
            total += branches[platforms.index(None)] if None in platforms else max(branches)
        elif name == "while":
            if any(count_flops(parameters[part].jaxpr) for part in ("cond_jaxpr", "body_jaxpr")):
                raise NotImplementedError("matrix products in a loop of unknown length")
        else:
            total += sum(count_flops(inner) for inner in _inner(parameters))
    return total


def _inner(parameters: dict[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        for one in value if isinstance(value, list | tuple) else (value,):
            if hasattr(one, "jaxpr"):
                yield one.jaxpr
            elif hasattr(one, "eqns"):
                yield one


# ---- communication ----------------------------------------------------------------------------------------

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(_KINDS)})(-start)?\(([^)]*)\)")
_DEFINED = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (.+?) [a-z][\w-]*\(")
# TPUs have an all-reduce of which each keeps a part, in a fusion of its own.
_REDUCE_SCATTER = re.compile(r"calls=%?(all-reduce-scatter[\w.-]*)")
# Stages of an asynchronous collective behind its start: each is a fusion that has it inside once more.
_LATER_STAGE = re.compile(r"%?async-collective-done[\w.-]* = |calls=%?async_collective_fusion")
_WHILE = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(
    r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)|branch_computations=\{([^}]*)\}"
)
_ARRAY = re.compile(r"\b([a-z]+[0-9]*\w*)\[([0-9,]*)\]")
_CONSTANT = re.compile(r"%?([\w.-]+) = [su]32\[\]\S* constant\((\d+)\)")
_LESS = re.compile(r"ROOT .* compare\(.*?%?([\w.-]+)\), direction=LT")


class Traffic(NamedTuple):
    """Collectives of one kind in one run of a program.

    Attributes:
      times: how many.
      bytes: on each device, of the arrays that all of them together make up: of what is gathered, reduced or permuted.
    """

    times: int
    bytes: int


def count_collectives(text: str) -> dict[str, Traffic]:
    """Collectives by kind in a compiled program's text, bodies of loops as often as they run.

    An asynchronous one is counted where it starts.

    Raises:
      ValueError: a loop with collectives in it does not say how often it runs.
    """
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = computations.setdefault(match[1], [])
            entry = match[1] if line.startswith("ENTRY") else entry
        else:
            lines.append(line)
    found = _collectives(entry, computations)
    return {kind: found[kind] for kind in _KINDS if kind in found}


def _collectives(name: str, computations: dict[str, list[str]]) -> dict[str, Traffic]:
    """Those of one run of a computation."""
    found: dict[str, Traffic] = {}

    def add(kind: str, times: int, size: int) -> None:
        before = found.get(kind, Traffic(0, 0))
        found[kind] = Traffic(before.times + times, before.bytes + size)

    lines = computations.get(name, [])
    for line in lines:
        if match := _COLLECTIVE.search(line):
            add(match[2], 1, _whole(match, lines))
        elif match := _REDUCE_SCATTER.search(line):
            for traffic in _collectives(match[1], computations).values():
                add("reduce-scatter", *traffic)
        elif match := _WHILE.search(line):
            if inside := _collectives(match[2], computations):
                known = _KNOWN_TRIPS.search(line)
                trips = int(known[1]) if known else _trips(match[1], computations)
                for kind, (times, size) in inside.items():
                    add(kind, trips * times, trips * size)
        elif not _LATER_STAGE.search(line):
            for called, branches in _CALLED.findall(line):
                for inner in [called] if called else re.findall(r"[\w.-]+", branches):
                    for kind, traffic in _collectives(inner, computations).items():
                        add(kind, *traffic)
    return found


def _whole(match: re.Match[str], lines: list[str]) -> int:
    """Bytes of the arrays that devices hold the parts of, before or after a collective."""
    _, kind, starts, arguments = match.groups()
    sizes = _sizes(match[1])
    operands = re.findall(r"%?([\w.-]+)(?:,|$)", arguments)
    if starts and kind != "all-reduce":
        # What starts names its operands first, and behind its results what it keeps for itself.
        return max(sum(sizes[: len(operands)]), sum(sizes[len(operands) : 2 * len(operands)]))
    if kind == "reduce-scatter":
        made = {found[1]: sum(_sizes(found[2])) for line in lines if (found := _DEFINED.match(line))}
        return sum(made[operand] for operand in operands)
    return sum(sizes)


def _sizes(types: str) -> list[int]:
    return [_bytes(*array) for array in _ARRAY.findall(types)]


def _trips(condition: str, computations: dict[str, list[str]]) -> int:
    """How often a loop runs that counts from zero to a constant."""
    lines = computations[condition]
    constants = {name: int(value) for line in lines for name, value in _CONSTANT.findall(line)}
    for line in lines:
        if (match := _LESS.search(line)) and match[1] in constants:
            return constants[match[1]]
    raise ValueError(f"the loop with the condition {condition} does not count to a constant")


def _bytes(dtype: str, shape: str) -> int:
    return math.prod(int(size) for size in shape.split(",") if size) * _itemsize(dtype)


def _itemsize(dtype: str) -> int:
    # f32, bf16, s8, pred, f8e4m3fn; what is no array (a token) has no bytes.
    match = re.match(r"[a-z]+(\d+)", dtype)
    return 1 if dtype == "pred" else max(int(match[1]) // 8, 1) if match else 0
