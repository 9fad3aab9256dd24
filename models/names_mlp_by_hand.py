# %% [markdown]
# # Backpropagation by hand

# %% [markdown]
"""
Backpropagation through the names MLP, one atomic step at a time, held against autograd.

The forward pass is written in steps so small that each has an obvious derivative. The backward pass then goes through
them in reverse, one gradient per step, and after each, `cmp` shows it beside autograd's. At last, the many steps of the
cross-entropy and of the batch norm are replaced by one formula each, and by the layers of handgrad: all must agree.
(After the backpropagation lecture of makemore.)

Everything is float64. It fails if any gradient differs from autograd's by more than rounding.
"""

# %% tags=["active-py"]
# Only in the script: what the terminal may do.
from names.terminal import prepare

prepare()

# %%
import sys

import torch
from torch import Tensor

from handgrad import BatchNorm1d, CrossEntropy, Embedding, Flatten, Linear, Sequential, Tanh
from names.data import DATA, Vocabulary, minibatch, read_names, split_names, windows

torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## One minibatch
#
# A few characters of context, and the character that comes next.

# %%
data, block_size, batch_size, seed = DATA, 3, 32, 42

# %% tags=["active-py"]
# Only in the script: a flag for each of the four, and one line where the file cannot be read.
from pathlib import Path

from names.errors import InputError
from names.flags import new_parser, whole

parser = new_parser("names_mlp_by_hand", __doc__ or "")
parser.add_argument("--data", type=Path, default=data, metavar="PATH", help="text file, one name per line")
parser.add_argument("--block-size", type=whole(1, 1024), default=block_size, metavar="N", help="context (default 3)")
parser.add_argument("--batch-size", type=whole(2, 2**16), default=batch_size, metavar="N", help="rows (default 32)")
parser.add_argument("--seed", type=whole(0, 2**63 - 1), default=seed, metavar="N", help="seed (default 42)")
args = parser.parse_args()
data, block_size, batch_size, seed = args.data, args.block_size, args.batch_size, args.seed
try:
    read_names(data)
except InputError as error:
    parser.exit(2, f"names_mlp_by_hand: error: {error}\n")

# %%
names, generator = read_names(data), torch.Generator().manual_seed(seed)
vocabulary = Vocabulary.of(names)
examples = windows(split_names(names, seed)["train"], vocabulary, block_size)
context, target = minibatch(examples, batch_size, generator)  # (N, T), (N,)
N, rows = batch_size, torch.arange(batch_size)
for row in range(3):
    print(repr(vocabulary.decode(context[row].tolist())), "->", repr(vocabulary.decode([int(target[row])])))

# %% [markdown]
# ## The parameters
#
# Every parameter is drawn at random, biases too: at 0 or 1 a wrong gradient could hide.

# %%
D, H, V = 10, 64, len(vocabulary)


def normal(*shape: int) -> Tensor:
    """Normal numbers from the generator."""
    return torch.randn(shape, generator=generator)


table = normal(V, D)
W1 = normal(block_size * D, H) * (5 / 3) / (block_size * D) ** 0.5
b1 = normal(H) * 0.1
gain = normal(H) * 0.1 + 1
shift = normal(H) * 0.1
W2 = normal(H, V) * 0.1
b2 = normal(V) * 0.1
parameters = {"table": table, "W1": W1, "b1": b1, "gain": gain, "shift": shift, "W2": W2, "b2": b2}
for parameter in parameters.values():
    parameter.requires_grad = True  # for the comparison only

# %% [markdown]
# ## The forward pass
#
# Embedding and first linear layer:

# %%
emb = table[context]  # (N, T, D)
joined = emb.view(N, -1)  # (N, T*D): joined over the context
pre = joined @ W1 + b1  # (N, H)

# %% [markdown]
# Batch norm, with n - 1 in the variance, and tanh:

# %%
eps = 1e-5
mean = pre.sum(0, keepdim=True) / N  # (1, H)
diff = pre - mean  # (N, H)
diff2 = diff**2  # (N, H)
var = diff2.sum(0, keepdim=True) / (N - 1)  # (1, H)
rstd = (var + eps) ** -0.5  # (1, H)
xhat = diff * rstd  # (N, H)
normed = xhat * gain + shift  # (N, H)
hidden = torch.tanh(normed)  # (N, H)

# %% [markdown]
# Second linear layer, and cross-entropy: softmax with the maximum taken out, then the mean of -log p of the targets.

