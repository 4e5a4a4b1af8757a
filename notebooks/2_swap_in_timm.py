# %% [markdown]
# # A timm model with another encoding, at another size
#
# You have a checkpoint of timm's and want two things of it: run it at a size it was not trained at, and try another
# positional encoding without training from nothing. `from_timm` does both. Nothing is downloaded here: the checkpoint
# is one that we make first, a small timm ViT that learns scikit-learn's digits in a plain torch loop. With
# `pretrained=True` the lines would be the same.

# %%
import logging

import matplotlib.pyplot as plt
import timm
import torch

from vit2dpe import from_timm, set_policy, sweep, to_timm
from vit2dpe.data.datasets import load_images, normalize, resize
from vit2dpe.plots.attention import draw as draw_attention

logging.getLogger("timm").setLevel(logging.ERROR)
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
data = load_images("digits")


figure, axes = plt.subplots(1, 8, figsize=(8, 1.2))
for ax, image in zip(axes, data.test.images, strict=False):
    ax.imshow(image[0], cmap="gray")
    ax.set_axis_off()


def at_size(split, *size):
    return normalize(resize(split.images, size), data.mean, data.std), split.labels


train, test = at_size(data.train, 16, 16), at_size(data.test, 16, 16)


def learn(model, epochs, lr=3e-3):
    """AdamW with a cosine; returns top-1 of the test images after each epoch."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 23)
    scores = []
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(train[1])).split(64):
            loss = torch.nn.functional.cross_entropy(model(train[0][batch]), train[1][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        scores.append(score(model, test))
    return scores


@torch.no_grad()
def score(model, batch):
    return 100 * (model.eval()(batch[0]).argmax(dim=1) == batch[1]).float().mean().item()


sizes = dict(img_size=16, patch_size=4, in_chans=1, num_classes=10, embed_dim=64, depth=3, num_heads=4)
torch.manual_seed(0)
theirs = timm.create_model("vit_tiny_patch16_224", **sizes, class_token=False, global_pool="avg")
print(f"timm's {type(theirs).__name__}: {learn(theirs, 20)[-1]:.1f}% of 360 test images")

# %% [markdown]
# ## The same function
#
# Without further words, `from_timm` is a change of owner: same logits, same names in the state_dict, and back again.

# %%
ours = from_timm(theirs).eval()
with torch.no_grad():
    print("largest difference of logits:", f"{(ours(test[0]) - theirs(test[0])).abs().max():.1e}")
theirs.load_state_dict(to_timm(ours))
print("encoding:", type(ours.position).__name__, "   trained on a grid of", *ours.train_grid)

# %% [markdown]
# ## Another size, a rectangle too
#
# timm's model refuses 32x20, unless it was built with `dynamic_img_size`; ours runs, its table resized to 8 rows of 5
# columns. Here are digits stretched upwards, and where the last blocks look from the centre.

# %%
tall = at_size(data.test, 32, 20)
try:
    theirs(tall[0])
except AssertionError as error:
    print("timm:", error)
print(f"ours, at 32x20: {score(ours, tall):.1f}%")
draw_attention(ours, tall[0][:1], mean=data.mean, std=data.std)

# %% [markdown]
# ## Another encoding, the other weights kept
#
# One word more. What the blocks learned was learned with the old encoding, so the exchange costs accuracy at once;
# the question is how soon a little finetuning brings it back. `none` is the control: finetuned as well, without places.

# %%
models = {"kept": from_timm(theirs)}
models |= {word: from_timm(theirs, position=word) for word in ("none", "alibi", "rope", "rope_mixed")}
curves = {word: [score(model, test), *learn(model, 4, lr=1e-3)] for word, model in models.items()}

figure, ax = plt.subplots(figsize=(6.4, 3.2))
for word, curve in curves.items():
    ax.plot(curve, "o-", label=word, ms=4)
ax.set(xlabel="epochs of finetuning", ylabel="top-1 [%]", xticks=range(5), title="the table of timm, kept or exchanged")
ax.legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# ## And then other sizes
#
# Each of the five at sizes nobody trained it at, under the first policy that it offers and, dashed, `interpolate` where
# it can. `sweep` measures; a policy is chosen at evaluation, so one training serves all lines.

# %%
batches = [test]
shown = [(12, 12), (16, 16), (24, 16), (24, 24), (32, 32)]
figure, ax = plt.subplots(figsize=(6.4, 3.4))
for i, (word, model) in enumerate(models.items()):
    for policy in model.position.policies[:1] if word != "rope_mixed" else ("extrapolate",):
        rows = sweep(model, batches, shown, [policy])
        ax.plot([row["top1"] for row in rows], "o-", color=f"C{i}", label=word, ms=4)
    if word in ("alibi", "rope", "rope_mixed"):
        rows = sweep(model, batches, shown, ["interpolate"])
        ax.plot([row["top1"] for row in rows], "--", color=f"C{i}", lw=1)
ax.set(ylabel="top-1 [%]", xlabel="height x width", title="finetuned at 16x16; dashed: interpolate")
ax.set_xticks(range(len(shown)), [f"{h}x{w}" for h, w in shown])
ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
figure.tight_layout()

# %% [markdown]
# Four epochs do not make up for the twenty in which blocks and table learned together; the rotations come nearest. What
# was learned with an encoding stays with it: an exchange is worth a finetuning of its own length. Where a dashed line
# lies above the solid one, places scaled into the training grid serve better than places as they are. To make such a
# choice the model's own, so that it holds from then on:

# %%
set_policy(models["rope_mixed"], "interpolate")
print(f"rope_mixed at 32x32, interpolating by itself: {score(models['rope_mixed'], at_size(data.test, 32, 32)):.1f}%")
