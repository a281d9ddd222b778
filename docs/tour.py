# One source: `python docs/make_tour.py` runs it and writes docs/tour.md, docs/tour.ipynb and docs/tour/*.png.
# Cells begin with `# %%`; text cells are comments. A term is bold where it is explained, once: the glossary is these.

# %% [markdown]
# # A tour: one picture from pixels to an answer, and to a loss
#
# You need to know what a matrix product is and have seen Python. Everything else is said here, once. Each piece of
# code ran when this page was made, on the model that ships (no download, no GPU); below it stands what it printed.
# The same is a notebook, [tour.ipynb](tour.ipynb). To type along, start Python in the folder `docs/` of a checkout.
#
# A LLaVA is a language model that was taught to look. It has three parts, in this order: a **vision tower** looks at
# the picture, a projector translates what it saw, a **decoder** reads that together with your question and writes the
# answer. All that the decoder is given, your question and the picture, is the **prompt**; it is a row of **tokens**,
# pieces of words or of the picture, and the decoder writes its answer token by token.
#
# ## 1. A picture and a question

# %%
from minillava import LLaVA
from minillava.synthetic.shapes import demo_scene

model = LLaVA.from_pretrained("nano", dtype="float32", device="cpu")
picture, question, expected = demo_scene()
print(f"{picture.size} pixels, {question!r}")
print(f"answer: {model.generate(question, images=[picture])}, expected: {expected}")

# %%
picture.resize((256, 256), 0)  # four times as large as it is

# %% [markdown]
# How large are the parts? A **parameter** is one of the numbers that training found; a model is its parameters and
# the few lines of code that multiply by them.

# %%
network = model.model
for name in ("vision", "projector", "decoder"):
    print(f"{name:10} {sum(p.numel() for p in getattr(network, name).parameters()):10,} parameters")

# %% [markdown]
# ## 2. Pixels become patches
#
# A computer's picture is three numbers a pixel: red, green, blue. The tower wants squares of one size, so a picture
# that is wide or tall is first padded to a square, then scaled. Then each colour has its mean over many photographs
# taken off and is divided by its spread, so that all numbers lie around 0; the padding has that mean colour, so it
# becomes 0. A **tensor** is a box of numbers; its shape says how many there are along each side. A **view** is one
# such square, as the tower gets it.

# %%
from minillava.media.image import prepare_views

pixels, span = prepare_views(picture, model.config)
print("views, colours, height, width:", tuple(pixels.shape))
print(f"from {pixels.min():.2f} to {pixels.max():.2f}")

# %% [markdown]
# A **patch** is a small square of pixels that the tower treats as one thing, as a reader treats a word. This model's
# patches are 16 pixels a side, so its pictures of 64 x 64 pixels have 4 x 4 = 16 of them.

# %%
from PIL import Image, ImageDraw

size = model.config.vision.patch_size
apart = Image.new("RGB", (4 * 68, 4 * 68), "white")
for row in range(4):
    for column in range(4):
        patch = picture.crop((column * size, row * size, (column + 1) * size, (row + 1) * size))
        apart.paste(patch.resize((64, 64), 0), (column * 68 + 2, row * 68 + 2))
apart

# %% [markdown]
# **Where does 576 come from?** It is the number you meet first with LLaVA-1.5, and it is nothing but this: that
# model's pictures are 336 pixels a side and its patches 14.

# %%
from minillava.config import ModelConfig

llava = ModelConfig().vision  # the defaults are LLaVA-1.5's
print(f"{llava.image_size} / {llava.patch_size} = {llava.patches_per_side} patches a side")
print(f"{llava.patches_per_side} x {llava.patches_per_side} = {llava.num_patches} patches")

# %% [markdown]
# Each patch becomes one token of the prompt, as you will see in part 5, so a picture costs LLaVA-1.5 as much as 576
# pieces of words.
#
# ## 3. The tower looks
#
# A **vector** is a list of numbers; the tower makes one of 256 out of each patch (a product of its 16 x 16 x 3
# numbers with a matrix that was trained), and adds another that says where the patch is: its **position embedding**.
# In front comes one vector more that belongs to no patch, the **class token**, a place to gather what the whole
# picture is about.

# %%
import torch

torch.set_grad_enabled(False)
tower = network.vision
state = tower.embed(pixels)
print("views, tokens, width:", tuple(state.shape), "of which", model.config.vision.num_patches, "are patches")

