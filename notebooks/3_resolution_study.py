# %% [markdown]
# # A resolution study, small enough to watch
#
# Which encoding survives a change of resolution? `vit2dpe study` trains one model for each encoding, at one size, and
# measures it at others. Here it runs from Python, on scikit-learn's digits, with four encodings and few epochs. It
# takes about half a minute on one core. **The accuracies are those of a short training and one seed**; the method
# is that of the long studies in `recipes/RESULTS.md`.

# %%
import os
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown

from vit2dpe import attention_maps, load_run, use_policy
from vit2dpe.attention.maps import summary
from vit2dpe.data.datasets import load_images, normalize, resize
from vit2dpe.study import StudyConfig, read_rows, report, study

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
os.chdir(tempfile.mkdtemp())  # a study leaves files

data = load_images("digits")
images = data.test.images[:64]
figure, axes = plt.subplots(1, 5, figsize=(7, 1.7))
for ax, size in zip(axes, ((12, 12), (16, 16), (24, 32), (32, 32), (48, 48)), strict=True):
    ax.imshow(resize(images[:1], size)[0, 0], cmap="gray")
    ax.set_title(f"{size[0]}x{size[1]}" + (": training" if size[0] == 16 else ""), fontsize=9)
    ax.set_axis_off()

# %% [markdown]
# One digit at some of the sizes. Patches are 4x4 pixels, so a model trained on 16 patches meets up to 144.

# %%

names = ["none", "learned", "sincos", "rope"]
sizes, temperatures = "12,16,24,24x32,32,48", "none,log"
config = StudyConfig.of(
    encodings=",".join(names), sizes=sizes, temperatures=temperatures, modes="scale", epochs=8, limit_test=180, jobs=1
)
with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
    picture = study(config, command="from a notebook")
print(*sorted(path.name for path in picture.parent.iterdir()))

# %% [markdown]
# Every study leaves these files. `results.csv` has a row for each encoding, policy, temperature and size; everything
# else is drawn from it. Run again, the same study reads what is finished and trains only what is missing.
#
# ## The picture
#
# Solid: what the encoding does by default. Dashed: the best of the other policies it can take.

# %%
rows = read_rows(picture.parent / "results.csv")
report.draw(rows)

# %% [markdown]
# How to read it. At the dotted line all models are at home. To the right, the same digits have more pixels and so
# more patches than in training; at 24x32 they are stretched, too, which costs all of them. A line that falls to 10% is
# guessing. Now compare the solid with the dashed line of one colour: it is the *same trained model*, told to look at
# its places in another way.
#
# ## What it loses
#
# The same as numbers: points of accuracy lost between the training size (16) and larger ones, the default policy first.


# %%
def losses(rows, sizes=(24, 32, 48)):
    top1 = {(r.encoding, r.policy, r.temperature, *r.size): r.top1 for r in rows}
    heads = ["encoding", "policy", "temperature", *(f"{s}x{s}" for s in sizes)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for key in dict.fromkeys(key[:3] for key in top1):
        home = top1[*key, 16, 16]
        lines.append(f"| {' | '.join(key)} |" + "".join(f" {top1[*key, s, s] - home:+.0f} |" for s in sizes))
    return "\n".join(lines)


Markdown(losses(rows))

# %% [markdown]
# `log` multiplies logits by ln N / ln N_train, so that attention over more tokens stays as sharp. At the training size
# it is 1 and changes nothing.
#
# ## Why
#
# Two numbers to look at: how spread attention is (its entropy, in nats) and how far it reaches (its mean distance, in
# patches). Both are read from the trained models, at 16 and at 48 pixels.

# %%
models = {path.name.split("-seed")[0]: load_run(path) for path in sorted(picture.parent.glob("cells/*"))}


def seen(model, side, policy="default"):
    with use_policy(model.eval(), policy):
        found = summary(model, normalize(resize(images, (side, side)), data.mean, data.std))
    return [torch.tensor([row[key] for row in found]).mean().item() for key in ("entropy", "distance")]


cases = [(word, "default") for word in names] + [("sincos", "interpolate"), ("rope", "interpolate")]
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
for word, policy in cases:
    values = torch.tensor([seen(models[word], side, policy) for side in (16, 24, 32, 48)])
    for ax, column in zip(axes, values.T, strict=True):
        style = dict(color=f"C{names.index(word)}", ls="-" if policy == "default" else "--", marker="o", ms=4)
        ax.plot((16, 24, 32, 48), column, label=word if policy == "default" else f"{word}, interpolate", **style)
axes[0].plot((16, 24, 32, 48), torch.tensor([16, 36, 64, 144]).log(), ":", color="0.6", label="all keys alike")
axes[0].set(title="entropy of attention [nats]", xlabel="image size [pixels]")
axes[1].set(title="mean distance of attention [patches]", xlabel="image size [pixels]")
figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside right upper")

# %% [markdown]
# ## One image, two policies
#
# Where the patch in the centre looks in the last block of the `rope` model, at three times the training size.

# %%
big = normalize(resize(images[:1], (48, 48)), data.mean, data.std)
looks = {}
for policy in ("extrapolate", "interpolate"):
    with torch.no_grad(), use_policy(models["rope"], policy), attention_maps(models["rope"]) as maps:
        models["rope"](big)
    last = list(maps.values())[-1]
    looks[policy] = last[0, :, 6 * 12 + 6].mean(dim=0).view(12, 12)

figure, axes = plt.subplots(1, 3, figsize=(8.2, 2.6), layout="constrained")
axes[0].imshow(big[0, 0], cmap="gray")
axes[0].set(title="the image", xlabel="column [pixels]", ylabel="row [pixels]")
most = max(float(look.max()) for look in looks.values())
for ax, (policy, look) in zip(axes[1:], looks.items(), strict=True):
    shown = ax.imshow(look, vmin=0, vmax=most)
    ax.plot(6, 6, "o", markerfacecolor="none", markeredgecolor="white")
    ax.set(title=policy, xlabel="column [patches]", ylabel="row [patches]")
figure.colorbar(shown, ax=axes[1:], label="attention")

# %% [markdown]
# ## From a shell
#
# ```
# vit2dpe study --encodings none,learned,sincos,rope --temperatures none,log --seeds 3
# vit2dpe report runs/study
# ```
#
# `report.html` has these lines to be switched off and on and read by pointing, in one file that needs no network.
