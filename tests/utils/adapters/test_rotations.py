"""OFT, BOFT and IA3, on Linears and convolutions: against weights made by hand, and PEFT's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from models.foundation.checkpoints.adapter_files import read_factors, read_updates
from tests.pretended_device import DEVICE, PretendedDevice
from tests.utils.adapters.toy_unet import begun, exported, factors_of, frozen, inputs, moved, names_of, net
from utils import adapters
from utils.adapters import attach, presets
from utils.adapters.oft import OftSettings, shape_of_blocks, turns_of
from utils.errors import UserError
from utils.settings.schema import AdapterSettings

Tensors = dict[str, torch.Tensor]
FORMS: dict[str, dict[str, Any]] = {
    "oft": {"type": "oft", "block_size": 4},
    "boft": {"type": "oft", "block_size": 6, "butterfly": True},
    "ia3": {"type": "ia3"},
}
each = pytest.mark.parametrize("keys", FORMS.values(), ids=FORMS)


def chosen(keys: dict[str, Any], **further: Any) -> AdapterSettings:
    return adapters.find(keys["type"]).settings(convolutions=True, **keys, **further)


def turned(blocks: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As ComfyUI applies a file's blocks: one index after the other."""
    skew = blocks - blocks.transpose(-1, -2)
    one = torch.eye(blocks.shape[-1])
    turns = (one + skew) @ torch.linalg.inv(one - skew)
    rows = weight.flatten(1)
    if blocks.ndim == 3:
        size = blocks.shape[-1]
        made = [turns[number].T @ rows[number * size : (number + 1) * size] for number in range(len(blocks))]
        return torch.cat(made).view(weight.shape)
    half = blocks.shape[-1] // 2
    for stage in range(len(blocks)):
        far = 2**stage * half
        # The order of rows in which a stage has its blocks.
        order = torch.arange(len(rows)).view(-1, 2, far).transpose(1, 2).flatten()
        mixed = torch.einsum("bij,bjx->bix", turns[stage], rows[order].unflatten(0, (-1, 2 * half))).flatten(0, 1)
        rows = torch.empty_like(rows).index_copy(0, order, mixed)
    return rows.view(weight.shape)