# %% [markdown]
# Then the vectors go through **blocks**, layers of one and the same form. In a block two things happen. First
# **attention**: every vector asks a question (its **query**), every vector offers an answer (its **key** says to
# what, its **value** says what), and each takes in the mean of all values, weighted by how well their keys fit its
# query. That is how a patch learns what is beside it. Then an **MLP**: two matrices, for each vector alone, with a
# function between them that is no straight line (else both would be one matrix). The results of both are added to
# what was there. A **norm** in front of each brings the numbers back to one size.

# %%
states = [state]
for block in tower.blocks:
    states.append(block(states[-1]))
print(len(tower.blocks), "blocks, so", len(states), "states, each", tuple(state.shape))

# %% [markdown]
# This tower, like LLaVA-1.5's, was trained as **CLIP**: two networks, one for pictures and one for captions, that
# learn to tell which belong together. LLaVA takes what comes out of the last block but one, as the last works for
# that task alone and throws details away. The class token has done its work inside the tower and is not handed on: 17
# - 1 = 16 here, 577 - 1 = 576 in LLaVA-1.5. The vectors that are, one for each patch, are called the **features** of
# the picture.

# %%
taken = model.config.vision.select_layers[0]
features = states[taken][:, 1:]
print(f"states[{taken}] without its first vector:", tuple(features.shape))
print("equal to the tower's own:", torch.equal(features, tower(pixels)))

# %% [markdown]
# ## 4. The projector translates
#
# The decoder works with vectors of another width. The **projector** is two matrices with a **GELU** between them, a
# smooth function that lets positive numbers through and holds negative ones back nearly to 0. It is all that LLaVA
# adds to a tower and a decoder that were there before.

# %%
visual = network.projector(features)[0]
print(f"{tuple(features.shape[1:])} -> {tuple(visual.shape)}")
print([f"{linear.in_features} -> {linear.out_features}" for linear in network.projector.linears])

# %% [markdown]
# ## 5. The prompt becomes tokens
#
# A decoder reads no letters. A **tokenizer** cuts text into tokens, pieces that it knows by number, and a token's
# number is its **id**. A **template** says how question and answer are written down, with which words around them.
# Here id 0 opens every prompt, and id 1 says that the answer ends. The picture stands in the prompt as its
# **placeholder**, one id (here 3) repeated as often as there are patches.

# %%
from minillava.chat.messages import Message
from minillava.media.visual import media
from minillava.processor import user_message

given = media([picture])
messages = [user_message(model.config.chat, question, given), Message("assistant", expected)]
sample = model.engine.processor(messages, given)
pieces = [model.tokenizer.decode([id]) or f"<{id}>" for id in sample.ids]
print(len(sample.ids), "tokens:", sample.ids)
print(pieces[:5], "...", pieces[19:])

# %% [markdown]
# The **vocabulary** is all pieces: 448 here, 32,000 in LLaVA-1.5. Every id has a vector in the decoder, its
# **embedding**. The placeholder's rows are then replaced, one after the other, by the vectors of part 4. This is the
# whole trick: the decoder cannot tell words from patches.

# %%
ids = torch.tensor(sample.ids)
words = network.embed(ids)
spliced = network.splice(words, ids, [visual])
changed = (spliced != words).any(1)
print(tuple(spliced.shape), "rows that were replaced:", changed.nonzero()[:, 0].tolist())

# %% [markdown]
# ## 6. The decoder answers
#
# Its blocks are like the tower's, with three differences. The decoder is **causal**: a token sees itself and what
# stands before it, and nothing behind, as the future is what it has to guess. The decoder knows places by a **rotary
# embedding**: the numbers of queries and keys are taken in pairs, and each pair is turned like the hand of a clock,
# by an angle that grows with the position, so that their fit depends on how far they are apart. The MLP is a
# **SwiGLU**: the product with one matrix decides how much of the product with another passes (part 11 is about it).
# Behind the last block the **output head**, a matrix again, gives each token of the vocabulary a number, its
# **logit**. The **softmax** makes probabilities of them: exp of each, over the sum of all. To take the likeliest
# token, always, is called **greedy** decoding.

# %%
logits = network(ids, pixels)
asked = len(sample.ids) - 3  # the place of "ASSISTANT:", where the answer begins
best = logits[asked].softmax(0).topk(4)
print(tuple(logits.shape))
for p, id in zip(*best):
    print(f"{p:7.1%} {model.tokenizer.decode([int(id)])!r}")

