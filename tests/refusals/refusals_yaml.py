"""A hundred mistakes in a run's YAML and its overrides."""

from pathlib import Path

from dora_dist.config import load_config
from tests.support.refusals import CANARY, Case

HEAD = "model: {path: m}\ndata: {train: t.jsonl}\n"
_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
_MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{', '.join(['*' + chr(97 + i)] * 9)}]}}\n" for i in range(9)
)

TEXTS = {  # the file, and what the message must name
    "empty": ("", "found null"),
    "comments alone": ("# model:\n", "found null"),
    "a list": ("- model\n- data\n", "found the list"),
    "a word": ("model", "found 'model'"),
    "a number": ("7", "found the int 7"),
    "two documents": ("---\nmodel: {path: m}\n---\ndata: {train: t}\n", "line 3"),
    "tab": ("model:\n\tpath: m\n", "line 2"),
    "unclosed bracket": ("model: {path: m\ndata: {train: t}\n", "line"),
    "unclosed quote": ("model: {path: 'm}\n", "line"),
    "bad indentation": ("model:\n  path: m\n dtype: float32\n", "line 3"),
    "colon in a value": ("model: {path: m}\ndata:\n  train: C: t\n", "line 3"),
    "no space behind the colon": ("model:\n  path:m\n", "model: expected a section"),
    "percent": ("%model: m\n", "line"),
    "at sign": ("model: {path: @m}\n", "line 1"),
    "NUL": ("model: {path: \x00}\n", "not valid YAML"),
    "control character": ("model: {path: \x07}\n", "not valid YAML"),
    "section twice": (HEAD + "model: {path: n}\n", "'model' stands twice"),
    "key twice": (HEAD + "train:\n  lr: 1e-4\n  lr: 1e-5\n", "'lr' stands twice"),
    "key twice, quoted": (HEAD + "train: {lr: 1, 'lr': 2}\n", "'lr' stands twice"),
    "number as a key": (HEAD + "1: 2\n", "the key 1 must be a string"),
    "true as a key": (HEAD + "yes: 2\n", "the key True must be a string"),
    "null as a key": (HEAD + "~: 2\n", "the key None must be a string"),
    "list as a key": (HEAD + "? [a]\n: b\n", "must be a string"),
    "python object": (HEAD + f"log: !!python/object/apply:os.mkdir ['../{CANARY}']\n", "could not determine"),
    "python name": (HEAD + "log: !!python/name:os.system\n", "could not determine"),
    "python module": (HEAD + "log: !!python/module:antigravity\n", "could not determine"),
    "python tuple": (HEAD + "dora: {targets: !!python/tuple [a]}\n", "could not determine"),
    "own tag": (HEAD + "train: {lr: !env LR}\n", "'!env'"),
    "int tag": (HEAD + "dora: {rank: !!int x}\n", "does not fit its tag"),
    "float tag": (HEAD + "train: {lr: !!float x}\n", "does not fit its tag"),
    "bool tag": (HEAD + "train: {compile: !!bool x}\n", "does not fit its tag"),
    "time tag": (HEAD + "output_dir: !!timestamp x\n", "does not fit its tag"),
    "binary": (HEAD + "output_dir: !!binary cnVu\n", "output_dir: expected a string"),
    "set": (HEAD + "dora: {targets: !!set {a, b}}\n", "dora.targets: expected a list of strings"),
    "unknown alias": (HEAD + "train: *base\n", "'base'"),
    "merge of a word": (HEAD + "train: {<<: word}\n", "expected a mapping"),
    "merge with an unknown key": (HEAD + "train: &t {lr: 1}\ndora: {<<: *t}\n", "dora.lr: unknown key"),
    "endless alias": (HEAD + "parallel: {strategy: zero1, deepspeed: &x {a: *x}}\n", "aliases"),
    "a billion laughs": (_LAUGHS, "aliases"),
    "a billion merges": (_MERGES, "aliases"),
    "a thousand brackets": ("[" * 5000, "nested too deeply"),
    "Python": ("from dora_dist import x\nlr = 3\n", "found 'from"),
    "JSON with a comment": ('{"model": {"path": "m"}, // x\n"data": {}}', "line"),
    "a file of Windows": ("\ufffe", "not valid YAML"),
}