@each
def test_the_weight_is_what_a_file_says(keys: dict[str, Any], tmp_path: Path) -> None:
    """With gradients; it is a preset, and gone on from."""
    settings = chosen(keys)
    model, x = moved(settings), inputs().requires_grad_()
    result = model(x)
    file = exported(model, settings, tmp_path)
    fused = net()
    presets.fuse(fused, [fused], read_updates(file, names_of(fused)), 1.0)
    torch.testing.assert_close(fused(inputs()), result, rtol=1e-4, atol=1e-5)
    again = begun(settings)
    read = read_factors(file, adapters.find(settings.type), names_of(again), attach.scales(again))
    attach.load(again, [again], read, "a test")
    torch.testing.assert_close(again(inputs()), result, rtol=1e-5, atol=1e-6)
    assert (result - net()(inputs())).abs().mean() > 1e-2
    if keys["type"] == "ia3":
        return

    leaves = {key: tensor.requires_grad_() for key, tensor in load_file(file).items() if "oft" in key}
    assert all(f"{key.rpartition('.')[0]}.alpha" in load_file(file) for key in leaves), (
        "ComfyUI needs it of a butterfly"
    )
    changed, base = {}, dict(net().named_parameters())
    for key, blocks in leaves.items():
        name = f"blocks.0.{key.removeprefix('lycoris_blocks_0_').removesuffix('.oft_blocks')}.weight"
        changed[name] = turned(blocks, base[name])
    other = inputs().requires_grad_()
    expected = functional_call(net(), changed, (other,))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    result.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)
    theirs = {key.replace("lycoris_blocks_0_", "blocks.0."): leaf.grad for key, leaf in leaves.items()}
    for name, factor in factors_of(model).items():
        torch.testing.assert_close(factor.grad, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


def test_peft_computes_the_same_of_ia3(tmp_path: Path) -> None:
    settings = chosen(FORMS["ia3"])
    model = moved(settings)
    exported(model, settings, tmp_path)
    theirs = PeftModel.from_pretrained(net(), tmp_path).eval()
    torch.testing.assert_close(theirs(inputs()), model(inputs()), rtol=1e-4, atol=1e-5)


@each
@pytest.mark.parametrize("form", [None, "int8"])
def test_at_first_and_switched_off_there_is_no_effect(keys: dict[str, Any], form: str | None) -> None:
    x, settings = inputs(), chosen(keys)
    plain = frozen(net(form))(x)
    assert torch.equal(begun(settings, net(form))(x), plain)
    changed = moved(settings, net(form))
    with attach.switched_off(changed):
        assert torch.equal(changed(x), plain)
    assert (changed(x) - plain).abs().mean() > 1e-3


@each
def test_a_strength_multiplies_what_the_adapter_changes(keys: dict[str, Any]) -> None:
    """Of one module, to which the effect of others is not added."""
    x, changed = inputs(), moved(chosen(keys))
    ((kind, module), *_) = attach.adapted(changed).values()
    is_convolution = isinstance(module.base_layer, torch.nn.Conv2d)
    x = x if is_convolution else torch.randn(3, module.base_layer.in_features)
    plain, whole = module.base_layer(x), module(x)
    with attach.at_strength(changed, 0.5):
        torch.testing.assert_close(module(x) - plain, 0.5 * (whole - plain))
    with attach.at_strength(changed, 0.0):
        assert torch.equal(module(x), plain)
    assert torch.equal(module(x), whole) and not torch.equal(whole, plain)


@each
def test_parts_are_left_out_in_training_alone(keys: dict[str, Any]) -> None:
    for key in ("dropout", "module_dropout"):
        model, x = moved(chosen(keys, **{key: 0.5})), inputs()
        torch.manual_seed(0)
        assert len({tuple(model(x).flatten().tolist()) for _ in range(40)}) > 4
        torch.testing.assert_close(model.eval()(x), moved(chosen(keys))(x))


@pytest.mark.parametrize(
    ("outputs", "size", "butterfly", "shape"),
    [
        (3072, 32, False, (96, 32, 32)),
        (1280, 12, False, (128, 10, 10)),
        (7, 4, False, (7, 1, 1)),
        (3072, 12, True, (9, 256, 12, 12)),
        (1280, 10, True, (8, 128, 10, 10)),
        (8, 8, True, (1, 1, 8, 8)),
        (3072, 4, True, None),
    ],
)
def test_shapes_of_blocks(outputs: int, size: int, butterfly: bool, shape: tuple[int, ...] | None) -> None:
    assert shape_of_blocks(outputs, OftSettings(type="oft", block_size=size, butterfly=butterfly)) == shape


def test_what_is_no_butterfly_is_told() -> None:
    with pytest.raises(
        UserError, match="'blocks.0.to_q' has 6 outputs, .* even number up to 4 .* set block_size = 6, or"
    ):
        begun(chosen({"type": "oft", "block_size": 4, "butterfly": True}))


@pytest.mark.parametrize("limit", [0.1, 100.0, 0.0])
def test_the_bound_of_a_file_is_kept(limit: float, tmp_path: Path) -> None:
    blocks = torch.randn(2, 4, 4)
    save_file({"a.oft_blocks": blocks, "a.alpha": torch.tensor(limit)}, tmp_path / "x.safetensors")
    tensors = {
        key.replace("a.", "lycoris_blocks_0_conv."): t for key, t in load_file(tmp_path / "x.safetensors").items()
    }
    save_file(tensors, tmp_path / "y.safetensors")
    ((_, update),) = read_updates(tmp_path / "y.safetensors", names_of(net())).items()
    size = (blocks - blocks.transpose(1, 2)).norm()
    expected = blocks * limit / size if 0 < limit < size else blocks
    weight = net().blocks[0]["conv"].weight.detach()
    torch.testing.assert_close(weight + update.delta(weight), turned(expected, weight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 4, 3), (8,), (4, 2, 4, 4)])
def test_blocks_that_do_not_fit_are_told(shape: tuple[int, ...], tmp_path: Path) -> None:
    save_file({"lycoris_blocks_0_conv.oft_blocks": torch.ones(shape)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="the blocks of the OFT of 'lycoris_blocks_0_conv'"):
        read_updates(tmp_path / "x.safetensors", names_of(net()))


def test_no_rotation_lets_the_host_wait() -> None:
    device = PretendedDevice()
    with device:
        blocks = torch.ones(3, 4, 4).triu().to(DEVICE, non_blocking=True).requires_grad_()
        turns_of(blocks).square().sum().backward()
    assert device.has(blocks.grad) and not device.waits
