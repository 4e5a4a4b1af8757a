# %% [markdown]
# # Learning from what is hidden
#
# A masked autoencoder hides three patches of four, encodes the rest, and paints what was hidden. It needs no labels,
# and it stands on positions more than anything: a visible patch says what it looks like, only its place says which
# part of the picture it is, and a hidden patch *is* nothing but its place.
#
# Here a very small one learns scikit-learn's digits in a few seconds.

# %%
import matplotlib.pyplot as plt
import torch

from vit2dpe import MAE, Positions, ViT
from vit2dpe.data.datasets import load_images, normalize, resize
from vit2dpe.plots.reconstruction import draw
from vit2dpe.study.probe import features, linear_probe

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
data = load_images("digits")
train = normalize(resize(data.train.images, (24, 24)), data.mean, data.std)
test = normalize(resize(data.test.images, (24, 24)), data.mean, data.std)

# %% [markdown]
# ## Hiding is taking
#
# There is no table of indices to keep in step. Tokens that stay are taken, and so are their places: what a rotation or
# a bias does to a visible patch is what it does to it in the whole image.

# %%
at = Positions.grid((6, 6))
keep = torch.randperm(36, generator=torch.Generator().manual_seed(3))[:9]
visible = at.take(keep)
print("places kept:", visible.coords[0].int().tolist())
print("the grid they stand in is still", *visible.extent)

figure, axes = plt.subplots(1, 3, figsize=(6, 2.2))
hidden = torch.ones(36).index_fill(0, keep, 0.0).view(6, 6).bool()
pixels = test[0, 0]
axes[0].imshow(pixels, cmap="gray")
axes[1].imshow(pixels.masked_fill(hidden.repeat_interleave(4, 0).repeat_interleave(4, 1), 0.5), cmap="gray")
axes[2].scatter(visible.coords[0, :, 1], visible.coords[0, :, 0])
axes[2].set(xlim=(-0.5, 5.5), ylim=(5.5, -0.5), aspect="equal")
for ax, title in zip(axes, ("an image", "what is kept", "and its places"), strict=True):
    ax.set(title=title, xticks=[], yticks=[])
axes[2].set(xlabel="column", ylabel="row", xticks=range(6), yticks=range(6))
figure.tight_layout()

# %% [markdown]
# ## Training
#
# `decoder_position` is a choice of its own. The loss counts hidden patches only; 1.0 is what one would get for
# painting each in the mean of all pixels.


# %%
def new(position, decoder_position="sincos"):
    torch.manual_seed(0)
    encoder = ViT(position, img_size=24, patch_size=4, in_chans=1, embed_dim=64, depth=3, num_heads=4, num_classes=0)
    sizes = dict(decoder_embed_dim=48, decoder_depth=1, decoder_num_heads=4)
    return MAE(encoder, decoder_position=decoder_position, **sizes)


def pretrain(model, epochs=12, lr=3e-3):
    draws = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * 12)
    curve = []
    for _ in range(epochs):
        losses = []
        for batch in torch.randperm(len(train), generator=draws).split(128):
            loss, _, _ = model(train[batch], mask_ratio=0.75, generator=draws)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        curve.append(sum(losses) / len(losses))
    return curve


untrained, model = new("rope"), new("rope")
curves = {"rope, decoder sincos": pretrain(model)}
blind = new("none", "none")
curves["no positions anywhere"] = pretrain(blind)

figure, ax = plt.subplots(figsize=(6, 3))
for name, curve in curves.items():
    ax.plot(range(1, len(curve) + 1), curve, label=name)
ax.set(xlabel="epoch", ylabel="loss on hidden patches", ylim=(0, None), xticks=range(2, len(curve) + 1, 2))
ax.legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# Without positions a decoder has one answer for all hidden patches of an image. The gap between the curves is what
# places are worth here.
#
# ## What it paints
#
# Test digits, three patches of four hidden; the last column keeps the visible patches as they were. After so few
# epochs it has learned where ink tends to be, place by place, and little of each digit; more epochs sharpen it. What
# it paints over visible patches is noise, for the loss never asks about them. First with positions, then without.

# %%
draw(model, test[[0, 5, 9]], data.mean, data.std, generator=torch.Generator().manual_seed(1))

# %%
draw(blind, test[[0]], data.mean, data.std, generator=torch.Generator().manual_seed(1))

# %% [markdown]
# ## What the features are worth
#
# No label was seen so far. A linear classifier on the frozen encoder's averaged tokens, against the same encoder before
# training, for few labels and for all.

# %%
counts = (50, 200, 1437)
how = dict(mean=data.mean, std=data.std, size=(24, 24), pool="avg")
figure, ax = plt.subplots(figsize=(6, 3))
for name, one in (("pretrained", model), ("as initialised", untrained)):
    x, y = (features(one.encoder, split.images, **how) for split in (data.train, data.test))
    scores = [linear_probe(x[:n], data.train.labels[:n], y, data.test.labels)["top1"] for n in counts]
    ax.plot(counts, scores, "o-", label=name, ms=4)
ax.set(xscale="log", xlabel="labelled images", ylabel="top-1 [%]", title="linear probe, 360 test images")
ax.set_xticks(counts, counts)
ax.minorticks_off()
ax.legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# ## From a shell
#
# ```
# vit2dpe pretrain --data digits --epochs 20
# vit2dpe train --data digits --init runs/pretrain --optim.epochs 20
# vit2dpe probe --run runs/pretrain
# ```
