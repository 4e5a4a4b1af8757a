# %% [markdown]
# # What encodings do, in pictures
#
# A transformer cuts an image into patches and calls them tokens. Attention then looks at the tokens as you would
# look at a handful of tiles: it sees every tile, and has no idea where on the wall each of them was.
#
# A **positional encoding** puts that back. In vit2dpe all of them have one shape: they take *places* and answer with
# a *signal*, and about places the signal can say only three kinds of things.
#
# | the signal's field | what attention does with it | read the pictures below as |
# |---|---|---|
# | `token` | adds a vector to each token | how alike two places look |
# | `rotation` | turns queries and keys before they meet | how much of a match survives between two places |
# | `bias` | adds a number to each pair's score | whom a head would rather look at |
#
# This page draws them all, and then checks by experiment what the pictures suggest. It runs in half a minute on one
# core.

# %%
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle

from vit2dpe import ENCODINGS, Dims, PositionEncoding, Positions, ViT, build, rotate
from vit2dpe.attention.contract import contract
from vit2dpe.plots.encodings import draw

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
torch.manual_seed(0)
print(len(ENCODINGS), "encodings:", " ".join(ENCODINGS))

# %% [markdown]
# ## Places first: rows before columns
#
# A place is a pair (row, column), counted in patches from the top left corner. Tokens are numbered as one reads a
# page: along the first row, then along the second. So the *last* coordinate changes fastest.

# %%
at = Positions.grid((3, 5))  # 3 rows, 5 columns
print("token  0 1 2 ... 6:", at.coords[0, :7].int().tolist())

figure, ax = plt.subplots(figsize=(4.2, 2.6))
ax.imshow(torch.arange(15).view(3, 5), cmap="Blues", vmax=30)
for token, (row, column) in enumerate(at.coords[0].int().tolist()):
    ax.text(column, row, token, ha="center", va="center")
ax.set(xlabel="column", ylabel="row", title="the number of each token", xticks=range(5), yticks=range(3))
figure.tight_layout()

# %% [markdown]
# It sounds like a formality. On a square grid it nearly is: swap rows and columns and everything is merely mirrored,
# the same way each time, and a model learns around it. On any other grid the mistake tears the image apart. Here are
# the same vectors twice: once laid out as 6 rows of 10, once by someone who believed in 10 rows of 6.

# %%
right = build("sincos", Dims(96, 3, (6, 10)))(Positions.grid((6, 10))).token[0]
wrong = build("sincos", Dims(96, 3, (10, 6)))(Positions.grid((10, 6))).token[0]

figure, axes = plt.subplots(1, 2, figsize=(8, 2.7))
for ax, token, title in ((axes[0], right, "rows and columns right"), (axes[1], wrong, "swapped")):
    alike = torch.cosine_similarity(token[34], token, dim=-1).view(6, 10)  # token 34 is at row 3, column 4
    ax.imshow(alike, vmin=0.6, vmax=1)
    ax.plot(4, 3, "o", color="white", markeredgecolor="black")
    ax.set(xlabel="column", ylabel="row", title=title)
figure.tight_layout()

# %% [markdown]
# On the right, tokens far apart are told that they are neighbours, and nothing crashes. That is why a place travels as
# data (`Positions`) through this library, and why its tests use grids that are not square.

# %% [markdown]
# ## Every encoding, seen from one token
#
# `draw` takes names. The white dot marks the token that looks; the colour says what the encoding tells it about every
# other place. Rows run downward, as in an image. `none` is the control: it says nothing.
#
# First the encodings that **add a vector to each token**. Yellow means: these two places were given similar vectors.

# %%
made = {name: build(name, Dims(192, 3, (14, 14))) for name in ENCODINGS}


def that_give(field):
    return [name for name, encoding in made.items() if field in encoding.gives]


draw(["none", *that_give("token")])

