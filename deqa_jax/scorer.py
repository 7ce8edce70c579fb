"""Images in, scores out: jitted batches, with decoding beside them."""

import collections
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.stages import Lowered
from jaxtyping import Array, Float, UInt8
from PIL import Image

from deqa_jax import builtin_model
from deqa_jax.checkpoint import Checkpoint
from deqa_jax.compilation import use_compilation_cache
from deqa_jax.config import ConfigError, MeshConfig
from deqa_jax.distributed import first_goes_first
from deqa_jax.model.deqa import Deqa
from deqa_jax.parameters import unflatten
from deqa_jax.preprocess import ImageError, ImageLike, load_rgb, load_square
from deqa_jax.prompt import PROMPTS
from deqa_jax.scoring_program import (
    Prediction,
    check_fit,
    int8_activations_by_default,
    programs,
    scoring_dtype,
    scoring_mesh,
    scoring_model,
    scoring_parameters,
)
from deqa_jax.sharding import (
    BATCH,
    batch_shards,
    bytes_per_device,
    check_batch,
    check_memory,
)

DTYPES = ("auto", "float32", "bfloat16")
# On CPU, images one at a time go nearly as fast as several, and a short batch wastes nothing.
_BATCH_SIZES = {"cpu": 1}
_ACCELERATOR_BATCH_SIZE = 32


class Result(NamedTuple):
    """One image's row of a `Prediction`, or the reason why it has none."""

    image: ImageLike
    score: float | None = None
    std: float | None = None
    probs: tuple[float, ...] | None = None
    logits: tuple[float, ...] | None = None
    open_probs: tuple[float, ...] | None = None
    error: str | None = None


