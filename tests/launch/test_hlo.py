"""What programs compute and send, against what is counted by hand."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from training import SMALL, jit

from deqa_jax.config import PRESETS, DeqaConfig, Execution
from deqa_jax.launch.hlo import Traffic, count_collectives, count_flops
from deqa_jax.model.deqa import Deqa
from deqa_jax.parameters import abstract_model

# ---- arithmetic -------------------------------------------------------------------------------------------


def flops(function: Callable[..., Any], *shapes: tuple[int, ...]) -> int:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


def scanned(length: int, body: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    return lambda x, w: jax.lax.scan(lambda x, _: (body(x, w), None), x, None, length=length)[0]


def chosen(x: jax.Array, w: jax.Array) -> jax.Array:
    """The dearer branch has two products."""
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)


with_jvp = jax.custom_jvp(product)
with_jvp.defjvp(lambda primals, tangents: (product(*primals), product(*tangents)))
with_vjp = jax.custom_vjp(product)
with_vjp.defvjp(lambda x, w: (product(x, w), (x, w)), lambda saved, y: (y @ saved[1].T, saved[0].T @ y))


# x is 3 × 5 and w 5 × 5: a product is 2 · 3 · 5 · 5.
ONE = 150


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, w: x + 1, 0),
        (product, ONE),
        (lambda x, w: product(product(x, w), w), 2 * ONE),
        (lambda x, w: (x * 2).sum(axis=1), 0),
        (jax.jit(product), ONE),
        (jax.jit(lambda x, w: jax.jit(product)(jax.jit(product)(x, w), w)), 2 * ONE),
        (jax.checkpoint(product), ONE),
        (scanned(7, product), 7 * ONE),
        (scanned(0, product), 0),
        (scanned(2, scanned(3, product)), 6 * ONE),
        (scanned(2, jax.jit(scanned(3, jax.checkpoint(scanned(5, product))))), 30 * ONE),
        (lambda x, w: jax.lax.map(lambda row: row @ w, x), ONE),
        (lambda x, w: jax.lax.fori_loop(0, 4, lambda i, x: x @ w, x), 4 * ONE),
        (chosen, 2 * ONE),
        (lambda x, w: jax.lax.switch(jnp.int32(1), [lambda: x, lambda: x @ w, lambda: x + 1]), ONE),
        (scanned(3, chosen), 6 * ONE),
        (lambda x, w: jax.lax.platform_dependent(x, w, cpu=product, default=product), ONE),
        (lambda x, w: jax.lax.platform_dependent(x, w, cpu=scanned(3, product), default=product), ONE),
        (lambda x, w: jax.lax.platform_dependent(x, w, cpu=product, default=scanned(3, product)), 3 * ONE),
        (with_jvp, ONE),
        (with_vjp, ONE),
    ],
)
def test_products_are_counted_as_often_as_they_run(function: Callable[..., Any], expected: int) -> None:
    assert flops(function, (3, 5), (5, 5)) == expected


@pytest.mark.parametrize(
    ("spec", "left", "right", "expected"),
    [
        ("ab,bc->ac", (2, 3), (3, 4), 2 * 2 * 3 * 4),
        ("ab,ab->", (2, 3), (2, 3), 2 * 2 * 3),
        ("a,b->ab", (2,), (3,), 2 * 2 * 3),
        ("nab,nbc->nac", (7, 2, 3), (7, 3, 4), 2 * 7 * 2 * 3 * 4),
        ("abc,bcd->ad", (2, 3, 5), (3, 5, 4), 2 * 2 * 3 * 5 * 4),
        ("bthe,bshe->bhts", (2, 3, 4, 5), (2, 6, 4, 5), 2 * 2 * 3 * 6 * 4 * 5),
    ],
)
def test_every_kind_of_product_is_counted(spec: str, left: Any, right: Any, expected: int) -> None:
    assert flops(lambda x, y: jnp.einsum(spec, x, y), left, right) == expected


def test_a_product_of_many_at_once_is_that_many_products() -> None:
    assert flops(jax.vmap(product, (0, None)), (4, 3, 5), (5, 5)) == 4 * ONE
    assert flops(jax.vmap(product), (4, 3, 5), (4, 5, 5)) == 4 * ONE
    assert flops(jax.vmap(scanned(3, product), (0, None)), (4, 3, 5), (5, 5)) == 12 * ONE


def loss(x: jax.Array, w: jax.Array, *, of: Callable[..., jax.Array] = product) -> jax.Array:
    return jnp.sum(jnp.square(of(x, w)))


@pytest.mark.parametrize(
    ("arguments", "products"),
    [
        # Forward, and backward to one of the two or to both.
        (0, 2),
        (1, 2),
        ((0, 1), 3),
    ],
)
def test_a_gradient_takes_a_product_for_each_side(arguments: Any, products: int) -> None:
    assert flops(jax.grad(loss, arguments), (3, 5), (5, 5)) == products * ONE
    stacked = jax.grad(lambda x, w: loss(x, w, of=scanned(4, product)), arguments)
    # Inside the loop what goes from step to step always has a gradient, but the first one's for `w` alone.
    assert flops(stacked, (3, 5), (5, 5)) == 4 * (products + (arguments == 1)) * ONE


def test_what_is_computed_again_is_counted_again() -> None:
    def layers(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    plain = jax.grad(lambda x, w: loss(x, w, of=scanned(4, layers)), (0, 1))
    again = jax.grad(lambda x, w: loss(x, w, of=scanned(4, jax.checkpoint(layers))), (0, 1))
    assert flops(plain, (3, 5), (5, 5)) == 4 * 2 * 3 * ONE
    # The last product of a block is no part of what its gradient needs: that of `tanh` needs its result.
    assert flops(again, (3, 5), (5, 5)) == 4 * 2 * 4 * ONE


def test_products_in_a_loop_of_unknown_length_are_refused() -> None:
    def until(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: scanned(2, product)(x, w), x)

    with pytest.raises(NotImplementedError, match="matrix products in a loop of unknown length"):
        flops(until, (3, 5), (5, 5))
    with pytest.raises(NotImplementedError, match="matrix products"):
        flops(scanned(2, jax.jit(until)), (3, 5), (5, 5))


def test_a_loop_of_unknown_length_without_products_is_nothing() -> None:
    def until(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x + 1, x) @ w

    assert flops(until, (3, 5), (5, 5)) == ONE


# ---- the model --------------------------------------------------------------------------------------------


def model_flops(config: DeqaConfig, batch: int, before: int, after: int) -> dict[str, int]:
    """A forward pass with logits of all that is behind the image, by hand."""
    vision, abstractor, language = config.vision, config.abstractor, config.language
    patches = (vision.image_size // vision.patch_size) ** 2
    s, d = patches + 1, vision.hidden_size
    q, keys = abstractor.num_queries, abstractor.num_queries + s
    t, width = before + q + 1 + after, language.hidden_size
    kv = language.num_kv_heads * (width // language.num_heads)
    return {
        "patches": 2 * batch * patches * 3 * vision.patch_size**2 * d,
        # Queries, keys, values and out; up and down; logits and values.
        "vision": vision.num_layers * 2 * batch * (s * 4 * d * d + s * 2 * d * vision.mlp_dim + 2 * s * s * d),
        # Queries and out; keys and values; gate, up and down; logits and values.
        "abstractor": abstractor.num_layers
        * 2
        * batch
        * (q * 2 * d * d + keys * 2 * d * d + q * 3 * d * abstractor.mlp_dim + 2 * q * keys * d),
        "projection": 2 * batch * q * d * width,
        "language": language.num_layers
        * 2
        * batch
        * (t * (2 * width * width + 2 * width * kv + 3 * width * language.mlp_dim) + 2 * t * t * width),
        "logits": 2 * batch * after * width * language.vocab_size,
    }


GROUPED = dataclasses.replace(SMALL, language=dataclasses.replace(SMALL.language, num_kv_heads=2))
MODELS = {"small": SMALL, "shared heads": GROUPED, "golden": PRESETS["test"], "full": PRESETS["full"]}


def forward(config: DeqaConfig, *, remat: str = "none") -> tuple[Callable[..., Any], Any]:
    """The forward pass as a function of state, pixels and text, and the state's shapes."""
    graphdef, state = nnx.split(abstract_model(config, Execution(remat=remat)))

    def run(state: Any, images: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
        model: Deqa = nnx.merge(graphdef, state)
        return model.answer_logits(images, before, after)

    return run, state


def inputs(config: DeqaConfig, batch: int, before: int, after: int) -> list[Any]:
    pixels = config.vision.image_size
    return [
        jax.ShapeDtypeStruct((batch, pixels, pixels, 3), jnp.float32),
        jax.ShapeDtypeStruct((before,), jnp.int32),
        jax.ShapeDtypeStruct((batch, after), jnp.int32),
    ]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_forward_pass_takes_what_the_formula_says(name: str, batch: int) -> None:
    config = MODELS[name]
    run, state = forward(config)
    found = count_flops(jax.make_jaxpr(run)(state, *inputs(config, batch, 5, 11)).jaxpr)
    assert found == sum(model_flops(config, batch, 5, 11).values())


@pytest.mark.parametrize("remat", ["none", "full"])
def test_training_takes_three_forward_passes_or_four_with_remat(remat: str) -> None:
    config = SMALL
    run, state = forward(config, remat=remat)

    def gradient(state: Any, *inputs: Any) -> Any:
        return jax.grad(lambda state: jnp.sum(run(state, *inputs)))(state)

    found = count_flops(jax.make_jaxpr(gradient)(state, *inputs(config, 2, 5, 11)).jaxpr)
    parts = model_flops(config, 2, 5, 11)
    blocks = parts["vision"] + parts["abstractor"] + parts["language"]
    # Pixels have no gradient; of a block computed again, the product at its end is not needed.
    least = 3 * sum(parts.values()) - parts["patches"] + 0.6 * blocks * (remat == "full")
    assert least <= found <= 3 * sum(parts.values()) - parts["patches"] + 1.01 * blocks * (remat == "full")
    assert remat == "full" or found == least


# ---- communication: programs compiled here ----------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


AROUND = [(i, (i + 1) % 8) for i in range(8)]
SPLIT, WHOLE = PartitionSpec("x"), PartitionSpec()


def compiled(mesh: Mesh, body: Callable[..., Any], result: PartitionSpec = SPLIT) -> str:
    """The text of a program in which each of eight devices has float32 `[4, 8]`: 128 bytes."""
    program = jax.shard_map(body, mesh=mesh, in_specs=SPLIT, out_specs=result, check_vma=False)
    array = jax.ShapeDtypeStruct((32, 8), jnp.float32, sharding=NamedSharding(mesh, SPLIT))
    return jit(program).lower(array).compile().as_text()


@pytest.mark.parametrize(
    ("body", "result", "expected"),
    [
        (lambda x: x * 2, SPLIT, {}),
        (lambda x: jax.lax.psum(x, "x"), WHOLE, {"all-reduce": Traffic(1, 128)}),
        (lambda x: jax.lax.all_gather(x, "x", tiled=True), WHOLE, {"all-gather": Traffic(1, 1024)}),
        (
            lambda x: jax.lax.psum_scatter(x, "x", scatter_dimension=1, tiled=True),
            PartitionSpec(None, "x"),
            {"reduce-scatter": Traffic(1, 128)},
        ),
        (lambda x: jax.lax.ppermute(x, "x", AROUND), SPLIT, {"collective-permute": Traffic(1, 128)}),
        (lambda x: jax.lax.all_to_all(x, "x", 1, 0), SPLIT, {"all-to-all": Traffic(1, 128)}),
        (lambda x: jax.lax.psum(x.astype(jnp.bfloat16).astype(jnp.int8), "x"), WHOLE, {"all-reduce": Traffic(1, 32)}),
        # Combined into one that makes two arrays.
        (lambda x: jax.lax.psum((x, x[0] * 2), "x"), WHOLE, {"all-reduce": Traffic(1, 160)}),
        (
            lambda x: jax.lax.ppermute(jax.lax.ppermute(x, "x", AROUND) * jax.lax.psum(x, "x"), "x", AROUND),
            SPLIT,
            {"all-reduce": Traffic(1, 128), "collective-permute": Traffic(2, 256)},
        ),
    ],
)
def test_what_is_sent_is_counted_by_kind(
    body: Callable[..., Any], result: PartitionSpec, expected: dict[str, Traffic], mesh: Mesh
) -> None:
    assert count_collectives(compiled(mesh, body, result)) == expected


def repeated(length: int, body: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda x: jax.lax.scan(lambda x, _: (body(x), None), x, None, length=length)[0]


def sent_around(x: jax.Array) -> jax.Array:
    return jax.lax.ppermute(x * 2, "x", AROUND)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (repeated(5, sent_around), {"collective-permute": Traffic(5, 5 * 128)}),
        (
            repeated(5, lambda x: sent_around(x) + jax.lax.psum(x, "x")),
            {"all-reduce": Traffic(5, 5 * 128), "collective-permute": Traffic(5, 5 * 128)},
        ),
        (repeated(5, lambda x: repeated(3, sent_around)(x) + 1), {"collective-permute": Traffic(15, 15 * 128)}),
        (
            repeated(5, lambda x: jax.lax.psum(repeated(3, sent_around)(x), "x")),
            {"all-reduce": Traffic(5, 5 * 128), "collective-permute": Traffic(15, 15 * 128)},
        ),
        (lambda x: repeated(4, sent_around)(jax.lax.psum(x, "x")), {"all-reduce": Traffic(1, 128)}),
    ],
)
def test_what_a_loop_sends_is_counted_as_often_as_it_runs(
    body: Callable[..., Any], expected: dict[str, Traffic], mesh: Mesh
) -> None:
    found = count_collectives(compiled(mesh, body))
    assert {kind: found[kind] for kind in expected} == expected


