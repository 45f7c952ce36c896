"""OmniGen2's denoiser against numbers that the publisher's own class gave, in float32, for weights and inputs that a
formula makes.

Shapes: B batch, C channels, F text features, h w latent cells.
"""

from __future__ import annotations

import math

import pytest
import torch

from models.foundation.denoisers.omnigen2 import TIME_WIDTH, OmniGen2Transformer2DModel
from models.foundation.denoisers.omnigen2_rows import positions, rotary_table

TINY = {
    "in_channels": 4,
    "hidden_size": 48,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "multiple_of": 40,
    "axes_dim_rope": (4, 2, 6),
    "axes_lens": (64, 32, 32),
    "text_feat_dim": 20,
}
PUBLISHED_PARAMETERS, PUBLISHED_TENSORS = 3_967_161_400, 582
FIRST, SECOND, OTHER = ("ref00", (4, 4, 4)), ("ref01", (4, 6, 2)), ("ref10", (4, 2, 4))
REFERENCES = {"none": [[], []], "both": [[FIRST, SECOND], [OTHER]], "one": [[FIRST, SECOND], []]}
EXPECTED = {
    "none": {
        "mean": 0.2825480,
        "size": 0.7696285,
        "spread": 0.9310927,
        "begin": [-0.380152, 1.037342, -0.045791, 0.656113],
        "end": [-0.139188, 2.356949, 0.428698, 1.515198],
        "loss": 1.4496288,
    },
    "both": {
        "mean": 0.3197401,
        "size": 0.7721900,
        "spread": 0.9266440,
        "begin": [-0.100804, 1.051729, -0.186501, 0.469229],
        "end": [-0.216449, 2.390319, 0.635673, 1.566118],
        "loss": 1.4485140,
    },
    "one": {
        "mean": 0.3255599,
        "size": 0.7692354,
        "spread": 0.9117398,
        "begin": [-0.100804, 1.051729, -0.186501, 0.469229],
        "end": [-0.139188, 2.356949, 0.428698, 1.515198],
        "loss": 1.4238890,
    },
}
"""Of the prediction for references of these kinds: its mean, that of its absolute values, its standard deviation, the
first values of the first sample, the last ones of the second, and the loss."""
GRADIENTS = {
    "norm": (6.4316265, 6.0355613, 6.3224685),
    "x": (3.7091780, 3.1817980, 3.3227458),
    "text": (0.7476093, 0.5593558, 0.5779644),
    "image_index_embedding": (0, 1.2175677, 0.8739410),
    "x_embedder.weight": (28.6384983, 25.4753532, 26.4553280),
    "ref_image_patch_embedder.weight": (0, 6.6631169, 4.8361754),
    "time_caption_embed.timestep_embedder.linear_1.weight": (222.2625, 201.5090, 226.6316),
    "time_caption_embed.caption_embedder.0.weight": (0.2138110, 0.1274202, 0.1553486),
    "noise_refiner.0.attn.to_k.weight": (13.2861261, 12.2514553, 12.5890741),
    "ref_image_refiner.0.attn.to_v.weight": (0, 5.9351797, 4.4906740),
    "context_refiner.0.norm1.weight": (0.2558675, 0.1741263, 0.2049937),
    "layers.0.norm1.linear.weight": (61.9695435, 56.8537025, 58.1512756),
    "layers.1.attn.norm_q.weight": (0.1029793, 0.0955591, 0.0886453),
    "layers.1.feed_forward.linear_2.weight": (28.8599339, 27.3345547, 27.3201733),
    "norm_out.linear_1.weight": (25.6964436, 25.3962383, 25.1186600),
    "norm_out.linear_2.bias": (0.9329156, 0.9662457, 0.9465981),
}
"""Sums of the absolute values of gradients, with references of each kind; and the norm of those of all parameters."""


