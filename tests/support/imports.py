"""What ranks import, for the process that they are forked from; see `support.ranks`."""

import contextlib

import pytest  # noqa: F401
import torch._dynamo.utils
import torch.distributed.fsdp
import torch.distributed.tensor.debug  # noqa: F401
import transformers.models.auto.tokenization_auto
import transformers.models.distilbert.modeling_distilbert
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401

import dora_dist.models.merge
import dora_dist.planning.plan
import dora_dist.training.run  # noqa: F401

OPTIONAL = "bitsandbytes.functional datasets deepspeed deepspeed.runtime.zero.stage3 peft".split()
OPTIONAL.append("deepspeed.runtime.zero.muon.muon_optimizer")  # imports torch's compiler; any engine asks for it
OPTIONAL += [f"trl.trainer.{name}_trainer" for name in ("sft", "dpo", "grpo")]
for module in OPTIONAL:
    with contextlib.suppress(ImportError):
        __import__(module)
