"""Checkpoints whose tensors are not the model's: renamed, fused, one for each expert, in FP8 or MXFP4."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dora_dist.config import DataConfig, DoraConfig, ModelConfig, QuantConfig, RunConfig
from dora_dist.dora.experts import ExpertsForward
from dora_dist.errors import UserError
from dora_dist.models import files as files_module
from dora_dist.models import weights
from dora_dist.models.build import build, make_blueprint, materialize
from dora_dist.models.files import SafetensorsFiles, flat_boxes
from dora_dist.models.origins import Traced
from dora_dist.models.weights import base_tensors, check_shapes, load_slices, missing_from
from dora_dist.parallel.process import Processes
from dora_dist.parallel.replicated import Single
from dora_dist.parallel.shards import Rectangle, RowsOfCopies, Whole, flat_rectangles
from tests.support.models import save_model
from tests.support.published import in_fp8, in_mxfp4
from tests.support.small import causal_types, small_config, small_model

EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text")
RANKS, CPU = 3, torch.device("cpu")


class FlatRanges(Whole):
    """ZeRO-3's part of each parameter, of parameters that are whole."""

    def __init__(self, index):
        super().__init__()
        self.index = index

    def rectangles(self, parameter: torch.Tensor) -> list[Rectangle]:
        flat = parameter.detach().view(-1)
        step = -(-flat.numel() // RANKS)
        own = flat[self.index * step : (self.index + 1) * step]
        return flat_rectangles(own, self.index * step, parameter.shape or (1,))


def all_ranks(kind: str) -> list[Whole]:
    if kind == "rows":
        return [RowsOfCopies(index, RANKS, lambda _: None) for index in range(RANKS)]
    return [FlatRanges(index) for index in range(RANKS)] if kind == "flat" else [Whole()]


def load_into(model, directory, kind: str = "whole"):
    """The model with the directory's weights, as all ranks of a strategy would read them."""
    found = SafetensorsFiles(directory)
    if missing_from(found, model):
        found.take_names(model)
    assert not missing_from(found, model)
    check_shapes(found, model)
    with torch.no_grad():
        for tensor in base_tensors(model).values():
            tensor.fill_(7)
    for shards in all_ranks(kind):
        load_slices(model, found, shards, CPU)
    return model


def assert_same(model, wanted) -> None:
    got, want = model.state_dict(), wanted.state_dict()
    assert got.keys() == want.keys()
    different = [name for name, tensor in want.items() if not torch.equal(got[name], tensor)]
    assert not different


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Directories of small models, as transformers publishes them."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            made[name] = save_model(small_model(name), tmp_path_factory.mktemp(name))
        return made[name]

    return get


def load(directory, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, **options)


@pytest.mark.parametrize("kind", ["whole", "rows", "flat"])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_read_by_slices(published, monkeypatch, name, kind):
    monkeypatch.setattr(weights, "_READ_ELEMENTS", 500)
    assert_same(load_into(small_model(name), published(name), kind), load(published(name)))


@pytest.mark.parametrize("kind", ["rows", "flat"])
@pytest.mark.parametrize("name", EXPERTS)
def test_adapted_experts_are_read_by_slices(published, monkeypatch, name, kind):
    """Into one tall matrix, whichever way the model's own parameters lie."""
    monkeypatch.setattr(weights, "_READ_ELEMENTS", 500)
    blueprint = make_blueprint(config_of(published(name), targets=["experts"]), published(name))
    materialize(blueprint.model, lambda p: nn.Parameter(torch.full_like(p, 7, device="cpu"), False), CPU)
    for shards in all_ranks(kind):
        load_slices(blueprint.model, blueprint.files, shards, CPU)
    wanted, compared = load(published(name), dtype=torch.float32), 0
    for path, module in blueprint.model.named_modules():
        for key in module.layout.shapes if isinstance(module, ExpertsForward) else ():
            own = wanted.get_parameter(f"{path}.{key}")
            assert torch.equal(getattr(module, key).weight, module.layout.stacked(own))
            compared += 1
    assert compared >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", causal_types())
def test_whatever_transformers_declares_is_read_by_slices(name, tmp_path):
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    if get_checkpoint_conversion_mapping(name) is None:
        pytest.skip("its tensors are the model's")
    try:
        torch.manual_seed(0)
        model = small_model(name)
        model.save_pretrained(tmp_path)
        wanted = type(model).from_pretrained(tmp_path)
    except Exception as error:
        pytest.skip(f"not at this size: {error}")
    assert_same(load_into(model, tmp_path, "flat"), wanted)


OPERATIONS = {
    "experts of two kinds": lambda a, b, c, d: torch.cat([torch.stack([a, b]), torch.stack([c, d])], dim=1),
    "one tall matrix": lambda a, b, c, d: torch.stack([a, b, c, d]).reshape(24, 4),
    "transposed": lambda a, b, c, d: torch.stack([a.t(), b.transpose(0, 1)]).transpose(1, 2).reshape(12, 4),
    "parts": lambda a, b, c, d: torch.cat([*torch.chunk(a, 2, dim=-1), *torch.split(b, [1, 3], dim=1)], dim=1),
    "interleaved": lambda a, b, c, d: a.reshape(3, 2, 4).transpose(0, 1).reshape(6, 4),
    "interleaved, cut": lambda a, b, c, d: a.reshape(3, 2, 4).transpose(0, 1).reshape(6, 4)[2:5].contiguous(),
    "single rows": lambda a, b, c, d: torch.stack([*torch.unbind(a)[1:3], b[4], c[-1].squeeze(0)]),
    "rows in heads": lambda a, b, c, d: torch.cat([a, b]).view(2, 3, 2, 4).permute(1, 0, 2, 3).flatten(),
}  # fmt: skip


@pytest.mark.parametrize("case", OPERATIONS)
def test_boxes_are_where_the_elements_are(case):
    """Any part of a tensor that operations made is what they make of numbers."""
    leaves = {name: torch.randn(6, 4) for name in "abcd"}
    want = OPERATIONS[case](*leaves.values())
    traced = OPERATIONS[case](*(Traced.of_file(name, (6, 4)) for name in "abcd"))
    assert isinstance(traced, Traced) and traced.shape == want.shape
    for start, stop in flat_boxes(3, want.numel() - 2, want.shape):
        part = torch.full([b - a for a, b in zip(start, stop, strict=True)], torch.nan)
        for box in traced.within(start, stop):
            part[box.places(start)] = leaves[box.source].flatten().as_strided(box.size, box.stride, box.offset)
        assert torch.equal(part, want[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))])


