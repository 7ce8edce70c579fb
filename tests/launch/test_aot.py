"""`deqa plan`: programs are compiled for TPUs that are not there, and the numbers are those of the program."""

import dataclasses
import functools
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest
import yaml
from jax.sharding import NamedSharding, PartitionSpec
from small_runs import TINY, write_tiny

from deqa_jax.config import PRESETS, ConfigError, MeshConfig
from deqa_jax.convert.to_jax import convert
from deqa_jax.launch import aot
from deqa_jax.launch.aot import PlanError
from deqa_jax.launch.hlo import Traffic, count_collectives
from deqa_jax.model.layers import attention
from deqa_jax.parameters import parameter_shapes
from deqa_jax.sharding import BATCH, compile_for, make_mesh
from deqa_jax.train.settings import read_config

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the compiler for TPUs, which is for Linux on x86-64 only"
)
LORA = {
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.3, "targets": ["language/layers/query"]},
    "parameters": [{"pattern": "lora_|^vision/", "multiplier": 1}, {"pattern": "", "multiplier": 0}],
}
COUNT = sum(math.prod(shape) for shape in parameter_shapes(TINY).values())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("plan") / "M")


@pytest.fixture(scope="module")
def configuration(model):
    """A training run of the smallest model, full or with more entries."""

    def write(**changes):
        tree = {
            "model": str(model),
            "output": "nowhere",
            "data": {"metas": ["none.json"], "root": ".", "pairs": False},
            "batch_size_per_device": 2,
            **changes,
        }
        path = model.parent / "plan.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def row(report, name):
    (found,) = re.findall(rf"^{re.escape(name)}\s{{2,}}(.*)$", report, re.MULTILINE)
    return found


# ---- compiled for real ------------------------------------------------------------------------------------


def test_scoring_is_planned_with_the_largest_batch(deqa, model):
    command = ("plan", "--topology", "v5e:1x1", "--model", model, "--batch-size", 4, "--largest-batch")
    with pytest.MonkeyPatch.context() as patch:
        # A chip this small is full soon: the search ends after a few compilations.
        compiled, limit = aot.compile_job, 24

        def compile_up_to_limit(job, topology, batch_size):
            if batch_size > limit:
                raise aot.OutOfMemoryError("it would not fit")
            return compiled(job, topology, 4)._replace(batch_size=batch_size)

        patch.setattr(aot, "compile_job", compile_up_to_limit)
        status, out, _ = deqa(*command)
    assert status == 0
    assert out.startswith(f"scoring, {model}, bfloat16\non v5e:1x1, 1 chip\n")
    assert row(out, "mesh") == "data 1, fsdp 1, tensor 1"
    assert row(out, "images a chip") == "4"
    assert row(out, "peak").endswith(" of 16.00 GiB")
    assert 22 <= int(row(out, "largest batch that fits, images a chip")) <= limit
    assert "The rate is a bound, not a forecast: 197 TFLOP/s" in out


@pytest.mark.parametrize("name", ["v5e:1x1", "v6e:2x2", "v4:2x2x1"])
def test_attention_of_the_published_size_is_a_kernel_on_every_chip(name):
    topology = aot.open_topology(name)
    chips = len(topology.devices)
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=min(2, chips)), topology.devices)
    placed = NamedSharding(mesh, BATCH) if chips > 1 else None
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    tokens = jax.ShapeDtypeStruct((4, 1025, 16, 64), jnp.bfloat16, sharding=split)
    compiled = compile_for(mesh, jax.jit(functools.partial(attention, placed=placed)).trace(tokens, tokens, tokens))
    assert "tpu_custom_call" in compiled.as_text()
    # Nothing is sent to other chips: the kernel is split as the tokens are.
    assert count_collectives(compiled.as_text()) == {}


