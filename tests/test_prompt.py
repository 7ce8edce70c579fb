"""Text to token ids: exactly those of the published tokenizer, and what holds of any vocabulary."""

import json
import re

import pytest
import sentencepiece
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from deqa_jax.prompt import (
    IGNORED_LABEL,
    IMAGE_ID,
    IMAGE_PLACEHOLDER,
    LEVELS,
    PROMPTS,
    SYSTEM_SENTENCES,
    PromptError,
    Tokenizer,
    encode_conversation,
    split_prompt,
)


@pytest.fixture(scope="session")
def llama(shared):
    return Tokenizer(shared / "tokenizer" / "tokenizer.model")


@pytest.fixture(scope="session")
def tokens(shared):
    return json.loads((shared / "tiny" / "tokens.json").read_text())


@pytest.fixture(scope="session")
def small_model(side_files, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(side_files["tokenizer.model"])
    return path


@pytest.fixture(scope="session")
def small(small_model):
    return Tokenizer(small_model)


def conversation(*texts):
    speakers = ["human", "gpt"] * len(texts)
    return [{"from": speaker, "value": text} for speaker, text in zip(speakers, texts, strict=False)]


# ---- the published ids ------------------------------------------------------------------------------------


def test_plain_texts_have_the_published_ids(llama, tokens):
    expected = [(entry["text"], entry["input_ids"]) for entry in tokens["plain"]]
    assert len(expected) == 66
    assert [(text, llama.encode(text)) for text, _ in expected] == expected


def test_texts_with_images_have_the_published_ids(llama, tokens):
    expected = [(entry["text"], entry["input_ids"]) for entry in tokens["with_image"]]
    assert len(expected) == 9
    assert [(text, llama.encode_with_images(text)) for text, _ in expected] == expected


def test_conversations_have_the_published_ids_and_labels(llama, tokens):
    assert len(tokens["conversations"]) == 108
    for entry in tokens["conversations"]:
        encoded = encode_conversation(llama, entry["conversation"], style=entry["version"])
        assert (encoded.input_ids, encoded.labels) == (entry["input_ids"], entry["labels"]), entry["conversation"]


def test_prompts_have_the_published_text_and_ids(llama, golden):
    assert set(golden[0]["prompts"]) == set(PROMPTS)
    for name, expected in golden[0]["prompts"].items():
        assert PROMPTS[name] == expected["text"]
        prompt = split_prompt(llama, PROMPTS[name])
        assert [*prompt.before, IMAGE_ID, *prompt.after] == expected["input_ids"]


def test_level_words_have_the_published_ids(llama, golden):
    assert llama.level_ids() == (15129, 1781, 6534, 6460, 4319)
    assert list(llama.level_ids()) == golden[0]["level_ids"]


def test_the_published_vocabulary_is_counted(llama):
    assert len(llama) == 32000


def test_a_space_in_front_makes_no_second_one(llama):
    """transformers' present tokenizer differs here."""
    assert llama.encode("The quality") == [1, 450, 11029]
    assert llama.encode(" The quality") == [1, 29871, 450, 11029]


# ---- any vocabulary ---------------------------------------------------------------------------------------

SPECIAL = ("<unk>", "<s>", "</s>")


def spelled(model, ids):
    """The text that token ids spell."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    spelling = b""
    for token in ids:
        piece = pieces.IdToPiece(token)
        spelling += bytes([int(piece[3:5], 16)]) if pieces.IsByte(token) else piece.encode()
    return spelling.decode().replace("▁", " ")


@settings(deadline=None)
@given(text=st.text())
@example(text="  two  spaces ")
@example(text="\nASSISTANT: x")
@example(text="▁")
def test_ids_begin_with_bos_and_spell_the_text(text, small, small_model):
    ids = small.encode(text)
    assert ids[0] == small.bos_id
    if not any(word in text for word in SPECIAL):
        assert spelled(small_model, ids[1:]) == ((" " + text) if text else "").replace("▁", " ")


@settings(deadline=None)
@given(parts=st.lists(st.one_of(st.sampled_from((*SPECIAL, " ")), st.text(max_size=8))))
def test_special_words_are_single_tokens(parts, small):
    text = "".join(parts)
    ids = small.encode(text)
    assert all(0 <= token < len(small) for token in ids)
    for token, word in enumerate(SPECIAL):
        assert ids[1:].count(token) == text.count(word)


@settings(deadline=None)
@given(pieces=st.lists(st.text(max_size=12), min_size=1, max_size=5))
def test_every_placeholder_is_one_image_among_ids_in_range(pieces, small):
    text = IMAGE_PLACEHOLDER.join(pieces)
    ids = small.encode_with_images(text)
    assert ids.count(IMAGE_ID) == text.count(IMAGE_PLACEHOLDER)
    assert all(0 <= token < len(small) for token in ids if token != IMAGE_ID)
    assert text == "" or ids[0] == (small.bos_id if not text.startswith(IMAGE_PLACEHOLDER) else IMAGE_ID)


@settings(deadline=None)
@given(text=st.text().filter(lambda text: IMAGE_PLACEHOLDER not in text))
def test_text_around_an_image_is_encoded_on_its_own(text, small):
    encoded = small.encode(text)
    assert small.encode_with_images(f"a{IMAGE_PLACEHOLDER}{text}") == [*small.encode("a"), IMAGE_ID, *encoded[1:]]
    kept = encoded if text else []
    assert small.encode_with_images(f"{IMAGE_PLACEHOLDER}{text}") == [IMAGE_ID, *kept]


@settings(deadline=None)
@given(
    rounds=st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), min_size=1, max_size=3),
    style=st.sampled_from(sorted(SYSTEM_SENTENCES)),
)
def test_the_labels_spell_the_answers(rounds, style, small, small_model):
    texts = [text for question_and_answer in rounds for text in question_and_answer]
    assume(not any(word in text for text in texts for word in (*SPECIAL, IMAGE_PLACEHOLDER)))
    encoded = encode_conversation(small, conversation(IMAGE_PLACEHOLDER + texts[0], *texts[1:]), style=style)
    assert encoded.input_ids.count(IMAGE_ID) == 1
    labelled = [
        (token, label) for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != IGNORED_LABEL
    ]
    assert all(token == label for token, label in labelled)
    answers = "".join(f" {answer}</s>" for answer in texts[1::2])
    assert spelled(small_model, [label for _, label in labelled]) == answers.replace("▁", " ")


def test_the_image_moves_in_front_of_the_question(small):
    image_last = encode_conversation(small, conversation(f"How good? \n{IMAGE_PLACEHOLDER}", "good"))
    image_first = encode_conversation(small, conversation(f"{IMAGE_PLACEHOLDER}\nHow good?", "good"))
    assert image_last == image_first
    where = image_last.input_ids.index(IMAGE_ID)
    assert image_last.input_ids[:where] == small.encode(SYSTEM_SENTENCES["v1"] + "USER: ")


def test_the_answer_and_its_end_are_labelled(llama):
    encoded = encode_conversation(llama, conversation(IMAGE_PLACEHOLDER, "It is good."), style="mplug_owl2")
    labelled = [label for label in encoded.labels if label != IGNORED_LABEL]
    assert labelled == [*llama.encode("It is good.")[1:], 2]


def test_without_an_image_the_first_token_of_an_answer_is_not_labelled(llama):
    encoded = encode_conversation(llama, conversation("Hello.", "It is good."))
    labelled = [label for label in encoded.labels if label != IGNORED_LABEL]
    assert labelled == [*llama.encode("It is good.")[2:], 2]


@pytest.mark.parametrize("max_length", [1, 20, 10_000])
def test_a_conversation_is_cut_at_the_maximum_length(max_length, small):
    messages = conversation(f"{IMAGE_PLACEHOLDER} How good?", "The quality of the image is good.")
    whole = encode_conversation(small, messages)
    cut = encode_conversation(small, messages, max_length=max_length)
    assert cut.input_ids == whole.input_ids[:max_length]
    assert cut.labels == whole.labels[:max_length]


def test_a_conversation_is_cut_at_2048_by_default(small):
    encoded = encode_conversation(small, conversation(IMAGE_PLACEHOLDER, "good " * 3000))
    assert len(encoded.input_ids) == len(encoded.labels) == 2048


# ---- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"not a sentencepiece model\n" * 20], ids=["empty", "text"])
def test_other_files_are_no_tokenizer(content, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(PromptError, match=re.escape(str(path))):
        Tokenizer(path)


def test_a_truncated_model_is_no_tokenizer(side_files, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(side_files["tokenizer.model"][:-1000])
    with pytest.raises(PromptError, match=re.escape(str(path))):
        Tokenizer(path)


def test_missing_files_and_folders_are_no_tokenizer(tmp_path):
    for path in (tmp_path / "absent.model", tmp_path):
        with pytest.raises(PromptError, match=re.escape(str(path))):
            Tokenizer(path)


def test_a_vocabulary_with_other_special_tokens_is_refused(tmp_path):
    """As T5 has them: its ids would be wrong without a word."""
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(PROMPTS.values()),
            model_writer=file,
            vocab_size=60,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    with pytest.raises(PromptError, match="<s>"):
        Tokenizer(path)


def test_a_level_word_of_several_tokens_is_refused_by_name(small):
    with pytest.raises(PromptError, match="superb, abysmal") as caught:
        small.level_ids(["good", "superb", "abysmal"])
    assert "good" not in str(caught.value)


def test_an_unknown_level_word_is_refused_by_name(small):
    with pytest.raises(PromptError, match="<unk>"):
        small.level_ids(["good", "<unk>"])


def test_level_ids_are_in_the_order_of_the_words(small):
    assert small.level_ids(LEVELS[::-1]) == small.level_ids()[::-1]
    assert len(set(small.level_ids())) == 5


@pytest.mark.parametrize(
    "text",
    ["", "no image", "<|image|>", "<|image|> text", "text <|image|>", "two <|image|> images <|image|> here"],
)
def test_a_prompt_has_one_image_between_texts(text, small):
    with pytest.raises(PromptError, match=re.escape(repr(text))):
        split_prompt(small, text)


@pytest.mark.parametrize(
    "speakers",
    [[], ["human"], ["gpt", "human"], ["human", "human"], ["human", "gpt", "human"], ["human", "assistant"], [None]],
    ids=str,
)
def test_a_conversation_takes_turns(speakers, small):
    messages = [{"value": "text"} | ({"from": speaker} if speaker else {}) for speaker in speakers]
    with pytest.raises(PromptError, match=re.escape(str(speakers))):
        encode_conversation(small, messages)


def test_an_unknown_style_is_refused_with_the_known_ones(small):
    with pytest.raises(PromptError, match=r"'v7'.*v1, mplug_owl2"):
        encode_conversation(small, conversation("a", "b"), style="v7")


def test_a_message_without_text_is_refused(small):
    with pytest.raises(PromptError, match="value"):
        encode_conversation(small, [{"from": "human", "value": "a"}, {"from": "gpt"}])