def test_no_more_is_read_than_asked_for(published, monkeypatch):
    """Of a per-expert checkpoint a rank touches its own experts' tensors alone."""
    model, touched = small_model("mixtral"), set()
    found = SafetensorsFiles(published("mixtral"))
    found.take_names(model)
    elements = SafetensorsFiles._elements
    monkeypatch.setattr(
        files_module.SafetensorsFiles,
        "_elements",
        lambda self, box: touched.add(box.source) or elements(self, box),
    )
    load_slices(model, found, RowsOfCopies(1, 4, lambda _: None), CPU)
    experts = {name.split(".experts.")[1].split(".")[0] for name in touched if ".experts." in name}
    assert experts == {"1"}


def test_a_file_tensor_that_does_not_fit_is_named(published, tmp_path):
    path = save_model(load(published("qwen3_moe")), tmp_path / "model")
    whole = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    for wrong, told in (
        (
            whole[name][:-1],
            "'model.layers.1.mlp.experts.2.up_proj.weight', .*does not fit beside the file's .*experts.0.up_proj",
        ),
        (None, "experts.0.up_proj.weight' and 2 more, .* does not fit beside the file's 'model.layers.1"),
    ):
        tensors = {key: value for key, value in whole.items() if key != name}
        if wrong is not None:
            tensors[name] = wrong.contiguous()
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=told):
            make_blueprint(config_of(path), path)
    narrow = {key: value[:, :-1].contiguous() if "up_proj" in key else value for key, value in whole.items()}
    save_file(narrow, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="does not fit beside the file's"):
        make_blueprint(config_of(path), path)


def config_of(path, dtype: str = "float32", targets=("o_proj",), **quant) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(path), dtype=dtype, attention="eager"),
        dora=DoraConfig(rank=2, targets=list(targets)),
        quant=QuantConfig(**quant),
        data=DataConfig(train="unused"),
    )


