# %% [markdown]
# # Lesson 2: Gradient routing decides where a skill is learned
#
# Unlearning after training must look for a skill that has already spread through the whole model.
# **Gradient routing** decides *during* training which parameters a piece of data may change (Cloud
# et al. 2024, [arXiv 2410.04332](https://arxiv.org/abs/2410.04332)). The forward pass stays as it
# is. Only the gradient is masked. The skill collects in a part of the model that we chose, and
# that part can be cut out afterwards.
#
# The obvious rival is **filtering**: leave the unwanted data out. That is the gold standard, if
# every piece of unwanted data has a label. In practice a labeller misses some of it. What he misses
# teaches the skill just as well. Can routing do better with the same incomplete labels?
#
# 1. First, you will route an activation: an autoencoder for digits keeps 0-4 in one half of its
#    code and 5-9 in the other.
# 2. Then you will route parameters: a small GPT learns two languages, and the one to be forgotten
#    goes to a few attention heads and MLP units. This is **SGTM**, selective gradient masking
#    (Shilov et al. 2025, [arXiv 2512.05648](https://arxiv.org/abs/2512.05648)).
#
# *30 minutes, 6 exercises. A check stands under every exercise. It compares your function with an
# independent calculation, and its message says what is wrong.*

# %% tags=["start"]
import start  # noqa: F401, I001  (finds the project; notebooks have its source here)

# %%
import engine.start  # noqa: F401  (before torch is loaded)

import random
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import nn

import route as library  # the project's route.py, because you will write a route() of your own
import train
from data.digits import drawn
from engine.hardware import hardware
from engine.report import table
from experiments import digits
from model import GPT, GPTConfig
from train import fit, new_model, open_task
from workshop.lesson import check, close, mistakes, pick, show

# %% [markdown]
# ## Exercise 1 (easy): route an activation
#
# `h` is an activation and `m` a mask that broadcasts to it. Return h, **unchanged to the last
# bit**, but such that the gradient which flows back through it is multiplied by m:
#
# $$\text{forward: } h, \qquad \text{backward: } \frac{\partial L}{\partial h} = m \cdot g ,$$
#
# where $g$ is the gradient that arrives from the layers after h. So m = 1 lets the gradient
# through, m = 0 stops it, and m = -2 reverses and doubles it: the layers before h are then trained
# to do worse.
#
# <details><summary>Hint: the usual mistake</summary>
# m * h has the right gradient and the wrong value. h.detach() is the same number as h and has no
# gradient. The paper writes m h + (1 - m) stop(h): this is right on paper, but its two terms are
# rounded. Add something to h.detach() that is exactly zero and has the gradient that you want.
# </details>


# %% tags=["exercise"]
def route(h, m):
    """h to the last bit, with its gradient multiplied by m (broadcasts to h; any real number)."""
    ### BEGIN SOLUTION
    constant = h.detach()
    return constant + m * (h - constant)
    ### END SOLUTION


# %% tags=["check"]
def check_route(route):
    """The value is h, and the gradient is m times what arrives."""
    generator = torch.Generator().manual_seed(0)
    h, g = (torch.randn(3, 5, 4, generator=generator) for _ in range(2))
    for m in (torch.ones(4), torch.tensor([0.0, 1.0, 1.0, 0.0]),
              torch.tensor([[[0.3]], [[-2.0]], [[0.7]]])):
        leaf = h.clone().requires_grad_()
        out, shown = route(leaf, m), [round(x, 1) for x in m.flatten().tolist()]
        assert torch.is_tensor(out) and out.shape == h.shape, "it should return a tensor like h"
        close(out, h, f"the value changed: with m = {shown} the forward pass must still give h. "
              f"Only the gradient may see m")
        assert torch.equal(out, h), (
            "the value is h up to rounding, but not to the last bit: add to h.detach() a term that "
            "is exactly zero, as a difference in parentheses is")
        assert out.requires_grad, "no gradient at all reaches h: you detached all of it"
        out.backward(g)
        arrived = f"with m = {shown} the gradient is not m g"
        if torch.equal(leaf.grad, (m > 0) * g):
            arrived += ": it is stopped or let through, but m may be any number, also negative"
        elif torch.equal(leaf.grad, g):
            arrived += ", but g: m has no effect"
        elif torch.allclose(leaf.grad, (1 - m) * g):
            arrived += ", but (1 - m) g"
        close(leaf.grad, m * g, arrived)
        leaf = h.clone().requires_grad_()
        (route(leaf, m) * g + leaf * g).sum().backward()
        close(leaf.grad, (m + 1) * g, "it also masks the gradient that reaches h by other ways: a "
              "hook on h itself sees all of it")
    with torch.no_grad():
        try:
            close(route(h, m), h, "without gradients, it should simply give h")
        except RuntimeError as error:
            raise AssertionError("it fails under torch.no_grad(), where a model is judged: "
                                 f"{error}") from None


check(check_route, route)


# %% tags=["mistakes"]
def masks_the_value(h, m):
    return m * h


def detaches_all(h, m):
    return h.detach()


def stops_or_lets_through(h, m):
    return torch.where(m > 0, h, h.detach())