def test_a_gradient_through_a_stack_that_is_gathered_a_layer_at_a_time_can_be_counted(mesh: Mesh) -> None:
    """Loops in loops, by the compiler's own hand: gathered a layer at a time, forward and backward."""
    stack = jax.ShapeDtypeStruct((6, 16, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "x")))
    rows = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, SPLIT))

    def layer(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
        kernel = jax.lax.with_sharding_constraint(kernel, NamedSharding(mesh, WHOLE))
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ kernel), rows.sharding), None

    def step(stack: jax.Array, x: jax.Array) -> jax.Array:
        return jax.grad(lambda stack: jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, stack)[0]))(stack)

    found = count_collectives(jit(step, out_shardings=stack.sharding).lower(stack, rows).compile().as_text())
    # 16 × 16 float32, for each of six layers, and again for the backward pass.
    assert found["all-gather"] == Traffic(12, 12 * 1024)
    gradients = found.get("all-reduce", Traffic(0, 0)).bytes + found.get("reduce-scatter", Traffic(0, 0)).bytes
    assert gradients >= 6 * 1024


# ---- communication: texts of other compilers --------------------------------------------------------------


def text(entry: str, *others: str) -> str:
    """A compiled program's text, as XLA writes it."""
    head = "ENTRY %main.7_spmd (param.1: f32[4,8]) -> f32[4,8] {"
    main = f"{head}\n  %param.1 = f32[4,8]{{1,0}} parameter(0)\n{entry}\n}}"
    return "\n\n".join(["HloModule jit_step, is_scheduled=true, num_partitions=8", *others, main]) + "\n"