def built(path, **settings):
    return build(make_blueprint(config_of(path, **settings), path), Single(Processes())).model


FP8 = {
    "blocks": ("qwen3_moe", (8, 4), False), "blocks beside attention of low rank": ("deepseek_v3", (8, 4), False),
    "rows": ("qwen3_moe", None, True), "one scale": ("qwen3_moe", None, False),
}  # fmt: skip


@pytest.mark.parametrize("case", FP8)
def test_fp8_is_widened(published, tmp_path, case):
    """To what its codes and scales say, as transformers does, and what 4 bits are made from."""
    from transformers import FineGrainedFP8Config

    name, block, by_row = FP8[case]
    path = save_model(load(published(name)), tmp_path / "model")
    meant = in_fp8(path, block, by_row)
    model = built(path)
    if block is not None:
        options = FineGrainedFP8Config(weight_block_size=block, dequantize=True)
        assert_same_values(model, load(path, dtype=torch.float32, quantization_config=options))
    layer = "model.layers.1.mlp.experts.{}_proj.weight"
    fused = model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")
    for expert in range(fused.shape[0]):
        want = torch.cat([meant[layer.format(f"{expert}.{side}")] for side in ("gate", "up")])
        assert torch.equal(fused[expert], want.float())
    if block is None:
        return
    fused = tmp_path / "fused"
    load(published(name)).save_pretrained(fused, save_original_format=False)
    meant_fused = in_fp8(fused, block)["model.layers.1.mlp.experts.down_proj"].float()
    assert torch.equal(built(fused).get_parameter("model.layers.1.mlp.experts.down_proj"), meant_fused)
    dense = save_model(load(published(name)), tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    save_file(
        {**tensors, **{n: t.float() for n, t in meant.items()}}, dense / "model.safetensors", {"format": "pt"}
    )
    assert_same(built(path, scheme="nf4"), built(dense, scheme="nf4"))


def assert_same_values(model, wanted) -> None:
    """Of the tensors that both have: ours has an adapter, too."""
    got = model.state_dict()
    different = [name for name, tensor in wanted.state_dict().items() if not torch.equal(got[name], tensor)]
    assert not different


@pytest.mark.parametrize("kind", ["whole", "rows", "flat"])
def test_mxfp4_is_widened(tmp_path, monkeypatch, kind):
    from transformers import AutoModelForCausalLM, Mxfp4Config

    config = small_config("gpt_oss")
    config.intermediate_size = 64
    path = save_model(AutoModelForCausalLM.from_config(config), tmp_path / "model")
    in_mxfp4(path)
    wanted = load(path, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True))
    monkeypatch.setattr(weights, "_READ_ELEMENTS", 500)
    assert_same_values(built(path), wanted)
    model, found = AutoModelForCausalLM.from_config(config), SafetensorsFiles(path)
    found.take_scaled({"quant_method": "mxfp4"})
    for shards in all_ranks(kind):
        load_slices(model, found, shards, CPU)
    assert_same(model, wanted)


WRONG = {
    "no scales": (lambda t, name: t.pop(f"{name}_scale_inv"), "is in FP8, but the files hold no '.*_scale_inv'"),
    "scales of another shape": (
        lambda t, name: t.update({f"{name}_scale_inv": torch.ones(3, 5)}),
        r"o_proj.weight_scale_inv' is \[3, 5\], which are no scales of '.*o_proj.weight', \[32, 32\]; valid",
    ),
    "transposed scales": (
        lambda t, name: t.update({f"{name}_scale_inv": torch.ones(8, 4)}),
        r"o_proj.weight_scale_inv' is \[8, 4\], which are no scales of '.*o_proj.weight', \[32, 32\]; valid",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_codes_without_their_scales_are_refused(published, tmp_path, case):
    path = save_model(load(published("qwen3_moe")), tmp_path / "model")
    in_fp8(path, (8, 4))
    spoil, told = WRONG[case]
    tensors = load_file(path / "model.safetensors")
    spoil(tensors, "model.layers.0.self_attn.o_proj.weight")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=told):
        make_blueprint(config_of(path), path)
