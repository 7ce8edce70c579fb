"""What a program computes and what it sends: counted, as XLA's own cost analysis counts the body of a loop once."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

# ---- arithmetic -------------------------------------------------------------------------------------------


def count_flops(jaxpr: Any) -> int:
    """Floating-point operations of all matrix products in a jaxpr, bodies of scans as often as they run.

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
            # Of platforms to choose from, all do the same.
            total += max(count_flops(branch.jaxpr) for branch in parameters["branches"])
        elif name == "while":
            if count_flops(parameters["body_jaxpr"].jaxpr):
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
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(_KINDS)})(-start)?\(")
_WHILE = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)|branch_computations=\{([^}]*)\}"
)
_ARRAY = re.compile(r"\b([a-z]+[0-9]*\w*)\[([0-9,]*)\]")
_CONSTANT = re.compile(r"%?([\w.-]+) = [su]32\[\]\S* constant\((\d+)\)")
# One that runs beside several products stands in the computation of each.
_SPREAD = re.compile(r"channel_id=(\d+).*chain_id=")
_LESS = re.compile(r"ROOT .* compare\(.*?%?([\w.-]+)\), direction=LT")


class Traffic(NamedTuple):
    """Collectives of one kind in one run of a program: how many, and the bytes of what they make on each device."""

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
    found: dict[str, list[int]] = {}
    _add_collectives(entry, 1, computations, found, set())
    return {kind: Traffic(*found[kind]) for kind in _KINDS if kind in found}


def _add_collectives(
    name: str, times: int, computations: dict[str, list[str]], found: dict[str, list[int]], seen: set[str]
) -> None:
    for line in computations.get(name, ()):
        if match := _COLLECTIVE.search(line):
            if spread := _SPREAD.search(line):
                if spread[1] in seen:
                    continue
                seen.add(spread[1])
            sizes = [_bytes(*array) for array in _ARRAY.findall(match[1])]
            # What starts names its operands too; a synchronous one may make several arrays at once.
            size = max(sizes) if match[3] else sum(sizes)
            count_and_bytes = found.setdefault(match[2], [0, 0])
            count_and_bytes[0] += times
            count_and_bytes[1] += times * size
        if match := _WHILE.search(line):
            inside: dict[str, list[int]] = {}
            _add_collectives(match[2], 1, computations, inside, set())
            if inside:
                trips = times * _trips(match[1], computations)
                for kind, (count, size) in inside.items():
                    count_and_bytes = found.setdefault(kind, [0, 0])
                    count_and_bytes[0] += trips * count
                    count_and_bytes[1] += trips * size
        elif not _COLLECTIVE.search(line):
            for called, branches in _CALLED.findall(line):
                for inner in [called] if called else re.findall(r"[\w.-]+", branches):
                    _add_collectives(inner, times, computations, found, seen)


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