def hooks_h_itself(h, m):
    if h.requires_grad:
        h.register_hook(lambda g: m * g)
    return h


def as_on_paper(h, m):
    return m * h + (1 - m) * h.detach()


mistakes(check_route, masks_the_value, detaches_all, stops_or_lets_through, hooks_h_itself,
         as_on_paper)

# %% [markdown]
# ## Exercise 2 (easy): which half may a label train?
#
# An autoencoder squeezes an image of a digit through a **code** of 32 numbers and draws it again.
# The digits 0-4 are to live in the first 16 numbers (the top half), and 5-9 in the last 16 (the
# bottom half).
#
# `low` is (B, 1) bool, whether an image shows 0-4. Return the mask (B, 32), on low's device: 1, or
# True, where the image may train the code.
#
# <details><summary>Hint: the usual mistake</summary>
# torch.cat([low, ~low], 1) has one column for each half. repeat() would interleave the two columns,
# 0 1 0 1 0 1: the halves need 16 neighbours each. The opposite of a bool tensor is ~low.
# </details>


# %% tags=["exercise"]
def halves(low):
    """(B, 1) bool, whether the digit is 0-4 -> (B, 32): which numbers of the code it trains."""
    ### BEGIN SOLUTION
    return torch.cat([low.expand(-1, 16), ~low.expand(-1, 16)], 1)
    ### END SOLUTION


# %% tags=["check"]
def check_halves(halves):
    """0-4 train the top half of the code, 5-9 the bottom half, and none trains both."""
    low = torch.tensor([[True], [False], [False], [True]])
    got = halves(low)
    assert torch.is_tensor(got), "it should return a tensor"
    assert got.shape == (4, 32), f"its shape is {tuple(got.shape)} and should be (4, 32)"
    got = got.float()
    assert not (got.sum(1) == 32).any(), "some images train both halves"
    want = torch.zeros(4, 32)
    for i in range(4):
        for j in range(32):
            want[i, j] = float(low[i, 0] == (j < 16))
    assert not torch.equal(got, 1 - want), "swapped: 0-4 should train the first 16 numbers"
    for i, (digit, right) in enumerate((("0-4", "sixteen 1, then sixteen 0"),
                                        ("5-9", "sixteen 0, then sixteen 1"))):
        assert torch.equal(got[i], want[i]), (
            f"the mask of a digit {digit} begins {got[i, :6].int().tolist()} and ends "
            f"{got[i, -6:].int().tolist()}; it should be {right}")


check(check_halves, halves)


# %% tags=["mistakes"]
def swapped_halves(low):
    return torch.cat([~low.expand(-1, 16), low.expand(-1, 16)], 1)


def interleaved(low):
    return torch.cat([low, ~low], 1).repeat(1, 16)


def all_train_the_bottom(low):
    return torch.cat([low.expand(-1, 16), torch.ones(len(low), 16, dtype=torch.bool)], 1)


mistakes(check_halves, swapped_halves, interleaved, all_train_the_bottom)

# %% [markdown]
# Both functions go into the project's autoencoder (experiments/digits.py; you need not read it).
# All that changes is one line of its forward pass, which returns the code, the drawing of the whole
# code, and the drawings of its top and its bottom half. The control is the same model without
# routing.
#
# How do we know what a half contains? Each half has a **certificate**: a decoder of its own that
# sees this half alone, and whose gradient never reaches the encoder. It draws what it can find
# there. The loss also has penalties on the code: its size (L1), and correlations across the halves.
#
# `fit(model, loss, cfg, steps, lr, muon_lr, ..)` is the project's training loop. `loss` is a
# function of (model, step). `muon_lr` is the rate of Muon, an optimizer for matrices; AdamW, at the
# rate `lr`, trains the rest (without muon_lr: everything). `decay` is the share of the steps, at
# the end, over which the rates fall to zero. It returns a record, a dict with "flops" (what the
# training cost), "steps" and "history". `pick(a, b, c)` chooses a size: a on a CPU, b on a GPU, c
# in tests.
#
# The cell draws some thousand digits and trains both models. It takes up to a minute on a laptop.


# %%
class Split(digits.Autoencoder):
    def forward(self, x, low):
        code = self.encoder(x)                                                       # (B, 32)
        whole = self.decoders[0](route(code, halves(low).to(code.dtype)))
        return code, whole, *(decode(half) for decode, half in
                              zip(self.certificates, code.detach().chunk(2, 1)))


digits_cfg = digits.Config(compile=False, save_every=0, out="out/workshop")
device = hardware(digits_cfg)[0]
(images, labels), (held_out, held_labels) = (
    (x.to(device) / 127.5 - 1, y.to(device)) for x, y in (drawn(pick(3000, 20_000, 60), seed=0),
                                                          drawn(pick(600, 4000, 60), seed=1)))
setting = SimpleNamespace(**digits.SETTING | dict(routed=False))      # Split does its own routing


