# %% [markdown]
# # A line is a grid of one axis
#
# The encodings of the other notebooks are N-dimensional, and text is the case of one axis: the same words, the same
# attention. First a study of length with `TextDecoder`; then the transformer that torch brings, which takes an encoding
# in training and, without a word, drops it in inference.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

from vit2dpe import Dims, Positions, TextDecoder, build, stock, use_policy

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## Trained on lines of 32, read at 128
#
# The task is pure position: *say what stood three places back*. Tokens are drawn at random, so nothing else helps.
# Models of two blocks learn it on lines of 32 tokens in a few seconds each.

# %%
LENGTH, BACK, LETTERS = 32, 3, 12


def lines(count, length, seed):
    tokens = torch.randint(LETTERS, (count, length), generator=torch.Generator().manual_seed(seed))
    return tokens, tokens.roll(BACK, dims=1)  # the first three have nothing to repeat and are not counted


def learn(position, steps=250):
    torch.manual_seed(0)
    model = TextDecoder(position, vocab_size=LETTERS, context=LENGTH, embed_dim=48, depth=2, num_heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        tokens, answer = lines(32, LENGTH, step)
        logits = model(tokens)[:, BACK:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), answer[:, BACK:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def right(model, length=128):
    """Share of right answers at each place of the line."""
    tokens, answer = lines(200, length, seed=10**6)
    return (model(tokens).argmax(dim=-1) == answer).float().mean(dim=0)[BACK:]


words = ["none", "learned", "alibi", "t5", "rope"]
models = {word: learn(word) for word in words}

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, width_ratios=(2, 1), layout="constrained")
for word, model in models.items():
    axes[0].plot(torch.arange(BACK, 128), right(model), label=word, lw=1.4)
axes[0].axvline(LENGTH - 0.5, color="0.5", ls=":")
axes[0].set(xlabel="place in the line; dotted: where training ended", ylabel="share right", ylim=(0, 1.05))
axes[0].set_title("as each extends by default")
axes[0].legend(fontsize=8, frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.2))
for policy, style in (("extrapolate", "-"), ("interpolate", "--"), ("ntk", ":")):
    with use_policy(models["rope"], policy):
        axes[1].plot(torch.arange(BACK, 128), right(models["rope"]), f"C4{style}", label=policy)
axes[1].set(xlabel="place in the line", title="rope, by policy")
axes[1].legend(fontsize=8, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2), columnspacing=1)

# %% [markdown]
# A distance of three is a distance of three anywhere: `rope` carries on to twice its training and more, `t5` fades, and
# `alibi`, which only knows near and far, never quite learned to point. A learned table is stretched over the longer
# line, and with it every distance, so that it is lost from the first place on. `interpolate` does the same to `rope`:
# what rescues a picture with more pixels ruins a line with more words, where `ntk` holds. Two questions, two answers,
# and the reason why a policy is chosen at evaluation.

# %% [markdown]
# ## torch's own transformer: a fault without a message
#
# `nn.TransformerEncoder` takes a bias as a float mask. We ask who influences whom: change token j a little, see how
# much output i changes. Three times with the same module, the same weights and the same mask (`alibi`).

# %%
torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
x = torch.randn(1, 16, 32)
signal = build("alibi", Dims(width=32, heads=4, grid=(16,)))(Positions.sequence(16))


def influence(run):
    """(16, 16): how much each output moves when each input does."""
    pushed = x.repeat(16, 1, 1) + 0.05 * torch.eye(16)[..., None]
    return (run(pushed) - run(x)).detach().norm(dim=-1).T


def with_mask(inputs):
    return encoder(inputs, mask=stock.attention_mask(signal, batch=len(inputs)))


found = {"with gradients": influence(with_mask)}
with torch.no_grad():
    found["no_grad(): torch's fast path"] = influence(with_mask)
    with stock.attach(encoder, "alibi", grid=16):
        found["no_grad(), stock.attach"] = influence(encoder)

figure, axes = plt.subplots(1, 3, figsize=(9.4, 3.2), layout="constrained")
for ax, (title, values) in zip(axes, found.items(), strict=True):
    off = values - values.diag().diag()  # the residual path makes the diagonal bright in any case
    shown = ax.imshow(off, vmin=0, vmax=float(found["with gradients"].fill_diagonal_(0).max()))
    ax.set(title=title, xlabel="input that is moved")
axes[0].set_ylabel("output that moves")
figure.colorbar(shown, ax=axes, shrink=0.8)
difference = [(found[key] - found["with gradients"]).fill_diagonal_(0).abs().max().item() for key in found]
print("largest difference from training:", *(f"{value:.1e}" for value in difference))

# %% [markdown]
# The middle picture is black: the fast path reads every number of the mask that is not zero as "masked", and of `alibi`
# only the token itself is left. No exception, no warning, another function. `stock.check` says so before users notice,
# and attached, the module is right in every mode, as the last picture shows.

# %%
try:
    stock.check(encoder)
except ValueError as error:
    print(error)
with stock.attach(encoder, "alibi", grid=16):
    stock.check(encoder)
    print("attached: nothing to complain about")
