"""A tiny byte-level tokenizer and row files for the tests of the data."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dora_dist.config import DataConfig
from dora_dist.data.encode import Encoder
from dora_dist.data.examples import Examples, load_examples
from dora_dist.data.formats import Labels

TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "what is the capital of france? the capital is paris",
    "user and assistant speak in turns; the assistant answers",
    "Below is an instruction. Write a response that completes the request.",
]
SEQ_LEN = 30  # no multiple of 8, so that the cap is met
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def make_tokenizer(bos: bool = True, end: bool = False, trim: bool = False) -> PreTrainedTokenizerFast:
    """`bos`, `end`: special tokens put around a text; `trim`: offsets without spaces, as GPT-2's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXT * 3,
        trainers.BpeTrainer(
            vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    template = f"{'<s> ' if bos else ''}$A{' </s>' if end else ''}"
    pair = f"{template} $B:1{' </s>:1' if end else ''}"
    around = processors.TemplateProcessing(single=template, pair=pair, special_tokens=[("<s>", 1), ("</s>", 2)])
    trimmed = [processors.ByteLevel(trim_offsets=True)] if trim else []
    core.post_processor = processors.Sequence([*trimmed, around])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )


def write_jsonl(path: Path, rows: list) -> str:
    """Rows as JSON lines; a string is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def load(
    path: str,
    tokenizer=None,
    labels: Labels | None = None,
    vocab_size=None,
    key="data.train",
    needed: str | None = None,
    **settings,
) -> Examples:
    """`load_examples` with the settings of DataConfig and, by their names, an encoder's arguments."""
    config = DataConfig(train=path, **settings)
    return load_examples(path, Encoder(config, tokenizer or make_tokenizer(), labels, vocab_size, needed), key)


def learnt(examples: Examples, row: int, tokenizer) -> str:
    """The supervised tokens of a row as text, special tokens included."""
    example = examples[row]
    return tokenizer.decode(example.ids[example.supervised], clean_up_tokenization_spaces=False)


def whole(examples: Examples, row: int, tokenizer) -> str:
    return tokenizer.decode(examples[row].ids, clean_up_tokenization_spaces=False)