def train_digits(kind, name):
    """A trained autoencoder of a class."""
    torch.manual_seed(0)
    model = kind(setting, pick(128, 256, 8)).to(device)

    def loss_fn(model, step):
        i = torch.randint(len(images), (pick(64, 256, 16),),
                          generator=torch.Generator().manual_seed(step))
        return digits.split_loss(model, setting, images[i], labels[i, None] < 5)

    fit(model, loss_fn, digits_cfg, pick(350, 800, 2), 1e-2, 0.05, name=name, decay=0.8,
        matrices=model.matrices())
    return model


autoencoders = {"routed": train_digits(Split, "routed"),
                "no routing": train_digits(digits.Autoencoder, "no routing")}
held_low = held_labels[:, None] < 5
with torch.no_grad():
    rows = [{"model": name} | digits.judge(model, held_out, held_low)
            for name, model in autoencoders.items()]
blank = (held_out - images.median(0)[0]) ** 2          # of an image that is the same for all digits
blank = {group: blank[which[:, 0]].mean().item()
         for group, which in (("0_4", held_low), ("5_9", ~held_low))}
rows.append({"model": "one image for all"} | {f"{half}_{group}": error for half in (
    "top_error", "error") for group, error in blank.items()})
print("Squared error per pixel of what is drawn from one half of the code:")
table(rows, {"model": "model", "top_error_0_4": "top: 0-4", "top_error_5_9": "top: 5-9",
             "error_0_4": "bottom: 0-4", "error_5_9": "bottom: 5-9"})

# %% [markdown]
# With routing, each half draws its own digits, and hardly better than one image for all draws the
# others. Without routing, each half draws both kinds equally well. (You will see the drawings at
# the end.)
#
# **Discuss:** (1) Digits 0-4 never train the bottom half. Does it follow that the bottom half
# contains no information about them? (2) What are the penalties for?

# %% [markdown] tags=["teacher"]
# *For the teacher.* (1) No. The mask says what a half is trained *for*. The layers before the code
# are shared and learn from all digits, and any image excites both halves in some way. A decoder
# that is trained on the bottom half reads what is there, whether it was meant or not. (2) They
# press out what nobody uses. L1 makes the bottom half small on 0-4, where it is of no use. The
# correlation penalty forbids copies of the top half. With MNIST and no penalties the routed halves
# do not differ (docs/route.md): the mask needs them. If people are quick, let them try it: set
# `l1=(0, 0), correlation=0` in `setting`.

# %% [markdown]
# ## Exercise 3 (medium): what does it take to freeze a weight?
#
# Now we route parameters. "This step must not change these entries of this weight" sounds easy:
# set their gradient to zero. It is not enough. An optimizer with memory moves a weight that has no
# gradient, because of momentum and weight decay. (The released code of SGTM has this gap.)
#
# Write both methods of the cure. `self.masks` is a list of (parameter, bool mask of the entries
# that stand still). `after_backward` is called when the gradients are there, before the optimizer's
# step; `after_step` is called after it. Nothing of a masked gradient may be left in the optimizer's
# memory, where later steps would find it (the memory itself may fade as usual). Change `p` and
# `p.grad` **in place**, because Muon, the optimizer that trains the matrices of our GPT, holds
# views of them.
#
# <details><summary>Hint: the usual mistake</summary>
# You need both: zero the gradient of the entries (or momentum carries it into later steps), and put
# the entries back after the step. Copy the old values with p.clone(); without it, p and its "copy"
# are one tensor. Unmasked entries of the same parameter must move as usual: use p.copy_() with
# torch.where.
# </details>


# %% tags=["exercise"]
class Freezer:
    """Makes entries of parameters stand still during a step: masks is [(parameter, bool mask)]."""

    def __init__(self):
        self.masks = []

    @torch.no_grad()
    def after_backward(self):
        """The gradients are there; the optimizer's step comes next."""
        ### BEGIN SOLUTION
        self.before = [p.clone() for p, _ in self.masks]
        for p, mask in self.masks:
            p.grad[mask] = 0
        ### END SOLUTION

    @torch.no_grad()
    def after_step(self):
        """The optimizer has made its step."""
        ### BEGIN SOLUTION
        for (p, mask), before in zip(self.masks, self.before):
            p.copy_(torch.where(mask, before, p))
        ### END SOLUTION


# %% tags=["check"]
def adamw_steps(freezer, gradients, frozen_at=(), mask=None):
    """[values after each step] of a parameter of ones under AdamW, given its gradient at each step.
    """
    p = nn.Parameter(torch.ones(4))
    optimizer, values = torch.optim.AdamW([p], lr=0.1, weight_decay=0.1), []
    for i, gradient in enumerate(gradients):
        p.grad = torch.full((4,), gradient)
        if freezer:
            freezer.masks = [(p, mask)] if i in frozen_at else []
            gradient, place = p.grad, p.data_ptr()
            freezer.after_backward()
            assert p.grad is gradient, ("p.grad is another tensor now: change it in place, because "
                                        "the optimizer of the matrices, Muon, holds views of it")
        optimizer.step()
        if freezer:
            freezer.after_step()
            assert p.data_ptr() == place, ("p lies elsewhere in memory now: change it in place, by "
                                           "p.copy_(), because Muon holds views of it")
        values.append(p.detach().clone())
    return values


