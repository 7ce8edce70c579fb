"""Text to token ids: the prompts, the level words, and conversations with labels (SPEC 3 and 4)."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence

import sentencepiece

IMAGE_PLACEHOLDER = "<|image|>"
IMAGE_ID = -200
"""Stands in token ids where the visual tokens go."""
IGNORED_LABEL = -100

LEVELS = ("excellent", "good", "fair", "poor", "bad")
LEVEL_WEIGHTS = (5.0, 4.0, 3.0, 2.0, 1.0)

_QUESTION = f"USER: How would you rate the quality of this image?\n{IMAGE_PLACEHOLDER}"
_ANSWER = "ASSISTANT: The quality of the image is"
# The two published entry points differ in one character, and the scores differ with it.
PROMPTS: dict[str, str] = {
    "scorer": f"{_QUESTION}\n{_ANSWER}",
    "eval": f"{_QUESTION} {_ANSWER}",
}

SYSTEM_SENTENCES: dict[str, str] = {
    "v1": (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    ),
    "mplug_owl2": "",
}
"""Conversation style to what stands in front of it; published training uses `v1`."""

_SPACE = "▁"
_SPECIAL = re.compile("(<unk>|<s>|</s>)")


class PromptError(ValueError):
    """Text that cannot be turned into what the model reads."""


class Tokenizer:
    """The exact ids of the LLaMA tokenizer that the checkpoints were trained with.

    (transformers' present one differs on leading and double spaces.) Needs a sentencepiece model with `<unk>`,
    `<s>`, `</s>` as pieces 0, 1, 2.

    Raises:
      PromptError: `path` is no sentencepiece model.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.Load(os.fspath(path))
        except (OSError, RuntimeError) as error:
            raise PromptError(f"{path}: not a sentencepiece model ({error})") from error
        self._special = {"<unk>": 0, "<s>": 1, "</s>": 2}
        if [self._pieces.IdToPiece(i) for i in range(min(3, len(self._pieces)))] != list(self._special):
            raise PromptError(f"{path}: its first three pieces are not {', '.join(self._special)}")
        self.bos_id = self._special["<s>"]
        self._space_id = self._pieces.PieceToId(_SPACE)
        # Text is encoded behind a newline, whose pieces are then dropped: this keeps sentencepiece from adding
        # a space of its own.
        self._guard = len(self._pieces.Encode("\n"))

    def __len__(self) -> int:
        return len(self._pieces)

    def encode(self, text: str) -> list[int]:
        """Token ids, BOS first.

        Example (LLaMA's vocabulary): `encode("The quality")` is `[1, 450, 11029]`, `encode("")` is `[1]`.
        """
        ids = [self.bos_id]
        if not text:
            return ids
        parts = [part for part in _SPECIAL.split(_SPACE + text.replace(_SPACE, " ")) if part]
        for part, following in zip(parts, [*parts[1:], ""], strict=True):
            if part in self._special:
                ids.append(self._special[part])
                continue
            piece_ids = self._pieces.Encode("\n" + part)[self._guard :]
            if piece_ids == [self._space_id] and following in self._special:
                continue
            ids += piece_ids
        return ids

    def encode_with_images(self, text: str) -> list[int]:
        """Token ids with `IMAGE_ID` for every `<|image|>`.

        Each piece of text between placeholders is tokenized on its own. Quirk: BOS is kept once, in front,
        and dropped from later pieces only if the first piece is not empty.

        Example (LLaMA's vocabulary): `encode_with_images("a<|image|>b")` is `[1, 263, -200, 289]`.
        """
        pieces = [self.encode(piece) if piece else [] for piece in text.split(IMAGE_PLACEHOLDER)]
        skip = 1 if pieces[0] else 0
        ids = list(pieces[0])
        for piece in pieces[1:]:
            ids += [IMAGE_ID, *piece[skip:]]
        return ids

    def level_ids(self, levels: Sequence[str] = LEVELS) -> tuple[int, ...]:
        """The one token of each level word.

        Raises:
          PromptError: a word is more than one token, so its probability is not that of a token.
        """
        ids = {level: self.encode(level)[1:] for level in levels}
        split = [level for level, pieces in ids.items() if len(pieces) != 1 or pieces[0] == 0]
        if split:
            raise PromptError(f"the vocabulary has no single token for {', '.join(split)}")
        return tuple(pieces[0] for pieces in ids.values())


@dataclasses.dataclass(frozen=True)
class SplitPrompt:
    """A prompt with one image: the ids in front of the placeholder and those behind it."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def split_prompt(tokenizer: Tokenizer, text: str) -> SplitPrompt:
    """Tokenizes a prompt that has one image, and text on both sides of it.

    Raises:
      PromptError: it has no image or several, or no text in front or behind.
    """
    if text.count(IMAGE_PLACEHOLDER) != 1 or not all(text.split(IMAGE_PLACEHOLDER)):
        raise PromptError(f"a prompt has text, {IMAGE_PLACEHOLDER} once, and text again: {text!r}")
    ids = tokenizer.encode_with_images(text)
    where = ids.index(IMAGE_ID)
    return SplitPrompt(tuple(ids[:where]), tuple(ids[where + 1 :]))


@dataclasses.dataclass(frozen=True)
class LabelledIds:
    """A conversation as the model reads it; `labels` is `IGNORED_LABEL` wherever nothing is to be predicted."""

    input_ids: list[int]
    labels: list[int]


def encode_conversation(
    tokenizer: Tokenizer,
    conversation: Sequence[Mapping[str, str]],
    *,
    style: str = "v1",
    max_length: int = 2048,
) -> LabelledIds:
    """Tokenizes a training conversation (SPEC 4).

    Args:
      tokenizer: the checkpoint's.
      conversation: messages `{"from": "human" | "gpt", "value": text}`, by turns, human first, as in the
        published metas.
      style: a key of `SYSTEM_SENTENCES`.
      max_length: ids beyond are cut off.

    Returns:
      Ids, and labels that are the ids of the answers (with their `</s>`) and `IGNORED_LABEL` elsewhere.
      Quirk: in a conversation without an image the first token of each answer is not labelled.

    Raises:
      PromptError: the messages do not take turns, or the style is unknown.
    """
    if style not in SYSTEM_SENTENCES:
        raise PromptError(f"no conversation style {style!r}; there are {', '.join(SYSTEM_SENTENCES)}")
    speakers = [message.get("from") for message in conversation]
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise PromptError(f"a conversation goes human, gpt, human, gpt, …, not {speakers}")
    if not all(isinstance(message.get("value"), str) for message in conversation):
        raise PromptError('a message of the conversation has no text under "value"')
    if any(IMAGE_PLACEHOLDER in message["value"] for message in conversation[1::2]):
        raise PromptError(f"an answer of the conversation holds {IMAGE_PLACEHOLDER}")
    messages = [_image_first(message["value"]) for message in conversation]
    quirk = 0 if any(IMAGE_PLACEHOLDER in message for message in messages) else 1

    text = SYSTEM_SENTENCES[style]
    answers = []
    for question, answer in zip(messages[::2], messages[1::2], strict=True):
        text += f"USER: {question} ASSISTANT:"
        start = len(tokenizer.encode_with_images(text)) + quirk
        text += f" {answer}</s>"
        answers.append(slice(start, len(tokenizer.encode_with_images(text))))
    ids = tokenizer.encode_with_images(text)
    labels = [IGNORED_LABEL] * len(ids)
    for answer_span in answers:
        labels[answer_span] = ids[answer_span]
    return LabelledIds(ids[:max_length], labels[:max_length])


def _image_first(message: str) -> str:
    """Moves the placeholder to the front, as training does wherever it stood."""
    if IMAGE_PLACEHOLDER not in message:
        return message
    return f"{IMAGE_PLACEHOLDER}\n{message.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()
