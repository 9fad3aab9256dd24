"""The models of the gallery: each proved by one line, each trained."""

from __future__ import annotations

import auxiliary
import diffusion
import experts
import feedback_alignment
import gan
import multitask
import residual_cnn
import seq2seq
import siamese
import straight_through
import tied
import torch
import transfer
import unet
import vae
from torch import nn

from handgrad import BCEWithLogits, CrossEntropy, Losses, MSE, Sequential
from handgrad.testing import check_layer, check_loss, compare, gradient_table

IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_residual_cnn() -> None:
    check_layer(lambda: residual_cnn.build(2), x="N 1 8 8")


def test_siamese() -> None:
    check_layer(lambda: siamese.build(4, 3), x=["N 1 8 8", "N 1 8 8"])


def test_vae() -> None:
    check_layer(lambda: vae.build(4, 3, 2), x="N 1 2 2")


def test_vae_sample() -> None:
    check_layer(vae.Sample, x=["*N", "*N"])


def test_vae_elbo() -> None:
    check_loss(vae.ELBO, x=("N D", "N Z", "N Z"), target="N D in 0 1")


def test_vae_table() -> None:
    assert gradient_table(vae.build(), vae.ELBO(), IMAGES, IMAGES.flatten(1)).ok


def test_seq2seq() -> None:
    check_layer(lambda V: seq2seq.build(V, 4), x=["N S < V", "N T < V"])


def test_experts() -> None:
    check_layer(lambda D: experts.build(D, 2, 3), x="N D")


def test_experts_mix() -> None:
    check_layer(experts.Mix, x=["N E", "N 6"], sizes={"E": (1, 3)})


def test_multitask() -> None:
    check_layer(lambda: multitask.build(4, 3), x=["N 1 8 8", "N < 10"])


def test_multitask_table() -> None:
    inputs, answers = multitask.questions(IMAGES, torch.tensor([1, 4, 7, 2, 5]))
    assert gradient_table(multitask.build(), Losses(CrossEntropy(), BCEWithLogits()), inputs, answers).ok


def test_unet() -> None:
    check_layer(lambda: unet.build(2), x="N 1 4 8")


def test_unet_double() -> None:
    check_layer(unet.Double, x="N C H W", reference=lambda x: nn.functional.interpolate(x, scale_factor=2))


def test_gan() -> None:
    generator, critic = gan.build(2, 4)
    assert gradient_table(Sequential(generator, critic.freeze()), BCEWithLogits(), torch.randn(5, 2), torch.ones(5, 1)).ok


def test_gan_check() -> None:
    def make():
        generator, critic = gan.build(2, 4)
        return Sequential(generator, critic.freeze())

    check_layer(make, x="N 2")


def test_auxiliary() -> None:
    check_layer(lambda: auxiliary.build(3, 1), x="N 1 8 8")


def test_tied() -> None:
    model = tied.build(27, 3, 4, 5)
    tied.adaptable(model)
    x, y = tied.windows(["ann", "bo"])
    assert gradient_table(model, CrossEntropy(), x, y).ok


def test_tied_check() -> None:
    check_layer(lambda V: tied.build(V, 3, 4, 5), x="N 3 < V")


def test_transfer() -> None:
    check_layer(lambda: transfer.build(transfer.make_base(2), 8), x="N 1 8 8")


def test_diffusion() -> None:
    check_layer(lambda: diffusion.build(6, 4), x=["N 2", "N < 6"])


def test_straight_through() -> None:
    def straight(x):
        line = x.clamp(-1, 1)
        return line + (torch.where(x >= 0, 1.0, -1.0) - line).detach()

    check_layer(straight_through.Sign, x="*N", reference=straight, kinks={0.0: 1.0, 1.0: 1.0, -1.0: 1.0}, skip={"differences": "sic"})


def test_feedback() -> None:
    def aligned(layer, x):
        back = nn.functional.linear(x, layer.feedback)
        return nn.functional.linear(x.detach(), layer.weight, layer.bias) + back - back.detach()

    check_layer(lambda D, F: feedback_alignment.FeedbackLinear(D, F), x="*N D", reference=aligned, skip={"differences": "sic"})