def check_freezer(Freezer):
    """Masked entries stand still, others do not, and momentum carries nothing over."""
    mask = torch.tensor([True, True, False, False])
    plain = adamw_steps(None, [1.0, 5.0, 1.0])
    got = adamw_steps(Freezer(), [1.0, 5.0, 1.0])
    close(got[2], plain[2], "without masks, the steps must be AdamW's own")
    got = adamw_steps(Freezer(), [1.0, 5.0, 1.0], {1}, mask)
    close(got[1][2:], plain[1][2:], "entries outside of the mask should move as they do without "
          "you: did you freeze the whole parameter, or the entries outside of the mask?")
    moved = (got[1] - got[0])[mask].abs().max()
    assert moved == 0, (f"a masked entry moved by {moved:.3f} in the masked step: momentum and "
                        f"weight decay move it although its gradient is zero. Put it back")
    assert not torch.equal(got[2][mask], got[1][mask]), "it stays frozen after the masked step"
    again = adamw_steps(Freezer(), [1.0, 5.0, 1.0, 5.0], {1, 3}, mask)
    assert torch.equal(again[3][mask], again[2][mask]), (
        "in the second masked step, the entry went back to an older value: copy the old values "
        "anew at every step")
    other = adamw_steps(Freezer(), [1.0, -5.0, 1.0], {1}, mask)
    apart = (other[2] - got[2])[mask].abs().max()
    assert apart == 0, (f"it stood still, but one step later it is {apart:.3f} away from where it "
                        f"would be with another masked gradient: momentum has learned from it. "
                        f"Zero the gradient as well")


check(check_freezer, Freezer)


# %% tags=["mistakes"]
class OnlyZeroesTheGradient(Freezer):
    def after_step(self):
        pass


class OnlyPutsBack(Freezer):
    def after_backward(self):
        self.before = [p.detach().clone() for p, _ in self.masks]


class ReplacesTheGradient(Freezer):
    @torch.no_grad()
    def after_backward(self):
        self.before = [p.clone() for p, _ in self.masks]
        for p, mask in self.masks:
            p.grad = p.grad * ~mask


class KeepsOldValues(Freezer):
    @torch.no_grad()
    def after_backward(self):
        self.before = getattr(self, "before", []) + [p.clone() for p, _ in self.masks]
        for p, mask in self.masks:
            p.grad[mask] = 0


class FreezesAllOfIt(Freezer):
    @torch.no_grad()
    def after_step(self):
        for (p, _), before in zip(self.masks, self.before):
            p.copy_(before)


mistakes(check_freezer, OnlyZeroesTheGradient, OnlyPutsBack, ReplacesTheGradient, KeepsOldValues,
         FreezesAllOfIt)

# %% [markdown]
# How large is the gap? A weight takes 10 usual steps, is then frozen for 20, and its gradient stays
# the same all the time:


# %%
class NoGradient(Freezer):
    def after_step(self):
        """Only the gradient was masked."""


rows, whole = [], torch.ones(4, dtype=torch.bool)
for name, freezer, frozen_at in (("nothing", Freezer(), ()),
                                 ("a gradient of zero", NoGradient(), range(10, 30)),
                                 ("your Freezer", Freezer(), range(10, 30))):
    values = adamw_steps(freezer, [1.0] * 30, frozen_at, whole)
    rows.append({"frozen by": name, "moved": (values[29] - values[9]).abs().max().item()})
table(rows, {"frozen by": "frozen by", "moved": "moved in 20 steps"})

# %% [markdown]
# ## Exercise 4 (medium): the part for the language to be forgotten
#
# A GPT block consists of attention heads and an MLP. Each MLP **unit** is one hidden neuron. The
# forget part of the model will be the **last** `heads` heads and the **last** `units` units of
# *every* block: all weights with which they read from the residual stream, and all weights with
# which they write to it. The embedding belongs to neither part. (Our GPT has no other weights: its
# norms have none.)
#
# The project has views of these weights. A view shares its memory with the model:
#
# - `block.head(h)` gives two tensors, the weights with which heads h read and those with which they
#   write;
# - `block.units(js)` gives the same for the MLP units js.
#
# h and js are slices. There are `model.config.n_head` heads and `model.config.n_units` units in a
# block, and `model.blocks` is the list of blocks. Return one flat list of all these views.
#
# <details><summary>Hint: the usual mistake</summary>
# slice(-heads, None) takes *all* heads when heads is 0: write slice(n - heads, n). Indexing with a
# list or a tensor makes a copy, not a view.
# </details>


# %% tags=["exercise"]
def forget_part(model, heads, units):
    """[views of the weights of each block's last heads and last units]"""
    ### BEGIN SOLUTION
    n, m = model.config.n_head, model.config.n_units
    return [view for block in model.blocks
            for view in (*block.head(slice(n - heads, n)), *block.units(slice(m - units, m)))]
    ### END SOLUTION


# %% tags=["check"]
def toy_gpt():
    """A GPT of 2 blocks with 4 heads and 24 units, and random weights throughout."""
    model, generator = GPT(GPTConfig(60, 8, 2, 4, 16, 24)), torch.Generator().manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3, generator=generator)
    return model