ADD = """%region_0.0 (psum.0: f32[], psum.1: f32[]) -> f32[] {
  %psum.0 = f32[] parameter(0)
  %psum.1 = f32[] parameter(1)
  ROOT %add.0 = f32[] add(%psum.0, %psum.1)
}"""


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            "  %all-gather.1 = bf16[1,1024,2816]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%param.1), channel_id=378, "
            "replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={1}, use_global_device_ids=true",
            {"all-gather": Traffic(1, 1024 * 2816 * 2)},
        ),
        (
            "  %all-reduce.168 = (f32[1,1408]{1,0:T(1,128)S(1)}, bf16[704,512]{0,1:T(8,128)(2,1)S(1)}) "
            "all-reduce(%a.1, %b.2), channel_id=188, replica_groups=[4,2]<=[8], to_apply=%region_0.0",
            {"all-reduce": Traffic(1, 1408 * 4 + 704 * 512 * 2)},
        ),
        # What is gathered, and not also what it is gathered from.
        (
            "  %all-gather-start.2 = (f32[4,8]{1,0:T(4,128)}, f32[32,8]{1,0:T(8,128)S(1)}) all-gather-start(%param.1), "
            "channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}\n"
            "  %all-gather-done.2 = f32[32,8]{1,0:T(8,128)S(1)} all-gather-done(%all-gather-start.2)",
            {"all-gather": Traffic(1, 32 * 8 * 4)},
        ),
        (
            "  %collective-permute-start.80 = (bf16[128,2816]{1,0:T(8,128)(2,1)S(1)}, "
            "bf16[128,2816]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) "
            "collective-permute-start(%get-tuple-element.8848), channel_id=136, source_target_pairs={{0,7},{1,0}}\n"
            "  %collective-permute-done.80 = bf16[128,2816]{1,0:T(8,128)(2,1)S(1)} "
            "collective-permute-done(%collective-permute-start.80)",
            {"collective-permute": Traffic(1, 128 * 2816 * 2)},
        ),
        (
            "  %all-reduce-start.1 = f32[16,4]{1,0} all-reduce-start(%param.1), channel_id=1, to_apply=%region_0.0\n"
            "  %all-reduce-done.1 = f32[16,4]{1,0} all-reduce-done(%all-reduce-start.1)",
            {"all-reduce": Traffic(1, 256)},
        ),
        # Combined: several arrays at once. This one names no operands.
        (
            "  %all-reduce-start.2 = (f32[16,4]{1,0}, f32[10]{0}, pred[8]{0}) all-reduce-start(%a, %b, %c), "
            "channel_id=1, to_apply=%region_0.0\n"
            "  %all-reduce-done.2 = (f32[16,4]{1,0}, f32[10]{0}, pred[8]{0}) all-reduce-done(%all-reduce-start.2)",
            {"all-reduce": Traffic(1, 256 + 40 + 8)},
        ),
        (
            "  %all-gather-start.3 = ((f32[2]{0}, bf16[3,4]{1,0}), (f32[16]{0}, bf16[24,4]{1,0})) "
            "all-gather-start(%a, %b), channel_id=3, dimensions={0}",
            {"all-gather": Traffic(1, 64 + 192)},
        ),
        # Its operand is the larger one.
        (
            "  %reduce-scatter-start = ((f32[16,8]{1,0}), f32[2,8]{1,0}, u32[]) reduce-scatter-start(%a), "
            "channel_id=3, dimensions={0}, to_apply=%region_0.0\n"
            "  %reduce-scatter-done = f32[2,8]{1,0} reduce-scatter-done(%reduce-scatter-start)",
            {"reduce-scatter": Traffic(1, 512)},
        ),
        # What only has the name of one, or reads one.
        (
            "  %all-gather.5 = f32[4,8]{1,0} add(%all-reduce.1, %collective-permute.4)\n"
            '  %copy.1 = f32[4,8]{1,0} copy(%all-gather.5), metadata={op_name="jit(step)/all-reduce(x)"}',
            {},
        ),
    ],
)
def test_texts_of_accelerators_are_counted(lines: str, expected: dict[str, Traffic]) -> None:
    assert count_collectives(text(lines, ADD)) == expected


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("pred", 1), ("s8", 1), ("u16", 2), ("bf16", 2), ("f32", 4), ("s64", 8), ("f8e4m3fn", 1), ("c64", 8), ("u4", 1)],
)
def test_every_dtype_has_its_size(dtype: str, size: int) -> None:
    found = count_collectives(text(f"  ROOT %a = {dtype}[3,5]{{1,0}} all-to-all(%param.1), channel_id=1"))
    assert found == {"all-to-all": Traffic(1, 15 * size)}