# %% [markdown]
# `learned` starts as noise: every place is like itself and like nothing else, and training has to discover
# that patches have neighbours. `sincos` knows from the start. Look at its arms, though: it counts rows and columns
# separately, so a place in the same row looks closer than one on the diagonal. The view from the corner is the view
# from the centre, moved over: among themselves these vectors know offsets only. That does not last, because
# attention meets them mixed with what the patches show; the second experiment below measures it.
#
# Next, those that **rotate** queries and keys. The picture shows how much of the score of a perfect match is left
# at each place: 1 where the token stands, less where the rotations disagree.

# %%
draw(that_give("rotation"), seed=2)

# %% [markdown]
# `rope` gives every pair of channels one axis, which makes a cross along rows and columns. `rope_mixed` turns the
# axes, differently for each head, and lets training move them on.
#
# Last, those that **add a bias** to the scores. Red invites, blue discourages. One scale serves all panels, so a
# pale one really is faint: the range is printed above it.

# %%
draw(that_give("bias"))

# %% [markdown]
# `alibi` is a plain penalty on distance, steep for one head and nearly flat for another, so that one head reads
# closely and another keeps the overview. `relative` is a table of numbers, one for each offset. It starts so close to
# zero that it is blank on the scale of the others; drawn alone, it gets a scale of its own and shows the noise that
# training starts from.

# %%
draw(["relative"])

# %% [markdown]
# ### On a line
#
# Text is the case of one axis. The same names work, and the pictures become curves.

# %%
draw(["sincos", "rope", "alibi"], grid=(64,))

# %% [markdown]
# ### Together
#
# Signals add up, so encodings do. A sum is spelled with a plus; it is drawn part by part.

# %%
draw(["sincos+rope(base=10)"], grid=(10, 16))

# %% [markdown]
# ## Experiment 1: can it tell a shuffled image?
#
# We take a picture, cut it into 64 patches and shuffle them. A model that knows no places, and averages over the
# patches at its end, must answer the same for both.

# %%
rows, columns = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
sky = torch.stack([0.95 - 0.5 * rows, 0.7 - 0.2 * rows, 0.5 + 0.4 * rows])
sun = ((rows - 0.35) ** 2 + (columns - 0.62) ** 2 < 0.025).double()
hills = (rows > 0.72 + 0.1 * torch.sin(9 * columns)).double()
image = sky * (1 - sun) + torch.tensor([1.0, 0.93, 0.6])[:, None, None] * sun
image = image * (1 - hills) + torch.tensor([0.15, 0.3, 0.25])[:, None, None] * hills  # (3, 64, 64) float64


def shuffled(image, order, patch=8):
    """The same patches in another order."""
    side = image.shape[-1] // patch
    patches = image.unfold(1, patch, patch).unfold(2, patch, patch).flatten(1, 2)[:, order]  # (3, N, p, p)
    return patches.unflatten(1, (side, side)).permute(0, 1, 3, 2, 4).reshape(image.shape)


mixed = shuffled(image, torch.randperm(64))
figure, axes = plt.subplots(1, 2, figsize=(5.6, 2.8))
for ax, picture, title in ((axes[0], image, "the image"), (axes[1], mixed, "its patches, shuffled")):
    ax.imshow(picture.permute(1, 2, 0))
    ax.set(title=title)
    ax.set_axis_off()
figure.tight_layout()

# %% [markdown]
# Each encoding gets a tiny ViT of two blocks, with random weights. Learned encodings begin near zero, where they
# would say very little, so we first pretend that training has happened and move their numbers about. We compute in
# float64, to see how small "the same" is.


# %%
@torch.no_grad()
def as_if_trained(model):
    """The model in float64, the learned numbers of its encodings moved about."""
    for part in model.modules():
        if isinstance(part, PositionEncoding):
            for parameter in part.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return model.double().eval()


@torch.no_grad()
def change_by_shuffling(word):
    torch.manual_seed(0)
    size = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3}
    model = as_if_trained(ViT(word, **size, global_pool="avg", num_classes=0))
    straight, mixed_up = model(image[None]), model(mixed[None])
    return float((straight - mixed_up).norm() / straight.norm())