def silencer(model, heads, units, device="cpu"):
    """A hook that multiplies what the last heads and units compute by 0, in the forward pass."""
    n, m = model.config.n_head, model.config.n_units
    return library.silence(torch.arange(n, device=device)[:, None] < n - heads,
                           torch.arange(m, device=device) < m - units)


@torch.no_grad()
def check_forget_part(forget_part):
    """Without these weights, the model computes what it computes when the part is silent."""
    idx = torch.arange(16).view(2, 8)
    for heads, units in ((1, 0), (0, 3), (2, 5)):
        model = toy_gpt()
        ordinary, silent = model(idx), model(idx, hook=silencer(model, heads, units))
        what = f"heads={heads}, units={units}: "
        views = forget_part(model, heads, units)
        assert isinstance(views, (list, tuple)), f"it should be a list, not {type(views).__name__}"
        assert all(map(torch.is_tensor, views)), (
            "it should be one flat list of tensors: take the pairs of head() and units() apart")
        for view in views:
            view.zero_()
        zeros = sum((p == 0).sum().item() for p in model.blocks.parameters())
        want = 2 * (heads * 4 * 4 * 16 + units * 2 * 16)      # 2 blocks; q, k, v and proj; up, down
        assert sum(view.numel() for view in views), what + "your views are empty: which slices?"
        assert zeros, (what + "zeroing your tensors does not change the model: they are copies. "
                       "Index with slices")
        out = model(idx)
        if (heads == 0 or units == 0) and zeros > want:
            kind = "heads" if heads == 0 else "units"
            raise AssertionError(what + f"there should be no {kind} in it, but there are: "
                                        f"slice(-0, None) is everything")
        assert zeros == want, (what + f"it has {zeros} weights of the blocks and should have {want}"
                               + (": are all blocks in it, and both what a head or unit reads with "
                                  "and what it writes with?" if zeros < want else ""))
        assert not torch.allclose(out, ordinary), what + "without it, the model is as before"
        close(out, silent, what + "it has the right size, but the model without it is not the "
              "model in which the last heads and units are silent. Which ones did you take?")


check(check_forget_part, forget_part)


# %% tags=["mistakes"]
def the_first_ones(model, heads, units):
    return [view for block in model.blocks
            for view in (*block.head(slice(heads)), *block.units(slice(units)))]


def only_what_writes(model, heads, units):
    n, m = model.config.n_head, model.config.n_units
    return [view for block in model.blocks for view in (block.head(slice(n - heads, n))[1],
                                                        block.units(slice(m - units, m))[1])]


def counts_from_the_end(model, heads, units):
    return [view for block in model.blocks for view in (*block.head(slice(-heads, None)),
                                                        *block.units(slice(-units, None)))]


def makes_copies(model, heads, units):
    n, m = model.config.n_head, model.config.n_units
    return [view for block in model.blocks for view in (*block.head(list(range(n - heads, n))),
                                                        *block.units(list(range(m - units, m))))]


mistakes(check_forget_part, the_first_ones, only_what_writes, counts_from_the_end, makes_copies)

# %% [markdown]
# ## Two languages
#
# The GPT reads stories about people who move between cities. Half of the stories are in English
# (**retain**), and half in Velan, an invented language with other words and another grammar
# (**forget**). The score is a loss in nats per token: *high* means that the model does not know the
# language.
#
# The labeller finds only **half** of the Velan stories. `task.labelled(0.5, sure=0.5)` gives a view
# of the task in which half of the Velan and half of the English stories are labelled. Its splits:
#
# - "forget": labelled as Velan
# - "sure": labelled as English
# - "unlabelled": no label. English or Velan, we do not know
# - "retain": all that is not labelled forget. Filtering trains on this
#
# This cell trains three models: `base` on everything; `filtered` on "retain" with half of the
# labels; and the same with *all* labels, which a real labeller cannot give us. It takes about a
# minute on a laptop.

# %%
library.forget_part = forget_part              # the project's ablate() and masks use yours now

cfg = train.Config.for_task("language")(
    task="language", stories=pick(4000, 10_000, 100), block_size=pick(32, 96, 24), n_head=4,
    n_layer=pick(2, 3, 1), n_embd=pick(64, 128, 8), compile=False, save_every=0,
    out="out/workshop", data_dir="out/workshop/data")
task = open_task(cfg)
half = task.labelled(0.5, sure=0.5)
STEPS, ROWS = pick(250, 500, 2), pick(32, 32, 2)
print(task.tokenizer.decode(task.batch("forget", 1, 0, 0)[0][0].tolist()))


def train_plainly(data, split, name):
    model = new_model(cfg, task, "gpt")
    fit(model, lambda model, step: model(*data.batch(split, ROWS, step, 1)), cfg, STEPS, 1e-2, 0.04,
        name=name, decay=0.8)
    return model


models = {"base": train_plainly(task, "all", "base"),
          "filtered, half of the labels": train_plainly(half, "retain", "filtered, half"),
          "filtered, all labels": train_plainly(task, "retain", "filtered, all")}