LOOP = """%body.1 (param: (u32[], f32[4,8])) -> (u32[], f32[4,8]) {
  %permuted.1 = f32[4,8]{1,0} collective-permute(%get-tuple-element.1), channel_id=1, source_target_pairs={{0,1}}
  ROOT %tuple.1 = (u32[], f32[4,8]{1,0}) tuple(%next.1, %permuted.1)
}

%condition.1 (param.1: (u32[], f32[4,8])) -> pred[] {
  %constant.5 = u32[]{:T(128)} constant(2)
  %constant.6404 = u32[]{:T(128)} constant(4)
  %get-tuple-element.6521 = u32[]{:T(128)} get-tuple-element(%param.1), index=0
  ROOT %compare.148 = pred[]{:T(512)} compare(%get-tuple-element.6521, %constant.6404), direction=LT
}"""
WHILE = "  %while.1 = (u32[], f32[4,8]{1,0}) while(%tuple.0), condition=%condition.1, body=%body.1"


def test_a_loop_runs_as_often_as_its_condition_says() -> None:
    assert count_collectives(text(WHILE, LOOP)) == {"collective-permute": Traffic(4, 512)}


def test_a_loop_that_does_not_say_how_often_it_runs_is_refused() -> None:
    unknown = LOOP.replace("constant(4)", "parameter(1)")
    with pytest.raises(ValueError, match=r"condition\.1 does not count to a constant"):
        count_collectives(text(WHILE, unknown))
    # It does not matter where nothing is sent.
    quiet = unknown.replace("collective-permute(", "copy(")
    assert count_collectives(text(WHILE, quiet)) == {}


