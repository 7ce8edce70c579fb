"""DeQA-Score: image and prompt to a distribution over five words (https://arxiv.org/abs/2501.11561)."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from deqa_jax.config import DeqaConfig, Execution
from deqa_jax.model.abstractor import Abstractor
from deqa_jax.model.layers import unstack
from deqa_jax.model.llama import KeyValue, LanguageModel, Layout
from deqa_jax.model.vision import VisionTower


class Forward(NamedTuple):
    """What a full forward pass saw on its way; T = before + visual + after."""

    vision: Float[Array, "B S D"]
    visual_tokens: Float[Array, "B V D"]
    hidden_states: Float[Array, "L B T D"]
    """The embeddings, then every block's output, the last one after the final norm: `[layers + 1, B, T, D]`."""

    @property
    def last_hidden_state(self) -> Float[Array, "B T D"]:
        """The final norm's output."""
        return self.hidden_states[-1]


class Deqa(nnx.Module):
    """The whole network. Parameters are stored and used as `execution` says.

    Example:
      >>> from deqa_jax.config import Execution, PRESETS
      >>> model = nnx.eval_shape(lambda: Deqa(PRESETS["full"], rngs=nnx.Rngs(0)))
      >>> model.language.head.kernel.shape
      (4096, 32000)
    """

    def __init__(self, config: DeqaConfig, *, execution: Execution = Execution(), rngs: nnx.Rngs):
        self.config = config
        self.vision = VisionTower(config.vision, execution=execution, rngs=rngs)
        self.abstractor = Abstractor(config, execution=execution, rngs=rngs)
        self.language = LanguageModel(config.language, execution=execution, rngs=rngs)

    def unrolled(self) -> "Deqa":
        """Makes each tower of this abstract model keep its blocks side by side (see `layers.unstack`)."""
        for tower, num_layers in (
            (self.vision, self.config.vision.num_layers),
            (self.abstractor, self.config.abstractor.num_layers),
            (self.language, self.config.language.num_layers),
        ):
            tower.layers = unstack(tower.layers, num_layers)
        return self

    def __call__(
        self,
        images: Float[Array, "B H W 3"],
        before: Int[Array, "B P"],
        after: Int[Array, "B A"],
    ) -> Forward:
        """Runs every token of `before`, the image, `after` through the network.

        Args:
          images: normalised pixels `[B, image_size, image_size, 3]`.
          before: ids of the text in front of the image, BOS included.
          after: ids of the text behind it.

        Returns:
          All intermediates. `model.language.logits` turns (chosen positions of) the last into logits.
        """
        vision = self.vision(images)
        visual_tokens = self.abstractor(vision)
        x, layout = self._sequence(before, visual_tokens, after)
        last, hidden_states = self.language(x, layout)
        return Forward(
            vision, visual_tokens, jnp.concatenate([x[None], hidden_states[:-1], last[None].astype(jnp.float32)])
        )

    def answer_logits(
        self, images: Float[Array, "B H W 3"], before: Int[Array, "P"], after: Int[Array, "B A"]
    ) -> Float[Array, "B A V"]:
        """Logits that predict each token of `after`, for training; `before` is the same text for every image.

        Attention is causal, so what pads `after` at its end changes nothing in front of it.
        """
        before = jnp.broadcast_to(before[None], (after.shape[0], before.shape[0]))
        x, layout = self._sequence(before, self.abstractor(self.vision(images)), after)
        last, _ = self.language(x, layout)
        start = layout.before + layout.visual - 1  # a token is predicted where the one before it stands
        return self.language.logits(last[:, start : start + layout.after])

    def _sequence(
        self, before: Int[Array, "B P"], visual_tokens: Float[Array, "B V D"], after: Int[Array, "B A"]
    ) -> tuple[Float[Array, "B T D"], Layout]:
        text = self.language.embed(jnp.concatenate([before, after], axis=1))
        split = before.shape[1]
        x = jnp.concatenate([text[:, :split], visual_tokens, text[:, split:]], axis=1)
        return x, Layout(split, visual_tokens.shape[1], after.shape[1])

    def prefill(self, before: Int[Array, "P"]) -> KeyValue:
        """Keys and values of the text in front of the image, which is the same for every image."""
        return self.language.prefill(self.language.embed(before[None]))

    def last_hidden(
        self, images: Float[Array, "B H W 3"], cache: KeyValue, after: Int[Array, "A"]
    ) -> Float[Array, "B D"]:
        """The last hidden state at the last token, given `prefill` of the text in front.

        The same as `self(images, before, after).last_hidden_state[:, -1]` without what the score does not need.
        """
        return self.last_of_tokens(self.abstractor(self.vision(images)), cache, after)

    def last_of_tokens(
        self, visual_tokens: Float[Array, "B V D"], cache: KeyValue, after: Int[Array, "A"]
    ) -> Float[Array, "B D"]:
        """The part of `last_hidden` that is behind the abstractor."""
        text = self.language.embed(after[None])
        text = jnp.broadcast_to(text, (visual_tokens.shape[0], *text.shape[1:]))
        x = jnp.concatenate([visual_tokens, text], axis=1)
        return self.language.last_token(x, Layout(0, visual_tokens.shape[1], after.shape[0]), cache)