def test_the_kernels_gradient_compiles_where_memory_on_the_chip_is_smallest():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1), aot.open_topology("v4:2x2x1").devices)
    tokens = jax.ShapeDtypeStruct((4, 1025, 16, 64), jnp.bfloat16, sharding=NamedSharding(mesh, BATCH))

    def total(*operands):
        return jnp.sum(attention(*operands, placed=NamedSharding(mesh, BATCH)), dtype="float32")

    compiled = compile_for(mesh, jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(tokens, tokens, tokens))
    assert compiled.as_text().count("tpu_custom_call") >= 3


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_training_step_is_planned_on_a_mesh(kind, configuration):
    config = read_config(configuration(**(LORA if kind == "lora" else {})))
    topology = aot.open_topology("v5p:2x2x1")
    job = aot.training_job(config, topology)
    plan = aot.compile_job(job, topology, config.batch_size_per_device)

    held = job.state["trained parameters"] + job.state["frozen parameters"]
    trained = job.state["trained parameters"] / 4
    if kind == "full":
        assert job.state["frozen parameters"] == 0
        # Norms and biases lie on all four chips.
        assert COUNT < held < 1.2 * COUNT
    else:
        assert job.state["frozen parameters"] > 0
        assert 0 < trained < COUNT / 4
    # Two moments for what is trained, and two counts of steps.
    assert job.state["optimizer"] == 2 * job.state["trained parameters"] + 8
    assert plan.job is job
    assert plan.temporary > 0
    assert sum(job.state.values()) < plan.peak < topology.chip.memory
    # Its gradients are summed over the chips, and its parameters gathered.
    assert plan.collectives["all-gather"].bytes > 0
    assert plan.collectives.keys() & {"all-reduce", "reduce-scatter"}
    assert plan.images_per_second == pytest.approx(4 * 2 / max(plan.seconds.values()))
    report = aot.report(plan, topology, None)
    assert report.startswith(f"{'LoRA' if kind == 'lora' else 'full'} training, {config.model}, bfloat16, remat full")
    assert "on v5p:2x2x1, 4 chips" in report
    assert row(report, "images a chip") == "2"


def test_more_parameters_on_a_chip_are_counted_as_more(configuration):
    config, topology = read_config(configuration()), aot.open_topology("v5e:2x2")

    def trained(**mesh):
        job = aot.training_job(dataclasses.replace(config, mesh=MeshConfig(**mesh)), topology)
        return job.state["trained parameters"]

    assert trained(data=4, fsdp=1) == 4 * COUNT
    assert trained(fsdp=4) < trained(fsdp=2, tensor=2) < trained(data=2, fsdp=2) < trained(data=4, fsdp=1)


def test_both_cores_of_a_v4_are_one_device():
    assert len(aot.open_topology("v4:2x2x1").devices) == 4


def test_what_is_not_here_has_the_published_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = aot.scoring_job("DeQA/Some-Id", "bfloat16", MeshConfig(), 1, aot.open_topology("v5p:2x2x1"))
    assert "not here: taken to have the published size" in job.name
    count = sum(math.prod(shape) for shape in parameter_shapes(PRESETS["full"]).values())
    assert job.state["parameters"] == pytest.approx(2 * count / 4, rel=0.01)


def test_a_quantised_model_is_planned_as_such(tmp_path, model):
    topology = aot.open_topology("v5e:1x1")
    convert(str(model), tmp_path / "Q", quantization="int4")

    def job(name, quantization=None):
        return aot.scoring_job(str(name), "bfloat16", MeshConfig(), 1, topology, quantization)

    exact, stored, asked = job(model), job(tmp_path / "Q"), job(model, "int4")
    assert stored.name.endswith("bfloat16, int4 kernels")
    assert stored.state == asked.state
    assert stored.state["parameters"] < exact.state["parameters"]
    assert aot.compile_job(stored, topology, 1).peak > 0


def test_a_quantised_model_is_not_planned_to_be_trained(tmp_path, model, configuration):
    convert(str(model), tmp_path / "Q", quantization="int8")
    config = dataclasses.replace(read_config(configuration()), model=str(tmp_path / "Q"))
    with pytest.raises(ConfigError, match="its weights are quantised"):
        aot.training_job(config, aot.open_topology("v5e:1x1"))


# ---- what is made of compiled programs ---------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch):
    """In place of the compiler: programs that fit up to some images on a chip, by mesh; and what was compiled."""
    tried = []

    def fake(limits, peak=lambda batch_size: 10):
        def compile_job(job, topology, batch_size):
            mesh = tuple(job.mesh.shape.values())
            tried.append((mesh, batch_size))
            if batch_size > limits.get(mesh, 0):
                raise aot.OutOfMemoryError("Ran out of memory in memory space hbm")
            seconds = {"compute": 1.0, "memory": 0.5, "network": float(mesh[1])}
            return aot.Plan(job, batch_size, peak(batch_size), 5, 1e12, {"all-gather": Traffic(3, 7)}, seconds)

        monkeypatch.setattr(aot, "compile_job", compile_job)
        return tried

    return fake


def test_the_largest_batch_is_found_to_within_an_eighth(compiler, configuration):
    config, topology = read_config(configuration()), aot.open_topology("v5e:2x2")
    for limit in (1, 2, 3, 7, 30, 100):
        tried = compiler({(1, 4, 1): limit})
        job = aot.training_job(config, topology)
        fits = aot.compile_job(job, topology, 2) if limit >= 2 else None
        found = aot.largest_batch(job, topology, fits)
        assert 7 / 8 * limit <= found.batch_size <= limit
        assert len(tried) <= 14
        tried.clear()
    compiler({})
    assert aot.largest_batch(aot.training_job(config, topology), topology, None) is None