# %%
logits = hidden @ W2 + b2  # (N, V)
logit_max = logits.max(1, keepdim=True).values  # (N, 1)
shifted = logits - logit_max  # (N, V)
counts = shifted.exp()  # (N, V)
counts_sum = counts.sum(1, keepdim=True)  # (N, 1)
counts_sum_inv = counts_sum**-1  # (N, 1)
probs = counts * counts_sum_inv  # (N, V)
logprobs = probs.log()  # (N, V)
loss = -logprobs[rows, target].mean()  # ()
print(f"loss {loss.item():.4f} on {N} examples; a guess among equals: log {V} = {torch.tensor(V).log():.4f}")

# %% [markdown]
# ## What autograd finds
#
# Autograd leaves its gradient of every value in `.grad`. After that it is switched off, and the rest is plain numbers.

# %%
values = [emb, joined, pre, mean, diff, diff2, var, rstd, xhat, normed, hidden]
values += [logits, logit_max, shifted, counts, counts_sum, counts_sum_inv, probs, logprobs]
for value in values:
    value.retain_grad()
loss.backward()
_ = torch.set_grad_enabled(False)

# %% [markdown]
# `cmp` prints one row: whether a gradient equals autograd's exactly, whether it does up to rounding, and the largest
# difference.

# %%
NOISE = 1e-9  # of the largest value in the gradient: far above float64 rounding, far below any mistake
ZERO = 1e-12  # added to that, for gradients that are zero up to rounding, as b1's is: batch norm subtracts any constant
wrong: list[str] = []


def cmp(name: str, gradient: Tensor, value: Tensor) -> None:
    """Print how the gradient of a value compares with autograd's."""
    expected = value.grad
    same_shape = gradient.shape == expected.shape
    difference = float((gradient - expected).abs().max()) if same_shape else float("inf")
    close = difference <= NOISE * float(expected.abs().max()) + ZERO
    if not close:
        wrong.append(name)
    shape, exact = "x".join(map(str, gradient.shape)), torch.equal(gradient, expected)
    print(f"{name:<24} {shape:<8} exact: {exact!s:<6} approximate: {close!s:<6} max difference: {difference:.1e}")


# %% [markdown]
# ## The backward pass, last step first
#
# Above each gradient stands the forward line that it is the derivative of. First the cross-entropy, down to the logits.
# Two rules do most of the work. What the forward broadcasts, the backward sums. And what the forward uses twice gets a
# gradient from each use: they add up.

# %%
# loss = -logprobs[rows, target].mean(): only the targets' entries count, each with -1/n
dlogprobs = torch.zeros_like(logprobs)
dlogprobs[rows, target] = -1 / N
cmp("logprobs", dlogprobs, logprobs)

# logprobs = log(probs)
dprobs = dlogprobs / probs
cmp("probs", dprobs, probs)

# probs = counts * counts_sum_inv, the inverse broadcast over a row: its gradient sums over the row
dcounts_sum_inv = (dprobs * counts).sum(1, keepdim=True)
cmp("counts_sum_inv", dcounts_sum_inv, counts_sum_inv)
dcounts = dprobs * counts_sum_inv  # the first of two ways into the loss

# counts_sum_inv = counts_sum^-1
dcounts_sum = -(counts_sum**-2) * dcounts_sum_inv
cmp("counts_sum", dcounts_sum, counts_sum)

# counts_sum = sum of counts over the row: each count gets the gradient of the sum, the second way
dcounts = dcounts + dcounts_sum
cmp("counts", dcounts, counts)

# counts = exp(shifted), its own derivative
dshifted = dcounts * counts
cmp("shifted", dshifted, shifted)

# %% [markdown]
# The maximum was taken out only for safety: the loss does not depend on it, and its gradient is zero but for rounding.

# %%
# shifted = logits - logit_max, broadcast over the row
dlogit_max = -dshifted.sum(1, keepdim=True)
cmp("logit_max", dlogit_max, logit_max)
dlogits = dshifted.clone()

# logit_max = the largest logit of the row
dlogits[rows, logits.max(1).indices] += dlogit_max.squeeze(1)
cmp("logits", dlogits, logits)

# %% [markdown]
# The second linear layer and tanh. With `out = x @ W + b`, the gradient of each factor is the gradient of `out` times
# the other factor, and the shapes leave one way to write it.

# %%
# logits = hidden @ W2 + b2
dhidden = dlogits @ W2.T
dW2 = hidden.T @ dlogits
db2 = dlogits.sum(0)
cmp("hidden", dhidden, hidden)
cmp("W2", dW2, W2)
cmp("b2", db2, b2)

# hidden = tanh(normed), tanh' = 1 - tanh^2
dnormed = dhidden * (1 - hidden**2)
cmp("normed", dnormed, normed)

# %% [markdown]
# Batch norm. `diff` leads to the loss in two ways, through `xhat` and through the variance; so does `pre`, through
# `diff` and through the mean.