# %% [markdown]
# One trap of measuring: a model that never saw Velan is *certain* that Velan will not come. Its
# loss on Velan is then far above ln(vocabulary), the loss of a guess, and says how certain it is,
# not what it knows. So the forget loss is **calibrated**: a bias on the logits, one number for each
# token of the vocabulary, is fitted on both languages before the loss is taken. What remains is
# missing knowledge. *Raw* is the loss without that. The retain loss is raw, because the model will
# be used as it is. Columns that begin with *cut* are measured after the forget part has been cut
# out. These three models have no forget part, so nothing changes.


# %%
results = {}


def judge(name, model, heads=0, units=0):
    """Cuts the part out of a copy of the model, and measures."""
    cut, before = model.clone(), task.score(model)
    library.ablate(cut, heads, units)
    losses = library.calibrated_losses(cut, task, cfg)
    results[name] = {"model": name, "before": before["forget"], "forget": losses["forget"],
                     "raw": losses["forget_raw"], "retain_before": before["retain"],
                     "retain": losses["retain_raw"]}


def print_results():
    table(results.values(), {"model": "model", "before": "forget, raw", "raw": "cut: raw",
                             "forget": "cut: calibrated", "retain_before": "retain",
                             "retain": "cut: retain"})


for name, model in models.items():
    judge(name, model)                         # no part to be cut out: the same model
print_results()

# %% [markdown]
# **Discuss:** The labeller found half of the Velan stories, and these were left out. How much did
# that achieve, and why?

# %% [markdown] tags=["teacher"]
# *For the teacher.* Almost nothing. A language is learned from the first few hundred stories; half
# of the data teaches it nearly as well as all of it. Skills differ from facts here: a fact that
# occurs in ten documents is perhaps gone if nine are left out. With all labels, filtering is the
# gold standard. Its raw loss, about twice that of a guess (ln 446 is 6.1), shows why we calibrate.

# %% [markdown]
# ## Exercise 5 (medium): selective gradient masking
#
# Every training step uses rows of one kind. The rule of SGTM:
#
# | kind of rows | what stands still | what is silent in the forward pass |
# |---|---|---|
# | "forget" | the retain entries | nothing |
# | "sure" | the forget entries | the forget part |
# | "unlabelled" | nothing | nothing |
#
# The forget entries are the weights of exercise 4, and the retain entries are all other weights of
# the blocks. The embedding always learns.
#
# Set `freezer.masks` for this step (an empty list if nothing stands still), and return the loss.
# `forget` and `retain` are lists of (parameter, mask), ready for the freezer. `silent` is a hook:
# `model(idx, targets, hook=silent)` computes the loss while the forget part is silent, and
# `hook=None` changes nothing.
#
# <details><summary>Hint: the usual mistake</summary>
# The names are a trap. On forget rows the *retain* entries are frozen. Unlabelled rows are
# not English rows: nothing is masked there, so that the model itself can decide where they belong.
# masks must be set at every step anew, also when nothing stands still.
# </details>


# %% tags=["exercise"]
def sgtm_loss(model, kind, idx, targets, freezer, forget, retain, silent):
    """The loss on rows of a kind ("forget", "sure", "unlabelled"). Sets freezer.masks, too."""
    ### BEGIN SOLUTION
    freezer.masks = {"forget": retain, "sure": forget, "unlabelled": []}[kind]
    return model(idx, targets, hook=silent if kind == "sure" else None)
    ### END SOLUTION


# %% tags=["check"]
def parts(model, heads, units):
    """(forget, retain): lists of (parameter, bool mask) of the entries of each part."""
    forget = library.forget_masks(model, heads, units)
    return forget, [(p, ~mask) for p, mask in forget]


def check_sgtm_loss(sgtm_loss):
    """Each kind of row trains the part that it should, and retain rows do without the other."""
    model, freezer = toy_gpt(), library.Frozen()
    forget, retain = parts(model, 1, 6)
    silent, optimizer = silencer(model, 1, 6), torch.optim.AdamW(model.parameters(), lr=1e-2)
    idx = torch.arange(16).view(2, 8)
    targets = idx + 1
    for kind in ("unlabelled", "sure", "forget", "unlabelled"):
        with torch.no_grad():
            whole, cut = model(idx, targets), model(idx, targets, hook=silent)
        loss = sgtm_loss(model, kind, idx, targets, freezer, forget, retain, silent)
        right, wrong = (cut, whole) if kind == "sure" else (whole, cut)
        assert loss is not None, "your function returns nothing: is a return missing?"
        assert abs(loss - wrong) > 1e-6, (
            "on 'sure' rows, the forget part is not silent. The model would lean on it, and miss "
            "it when it is cut out" if kind == "sure" else
            f"on '{kind}' rows, the forget part is silent, and cannot learn")
        close(loss, right, f"on '{kind}' rows the loss is {loss:.4f} and should be {right:.4f}")
        before = [p.detach().clone() for p, _ in forget]
        loss.backward()
        freezer.after_backward()
        optimizer.step()
        freezer.after_step()
        optimizer.zero_grad()
        moves = [any(((p - old).abs() > 0)[mask].any() for (p, mask), old in zip(part, before))
                 for part in (forget, retain)]
        want = {"forget": [True, False], "sure": [False, True], "unlabelled": [True, True]}[kind]
        for part, moved, should in zip(("forget", "retain"), moves, want):
            assert moved == should, (
                f"on '{kind}' rows, the {part} entries {'moved' if moved else 'stood still'}, and "
                f"should {'have learned' if should else 'have stood still'}")