@pytest.mark.parametrize("limit", [40, 300, 5000])
def test_memory_that_grows_evenly_says_where_the_largest_batch_is(limit, compiler, configuration):
    config, topology = read_config(configuration()), aot.open_topology("v5e:2x2")
    job = aot.training_job(config, topology)
    state = topology.chip.memory / 4
    tried = compiler({(1, 4, 1): limit}, lambda batch_size: state + 3 * state * batch_size / limit)
    found = aot.largest_batch(job, topology, aot.compile_job(job, topology, 16))
    assert 7 / 8 * limit <= found.batch_size <= limit
    # What is there already, twice as many, a little less than should fit, and what does not.
    assert len(tried) == 4


def test_the_best_mesh_is_the_one_that_is_fastest_of_those_that_fit(compiler, configuration):
    compiler({(1, 4, 1): 8, (2, 2, 1): 8, (1, 1, 4): 8})
    report = aot.plan_training(read_config(configuration()), "v5e:2x2", search=True)
    table, rest = report.split("\n\n", 1)
    lines = [line.split("  ")[0] for line in table.splitlines()[2:]]
    assert lines[0] == "data 1, fsdp 1, tensor 4"
    assert lines[1:3] == ["data 2, fsdp 2, tensor 1", "data 1, fsdp 4, tensor 1"]
    assert sorted(lines[3:]) == sorted(str(MeshConfig(data=d, fsdp=f, tensor=t)) for d, f, t in
                                       [(4, 1, 1), (1, 2, 2), (2, 1, 2)])  # fmt: skip
    assert row(rest, "mesh") == lines[0]
    assert row(rest, "all-gather") == "3 × a step, 0.00 GiB"


def test_if_no_mesh_fits_the_search_says_of_each_why(compiler, configuration):
    compiler({})
    with pytest.raises(PlanError, match=r"on v5e:2x2 no mesh fits:\n(.*\n)+data 4, fsdp 1, tensor 1 .* out of memory"):
        aot.plan_training(read_config(configuration()), "v5e:2x2", search=True)


@pytest.mark.parametrize(
    ("limits", "mesh", "advice"),
    [
        ({(1, 4, 1): 1}, {}, "1 images a device fit; optimizer.accumulate makes up for it"),
        ({}, {"data": 4, "fsdp": 1}, "split the parameters over more devices: fsdp or tensor in place of data"),
        ({}, {}, "take more chips, remat: full or LoRA"),
    ],
)
def test_out_of_memory_says_what_to_change(compiler, configuration, limits, mesh, advice):
    compiler(limits)
    config = dataclasses.replace(read_config(configuration()), mesh=MeshConfig(**mesh))
    with pytest.raises(PlanError) as error:
        aot.plan_training(config, "v5e:2x2")
    assert "with 2 images a device does not fit the memory of these chips on mesh data" in str(error.value)
    assert str(error.value).endswith(f"What to change: {advice}")


# ---- bad usage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["v5e", "v5e:0x1", "v5e:2x2x2", "v5p:2x2", "v9:1x1", "v6e:32x32", "v5e:3x3", "v5e:2 x2", ""]
)
def test_an_unknown_topology_is_refused_with_those_there_are(deqa, name):
    status, out, said = deqa("plan", "--topology", name, "--model", "test")
    assert status == 1
    assert out == ""
    assert name in said
    assert "there are v5e:1x1 to v5e:16x16" in said


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--mesh", "tensor=3"], "does not fit 4 devices; nearest: data 1, fsdp 1, tensor 4 or "),
        (["--mesh", "data=2,tensor=4"], "does not fit 4 devices"),
        (["--mesh", "model=2"], "'model=2' does not give data, fsdp or tensor a size each"),
        (["--config_path", "none.yaml"], "none.yaml: no such file"),
        (["--config_path", "none.yaml", "--mesh", "tensor=2"], "--mesh is for scoring"),
        (["--config_path", "none.yaml", "--batch-size", "2"], "--batch-size is for scoring"),
        (["--batch-size", "0"], "'0' is not a whole number"),
    ],
)
def test_bad_usage(deqa, options, reason):
    status, out, said = deqa("plan", "--topology", "v5e:2x2", "--model", "test", *options)
    assert status == 2
    assert out == ""
    assert reason in said


def test_a_mesh_that_does_not_divide_the_model_is_refused(configuration):
    config = dataclasses.replace(read_config(configuration()), mesh=MeshConfig(fsdp=1, tensor=256))
    with pytest.raises(ConfigError, match="tensor = 256 does not divide the"):
        aot.training_job(config, aot.open_topology("v5e:16x16"))


def test_without_the_compiler_the_command_says_how_to_get_it(deqa, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name))
    status, _, said = deqa("plan", "--topology", "v5e:2x2")
    assert status == 1
    assert "pip install 'deqa-jax[plan]'" in said