def test_an_all_reduce_that_is_cut_at_once_is_a_reduce_scatter_where_it_is_called() -> None:
    wrapped = """%all-reduce-scatter.11 (input.11: f32[16,8]) -> f32[2,8] {
  %all-reduce.7 = f32[16,8]{1,0} all-reduce(%input.11), channel_id=9, to_apply=%region_0.0
  ROOT %dynamic-slice.1 = f32[2,8]{1,0} dynamic-slice(%all-reduce.7, %index.1, %zero.1), dynamic_slice_sizes={2,8}
}"""
    never = wrapped.replace("%all-reduce-scatter.11", "%all-reduce-scatter.12")
    call = "  %fusion.{} = f32[2,8]{{1,0}} fusion(%param.1), kind=kCustom, calls=%all-reduce-scatter.11"
    entry = "\n".join(call.format(number) for number in range(3))
    assert count_collectives(text(entry, ADD, wrapped, never)) == {"reduce-scatter": Traffic(3, 3 * 512)}


def test_an_asynchronous_one_in_fusions_is_counted_once() -> None:
    """On TPUs each stage, from start to done, is a fusion that has the collective in it; these are as v5e has them."""
    array = "f32[1025,512]{0,1:T(8,128)S(1)}"
    gather = (
        "%all-gather.{} = f32[1025,512]{{0,1:T(8,128)}} all-gather(%param_0.8028), channel_id=289, "
        'replica_groups=[1,8]<=[8], dimensions={{1}}, frontend_attributes={{chain_id="26"}}'
    )
    first, *steps, last = (
        "fused_computation.2301",
        "async_collective_fusion.2611",
        "async_collective_fusion.2614",
        "fused_computation.2304",
    )
    stages = [
        f"%{name} (param_0.8028: f32[1025,64]) -> f32[1025,512] {{\n  {gather.format(number)}\n}}"
        for number, name in enumerate([first, *steps, last])
    ]
    start = (
        f"%async-collective-start.26 = (f32[1025,64]{{0,1:T(8,128)S(1)}}, {array}, s32[2]{{0:S(4)}}, u32[]{{:S(2)}})"
    )
    done = f"%async-collective-done.26 = {array}"
    lines = [
        f"  {start} fusion(%copy-done.122), kind=kCustom, calls=%{first}",
        *(
            f"  %{name[6:]} = (bf16[4,64]{{1,0}}, {array}) fusion(%a.1, %b.1), kind=kCustom, calls=%{name}"
            for name in steps
        ),
        f"  {done} fusion(%get-tuple-element.12597, %get-tuple-element.12598), kind=kCustom, calls=%{last}",
    ]
    assert count_collectives(text("\n".join(lines), *stages)) == {"all-gather": Traffic(1, 1025 * 512 * 4)}