KEYS = {  # laid over a valid file, and what the message must name
    "train.learning_rate=1e-4": "train.learning_rate: unknown key",
    "train.lrr=1e-4": "did you mean 'lr'",
    "lora.rank=8": "lora: unknown key; did you mean 'dora'",
    "dora.r=8": "dora.r: unknown key",
    "dora.lora_alpha=8": "did you mean 'alpha'",
    "dora.target_modules=all-linear": "dora.target_modules: unknown key",
    "model.name=m": "model.name: unknown key",
    "model.trust_remote_code=true": "model.trust_remote_code: unknown key",
    "model.load_in_4bit=true": "model.load_in_4bit: unknown key",
    "optimizer=adamw": "optimizer: unknown key",
    "Train.lr=1": "did you mean 'train'",
    "train=fast": "train: expected a section of keys, found 'fast'",
    "train=[lr]": "train: expected a section of keys, found the list",
    "train.lr=fast": "train.lr: expected a number, found 'fast'",
    "train.lr='1e-4'": "train.lr: expected a number, found '1e-4'",
    "train.lr=1e-4x": "train.lr: expected a number",
    "train.lr=1,5": "train.lr: expected a number",
    "train.lr=0": "train.lr: 0 must be greater than 0",
    "train.lr=-1e-4": "train.lr: -0.0001 must be greater than 0",
    "train.lr=.nan": "train.lr: expected a number, found the float nan",
    "train.lr=.inf": "train.lr: expected a number, found the float inf",
    "train.lr=1e999": "train.lr: expected a number, found the float inf",
    "train.lr=true": "train.lr: expected a number, found true",
    "train.lr=": "train.lr: expected a number, found null",
    "train.lr=1:30": "train.lr: expected a number, found '1:30'",
    "train.steps=1e3": "train.steps: expected a whole number or null",
    "train.steps=0": "train.steps: 0 is too small",
    "train.steps=-5": "train.steps: -5 is too small",
    "train.steps=ten": "train.steps: expected a whole number or null, found 'ten'",
    "train.steps=0100": "train.steps: expected a whole number or null, found '0100'",
    "train.epochs=0": "train.epochs: 0 must be greater than 0",
    "train.micro_batch_size=1.5": "train.micro_batch_size: expected a whole number",
    "train.accumulation=[4]": "train.accumulation: expected a whole number",
    "train.seed=-1": "train.seed: -1 is too small",
    "train.seed=99999999999999999999": "train.seed: 99999999999999999999 is too large",
    "train.optimizer=adam": "train.optimizer: expected one of adamw",
    "train.schedule=Cosine": "did you mean 'cosine'",
    "train.max_grad_norm=0": "train.max_grad_norm: 0 must be greater than 0",
    "train.compile=maybe": "train.compile: expected true or false, found 'maybe'",
    "model.dtype=bf16": "model.dtype: expected one of bfloat16",
    "model.dtype=16": "model.dtype: expected one of bfloat16",
    "model.path=": "model.path: expected a string, found null",
    "model.path=''": "model.path: expected a string, found ''",
    "model.path=[a]": "model.path: expected a string, found the list",
    "model.num_labels=1": "model.num_labels: 1 is too small",
    "dora.rank=0": "dora.rank: 0 is too small",
    "dora.rank=16.0": "dora.rank: expected a whole number, found the float 16.0",
    "dora.alpha=-1": "dora.alpha: -1 must be greater than 0",
    f"dora.alpha=1{'0' * 400}": "dora.alpha: expected a number",
    "dora.dropout=1": "dora.dropout: 1 is too large",
    "dora.dropout=50": "dora.dropout: 50 is too large",
    "dora.targets=[1, 2]": "dora.targets: expected a list of strings",
    "dora.targets={q_proj: 1}": "dora.targets: expected a list of strings",
    "dora.rank_pattern={q_proj: 0}": "dora.rank_pattern.q_proj: 0 is too small",
    "dora.rank_pattern=[q_proj]": "dora.rank_pattern: expected a mapping of names",
    "dora.alpha_pattern={q_proj: many}": "dora.alpha_pattern: expected a mapping of names",
    "dora.magnitude_axis=1": "dora.magnitude_axis: expected one of out, in",
    "dora.init_from=true": "dora.init_from: expected a string or null, found true",
    "dora.use_dora=false": "dora.use_dora: unknown key",
    "quant.scheme=int8": "quant.scheme: expected one of none, nf4",
    "quant.block_size=100": "quant.block_size: 100 is not a power of two",
    "quant.block_size=16": "quant.block_size: 16 is too small",
    "data.format=sharegpt": "data.format: expected one of auto",
    "data.seq_len=1": "data.seq_len: 1 is too small",
    "data.seq_len=2k": "data.seq_len: expected a whole number, found '2k'",
    "data.on_bad_row=ignore": "data.on_bad_row: expected one of error, skip",
    "data.train=[a.jsonl, b.jsonl]": "data.train: expected a string, found the list",
    "parallel.strategy=ddpp": "did you mean 'ddp'",
    "parallel.strategy=zero": "parallel.strategy: expected one of auto",
    "parallel.timeout_s=99999999999": "parallel.timeout_s: 99999999999 is too large",
    "parallel.replicas=0": "parallel.replicas: 0 is too small",
    "log.sample_prompts=hello": "log.sample_prompts: expected a list of strings",
    "output_dir=2": "output_dir: expected a string, found the int 2",
    "train.eval_every=5": "train.eval_every needs data.eval",
    "train.lr": "key.sub=value",
    "=5": "key.sub=value",
    "train.lr=[": "not valid YAML",
    "train.lr.x.y=1": "train.lr: expected a number",
    "train..lr=1": "train.: unknown key",
    ".lr=1": ": unknown key",
}

