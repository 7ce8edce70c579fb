"""Where parameters, batches and activations lie: a mesh of devices, and a table from parameter path to its split.

Three mesh axes (see `config.MeshConfig`): the batch is split over `data` and `fsdp`, parameters over `fsdp` and
`tensor`. A matrix product is split over `tensor` as in Megatron-LM (https://arxiv.org/abs/1909.08053): by columns into
a block's inner width, by rows out of it.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deqa_jax.config import ConfigError, MeshConfig
from deqa_jax.parameters import ParamPath

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))
"""The first axis of everything that has a batch."""

_FSDP, _TENSOR, _BOTH = "fsdp", "tensor", ("tensor", "fsdp")

# First match wins. Stacks have a layer axis in front, which is never split. Left whole are axes of odd sizes (588
# values of a patch, 1025 positions, the rank of an adapter), groups that share a scale, and vectors, which are small.
_TABLE: tuple[tuple[str, tuple[Any, ...]], ...] = (
    (r"/(out|down)/kernel$", (_TENSOR, _FSDP)),
    (r"/(out|down)/lora_a$", (_BOTH, None)),
    (r"/(out|down)/lora_b$", (None, _FSDP)),
    (r"^vision/patch_embedding/kernel$", (None, _FSDP)),
    (r"/kernel$", (_FSDP, _TENSOR)),
    (r"/(out|down)/kernel_scale$", (None, _FSDP)),
    (r"/kernel_scale$", (None, _TENSOR)),
    (r"/lora_a$", (_FSDP, None)),
    (r"/lora_b$", (None, _BOTH)),
    (r"^language/embedding$", (_TENSOR, _FSDP)),
    (r"^vision/position_embedding$|^abstractor/queries$", (None, _FSDP)),
    (r"/(up|gate|query|key|value|query_key_value)/bias$", (_TENSOR,)),
    (r"/(scale|bias)$|^vision/class_token$|^abstractor/end_token$", (None,)),
)


# ---- the mesh ---------------------------------------------------------------------------------------------


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Devices, all of them without `devices`, as a mesh with the axes `data`, `fsdp`, `tensor`.

    Raises:
      ConfigError: the mesh does not have as many devices as there are; the message has the nearest that do.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(mesh_shape(config, len(devices)), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Sizes of the axes, with -1 filled in. Raises what `make_mesh` does.

    >>> mesh_shape(MeshConfig(data=2), 8)
    (2, 4, 1)
    """
    wanted = dataclasses.astuple(config)
    for shape in mesh_shapes(num_devices):
        if all(size in (-1, axis) for size, axis in zip(wanted, shape, strict=True)):
            return shape

    def distance(shape: tuple[int, int, int]) -> float:
        known = [(size, axis) for size, axis in zip(wanted, shape, strict=True) if size != -1]
        return sum(abs(math.log(axis / size)) for size, axis in known)

    nearest = sorted(mesh_shapes(num_devices), key=distance)[:3]
    raise ConfigError(
        f"mesh {config} does not fit {num_devices} device{'s' * (num_devices > 1)}; "
        f"nearest: {' or '.join(str(MeshConfig(data=d, fsdp=f, tensor=t)) for d, f, t in nearest)}"
    )