def bars(values, title, colour):
    """One bar a name, on a scale of powers of ten."""
    figure, ax = plt.subplots(figsize=(7, 0.6 + 0.3 * len(values)))
    lengths = [max(value, 1e-17) for value in values.values()]
    drawn = ax.barh(list(values), lengths, color=[colour(name) for name in values])
    ax.bar_label(drawn, [f"{value:.0e}" if value else "0" for value in values.values()], padding=4)
    ax.set(xscale="log", xlim=(1e-17, 100), xlabel=title)
    ax.invert_yaxis()
    figure.tight_layout()


seen = {name: change_by_shuffling(name) for name in ENCODINGS}
bars(seen, "relative change of the output when the patches are shuffled", lambda n: "C1" if n == "none" else "C0")
assert seen["none"] < 1e-12
assert all(change > 1e-6 for name, change in seen.items() if name != "none")

# %% [markdown]
# Without positions, the change is rounding: to `none`, the landscape and the heap of tiles are one image. Every other
# encoding tells them apart. By how much says little yet, for the weights are random; that there is a difference at
# all is what training needs.
#
# ## Experiment 2: does moving everything together matter?
#
# A cat in the left half is a cat in the right half. Encodings that declare themselves `relative` promise as much for
# attention: move all tokens together, and they look at each other as before. Here is a window of tokens, and the
# same window elsewhere.

# %%
grid = (14, 14)
where = torch.arange(14 * 14).view(grid)
here, there = where[1:7, 2:7].flatten(), where[6:12, 7:12].flatten()  # 5 rows down, 5 columns to the right

figure, ax = plt.subplots(figsize=(3, 3))
ax.imshow(torch.zeros(grid), cmap="Greys")
for (row, column), colour in (((1, 2), "C0"), ((6, 7), "C1")):
    ax.add_patch(Rectangle((column - 0.5, row - 0.5), 5, 6, color=colour, alpha=0.6))
ax.annotate("", (9, 8.5), (4, 3.5), arrowprops={"arrowstyle": "->", "lw": 2})
ax.set(xlabel="column", ylabel="row", xticks=range(0, 14, 2), yticks=range(0, 14, 2))
figure.tight_layout()


# %%
def attention(encoding, at):
    """(H, N, N) weights between random tokens that stand at `at`, the same tokens at each call."""
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(at.coords.shape[1], 192, generator=draws, dtype=torch.float64)
    to_q, to_k = torch.randn(2, 192, 192, generator=draws, dtype=torch.float64) / 192**0.5
    signal = encoding(at)
    if signal.token is not None:
        x = x + signal.token[0]
    q, k = ((x @ to).unflatten(-1, (3, 64)).transpose(0, 1)[None] for to in (to_q, to_k))  # (1, H, N, Dh)
    signal = contract(signal, q, k)  # a contextual bias is a product with them
    if signal.q_rotation is not None:
        q, k = rotate(q, signal.q_rotation), rotate(k, signal.k_rotation)
    scores = q @ k.transpose(-1, -2) / 8 + sum(term.dense() for term in signal.bias)
    return scores.softmax(dim=-1)[0]


@torch.no_grad()
def change_by_moving(word):
    torch.manual_seed(0)
    encoding, places = as_if_trained(build(word, Dims(192, 3, grid))), Positions.grid(grid)
    one, other = attention(encoding, places.take(here)), attention(encoding, places.take(there))
    return float((one - other).norm() / one.norm())


moved = {name: change_by_moving(name) for name in ENCODINGS}
bars(moved, "relative change of attention when all tokens move", lambda n: "C2" if made[n].relative else "C3")
assert all((change < 1e-9) == made[name].relative for name, change in moved.items())

# %% [markdown]
# Green: declared relative, and it holds up to rounding. Red: absolute, attention depends on where the group stands.
# Neither is wrong. A model that should know that the sky is up wants something absolute; one that should treat all
# corners of an image alike wants offsets; and a sum gives both.
#
# ## Your turn
#
# Change the names in any `draw([...])` above: add options (`"rope(base=10)"`), change the grid to one that is not
# square, write a sum of three. From a shell, without a notebook:
#
# ```
# vit2dpe show rope relative
# ```