class Scorer:
    """Scores images with one compiled program.

    The same image gets the same bits alone, in any place of a batch and beside any other images.

    Attributes:
      batch_size: images that go through the model at once; a short batch is padded. May be set, to what `check_batch`
        passes.
      batch_sharding: how a batch lies on the devices.
      dtype: of matrix products, and of parameters that are not quantised.
      int8_activations: whether half of the products of int8 kernels are in int8.
      prompt: `scorer` or `eval`.
      identity: of the checkpoint; see `Checkpoint.identity`.

    Example:
      >>> scorer = Scorer.from_pretrained("model")  # doctest: +SKIP
      >>> scorer(["photo.jpg", Image.open("other.png")])  # doctest: +SKIP
      array([4.127, 2.563], dtype=float32)
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: str = "auto",
        batch_size: int | None = None,
        prompt: str = "scorer",
        mesh: MeshConfig | None = None,
        int8_activations: bool = False,
        input_size_limit: float | None = None,
    ):
        """Loads the parameters, and computes keys and values of the text in front of the image.

        Args:
          checkpoint: a converted checkpoint.
          dtype: of parameters and matrix products: `float32`, `bfloat16`, or `auto`, which is float32 on CPU (with
            `int8_activations` where kernels are int8) and bfloat16 elsewhere.
          batch_size: images at once, over all devices; chosen for the devices without it.
          prompt: `scorer` or `eval`, the two published entry points, whose scores differ slightly.
          mesh: how this process's devices share the work. Without it each holds the whole model and scores its part of
            a batch; on CPU there is one.
          int8_activations: for a checkpoint of int8 kernels: multiply in int8 instead of `dtype` where that costs
            little (queries, `gate` and `up`), each token's activations rounded to 255 steps.
          input_size_limit: megapixels; images that have more are refused before they are decoded. Pillow's own limit,
            179, holds without it.

        Raises:
          ConfigError: an argument is out of range, the checkpoint's parts do not fit together, or the devices are too
            few or too small.
          CheckpointError: the checkpoint is damaged.
        """
        platform = jax.local_devices()[0].platform
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        if prompt not in PROMPTS:
            raise ConfigError(f"prompt {prompt!r} is not one of {', '.join(PROMPTS)}")
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
        if input_size_limit is not None and not input_size_limit > 0:
            raise ConfigError(f"input_size_limit must be above 0 megapixels, not {input_size_limit}")
        if int8_activations and checkpoint.quantization != "int8":
            raise ConfigError(
                f"{checkpoint.folder}: int8 activations need int8 kernels, which `deqa convert --quantize int8` makes"
            )
        by_default = int8_activations_by_default(dtype, platform, checkpoint.quantization)
        self.int8_activations = int8_activations or by_default
        self.dtype = dtype = scoring_dtype(dtype, platform)
        self.prompt = prompt
        self._most_pixels = math.inf if input_size_limit is None else input_size_limit * 1e6
        self.identity = checkpoint.identity
        self._mesh = scoring_mesh(mesh)
        shards = batch_shards(self._mesh)
        self.batch_size = batch_size or shards * _BATCH_SIZES.get(platform, _ACCELERATOR_BATCH_SIZE)
        check_batch("batch size", self.batch_size, self._mesh)
        self.batch_sharding = NamedSharding(self._mesh, BATCH)
        self._preprocess = checkpoint.preprocess()
        ids, level_ids = check_fit(checkpoint, self._preprocess, prompt)
        self._graphdef = nnx.graphdef(self._load(checkpoint))
        quantized = checkpoint.quantization is not None
        prefill, self._run = programs(
            self._graphdef, ids, level_ids, self._preprocess, dtype, platform, quantized=quantized
        )
        self._cache = prefill(self._params)

    def _load(self, checkpoint: Checkpoint) -> Deqa:
        """Puts the parameters on the devices; returns the model that they are of, with shapes in their place."""
        config, quantization = checkpoint.config, checkpoint.quantization
        leaves = scoring_parameters(config, self.dtype, self._mesh, quantization)
        check_memory("the model", bytes_per_device(leaves), self._mesh)
        model = scoring_model(config, self.dtype, self._mesh, quantization, int8_activations=self.int8_activations)
        device = self._mesh.devices.flat[0]
        # Kernels of few bits are faster from a stack on GPUs, but for one image at a time.
        side_by_side = device.platform == "cpu" or (device.platform == "gpu" and quantization is None)
        if self._mesh.size == 1 and side_by_side:
            self._params = unflatten(_restore_unstacked(checkpoint, self.dtype, device))
            return model.unrolled()
        shardings = {path: leaf.sharding for path, leaf in leaves.items()}
        self._params = unflatten(checkpoint.restore(self.dtype, shardings=shardings))
        return model

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str] | None = None, **options: Any) -> "Scorer":
        """Opens a model by name.

        Args:
          model: a converted folder, a published checkpoint's folder, or a hub id; the last two are converted once
            into a cache. Without it `deqa-tiny`, the small model that comes with the package.
          **options: those of `Scorer`.

        Raises:
          ConversionError, CheckpointError: there is no such model, or it is damaged; all faults are named.
        """
        # The one place where the library reaches up: here, as on the command line, a model may need converting.
        from deqa_jax.convert.to_jax import resolve

        use_compilation_cache()
        if model is None:
            builtin_model.announce()
            model = builtin_model.whole_folder()
        with first_goes_first():
            checkpoint = Checkpoint.open(resolve(os.fspath(model)))
        return cls(checkpoint, **options)

    def __call__(self, images: Sequence[ImageLike]) -> Float[np.ndarray, "N"]:
        """Scores of images in order, float32 from 1 (bad) to 5 (excellent). Takes and raises what `predict` does."""
        return self.predict(images).score

    def predict(self, images: Sequence[ImageLike], *, open_set: bool = False, hidden: bool = False) -> Prediction:
        """Everything the model says of images.

        Args:
          images: paths, bytes of image files, PIL images of any mode, uint8 arrays `[H, W, 3]`, in any mixture of
            kinds and sizes.
          open_set: whether to return probabilities in the whole vocabulary as well.
          hidden: whether to return the last hidden state as well.

        Returns:
          A `Prediction` of NumPy arrays, one row per image, in order.

        Raises:
          ImageError: an image cannot be read; the message names it.
        """
        if isinstance(images, str | os.PathLike | bytes | np.ndarray | Image.Image) or not len(images):
            raise ValueError("images is a list of at least one image; for a single one write [image]")
        parts = []
        for items, prediction in self._batches(images, open_set=open_set, hidden=hidden):
            for _, pixels in items:
                if isinstance(pixels, ImageError):
                    raise pixels
            parts.append(prediction)
        fields = zip(*(part for part in parts if part is not None), strict=True)
        return Prediction(*(None if field[0] is None else np.concatenate(field) for field in fields))

    def stream(self, images: Iterable[ImageLike], *, open_set: bool = False) -> Iterator[Result]:
        """Scores any number of images, in order, as they come.

        An image that cannot be read, or whose score is no number, gets its `error`. Decoding runs in threads beside the
        model, a few batches ahead; a PIL image is decoded when it comes, so what is done to it afterwards changes
        nothing. `open_set` is that of `predict`.
        """
        for items, prediction in self._batches(images, open_set=open_set):
            row = 0
            for image, pixels in items:
                if isinstance(pixels, ImageError):
                    yield Result(image, error=str(pixels))
                    continue
                assert prediction is not None  # there is a row for every image that could be read
                score, std = float(prediction.score[row]), float(prediction.std[row])
                levels = (prediction.probs, prediction.logits, prediction.open_probs)
                probs, logits, open_probs = (None if x is None else tuple(x[row].tolist()) for x in levels)
                row += 1
                if not math.isfinite(score):
                    yield Result(image, error=f"the score is {score}: the model's weights are damaged")
                    continue
                yield Result(image, score, std, probs, logits, open_probs)

    def predict_pixels(self, pixels: UInt8[Array, "B H W 3"], *, open_set: bool = False) -> Prediction:
        """Scores what is on the device already; compiled once for every batch size B.

        Args:
          pixels: uint8 RGB squares of the model's size, as `preprocess.load_square` makes them; B divides by the
            number of devices that split a batch.
          open_set: whether to return probabilities in the whole vocabulary as well.

        Returns:
          A `Prediction` of arrays on the device, computed asynchronously, with `hidden`.
        """
        if self._mesh.size > 1:
            check_batch("batch size", pixels.shape[0], self._mesh)
            pixels = jax.device_put(pixels, self.batch_sharding)
        return self._run(self._params, self._cache, pixels, open_set=open_set)

    def lower(self, pixels: UInt8[Array, "B H W 3"]) -> Lowered:
        """What `predict_pixels` compiles for such a batch, which lies as `batch_sharding` says."""
        return self._run.lower(self._params, self._cache, pixels, open_set=False)

    @property
    def model(self) -> Deqa:
        """The network, with its parameters as they lie on the devices."""
        return nnx.merge(self._graphdef, self._params)

    # ---- batches ------------------------------------------------------------------------------------------

    def _batches(
        self, images: Iterable[ImageLike], *, open_set: bool = False, hidden: bool = False
    ) -> Iterator[tuple[list[tuple[ImageLike, np.ndarray | ImageError]], Prediction | None]]:
        """Groups of images with the prediction of those that could be read (None if there are none).

        A batch is handed to the device before the one in front of it is waited for.
        """

        def dispatch(squares: list[np.ndarray]) -> Callable[[], Prediction | None]:
            if not squares:
                return lambda: None
            batch = np.zeros((self.batch_size, *squares[0].shape), np.uint8)
            batch[: len(squares)] = squares
            running = self.predict_pixels(jax.device_put(batch, self.batch_sharding), open_set=open_set)
            running = running if hidden else running._replace(hidden=None)
            return lambda: jax.tree.map(lambda x: np.asarray(x)[: len(squares)], running)

        waiting: collections.deque[tuple[Any, Callable[[], Prediction | None]]] = collections.deque()
        items: list[tuple[ImageLike, np.ndarray | ImageError]] = []
        squares: list[np.ndarray] = []
        for item in self._decoded(images):
            items.append(item)
            if not isinstance(item[1], ImageError):
                squares.append(item[1])
            if len(squares) == self.batch_size:
                waiting.append((items, dispatch(squares)))
                items, squares = [], []
            if len(waiting) > 1:
                done, fetch = waiting.popleft()
                yield done, fetch()
        if items:
            waiting.append((items, dispatch(squares)))
        for done, fetch in waiting:
            yield done, fetch()

    def _decoded(self, images: Iterable[ImageLike]) -> Iterator[tuple[ImageLike, np.ndarray | ImageError]]:
        """Images with their pixels, in order, read by threads that stay a bounded number of images ahead."""

        def taken(image: ImageLike) -> ImageLike | ImageError:
            # Here and now: two threads cannot read one PIL image, and it may show another frame when one gets to it.
            try:
                return load_rgb(image, most_pixels=self._most_pixels) if isinstance(image, Image.Image) else image
            except ImageError as error:
                return error

        def load(image: ImageLike | ImageError) -> np.ndarray | ImageError:
            if isinstance(image, ImageError):
                return image
            try:
                return load_square(image, self._preprocess, most_pixels=self._most_pixels)
            except ImageError as error:
                return error

        workers = os.cpu_count() or 1
        ahead = 2 * max(self.batch_size, workers)
        queue: collections.deque[tuple[ImageLike, Future[np.ndarray | ImageError]]] = collections.deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        try:
            for image in images:
                queue.append((image, pool.submit(load, taken(image))))
                if len(queue) > ahead:
                    done, future = queue.popleft()
                    yield done, future.result()
            for done, future in queue:
                yield done, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _restore_unstacked(
    checkpoint: Checkpoint, dtype: str, device: jax.Device
) -> dict[tuple[str | int, ...], jax.Array]:
    """Parameters with every layer of a stack as an array of its own (see `layers.unstack`).

    They are read one by one, the largest first, so that what is there twice is small against the room that is left.
    """
    moved: dict[tuple[str | int, ...], jax.Array] = {}
    for path in sorted(checkpoint.stored, key=lambda path: -math.prod(checkpoint.stored[path].shape)):
        leaf = checkpoint.restore(dtype, only=[path])[path]
        if "layers" in path:
            tower, _, *rest = path
            moved |= {(tower, "layers", i, *rest): jax.device_put(layer, device) for i, layer in enumerate(leaf)}
        else:
            moved[path] = jax.device_put(leaf, device)
        # Before the next one is read: the name alone would keep it.
        del leaf
    return moved