def mesh_shapes(num_devices: int) -> list[tuple[int, int, int]]:
    """Every mesh of so many devices.

    >>> mesh_shapes(2)
    [(1, 1, 2), (1, 2, 1), (2, 1, 1)]
    """
    sizes = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
    return [(d, f, num_devices // (d * f)) for d in sizes for f in sizes if num_devices % (d * f) == 0]


def batch_shards(mesh: Mesh) -> int:
    """In how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(name: str, size: int, mesh: Mesh) -> None:
    """Raises `ConfigError` if a batch cannot be split evenly; the message has the nearest sizes that can."""
    shards = batch_shards(mesh)
    if size % shards:
        nearest = [n for n in (size // shards * shards, -(-size // shards) * shards) if n]
        raise ConfigError(
            f"{name} {size} does not divide by data × fsdp = {shards} of the mesh; "
            f"nearest: {' or '.join(map(str, nearest))}"
        )


# ---- the table --------------------------------------------------------------------------------------------


def partition_specs(shapes: Mapping[ParamPath, tuple[int, ...]]) -> dict[ParamPath, PartitionSpec]:
    """How parameters are split, by path; adapters included.

    Raises:
      ConfigError: the table does not cover a parameter.

    >>> path = ("language", "layers", "down", "kernel")
    >>> tuple(partition_specs({path: (32, 11008, 4096)})[path])
    (None, 'tensor', 'fsdp')
    """
    specs, uncovered = {}, []
    for path, shape in shapes.items():
        name = "/".join(path)
        axes = next((axes for pattern, axes in _TABLE if re.search(pattern, name)), None)
        stacked = ("layers" in path) * (None,)
        if axes is None or len(stacked) + len(axes) != len(shape):
            uncovered.append(f"{name} {shape}")
        else:
            specs[path] = PartitionSpec(*stacked, *axes)
    if uncovered:
        raise ConfigError(f"no row of the table in sharding.py covers {', '.join(uncovered)}")
    return specs


def parameter_shardings(shapes: Mapping[ParamPath, tuple[int, ...]], mesh: Mesh) -> dict[ParamPath, NamedSharding]:
    """Where parameters lie on a mesh, by path.

    Raises:
      ConfigError: the table does not cover a parameter, or the mesh does not divide one.
    """
    shardings = {path: NamedSharding(mesh, spec) for path, spec in partition_specs(shapes).items()}
    for path, sharding in shardings.items():
        for size, axes in zip(shapes[path], sharding.spec, strict=True):
            names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
            parts = math.prod(mesh.shape[name] for name in names)
            if size % parts:
                fits = [n for n in range(1, parts + 1) if size % n == 0 and mesh.size % n == 0]
                raise ConfigError(
                    f"mesh: {' × '.join(names)} = {parts} does not divide the {size} of {'/'.join(path)}; "
                    f"nearest for {mesh.size} devices: {' or '.join(map(str, fits[-2:]))}, and the rest on data"
                )
    return shardings


def following(tree: Any, shardings: Mapping[ParamPath, NamedSharding], mesh: Mesh) -> Any:
    """Places for a tree with values of parameters by path, as an optimizer's state is; the rest lies everywhere."""

    def place(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        paths = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey) and key.key in shardings]
        return shardings[paths[-1]] if paths else NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, tree)


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes with their places: what programs are compiled from, and checkpoints restored into."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings)


def bytes_per_device(tree: Any) -> int:
    """What one device holds of arrays, or of `abstract` ones."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def check_memory(name: str, needed: int, mesh: Mesh) -> None:
    """Raises `ConfigError` if devices say that they have less memory than `needed` bytes each."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in mesh.local_devices]
    if (limit := min((limit for limit in limits if limit), default=None)) and needed > limit:
        raise ConfigError(
            f"{name} takes {needed / 2**30:.1f} GiB a device on the mesh {dict(mesh.shape)}; there are "
            f"{limit / 2**30:.1f}. Split it over {math.ceil(mesh.size * needed / limit)} devices or more, by fsdp or "
            "tensor"
        )


def compile_for(mesh: Mesh, traced: Any) -> Any:
    """A traced program, compiled for the devices of a mesh, be they there or not."""
    platform = mesh.devices.flat[0].platform
    # JAX itself promotes types implicitly where it lowers attention's gradient in bfloat16.
    with jax.numpy_dtype_promotion("standard"):
        return traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,)).compile()


# ---- several processes ------------------------------------------------------------------------------------


def feed(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process reads, and in how many parts the processes read it.

    Processes whose devices share the same rows (a `tensor` axis over several hosts) read the same part.

    Raises:
      ConfigError: the rows of processes overlap in part.
    """
    shards = batch_shards(mesh)
    rows: dict[int, set[int]] = {}
    places: Mapping[Any, Any] = NamedSharding(mesh, BATCH).devices_indices_map((shards,))
    for device, (index, *_) in places.items():
        rows.setdefault(device.process_index, set()).update(range(shards)[index])
    parts = sorted({tuple(sorted(part)) for part in rows.values()})
    if sum(parts, ()) != tuple(range(shards)) or len({len(part) for part in parts}) > 1:
        raise ConfigError(
            f"mesh {dict(mesh.shape)}: {len(rows)} processes of {mesh.size // len(rows)} devices cannot split a batch "
            "evenly; let the devices of a process be a multiple of tensor, or tensor a multiple of them"
        )
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def gather(array: Any) -> np.ndarray:
    """A whole array in this process's memory; all processes call it, if there are several."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
