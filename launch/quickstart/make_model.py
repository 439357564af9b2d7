"""Pre-trains the quickstart's model: a Llama of 3.5 million parameters that has read the standard library.

What: takes the text that every machine with Python carries (the standard library's sources, their docstrings
once more as clean text, and the language reference behind `help("topics")`), trains a byte-level BPE
tokenizer on it and a `LlamaForCausalLM` from scratch, and saves both in Hugging Face layout, as bfloat16.

Why: the quickstart must fine-tune a model that knows something, on a machine with neither a GPU nor a way to
the hub. Over half the windows are docstrings or prose, so that the model can write a docstring's English.

How long: some 36 minutes of one AMD EPYC core, which computes in bfloat16 (others emulate that, more slowly).

What it gives up: it knows the style of a docstring, not the truth about a function. The text depends on the
Python version (ours is 3.11), and the weights' last bits on the processor. The docstrings of the held-out
rows of `make_data.py` are kept out of the text, along with all that quotes or nearly repeats them.
"""

import argparse
import ast
import inspect
import math
import shutil
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from make_data import HeldOut, Row, documented, heading, source_files, split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MIX = {"sources": 0.45, "docstrings": 0.45, "topics": 0.1}  # the share of training windows drawn from each
VOCABULARY, HIDDEN, LAYERS, MAX_POSITIONS = 3072, 256, 4, 512
BATCH, LENGTH = 8, 256  # windows a step, tokens a window
LR, WARMUP = 5e-3, 0.04  # peak, and the share of the steps that leads up to it


def without_held_out_paragraphs(text: str, held_out: HeldOut) -> str:
    return "\n\n".join(part for part in text.split("\n\n") if not held_out.is_quoted_in(part))


def read_module(module: str, source: str, held_out: HeldOut) -> tuple[str, list[str]]:
    """(the source, its docstrings under their headings), both without what the hold-out rule forbids."""
    docstrings, forbidden_lines = [], set()
    for name, node, parent in documented(ast.parse(source), module):
        docstring = ast.get_docstring(node)
        if held_out.is_revealed_by(docstring):
            forbidden_lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        else:
            docstrings.append(f"{heading(name, node, parent)}\n{inspect.cleandoc(docstring)}")
    lines = enumerate(source.split("\n"), start=1)
    allowed = "\n".join(line for number, line in lines if number not in forbidden_lines)
    return without_held_out_paragraphs(allowed, held_out), docstrings


def read_texts(held_out: HeldOut) -> dict[str, list[str]]:
    """The pre-training documents of each part of the mix."""
    texts: dict[str, list[str]] = {"sources": [], "docstrings": []}
    for module, source in source_files():
        allowed, docstrings = read_module(module, source, held_out)
        texts["sources"].append(allowed)
        texts["docstrings"] += docstrings
    texts["topics"] = [without_held_out_paragraphs(topics[key], held_out) for key in sorted(topics)]
    return texts


def train_tokenizer(texts: dict[str, list[str]]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    # The docstrings are in the sources already; twice more, so that English gets its share of the tokens.
    tokenizer.train_from_iterator(texts["sources"] + texts["topics"] + 2 * texts["docstrings"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN * 5 // 2,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=HIDDEN // 128,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def token_streams(texts: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """Each part of the mix as one line of tokens, its documents between `<s>` and `</s>`."""
    streams = {}
    for part, documents in texts.items():
        ids = [
            token
            for row in tokenizer(documents, verbose=False).input_ids
            for token in [*row, tokenizer.eos_token_id]
        ]
        streams[part] = torch.tensor(ids)
        characters = sum(map(len, documents))
        print(f"{part}: {len(documents)} documents, {characters:,} characters, {len(ids):,} tokens")
    return streams


def draw_batch(streams: dict[str, torch.Tensor]) -> torch.Tensor:
    """[BATCH, LENGTH] windows from random places, each from a part drawn by its share in the mix."""
    windows = []
    for index in torch.multinomial(torch.tensor(list(MIX.values())), BATCH, replacement=True):
        stream = streams[list(MIX)[index]]
        start = int(torch.randint(len(stream) - LENGTH, ()))
        windows.append(stream[start : start + LENGTH])
    return torch.stack(windows)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> float:
    """Mean loss over the tokens of the held-out completions, the end of sequence included."""
    total = tokens = 0
    for row in rows:
        prompt = tokenizer(row.prompt).input_ids
        completion = [*tokenizer(row.completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        total += F.cross_entropy(logits.float(), torch.tensor(completion), reduction="sum").item()
        tokens += len(completion)
    return total / tokens


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the layers' matrices, AdamW for the embedding and the norms.

    With so few steps to take, Muon is worth far more than the seconds it costs: README.md has the comparison.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.model.layers.parameters() if p.ndim != 2]
    others += [*model.model.embed_tokens.parameters(), *model.model.norm.parameters()]
    muon = torch.optim.Muon(matrices, lr=LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=LR, betas=(0.9, 0.95), weight_decay=0.1)]


def train(model: LlamaForCausalLM, streams: dict[str, torch.Tensor], steps: int) -> None:
    optimizers = make_optimizers(model)
    warmup = max(1, round(WARMUP * steps))
    start, recent = time.time(), []
    for step in range(steps):
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        tokens = draw_batch(streams)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = LR * min((step + 1) / warmup, cosine)
            optimizer.step()
        model.zero_grad()
        recent.append(loss.item())
        if len(recent) == 50 or step + 1 == steps:
            seconds = time.time() - start
            speed = (step + 1) * tokens.numel() / seconds
            mean = sum(recent) / len(recent)
            print(f"step {step + 1}  loss {mean:.3f}  {speed:.0f} tokens/s  {seconds:.0f} s", flush=True)
            recent = []


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes beside `out` first, so that whoever reads it meanwhile finds a whole model."""
    unfinished = out.with_name(f"{out.name}.new")
    model.to(torch.bfloat16).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(out, ignore_errors=True)
    unfinished.rename(out)
    print(f"{out}: {sum(file.stat().st_size for file in out.iterdir()):,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    options = parser.parse_args()
    torch.set_num_threads(1)  # one core's sums come out the same every time
    torch.manual_seed(0)

    held_rows = split()[1]
    texts = read_texts(HeldOut(held_rows))
    tokenizer = train_tokenizer(texts)
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters")
    train(model, token_streams(texts, tokenizer), options.steps)
    save(model, tokenizer, options.out)
    print(f"loss of the held-out rows' completions: {held_out_loss(model.float(), tokenizer, held_rows):.3f}")


if __name__ == "__main__":
    main()