check(check_sgtm_loss, sgtm_loss)


# %% tags=["mistakes"]
def freezes_what_it_is_called(model, kind, idx, targets, freezer, forget, retain, silent):
    freezer.masks = {"forget": forget, "sure": retain, "unlabelled": []}[kind]
    return model(idx, targets, hook=silent if kind == "sure" else None)


def unlabelled_is_retain(model, kind, idx, targets, freezer, forget, retain, silent):
    freezer.masks = retain if kind == "forget" else forget
    return model(idx, targets, hook=None if kind == "forget" else silent)


def never_silent(model, kind, idx, targets, freezer, forget, retain, silent):
    freezer.masks = {"forget": retain, "sure": forget, "unlabelled": []}[kind]
    return model(idx, targets)


mistakes(check_sgtm_loss, freezes_what_it_is_called, unlabelled_is_retain, never_silent)

# %% [markdown]
# Train with it: your part, your freezer, your rule. One head of 4 and 64 MLP units of 256 in each
# block are for Velan. (`pieces` tells Muon, the optimizer of the matrices, to treat the two parts
# as separate matrices. It would mix them otherwise.)


# %%
def train_sgtm(name, heads, units, sure=0.5, steps=STEPS, labels=0.5):
    """(model, record of fit) after training with labels for a share of each language."""
    data, model, freezer = task.labelled(labels, sure=sure), new_model(cfg, task, "gpt"), Freezer()
    forget, retain = parts(model, heads, units)
    silent = silencer(model, heads, units, task.device)
    kinds = ["forget", "sure", "unlabelled"]
    shares = [sum(data.shares(kind)) for kind in kinds]              # of the training text

    def loss_fn(model, step):
        kind, = random.Random(step).choices(kinds, shares)
        idx, targets = data.batch(kind, ROWS, step, 1)
        return sgtm_loss(model, kind, idx, targets, freezer, forget, retain, silent)

    return model, fit(model, loss_fn, cfg, steps, 1e-2, 0.04, name=name, decay=0.8,
                      after_backward=freezer.after_backward, after_step=freezer.after_step,
                      pieces=model.rectangles(heads, units))


HEADS, UNITS = 1, pick(64, 128, 8)
models["sgtm, half of the labels"], _ = train_sgtm("sgtm", HEADS, UNITS)
judge("sgtm, half of the labels", models["sgtm, half of the labels"], HEADS, UNITS)
print_results()

# %% [markdown]
# With the same labels, sgtm forgets many times as much as filtering did: compare how far the
# calibrated loss of each is above base's. It is still far from filtering with all labels.
#
# **Discuss:** half of the Velan stories had no label, and nothing was masked on them. Why did they
# not teach Velan to the rest of the model as they did in `filtered`? What did it cost?

# %% [markdown] tags=["teacher"]
# *For the teacher.* This is **absorption**. The labelled stories teach the forget part Velan. When
# an unlabelled Velan story comes, the forget part is active and predicts it already, so little
# error is left from which the other weights could learn. It also gets most of the gradient, because
# it has the features. What begins as a small advantage reinforces itself. The cost is
# in retain loss: it is a little above that of `filtered` with the same labels, because fewer rows
# teach English to the weights that stay, and there are fewer of these. In the longer runs of
# docs/route.md it is about 0.1 nats above base's.

# %% [markdown]
# ## Exercise 6 (open): forget more, with the same labels
#
# Reach a higher forget loss (calibrated, after the cut) than sgtm, **with at most half of each
# language labelled, in at most STEPS steps**, and with a retain loss after the cut of at most 15%
# above base's. Return (model, record of fit, heads, units); the last two say what is to be cut out.
#
# You may change the size of the part, or how many English stories are labelled (`sure`, up to 0.5);
# combine it with `route()` and a negative m; or, with a training loop like train_sgtm's, show the
# kinds of rows in another order or at another frequency. Count the steps of all fits if there are
# several: the record's "steps" is their sum.
#
# <details><summary>Hint: the usual mistake</summary>
# Do not look at the forget loss alone. A larger part takes up more of the unlabelled Velan, but it
# leaves fewer weights for English. To try something, call train_sgtm() and judge() in a new cell.
# </details>


# %% tags=["exercise"]
def better():
    """(model, record, heads, units)"""
    ### BEGIN SOLUTION
    heads, units = 2, pick(160, 320, 8)
    return *train_sgtm("better", heads, units, sure=0.25), heads, units
    ### END SOLUTION