PAIRS = {  # keys that contradict each other
    "labels of a language model": ("model.num_labels=2", "model.num_labels needs model.task"),
    "packed pairs": ("model.task=preference data.packing=true", "data.packing needs model.task: causal_lm"),
    "pairs learned as a whole": ("model.task=preference data.loss_on=all", "data.loss_on: all needs model.task"),
    "an objective of tokens": (
        "train.objective=dpo",
        "train.objective needs model.task: preference, not causal_lm",
    ),
    "a beta of tokens": ("train.beta=0.1", "train.beta needs model.task: preference, not causal_lm"),
    "an objective of rewards": (
        "model.task=reward_model train.objective=kto",
        "train.objective needs model.task: preference, not reward_model",
    ),
    "labels of rewards": ("model.task=reward_model model.num_labels=2", "model.num_labels needs model.task"),
    "packed pairs of rewards": ("model.task=reward_model data.packing=true", "data.packing needs model.task"),
    "a gamma of DPO": ("model.task=preference train.gamma=1", "train.gamma needs train.objective: simpo"),
    "a stream for KTO": (
        "model.task=preference train.objective=kto data.streaming=true train.steps=1",
        "data.streaming does not work with train.objective: kto",
    ),
    "a reference that is trained": (
        "model.task=preference dora.modules_to_save=[lm_head]",
        "dora.modules_to_save: lm_head would be lost",
    ),
    "packed classifier": ("model.task=sequence_classification data.packing=true", "data.packing needs model.task"),
    "lora's magnitudes": ("dora.method=lora dora.magnitude_only=[q_proj]", "dora.magnitude_only needs"),
    "their rate": ("dora.method=lora train.magnitude_lr=0.1", "train.magnitude_lr needs"),
    "replicas under ddp": ("parallel.strategy=ddp parallel.replicas=2", "parallel.replicas needs"),
    "offload alone": ("parallel.strategy=single parallel.cpu_offload=true", "parallel.cpu_offload needs"),
    "DeepSpeed's keys": ("parallel.strategy=fsdp parallel.deepspeed={x: 1}", "parallel.deepspeed needs"),
    "8 bits under fsdp": ("parallel.strategy=fsdp train.optimizer=adamw8bit", "train.optimizer: adamw8bit"),
    "a value and a section": ("model=m model.path=m", "'model' is a value"),
}


def read(directory: Path, text: str, overrides: list[str]) -> object:
    (directory / "c.yaml").write_text(text, encoding="utf-8")
    return load_config(directory / "c.yaml", overrides)


def _not_text(directory: Path) -> object:
    (directory / "c.yaml").write_bytes(HEAD.encode("utf-16"))
    return load_config(directory / "c.yaml")


def _a_directory(directory: Path) -> object:
    return load_config(directory)


def _nothing(directory: Path) -> object:
    return load_config(directory / "none.yaml")


def _no_section(name: str, text: str, missing: str) -> Case:
    return Case(name, lambda d: read(d, text, []), (missing,))


def cases() -> list[Case]:
    return [
        *(Case(n, lambda d, t=text: read(d, t, []), (names,)) for n, (text, names) in TEXTS.items()),
        *(Case(f"{k[:60]!r}", lambda d, k=k: read(d, HEAD, [k]), (names,)) for k, names in KEYS.items()),
        *(Case(n, lambda d, k=k: read(d, HEAD, _split(k)), (names,)) for n, (k, names) in PAIRS.items()),
        Case("UTF-16", _not_text, ("c.yaml: not valid YAML",)),
        Case("a directory", _a_directory, ("--config: there is no file",)),
        Case("no file", _nothing, ("--config: there is no file '{d}/none.yaml'",)),
        _no_section("no model", "data: {train: t}\n", "model.path: missing"),
        _no_section("no data", "model: {path: m}\n", "data.train: missing"),
        _no_section("a section of nothing", "model:\ndata: {train: t}\n", "model.path: missing"),
    ]


def _split(text: str) -> list[str]:
    """At the blanks in front of keys."""
    parts: list[str] = []
    for word in text.split(" "):
        if parts and "=" not in word:
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    return parts