def test_an_asynchronous_one_that_goes_on_inside_an_inner_loop_is_counted_once() -> None:
    """Started before a loop of products and done behind it; the loop's body has it inside too."""
    gather = (
        "%all-gather.{} = bf16[1,512,512]{{2,1,0:T(8,128)(2,1)}} all-gather(%param_0.1), channel_id=364, "
        'replica_groups=[1,8]<=[8], dimensions={{1}}, frontend_attributes={{chain_id="21"}}'
    )
    names = ("fused_computation.2280", "async_collective_fusion.2566", "fused_computation.2285")
    stages = [
        f"%{name} (param_0.1: bf16[1,64,512]) -> bf16[1,512,512] {{\n  {gather.format(number)}\n}}"
        for number, name in enumerate(names)
    ]
    call = "  %{} = bf16[1,512,512]{{2,1,0}} fusion(%a.1), kind=kCustom, calls=%{}\n"
    loop = LOOP.replace("  %permuted.1", call.format("fusion.2566", names[1]) + "  %permuted.1")
    start, done = call.format("async-collective-start.21", names[0]), call.format("async-collective-done.21", names[2])
    assert count_collectives(text(f"{start}{WHILE}\n{done}", loop, *stages)) == {
        "all-gather": Traffic(1, 512 * 512 * 2),
        "collective-permute": Traffic(4, 512),
    }