def field(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """sin(0.37 i + 0.011 i^2 + P), i from 0, where P is the sum of k times the k-th letter's code, modulo 1000."""
    phase = sum(place * ord(letter) for place, letter in enumerate(name, start=1)) % 1000
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.37 * i + 0.011 * i**2 + phase).view(shape).float()


def denoiser() -> OmniGen2Transformer2DModel:
    made = OmniGen2Transformer2DModel(**TINY)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            wave = field(name, tuple(parameter.shape))
            if wave.dim() == 2:
                parameter.copy_(0.2 * wave)
            else:
                parameter.copy_(1 + 0.1 * wave if name.endswith("weight") else 0.1 * wave)
    return made


@pytest.mark.parametrize("kind", REFERENCES)
def test_prediction_and_gradients_are_the_publishers(kind: str) -> None:
    model, x_BChw = denoiser(), field("x", (2, 4, 6, 8)).requires_grad_()
    text_BLF, target = field("text", (2, 5, 20)).requires_grad_(), field("target", (2, 4, 6, 8))
    # The last two tokens of the second text hold numbers, which would show if they were seen.
    mask_BL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    references = [[field(*one) for one in own] for own in REFERENCES[kind]]
    output = model(x_BChw, torch.tensor([0.3, 0.85]), text_BLF, mask_BL, references)
    loss = (output - target).square().mean()
    loss.backward()
    made = {
        "mean": output.mean(),
        "size": output.abs().mean(),
        "spread": output.std(),
        "begin": output[0].flatten()[:4],
        "end": output[1].flatten()[-4:],
        "loss": loss,
    }
    for name, value in EXPECTED[kind].items():
        torch.testing.assert_close(made[name].detach(), torch.tensor(value), rtol=0, atol=1e-5)

    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    sums = {name: gradient.abs().sum() for name, gradient in gradients.items()}
    sums |= {"x": x_BChw.grad.abs().sum(), "text": text_BLF.grad.abs().sum()}
    sums["norm"] = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for name, values in GRADIENTS.items():
        expected = values[list(REFERENCES).index(kind)]
        assert float(sums.get(name, 0.0)) == pytest.approx(expected, rel=1e-4, abs=1e-9), name


def test_the_published_model_has_its_tensors() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in OmniGen2Transformer2DModel().named_parameters()}
    assert len(shapes) == PUBLISHED_TENSORS and sum(map(math.prod, shapes.values())) == PUBLISHED_PARAMETERS
    assert shapes["layers.31.feed_forward.linear_1.weight"] == (10240, 2520)
    assert shapes["norm_out.linear_1.weight"] == (2520, TIME_WIDTH)


def test_places_go_on_behind_the_longer_side_of_a_reference() -> None:
    places = positions(7, [5, 7], [[(2, 2), (3, 1)], []], (3, 4))
    assert places.picture_BT3[0, -1].tolist() == [10, 2, 3] and places.picture_BT3[1, 0].tolist() == [7, 0, 0]
    assert places.reference_BRT3[0, :, 0].tolist() == [[5, 0, 0], [7, 0, 0]]
    angles = torch.tensor([10, 0.1, 2, 3, 3 * 10000 ** (-1 / 3), 3 * 10000 ** (-2 / 3)])
    expected = torch.polar(torch.ones(6), angles)
    torch.testing.assert_close(rotary_table(places.picture_BT3[0, -1], (4, 2, 6)), expected, rtol=0, atol=1e-6)


def test_a_new_model_begins_with_zeros() -> None:
    made = OmniGen2Transformer2DModel(**TINY)
    x_BChw, text_BLF = field("x", (1, 4, 4, 4)), field("text", (1, 3, 20))
    output = made(x_BChw, torch.tensor([0.5]), text_BLF, torch.ones(1, 3).bool(), [[x_BChw[0]]])
    assert output.shape == x_BChw.shape and not output.any()
    assert made.layers[0].attn.to_q.weight.std() > 0.1 and not made.layers[0].norm1.linear.weight.any()
    assert made.image_index_embedding.std().item() == pytest.approx(0.02, rel=0.3)
