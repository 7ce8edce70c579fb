"""TPU chips, and how they are connected, as far as a compiler needs to know without having any."""

import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

_GIB = 2**30
_EXAMPLES = "v5e:1x1 to v5e:16x16, v6e:1x1 to v6e:16x16, v4:2x2x1 to v4:16x16x16, v5p:2x2x1 to v5p:16x16x24"
# There is no TPU to look for, and nothing to be said of that.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class PlanError(ValueError):
    """What cannot be planned; the message says why, and what can."""


class Chip(NamedTuple):
    """What the makers say of a chip.

    Attributes:
      flops: of matrix products in bfloat16, a second.
      memory_bandwidth: bytes a second.
      network_bandwidth: bytes a second into a chip, all of its links together.
      memory: bytes.
      axes: of its topologies.
      most: chips that can be connected.
    """

    flops: float
    memory_bandwidth: float
    network_bandwidth: float
    memory: int
    axes: int
    most: int


# https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e
CHIPS = {
    "v4": Chip(275e12, 1228e9, 300e9, 32 * _GIB, 3, 4096),
    "v5e": Chip(197e12, 819e9, 200e9, 16 * _GIB, 2, 256),
    "v5p": Chip(459e12, 2765e9, 600e9, 95 * _GIB, 3, 6144),
    "v6e": Chip(918e12, 1640e9, 448e9, 32 * _GIB, 2, 256),
}


class Topology(NamedTuple):
    """TPU chips and how they are connected."""

    name: str
    chip: Chip
    devices: Sequence[Any]
    """One for each chip."""


def open_topology(name: str) -> Topology:
    """Describes chips by a name such as `v5e:4x4` or `v5p:2x2x4`.

    Raises:
      PlanError: there are none of that name.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", name)
    chip = CHIPS.get(match[1]) if match else None
    sizes = [int(size) for size in match[2].split("x")] if match else []
    if chip is None or len(sizes) != chip.axes or not 1 <= math.prod(sizes) <= chip.most:
        raise PlanError(f"no topology is called {name!r}; there are {_EXAMPLES}")
    bounds = [min(size, 2) for size in sizes[:2]] + [1]
    # The two cores of a v4 are one device.
    cores = {"chip_config_name": "megacore"} if chip.axes == 3 else {}
    os.environ |= _NO_TPU
    jax.config.update("jax_platforms", "cpu")
    try:
        found = topologies.get_topology_desc(name, "tpu", chips_per_host_bounds=bounds, **cores)
    except jax.errors.JaxRuntimeError as error:
        raise PlanError(f"topology {name}: {first_line(error)}; there are {_EXAMPLES}") from error
    return Topology(name, chip, found.devices)


def first_line(error: Exception) -> str:
    """What the compiler says, without the kind of error in front and all that follows."""
    text = re.sub(r"^[A-Z_]+: ", "", str(error).strip())
    return text.splitlines()[0].rstrip(".")
