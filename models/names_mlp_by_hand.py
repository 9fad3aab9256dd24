"""Backpropagation through the names MLP, one atomic step at a time, held against autograd.

The forward pass is written in steps so small that each has an obvious derivative. The backward pass then goes through
them in reverse, one gradient per step. Autograd differentiates the same forward pass, and a table shows both results
for every intermediate. At last, the many steps of the cross-entropy and of the batch norm are replaced by one formula
each, and by the layers of handgrad: all three must agree. (After the backpropagation lecture of makemore.)

Everything is float64. The exit code is 1 if any gradient differs from autograd's by more than rounding.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from handgrad import BatchNorm1d, CrossEntropy, Embedding, Flatten, Linear, Sequential, Tanh
from names.data import DATA, Vocabulary, minibatch, read_names, split_names, windows
from names.errors import InputError
from names.flags import whole

EPS = 1e-5
NOISE = 1e-9  # of the largest value in the gradient: far above float64 rounding, far below any mistake
ZERO = 1e-12  # added to that, for gradients that are zero up to rounding, as b1's is: batch norm subtracts any constant


def initial_parameters(vocabulary: int, block_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Every parameter drawn at random, biases too: at 0 or 1 a wrong gradient could hide."""
    embedding_dim, hidden_dim = 10, 64
    context = block_size * embedding_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    return {
        "table": normal(vocabulary, embedding_dim),
        "W1": normal(context, hidden_dim) * (5 / 3) / context**0.5,
        "b1": normal(hidden_dim) * 0.1,
        "gain": normal(hidden_dim) * 0.1 + 1,
        "shift": normal(hidden_dim) * 0.1,
        "W2": normal(hidden_dim, vocabulary) * 0.1,
        "b2": normal(vocabulary) * 0.1,
    }


