"""Checkpoints as they are published: in FP8 or MXFP4."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def _save(path: Path, about: dict, tensors: dict) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": about}))
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})


def in_fp8(path: Path, block: tuple[int, int] | None, by_row: bool = False) -> dict[str, torch.Tensor]:
    """Puts the matrices of a checkpoint's linear layers and experts into FP8. Gives what they stand for."""
    tensors, meant = load_file(path / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        if not name.endswith(("_proj.weight", "experts.gate_up_proj", "experts.down_proj")):
            continue
        *experts, rows, columns = weight.shape
        high, wide = block or ((1, columns) if by_row else (rows, columns))
        cut = weight.reshape(*experts, rows // high, high, columns // wide, wide)
        scales = cut.abs().amax((-3, -1)) / 448
        tensors[name] = (cut / scales[..., :, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales if block or by_row else scales[0, 0]
        wide_codes = tensors[name].double().reshape(cut.shape) * scales[..., :, None, :, None].double()
        meant[name] = wide_codes.reshape(weight.shape)
    _save(path, {"quant_method": "fp8", "weight_block_size": block and list(block)}, tensors)
    return meant


def in_mxfp4(path: Path) -> None:
    """Gives gpt-oss's experts random codes and scales."""
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(path / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 128, shape, generator=generator, dtype=torch.uint8)
    _save(path, {"quant_method": "mxfp4"}, tensors)
