"""The models of the gallery: each is proved by one line, and each trains."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import auxiliary
import diffusion
import experts
import feedback_alignment
import gan
import initialisation
import multitask
import pytest
import residual_cnn
import seq2seq
import siamese
import straight_through
import torch
import transfer
import unet
import vae
from torch import Tensor
from torch.nn import functional

import digits
import tied
from handgrad import MSE, BCEWithLogits, CrossEntropy, Layer, Loss, Losses, Sequential, TrainStep
from handgrad.testing import check_layer, check_loss, gradient_table
from tests.models.running import script

DRAWN = torch.Generator().manual_seed(1)
IMAGES = torch.rand(5, 1, 8, 8, generator=DRAWN, dtype=torch.float64)
POINTS = torch.randn(5, 2, generator=DRAWN, dtype=torch.float64)
YES = torch.ones(5, 1, dtype=torch.float64)
DIGITS = torch.tensor([1, 4, 7, 2, 5])
LETTERS = torch.randint(27, (3, 6), generator=DRAWN)
BOTH = Losses(CrossEntropy(), CrossEntropy(), weights=(1, 0.3))


def adversaries() -> Layer:
    """A generator in front of a frozen critic."""
    generator, critic = gan.build(2, 16)
    return Sequential(generator, critic.freeze())


def adapted() -> Layer:
    """The tied model, its table frozen."""
    model = tied.build(D=4, H=5)
    tied.adaptable(model)
    return model


MODELS: dict[str, tuple[Callable[[], Layer], Loss, Any, Any]] = {
    "residual_cnn": (lambda: residual_cnn.build(4), CrossEntropy(), IMAGES, DIGITS),
    "siamese": (lambda: siamese.build(8, 8), BCEWithLogits(), (IMAGES, IMAGES.flip(0)), YES),
    "vae": (lambda: vae.build(H=8), vae.ELBO(), IMAGES.round(), IMAGES.round().flatten(1)),
    "seq2seq": (lambda: seq2seq.build(D=8), CrossEntropy(), (LETTERS, LETTERS[:, 1:]), LETTERS[:, :-1].flatten()),
    "experts": (experts.build, MSE(), POINTS, POINTS.flip(0)),
    "multitask": (multitask.build, Losses(CrossEntropy(), BCEWithLogits()), (IMAGES, DIGITS), (DIGITS, YES)),
    "unet": (lambda: unet.build(2), MSE(), IMAGES, IMAGES),
    "gan": (adversaries, BCEWithLogits(), POINTS, YES),
    "auxiliary": (lambda: auxiliary.build(8, 1), BOTH, IMAGES, (DIGITS, DIGITS)),
    "initialisation": (lambda: initialisation.build(5 / 3, True, H=4), CrossEntropy(), LETTERS[:, :3], LETTERS[:, 3]),
    "tied": (adapted, CrossEntropy(), LETTERS[:, :3], LETTERS[:, 3]),
    "transfer": (lambda: transfer.build(transfer.make_base(4, 16), 16), CrossEntropy(), IMAGES, DIGITS % 2),
    "diffusion": (lambda: diffusion.build(10, 8), MSE(), (POINTS, DIGITS), POINTS.flip(0)),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_of_a_model(name: str) -> None:
    build, loss, x, target = MODELS[name]
    assert gradient_table(build().to(torch.float64), loss, x, target).ok


@pytest.mark.parametrize("name", MODELS)
def test_a_small_one_learns_five_examples(name: str) -> None:
    torch.manual_seed(0)
    build, loss, x, target = MODELS[name]
    model = build().to(torch.float64)
    step = TrainStep(model, loss, torch.optim.AdamW(model.parameters(), lr=1e-2))
    losses = [float(step(x, target)) for _ in range(60)]
    assert losses[-1] < 0.9 * losses[0]


def test_layers_of_its_own() -> None:
    check_layer(vae.Sample, x=["*N", "*N"])
    check_layer(experts.Mix, x=["N E", "N 6"], sizes={"E": (1, 3)})


def test_loss_of_its_own() -> None:
    check_loss(vae.ELBO, x=("N D", "N Z", "N Z"), target="N D in 0 1")


# Two layers whose dx is by definition not the slope of their forward: the reference is a function that has it.


def sign_with_the_slope_of_clamp(x: Tensor) -> Tensor:
    """Autograd sees clamp(x, -1, 1) alone; the rest is a constant."""
    line = x.clamp(-1, 1)
    return line + (torch.where(x >= 0, 1.0, -1.0) - line).detach()


def linear_with_the_slope_of_feedback(layer: Any, x: Tensor) -> Tensor:
    """Autograd sees weight and bias in the first term, and x in the second, whose value is 0."""
    back = functional.linear(x, layer.feedback)
    return functional.linear(x.detach(), layer.weight, layer.bias) + back - back.detach()


def test_straight_through() -> None:
    check_layer(
        straight_through.Sign,
        x="*N",
        reference=sign_with_the_slope_of_clamp,
        kinks={-1.0: 1.0, 1.0: 1.0},
        skip={"differences": "dx is the slope of clamp(x, -1, 1)"},
    )


def test_feedback_alignment() -> None:
    check_layer(
        lambda D, F: feedback_alignment.FeedbackLinear(D, F),
        x="*N D",
        reference=linear_with_the_slope_of_feedback,
        skip={"differences": "dx goes through feedback, not through weight"},
    )


TRAININGS: dict[str, Callable[[int], Any]] = {
    "auxiliary": lambda steps: auxiliary.train(0.3, steps),
    "diffusion": lambda steps: diffusion.train(steps, size=20),
    "experts": lambda steps: experts.train(experts.perceptron(), steps),
    "feedback_alignment": lambda steps: feedback_alignment.train(feedback_alignment.FeedbackLinear, steps),
    "gan": gan.train,
    "initialisation": lambda steps: initialisation.train(*initialisation.BAD, steps)[1],
    "multitask": multitask.train,
    "residual_cnn": residual_cnn.train,
    "seq2seq": seq2seq.train,
    "siamese": siamese.train,
    "straight_through": straight_through.train,
    "tied": tied.train,
    "transfer": transfer.train,
    "unet": unet.train,
    "vae": vae.train,
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_of_a_few_steps_has_results(name: str) -> None:
    results = TRAININGS[name](3)
    results = results if isinstance(results, tuple) else (results,)
    assert all(math.isfinite(number) and number >= 0 for number in results)


def test_what_is_wrong_with_a_bad_start() -> None:
    torch.manual_seed(0)
    (bad, _), (good, _) = (
        initialisation.train(*start, steps=20) for start in (initialisation.BAD, initialisation.GOOD)
    )
    tanhs, parameters = (list(bad.to_dict()[of].values()) for of in ("layers", "parameters"))
    assert [row["saturated"] > 0.4 for row in tanhs if row["layer"] == "Tanh()"] == [True] * 5
    assert any("too small" in remark for row in parameters for remark in row["remarks"])
    assert not any(row["remarks"] for of in ("layers", "parameters") for row in good.to_dict()[of].values())


def test_the_digits() -> None:
    known, held_out = digits.load()
    assert known.x.shape == (1437, 1, 8, 8)
    assert held_out.x.shape == (360, 1, 8, 8)
    assert (float(known.x.min()), float(known.x.max())) == (0, 1)
    assert (known.y.bincount() + held_out.y.bincount()).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


# Between what the numbers lie that each script prints, in order; README.md has those of one run.
REACHED = {
    "auxiliary": [(60, 100), (0.3, 0.3), (10, 70)],
    "diffusion": [(0, 0.01), (0, 0.01), (0.03, 1)],
    "experts": [(0, 0.02), (0.02, 1)],
    "feedback_alignment": [(85, 100), (85, 100)],
    "gan": [(70, 100), (8, 8)],
    "multitask": [(87, 100), (93, 100)],
    "residual_cnn": [(97.9, 100)],
    "seq2seq": [(97, 100)],
    "siamese": [(87, 100)],
    "straight_through": [(90, 100)],
    "tied": [(2.4, 3.3), (2, 2.35)],
    "transfer": [(30, 30), (84, 100), (70, 86)],
    "unet": [(0.15, 0.17), (0.02, 0.035)],
    "vae": [(20, 25), (26, 28)],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REACHED)
def test_what_a_script_reaches(name: str) -> None:
    result = script(f"gallery/{name}.py")
    assert result.returncode == 0, result.stderr
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", result.stdout)]
    assert all(low <= number <= high for number, (low, high) in zip(numbers, REACHED[name])), result.stdout


@pytest.mark.slow
def test_the_picture_of_two_starts(tmp_path: Path) -> None:
    result = script("gallery/initialisation.py", tmp_path / "picture.png")
    assert result.returncode == 0, result.stderr
    bad, good = map(float, re.findall(r"(\d\.\d{3}) (?:nats|with)", result.stdout))
    assert 2.3 < good < 2.6 < 3.5 < bad
    assert result.stdout.count("500 updates; SGD") == 2
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