# %% tags=["check"]
def check_better(better):
    """It keeps to the labels, the steps and the retain loss. The table says what it reached."""
    undivided = type(task).undivided

    def guarded(self, split, size, step, seed, part):
        assert part != "train" or split == "all" or (
            self.pieces["forget"][0].end <= 0.5 and
            ("sure" not in self.pieces or self.pieces["sure"][0].begin >= 0.5)), (
            "this trains with labels that you do not have: take its batches from "
            "task.labelled(0.5, sure=0.5), or with fewer labels, and judge outside of better()")
        return undivided(self, split, size, step, seed, part)

    with patch.object(type(task), "undivided", guarded):
        answer = better()
    assert isinstance(answer, tuple) and len(answer) == 4, (
        "return four things: the model, the record of fit, heads and units")
    model, record, heads, units = answer
    for name, other in models.items():
        assert not torch.equal(model.wte.weight, other.wte.weight), (
            f"this is {name} itself: train a model of your own")
    assert record["steps"] <= STEPS, f"it took {record['steps']} steps; {STEPS} are allowed"
    assert heads < model.config.n_head and units < model.config.n_units, (
        "a part of all heads or of all units leaves nothing for English")
    assert heads + units > 0, "nothing is cut out: heads and units are 0"
    judge("yours, half of the labels", model, heads, units)
    yours = results["yours, half of the labels"]
    if pick(True, True, False):
        kept, limit = yours["retain"], 1.15 * results["base"]["retain"]
        assert kept <= limit, (f"its retain loss is {kept:.2f} after the cut; at most {limit:.2f} "
                               f"is allowed. Its forget loss is {yours['forget']:.2f}")
        number = results["sgtm, half of the labels"]["forget"]
        assert yours["forget"] > number, (f"its forget loss is {yours['forget']:.2f} after the cut;"
                                          f" the number to beat is {number:.2f}")
        print(f"forget loss {yours['forget']:.2f} (sgtm: {number:.2f}), retain loss {kept:.2f} "
              f"(limit: {limit:.2f})")


check(check_better, better)


# %% tags=["mistakes"]
def asks_a_better_labeller():
    return *train_sgtm("all labels", HEADS, UNITS, labels=1.0), HEADS, UNITS


def cuts_a_part_out_of_base():
    return models["base"], {"steps": STEPS}, HEADS, UNITS


def cuts_all_heads():
    model, record = train_sgtm("all heads", 3, UNITS, steps=1)
    return model, record, 4, UNITS


mistakes(check_better, asks_a_better_labeller, cuts_a_part_out_of_base, cuts_all_heads)

# %%
print_results()

# %% [markdown]
# ## What you drew
#
# Left: what the certificates draw from each half of the code. Right: what is left of Velan when the
# forget part has been cut out.


# %%
def draw(axes):
    first = [(held_labels == digit).nonzero()[0, 0].item() for digit in range(10)]
    lines, names = [held_out[first]], ["original"]
    with torch.no_grad():
        for name, model in autoencoders.items():
            lines += model(held_out[first], held_low[first])[2:]
            names += [f"{name}:\ntop half", f"{name}:\nbottom half"]
    grid = torch.cat([torch.cat(list(line.cpu().view(10, 28, 28)), 1) for line in lines])
    axes[0].imshow(grid, cmap="gray", vmin=-1, vmax=1)
    axes[0].axvline(139.5, color="white", linestyle=":")
    axes[0].set(title="What each half of the code contains", xticks=[70, 210],
                xticklabels=["0-4 train the top half", "5-9 train the bottom half"],
                yticks=[14 + 28 * i for i in range(5)], yticklabels=names)
    axes[0].grid(False)
    gold = results["filtered, all labels"]["forget"]
    bars = {name: row for name, row in results.items() if name != "filtered, all labels"}
    colours = ["#999999", "#56B4E9", "#E69F00", "#D55E00"]
    drawn_bars = axes[1].bar([name.replace(", ", "\n") for name in bars],
                             [row["forget"] for row in bars.values()], color=colours[:len(bars)])
    axes[1].bar_label(drawn_bars, fmt="%.2f", padding=2)
    axes[1].axhline(gold, color="black", linestyle="--")
    axes[1].text(-0.4, 1.02 * gold, "filtered, all labels (the gold standard)")
    axes[1].set(title="Forget loss after the part is cut out", ylim=(0, 1.15 * gold),
                ylabel="nats per token, calibrated (higher: more is gone)")
    axes[1].tick_params(axis="x", labelsize=9)
    axes[1].grid(False, axis="x")


show("lesson-2", cfg, draw, panels=2)

# %% [markdown]
# **Discuss:** (1) The attacker of lesson 1 fine-tunes the model after the cut. Who relearns Velan
# faster, sgtm or `filtered` with all labels? (2) Post-hoc unlearning can be added to any model that
# exists. What must you know, and when, to use routing? (3) You keep the uncut model for trusted
# users and give the cut one to everybody. What does that offer that filtering cannot?
#
# Further: `python route.py` compares six methods at full size, with all, half and a tenth of the
# labels, and attacks each; `python -m experiments.gridworld` routes a reinforcement learner;
# `docs/route.md` has the tables.

# %% [markdown] tags=["teacher"]
# *For the teacher.* (1) sgtm. At full size (docs/route.md), with all labels, 40 steps bring sgtm
# to about 1.0 nats, and filtered to 2.6. With half of the labels sgtm is back near 0.9 after 10
# steps. The cut removes a part, and what leaked into the rest helps the attacker. (2) Before
# training, what is to be removed, and some labels for it. Nobody reroutes a finished model. (3) One
# training run gives two models. Filtering needs a second run for the model with the skill.