# %% [markdown]
# The token is put behind the prompt, and the model runs again for the next one, until id 1 is the likeliest. Keys and
# values of what was read do not change, so they are kept in the **cache**, and each step computes one token only.
#
# Where did it look? Attention has weights, and we can lay those from the answer to the patches over the picture. A
# block attends several times at once, each time with matrices of its own: each is an **attention head**. We take for
# every patch the strongest head of each block, and the mean over the blocks; so the numbers below need not add up to
# 100 %. Bright is much. It shows what was read, which is not always what mattered.

# %%
from minillava.generation.look import attention_over_pictures

word = (0, len(expected))  # which characters of the answer: all of it
(look,) = attention_over_pictures(model.engine, messages, given, word, heads="max")
weights = look.maps[0][0]  # of the first view: 4 rows of 4 patches
shade = (weights / weights.max() * 255).to(torch.uint8)
mask = Image.fromarray(shade.numpy()).resize((256, 256), 0)
Image.composite(picture.resize((256, 256), 0), Image.new("RGB", (256, 256)), mask.point(lambda v: 40 + v * 215 // 255))

# %%
print("\n".join(" ".join(f"{w:6.1%}" for w in row) for row in weights))

# %% [markdown]
# ## 7. The loss, and what it is taken on
#
# In training the answer is given, and each token has to be guessed from those before it. The **loss** of one guess is
# minus the logarithm of the probability that the right token got: 0 where the model was sure and right. Only the
# answer counts. The **label mask** says so: a second list as long as the ids, with the id where a token is to be
# learned and IGNORE, a number that is no id, everywhere else. Below, blue is the picture, grey other text that is
# given, green what is learned.

# %%
from minillava.config import IGNORE

print(f"IGNORE is {IGNORE}; labels: {sample.labels[:4]} ... {sample.labels[-4:]}")
strip = Image.new("RGB", (10 * 72, 3 * 26), "white")
draw = ImageDraw.Draw(strip)
for n, (id, label, piece) in enumerate(zip(sample.ids, sample.labels, pieces)):
    x, y = n % 10 * 72, n // 10 * 26
    picture_here = id == model.config.chat.image_token_id
    colour = "#b7d4f5" if picture_here else "#d9d9d9" if label == IGNORE else "#a8e0a8"
    draw.rectangle((x + 1, y + 1, x + 70, y + 24), fill=colour)
    draw.text((x + 5, y + 7), "patch" if picture_here else repr(piece)[1:-1].replace(" ", "_"), "black", font_size=12)
strip

# %%
labels = torch.tensor(sample.labels)
for t in (labels != IGNORE).nonzero()[:, 0].tolist():
    loss = -logits[t - 1].log_softmax(0)[labels[t]]  # the place before guesses it
    print(f"token {t} {pieces[t]!r:10} loss {loss:.3f}")
total = network(ids, pixels, labels=labels)
blind = network(ids, torch.zeros_like(pixels), labels=labels)
print(f"sum {total:.3f}; with a picture of zeros, which is plain grey, {blind:.3f}")

# %% [markdown]
# A step of training adds up the losses of a few examples and divides by the number of tokens that are learned. The
# **gradient** says for each parameter how much the loss grows with it, and an **optimizer** moves all of them a
# little the other way. LLaVA trains in two stages: first the projector alone, on captions, so that patches come to
# mean something to the decoder; then projector and decoder, on conversations. A parameter that is left as it was is
# called **frozen**.

# %%
torch.set_grad_enabled(True)
for p in network.parameters():
    p.requires_grad_(False)
for p in network.projector.parameters():
    p.requires_grad_(True)
network(ids, pixels, labels=labels).backward()
torch.set_grad_enabled(False)
with_gradient = [name for name, p in network.named_parameters() if p.grad is not None]
print("stage 1 can move:", with_gradient)

# %% [markdown]
# ## 8. Large pictures become tiles
#
# 336 pixels a side do not show small print. LLaVA-NeXT therefore also cuts a picture into **tiles**, squares of the
# tower's size. From a short list of grids, 1 x 2 to 3 x 1 tiles, it takes the one on which the picture, scaled to
# fit, keeps most pixels, and of those the one with least space left over; what is left over is padded. In front comes
# the whole picture squeezed into one square, its **base view**. Base view and tiles together are called **AnyRes**.
# Each square goes through the tower alone. Then the tiles' patches are laid out as one map, rows and columns that lie
# in the padding are cut off, and a learned vector, the **newline**, ends each row. Even a picture of 336 x 336 is
# seen twice, squeezed and on the tiles: 576 + 24 x (24 + 1) = 1,176 tokens. `image_span` does all this counting: a
# **span** says how many views, rows, columns and tokens a picture takes.

# %%
from systems import SYSTEMS  # docs/systems.py

from minillava.visual_tokens import best_grid, image_span

by_name = {system.name: system for system in SYSTEMS}
next_config = by_name["LLaVA-NeXT"].config
columns, rows = best_grid(next_config, 1000, 500)
span = image_span(next_config, 1000, 500)
print(f"1000 x 500 pixels: {columns} x {rows} tiles, {span.views} squares through the tower")
print(f"map of {span.height} x {span.width} patches, a newline behind each of its {span.height} rows")
print(f"576 + {span.height} x ({span.width} + 1) = {576 + span.height * (span.width + 1)} = {span.tokens} tokens")

# %%
wide = Image.new("RGB", (1000, 500))
wide.paste(picture.resize((500, 500), 0), (0, 0))
wide.paste(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((500, 500), 0), (500, 0))
squares = prepare_views(wide, next_config)[0]
mean, std = (torch.tensor(x)[:, None, None] for x in (next_config.image.mean, next_config.image.std))
sheet = Image.new("RGB", (len(squares) * 116, 112), "white")
for n, square in enumerate(squares):
    back = ((square * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    sheet.paste(Image.fromarray(back.numpy()).resize((112, 112), Image.Resampling.BILINEAR), (n * 116, 0))
sheet

# %% [markdown]
# ## 9. The eight systems
#
# The family differs in few places, and all of them are data here, not code: what a tower is like, how a picture
# becomes squares or keeps its own size, how many patches become one token, which decoder reads them. How many tokens
# do a picture of 336 x 336 pixels and one of 1000 x 500 take?


# %%
def sum_of(config, width, height):
    """How the number of tokens comes about."""
    span, side = image_span(config, width, height), config.vision.patches_per_side
    if span.native:
        return f"{span.height} x {span.width} / {config.projector.merge**2} = {span.tokens}"
    map_of_tiles = f" + {span.height} x ({span.width} + 1)" if span.height else ""
    return f"{side} x {side}{map_of_tiles} = {span.tokens}"


for system in SYSTEMS:
    print(f"{system.name:20} {sum_of(system.config, 336, 336):32} {sum_of(system.config, 1000, 500)}")

# %% [markdown]
# - **LLaVA v1** cuts the middle square out of a picture and scales it to 224 pixels: 224 / 14 = 16 patches a side.
#   Its projector is one matrix.
# - **LLaVA-1.5** pads instead of cutting, has 336 pixels, and a projector of two layers with GELU.
# - **LLaVA-1.5-HD** has v1's tower again and up to six tiles of 224 pixels behind the base view.
# - **LLaVA-NeXT** has tiles of 336 pixels, trains the tower too in stage 2, and comes with other decoders than LLaMA:
#   Mistral, Qwen, Yi.
# - **LLaVA-NeXT-Video** reads a video as a row of pictures, its **frames**. Each is one square of which the mean of 2
#   x 2 patches becomes one token: 24 x 24 / 4 = 144 a frame. More tokens than the decoder was trained to read fit in
#   when the angles of its rotary embedding are divided by a factor.
# - **LLaVA-OneVision** has the tower **SigLIP**, CLIP's successor without a class token, with 384 pixels (384 / 14 is
#   27 and a bit), and up to 36 tiles; a map larger than that of nine tiles is shrunk to it. Where there are several
#   pictures, each is one padded square.
# - **LLaVA-OneVision-1.5** takes a picture at its **native** size, rounded to whole blocks of 2 x 2 patches of 14
#   pixels: 1000 x 500 becomes 1008 x 504, which are 72 x 36 patches. Its tower has no table of positions: it turns
#   queries and keys as the decoder does, by row and by column. Each 2 x 2 patches become one token.
# - **LLaVA-OneVision-2** turns them by time as well, for videos: in the tower four frames at a time see each other.
#   In the prompt the time stands in front of each frame, as text: `<1.5 seconds>`.
#
# [systems.md](systems.md) has all columns. Here are the tokens of the picture of 1000 x 500 pixels, a dot for each:
# base view on the left, map on the right, newlines left out.

# %%
cells = {}
for system in SYSTEMS:  # of a picture of 1000 x 500 pixels: (rows, columns) of tokens, base view and map
    span, merge, side = image_span(system.config, 1000, 500), system.config.projector.merge, system.config.vision
    whole = [] if span.native else [(side.patches_per_side, side.patches_per_side)]
    cells[system.name] = whole + ([(span.height // merge, span.width // merge)] if span.height else [])
drawn = Image.new("RGB", (530, sum(max(h for h, _ in maps) * 3 + 12 for maps in cells.values())), "white")
draw, y = ImageDraw.Draw(drawn), 0
for name, maps in cells.items():
    draw.text((4, y), name, fill="black")
    x = 150
    for height, width in maps:
        for n in range(height * width):
            left, top = x + n % width * 3, y + n // width * 3
            draw.rectangle((left, top, left + 1, top + 1), fill="#4a7ebb")
        x += width * 3 + 10
    y += max(height for height, _ in maps) * 3 + 12
drawn

# %% [markdown]
# ## 10. Where it is in the code
#
# All this is in the folder `minillava/`. `llava.py` is parts 3 to 7 on one screen: `LLaVAModel.forward` calls
# `embed`, `see` (tower, projector), `splice`, and the decoder. `processor.py` is part 5. Only `visual_tokens.py`
# computes how many tokens a picture takes; `projector.py: arrange` lays out the map of part 8. You have now seen all
# that happens in `minillava ask --model nano --image picture.png --prompt "What color is the moon?"`.
#
# ## 11. A kernel, line by line
#
# A **kernel** is a program that a GPU runs thousands of times at once, each time on its own piece of the data.
# PyTorch has one for each simple operation; written one after the other they read and write the GPU's memory again
# and again, which is what takes the time. A kernel of our own does several operations in one go. Ours are written in
# **Triton**, Python that is compiled for the GPU where `@jit` stands; `tl` is its module `triton.language`. This
# kernel is SwiGLU's middle: of the two products `gate` and `up` it makes silu(gate) * up, where silu(x) = x / (1 +
# exp(-x)).

# %%
import inspect

from minillava.kernels import swiglu

source = inspect.getsource(swiglu)
print(source[source.index("@jit\ndef _swiglu(") : source.index("@jit\ndef _swiglu_backward(")].rstrip())

# %% [markdown]
# - `gate_ptr, up_ptr, y_ptr` are addresses in the GPU's memory; `E` is how many numbers there are; `BLOCK` is how
#   many one program takes, and a `tl.constexpr`: it is known when the kernel is compiled.
# - `tl.program_id(0)` says which of the programs this is, and `tl.arange(0, BLOCK)` is 0, 1, ... BLOCK - 1. The first
#   program takes numbers 0 to BLOCK - 1, the second the next ones. `.to(tl.int64)`: 32 bits count to two billion
#   only.
# - `keep` is false for numbers behind the end, which the last program would touch otherwise: `mask=keep` skips them,
#   and `other=0.0` stands in for them.
# - `tl.load` reads BLOCK numbers from memory at once, and `.to(tl.float32)` makes 16-bit numbers (fp16 and bf16 are
#   two kinds) exact enough to compute with.
# - the formula is written as it is on paper, for all BLOCK numbers; nothing of it touches memory.
# - `tl.store` writes the results, rounded to the type of `y` (`element_ty`). So two numbers are read and one is
#   written for each result: it cannot be done with less.
#
# Below it in the file stands a second kernel for the gradient. Change the first. In the top folder of a checkout,
# this writes the same formula another way (`kernels/` is imported as `minillava.kernels`):
#
# ```
# sed -i 's|y = gate / (1.0 + tl.exp(-gate)) \* up|y = gate * tl.sigmoid(gate) * up|' kernels/swiglu.py
# ```
#
# Test it: without a GPU an interpreter runs the kernel, on random numbers of many shapes and types. Its error must be
# at most twice that of plain PyTorch, both against 64-bit numbers. It takes under a minute and ends with "passed".
#
# ```
# python -m pytest tests/kernels/test_swiglu.py
# ```
#
# (Forget `* up` in the change and the test fails.) Measure it, beside PyTorch and, where it is installed, Liger, a
# library of such kernels; `--no-compile` leaves out PyTorch's own compiler, which takes a while. Without a GPU sizes
# are tiny and PyTorch's code runs in the kernel's place, so the figures then say only that the bench works:
#
# ```
# python -m bench.report swiglu --no-compile
# ```
#
# `git checkout kernels/swiglu.py` undoes it.
