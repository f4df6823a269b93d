"""Words of the world: a tokenizer with a word for each second, colour, shape, place, number and box."""

from __future__ import annotations

from functools import cache
from typing import Any

from vmemory.data.world import COLOURS, KINDS, PLACES, SHAPES

PAD, VIDEO, IMAGE, END, UNKNOWN = "<pad>", "<video>", "<image>", "<end>", "<unk>"
# seconds that have a word
SECONDS = 1024
_TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}{% if c.type == 'text' %} {{ c.text }}{% elif c.type == 'image' %}"
    "<image>{% else %}<video>{% endif %}{% endfor %}{% if m.role == 'assistant' %} <end>{% endif %}{% endfor %}"
)
_QUESTIONS = (
    "what colour is the now number shown where are we box of was last first were with at which second did come came "
    "after before how many cards there a"
)


@cache
def vocabulary() -> dict[str, int]:
    """Return the number of every word."""
    boxes = KINDS["now_box"][1] or ()
    words = [PAD, VIDEO, IMAGE, END, UNKNOWN, *COLOURS, *SHAPES, *PLACES, "yes", "no", *_QUESTIONS.split()]
    words += [box.replace(" ", "") for box in boxes]
    words += [str(second) for second in range(SECONDS)]
    return {word: i for i, word in enumerate(words)}


def world_tokenizer() -> Any:
    """Make the tokenizer: `Time 12.0s:` is the word 12, a box is one word, question marks and capitals do not count."""
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    core = Tokenizer(models.WordLevel(vocab=vocabulary(), unk_token=UNKNOWN))
    core.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(", ", ","),
            normalizers.Replace(Regex(r",?time "), " "),
            normalizers.Replace(Regex(r"\.\ds:"), " "),
            normalizers.Replace("?", " "),
        ]
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # words with a space between them, whatever they begin with
    core.decoder = decoders.Sequence([decoders.WordPiece(prefix="\0", cleanup=False), decoders.Replace(",", ", ")])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, chat_template=_TEMPLATE
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [VIDEO, IMAGE]})
    return tokenizer


def word_ids(text: str) -> list[int]:
    """Turn a question or an answer into ids, as the tokenizer does."""
    known = vocabulary()
    return [known[word] for word in text.lower().replace(", ", ",").replace("?", " ").split()]
