"""The command line: `dora-dist VERB ...`. Exit status 0: done; 2: the user's mistake, told in one line;
75: ended by a signal, with a checkpoint where a step was made; else a failure."""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, MutableMapping, Sequence
from typing import NoReturn

from dora_dist.config import load_config
from dora_dist.errors import RunFailed, Stopped, UserError
from dora_dist.parallel.orphans import end_with_launcher

STOPPED = 75  # exit status of a run that a signal ended after a checkpoint: EX_TEMPFAIL, try again
_SECONDS_FOR_RANK_0 = 10


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dora-dist", description="DoRA fine-tuning that is aware of sharding.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(name: str, run: Callable[[argparse.Namespace], None], about: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=about)
        verb.add_argument("--config", required=True, metavar="RUN/config.yaml" if name == "merge" else "C.yaml")
        verb.set_defaults(run=run)
        return verb

    train = add("train", _train, "fine-tune a model as a YAML says (under torchrun or alone)")
    train.add_argument("--local_rank", help=argparse.SUPPRESS)  # from the deepspeed launcher, as is LOCAL_RANK
    merge = add("merge", _merge, "write base and adapter as one 16-bit Hugging Face model")
    merge.add_argument("--adapter", metavar="DIR", help="default: adapter in the run's output_dir")
    merge.add_argument(
        "--base",
        choices=["dequantized", "original"],
        default="dequantized",
        help="of a 4-bit run: the weights that the adapter was trained on (default), or the unquantized ones",
    )
    merge.add_argument("out", metavar="OUT_DIR", help="a new directory")
    plan = add("plan", _plan, "what a run will hold and how long a step will take, without a GPU")
    plan.add_argument("--gpus", type=int, default=1, help="in all (default: 1)")
    plan.add_argument("--gpu", required=True, help="rtx4090, a100-80, h100, h200 or b200")
    plan.add_argument("--nodes", type=int, default=1, help="machines that the GPUs are in (default: 1)")
    plan.add_argument("--net", default="400g", help="Gb/s of each GPU between machines (default: 400g)")
    plan.add_argument("--json", action="store_true", help="numbers in place of the table")
    for verb in (train, merge, plan):
        verb.add_argument("overrides", nargs="*", metavar="key.sub=value", help="laid over the YAML")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") or "=" not in word for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides += rest  # those after an option
    try:
        options.run(options)
        return 0
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr, flush=True)
        return _ended(STOPPED)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # Rank 0 has the same to say, and when it ends the launcher ends all. Who ended first would silence it;
            # who is still here after that had a mistake of its own.
            time.sleep(_SECONDS_FOR_RANK_0)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return _ended(2)
    except RunFailed as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return _ended(1)
    except KeyboardInterrupt:
        return 130


def _ended(status: int) -> int:
    """One rank of several ends here and now: its error's traceback holds the model, and a model that is let go
    beside a group that others have left can wait for it forever."""
    return leave(status) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else status


def entry() -> None:
    """What launch/train.py and the console script run: `main`, then the end of the process."""
    end_with_launcher()
    try:
        leave(main())
    except Exception:
        traceback.print_exc()
        leave(1)


def leave(status: int) -> NoReturn:
    """End this process. One rank of several ends at once: FSDP2's caches keep gloo's threads alive, and a thread
    that lets go of a tensor while the interpreter shuts down aborts it ("terminate called without an active
    exception", seen in one of 30 runs on a busy machine)."""
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(status)
    sys.exit(status)


def _train(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)  # before transformers is imported, which takes seconds
    _let_segments_grow(os.environ)
    from dora_dist.planning.plan import check_fits
    from dora_dist.training.run import run_training

    _quiet_transformers()
    run_training(config, check_fits)


def _let_segments_grow(environment: MutableMapping[str, str]) -> None:
    """Have torch's CUDA allocator leave few fragments, which `plan` counts on, unless the user has set it up. It
    reads this at the first allocation."""
    if not any(f"PYTORCH_{kind}ALLOC_CONF" in environment for kind in ("", "CUDA_", "HIP_")):
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _merge(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    from dora_dist.models.merge import run_merge

    _quiet_transformers()
    run_merge(config, options.out, options.adapter, options.base)


def _plan(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    from dora_dist.planning.hardware import find_cluster

    cluster = find_cluster(options.gpu, options.gpus, options.nodes, options.net)
    from dora_dist.planning.known_models import directory_to_plan
    from dora_dist.planning.plan import as_json, as_text, make_plan
    from dora_dist.planning.rehearse import Rehearsals

    _quiet_transformers()
    with directory_to_plan(config.model.path) as (directory, built_in), Rehearsals(here=True) as rehearse:
        made = make_plan(config, directory, cluster, rehearse, compare=True)
    if built_in:
        print(
            f"note: {config.model.path} could not be fetched; its shape is the built-in one, of its published "
            "config.json",
            file=sys.stderr if options.json else sys.stdout,
        )
    print(json.dumps(as_json(made), indent=2) if options.json else as_text(made))


def _quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