def forward(p: dict[str, Tensor], context: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The loss of a batch in atomic steps; returns every intermediate under its name, in the order of computation."""
    v = dict(p)
    n = context.shape[0]
    rows = torch.arange(n)
    # embedding, joined over the context
    v["emb"] = p["table"][context]  # (N, T, D)
    v["joined"] = v["emb"].view(n, -1)  # (N, T*D)
    # first linear layer
    v["pre"] = v["joined"] @ p["W1"] + p["b1"]  # (N, H)
    # batch norm, with n - 1 in the variance
    v["mean"] = v["pre"].sum(0, keepdim=True) / n  # (1, H)
    v["diff"] = v["pre"] - v["mean"]  # (N, H)
    v["diff2"] = v["diff"] ** 2  # (N, H)
    v["var"] = v["diff2"].sum(0, keepdim=True) / (n - 1)  # (1, H)
    v["rstd"] = (v["var"] + EPS) ** -0.5  # (1, H)
    v["xhat"] = v["diff"] * v["rstd"]  # (N, H)
    v["normed"] = v["xhat"] * p["gain"] + p["shift"]  # (N, H)
    # nonlinearity, second linear layer
    v["hidden"] = torch.tanh(v["normed"])  # (N, H)
    v["logits"] = v["hidden"] @ p["W2"] + p["b2"]  # (N, V)
    # cross-entropy: softmax with the maximum taken out, then the mean of -log p of the targets
    v["logit_max"] = v["logits"].max(1, keepdim=True).values  # (N, 1)
    v["shifted"] = v["logits"] - v["logit_max"]  # (N, V)
    v["counts"] = v["shifted"].exp()  # (N, V)
    v["counts_sum"] = v["counts"].sum(1, keepdim=True)  # (N, 1)
    v["counts_sum_inv"] = v["counts_sum"] ** -1  # (N, 1)
    v["probs"] = v["counts"] * v["counts_sum_inv"]  # (N, V)
    v["logprobs"] = v["probs"].log()  # (N, V)
    v["loss"] = -v["logprobs"][rows, target].mean()  # ()
    return v


def backward(v: dict[str, Tensor], context: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The gradient of the loss by every value of the forward pass, last step first; above each, its forward line."""
    n = context.shape[0]
    rows = torch.arange(n)
    d: dict[str, Tensor] = {}
    # loss = -logprobs[rows, target].mean(): only the targets' entries count, each with -1/n
    d["logprobs"] = torch.zeros_like(v["logprobs"])
    d["logprobs"][rows, target] = -1 / n
    # logprobs = log(probs)
    d["probs"] = d["logprobs"] / v["probs"]
    # probs = counts * counts_sum_inv, the inverse broadcast over a row: its gradient sums over the row
    d["counts_sum_inv"] = (d["probs"] * v["counts"]).sum(1, keepdim=True)
    d["counts"] = d["probs"] * v["counts_sum_inv"]  # the first of two ways into the loss
    # counts_sum_inv = counts_sum^-1
    d["counts_sum"] = -(v["counts_sum"] ** -2) * d["counts_sum_inv"]
    # counts_sum = sum of counts over the row: each count gets the gradient of the sum, the second way
    d["counts"] = d["counts"] + d["counts_sum"]
    # counts = exp(shifted), its own derivative
    d["shifted"] = d["counts"] * v["counts"]
    # shifted = logits - logit_max, broadcast over the row
    d["logit_max"] = -d["shifted"].sum(1, keepdim=True)  # zero but for rounding: the maximum cancels out
    d["logits"] = d["shifted"].clone()
    # logit_max = the largest logit of the row
    d["logits"][rows, v["logits"].max(1).indices] += d["logit_max"].squeeze(1)
    # logits = hidden @ W2 + b2
    d["hidden"] = d["logits"] @ v["W2"].T
    d["W2"] = v["hidden"].T @ d["logits"]
    d["b2"] = d["logits"].sum(0)
    # hidden = tanh(normed), tanh' = 1 - tanh^2
    d["normed"] = d["hidden"] * (1 - v["hidden"] ** 2)
    # normed = xhat * gain + shift, both broadcast over the batch
    d["gain"] = (d["normed"] * v["xhat"]).sum(0)
    d["shift"] = d["normed"].sum(0)
    d["xhat"] = d["normed"] * v["gain"]
    # xhat = diff * rstd, rstd broadcast over the batch
    d["rstd"] = (d["xhat"] * v["diff"]).sum(0, keepdim=True)
    d["diff"] = d["xhat"] * v["rstd"]  # the first of two ways
    # rstd = (var + eps)^-0.5
    d["var"] = d["rstd"] * -0.5 * (v["var"] + EPS) ** -1.5
    # var = sum of diff2 over the batch / (n - 1)
    d["diff2"] = torch.ones_like(v["diff2"]) * d["var"] / (n - 1)
    # diff2 = diff^2, the second way
    d["diff"] = d["diff"] + d["diff2"] * 2 * v["diff"]
    # diff = pre - mean, the mean broadcast over the batch
    d["mean"] = -d["diff"].sum(0, keepdim=True)
    # mean = sum of pre over the batch / n: pre counts directly and through the mean
    d["pre"] = d["diff"] + d["mean"] / n
    # pre = joined @ W1 + b1
    d["joined"] = d["pre"] @ v["W1"].T
    d["W1"] = v["joined"].T @ d["pre"]
    d["b1"] = d["pre"].sum(0)
    # joined = emb, in another shape
    d["emb"] = d["joined"].view_as(v["emb"])
    # emb = table[context]: a row that was read several times gets the sum
    d["table"] = torch.zeros_like(v["table"])
    d["table"].index_add_(0, context.flatten(), d["emb"].flatten(0, 1))
    return d


def cross_entropy_at_once(v: dict[str, Tensor], target: Tensor) -> Tensor:
    """The gradient of the logits in one step.

    loss[n] = log sum_k exp(logits[n, k]) - logits[n, y], so d loss[n] / d logits[n, k] = p[n, k] - [k = y]: every
    logit is pulled down by its probability, the right one pushed up by 1, and a row sums to zero.
    """
    n = target.shape[0]
    dlogits = torch.softmax(v["logits"], 1)
    dlogits[torch.arange(n), target] -= 1
    return dlogits / n


def batch_norm_at_once(v: dict[str, Tensor], dnormed: Tensor) -> Tensor:
    """The gradient of the batch norm's input in one step.

    With g = dnormed * gain, the two ways through diff are g rstd and, by var = sum diff^2 / (n - 1),
    -xhat rstd / (n - 1) sum g xhat. The way through the mean takes the average over the batch off both; the second
    has average zero, since xhat has. Hence dpre = rstd (g - sum g / n - xhat sum(g xhat) / (n - 1)).
    """
    n = dnormed.shape[0]
    g = dnormed * v["gain"]
    return v["rstd"] * (g - g.sum(0) / n - v["xhat"] * (g * v["xhat"]).sum(0) / (n - 1))


def autograd(p: dict[str, Tensor], context: Tensor, target: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The forward pass once more with autograd watching: every value, and every gradient that autograd finds."""
    v = forward({name: tensor.clone().requires_grad_() for name, tensor in p.items()}, context, target)
    wanted = [name for name in v if name != "loss"]
    gradients = torch.autograd.grad(v["loss"], [v[name] for name in wanted])
    return {name: tensor.detach() for name, tensor in v.items()}, dict(zip(wanted, gradients))


def layers(p: dict[str, Tensor], context: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The same gradients from handgrad's layers; torch's Linear keeps its weight transposed."""
    vocabulary, embedding_dim = p["table"].shape
    model = Sequential(
        Embedding(vocabulary, embedding_dim),
        Flatten(),
        Linear(*p["W1"].shape),
        BatchNorm1d(p["gain"].shape[0], eps=EPS, unbiased=True),
        Tanh(),
        Linear(*p["W2"].shape),
    ).to(torch.float64)
    values = [p["table"], p["W1"].T, p["b1"], p["gain"], p["shift"], p["W2"].T, p["b2"]]
    for parameter, value in zip(model.parameters(), values):
        parameter.copy_(value)
    loss, d = CrossEntropy(), {}
    loss(model(context), target)
    d["logits"] = dout = loss.backward()
    for layer, name in reversed(list(zip(model, [None, "emb", "joined", "pre", "normed", "hidden"]))):
        dout = layer.backward(dout)
        if name is not None:
            d[name] = dout
    for parameter, name in zip(model.parameters(), ["table", "W1", "b1", "gain", "shift", "W2", "b2"]):
        d[name] = parameter.grad.T if name in ("W1", "W2") else parameter.grad
    return d


def show(title: str, gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> bool:
    """Print one row per gradient; whether all equal the reference's up to rounding."""
    print(f"\n{title}\n{'gradient of':<16} {'shape':<12} {'exact':<6} {'approximate':<12} max difference")
    right = True
    for name, gradient in gradients.items():
        expected = reference[name]
        difference = float((gradient - expected).abs().max()) if gradient.shape == expected.shape else float("inf")
        close = difference <= NOISE * float(expected.abs().max()) + ZERO
        right &= close
        shape = "x".join(map(str, gradient.shape))
        print(f"{name:<16} {shape:<12} {torch.equal(gradient, expected)!s:<6} {close!s:<12} {difference:.1e}")
    return right


def main() -> int:
    """Run the walk; the exit code: 0, 1 for a wrong gradient, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, metavar="PATH", help="text file, one name per line")
    parser.add_argument("--block-size", type=whole(1, 1024), default=3, metavar="N", help="context (default 3)")
    parser.add_argument("--batch-size", type=whole(2, 2**16), default=32, metavar="N", help="rows (default 32)")
    parser.add_argument("--seed", type=whole(0, 2**63 - 1), default=42, metavar="N", help="seed (default 42)")
    args = parser.parse_args()
    try:
        names = read_names(args.data)
    except InputError as error:
        print(f"names_mlp_by_hand: error: {error}", file=sys.stderr)
        return 2
    generator = torch.Generator().manual_seed(args.seed)
    vocabulary = Vocabulary.of(names)
    examples = windows(split_names(names, args.seed)["train"], vocabulary, args.block_size)
    context, target = minibatch(examples, args.batch_size, generator)
    p = initial_parameters(len(vocabulary), args.block_size, generator)

    v, reference = autograd(p, context, target)
    print(f"loss {float(v['loss']):.4f} on {args.batch_size} examples; a guess among equals: log {len(vocabulary)}")
    by_hand = backward(v, context, target)
    at_once = {"logits": cross_entropy_at_once(v, target), "pre": batch_norm_at_once(v, by_hand["normed"])}
    right = show("Step by step, against autograd", by_hand, reference)
    right &= show("Cross-entropy and batch norm in one formula each, against the atomic steps", at_once, by_hand)
    right &= show("The layers of handgrad, against the atomic steps", layers(p, context, target), by_hand)
    right &= len(by_hand) == len(reference)
    print("\nEvery gradient agrees." if right else "\nA gradient is wrong: see the rows marked False.")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