# %%
# normed = xhat * gain + shift, both broadcast over the batch
dgain = (dnormed * xhat).sum(0)
dshift = dnormed.sum(0)
dxhat = dnormed * gain
cmp("gain", dgain, gain)
cmp("shift", dshift, shift)
cmp("xhat", dxhat, xhat)

# xhat = diff * rstd, rstd broadcast over the batch
drstd = (dxhat * diff).sum(0, keepdim=True)
cmp("rstd", drstd, rstd)
ddiff = dxhat * rstd  # the first of two ways

# %% [markdown]
# The variance, and then the mean:

# %%
# rstd = (var + eps)^-0.5
dvar = drstd * -0.5 * (var + eps) ** -1.5
cmp("var", dvar, var)

# var = sum of diff2 over the batch / (n - 1)
ddiff2 = torch.ones_like(diff2) * dvar / (N - 1)
cmp("diff2", ddiff2, diff2)

# diff2 = diff^2, the second way
ddiff = ddiff + ddiff2 * 2 * diff
cmp("diff", ddiff, diff)

# diff = pre - mean, the mean broadcast over the batch
dmean = -ddiff.sum(0, keepdim=True)
cmp("mean", dmean, mean)

# mean = sum of pre over the batch / n: pre counts directly and through the mean
dpre = ddiff + dmean / N
cmp("pre", dpre, pre)

# %% [markdown]
# The first linear layer and the embedding. A row of the table that was read several times gets the sum.

# %%
# pre = joined @ W1 + b1
djoined = dpre @ W1.T
dW1 = joined.T @ dpre
db1 = dpre.sum(0)
cmp("joined", djoined, joined)
cmp("W1", dW1, W1)
cmp("b1", db1, b1)

# joined = emb, in another shape
demb = djoined.view_as(emb)
cmp("emb", demb, emb)

# emb = table[context]
dtable = torch.zeros_like(table)
dtable.index_add_(0, context.flatten(), demb.flatten(0, 1))
cmp("table", dtable, table)

# %% [markdown]
# ## Cross-entropy in one formula
#
#     loss[n] = log sum_k exp(logits[n, k]) - logits[n, y]
#     d loss[n] / d logits[n, k] = p[n, k] - [k = y]
#
# Every logit is pulled down by its probability, the right one is pushed up by 1, and a row sums to zero.

# %%
dlogits_at_once = torch.softmax(logits, 1)
dlogits_at_once[rows, target] -= 1
dlogits_at_once /= N
cmp("logits, at once", dlogits_at_once, logits)

# %% [markdown]
# ## Batch norm in one formula
#
# With `g = dnormed * gain`, the two ways through `diff` are
#
#     g rstd                                  by xhat = diff rstd
#     -xhat rstd / (n - 1) sum(g xhat)        by var = sum diff^2 / (n - 1)
#
# The way through the mean takes the average over the batch off both; the second has average zero, since `xhat` has.
# Hence
#
#     dpre = rstd (g - sum g / n - xhat sum(g xhat) / (n - 1))

# %%
g = dnormed * gain
dpre_at_once = rstd * (g - g.sum(0) / N - xhat * (g * xhat).sum(0) / (N - 1))
cmp("pre, at once", dpre_at_once, pre)

# %% [markdown]
# ## The layers of handgrad
#
# The same model of layers, each with its own `backward(dout)`. (As torch's, Linear keeps its weight transposed.)

# %%
model = Sequential(
    Embedding(V, D),
    Flatten(),
    Linear(block_size * D, H),
    BatchNorm1d(H, eps=eps, unbiased=True),
    Tanh(),
    Linear(H, V),
)
for own, value in zip(model.parameters(), [table, W1.T, b1, gain, shift, W2.T, b2]):
    own.copy_(value)

_ = torch.set_grad_enabled(True)  # to handgrad it says: record what the backward needs
criterion = CrossEntropy()
print(f"loss {float(criterion(model(context), target)):.4f}")

# %% [markdown]
# Backward through the loss, then through the layers in reverse: each is given the gradient of its output and returns
# that of its input.

# %%
dout = criterion.backward()
cmp("logits, handgrad", dout, logits)
inputs = {"emb": emb, "joined": joined, "pre": pre, "normed": normed, "hidden": hidden}
for layer, (name, value) in zip(reversed(model), reversed(inputs.items())):
    dout = layer.backward(dout)
    cmp(f"{name}, handgrad", dout, value)
model[0].backward(dout)  # integers have no gradient

for own, (name, value) in zip(model.parameters(), parameters.items()):
    cmp(f"{name}, handgrad", own.grad.T if name in ("W1", "W2") else own.grad, value)

# %%
if wrong:
    sys.exit("A gradient is wrong: see the rows marked False.")
print("Every gradient agrees.")
