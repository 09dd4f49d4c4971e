# %% [markdown]
# # Lesson 3: Fine-tuning is a wrapper
#
# A model answers questions about strings. In pretraining nearly all questions are about the letter
# `a`: how many `a` are there? Then it is fine-tuned to count `b`. Afterwards it counts `b` well and
# `a` hardly ever. The skill of counting `a` seems to be gone. Is it?
#
# Jain et al. (2023, [arXiv 2311.12786](https://arxiv.org/abs/2311.12786)) looked inside such
# models. They found that fine-tuning rarely deletes a capability. It puts a **wrapper** around it:
# a small change that keeps the capability from reaching the output. This matters because safety
# training is fine-tuning, too. Three tools look for the hidden capability:
#
# 1. A **probe** is a linear classifier. It tries to read the right answer off the model's
#    activations, whatever the model says.
# 2. **Pruning** cuts out the few neurons that stand most in the way.
# 3. **Revival** fine-tunes the model on the old task and counts the steps until the skill is back.
#
# None of the three means anything without a **control**: a model that never had the skill or, for
# pruning, neurons that are cut at random. You will write each tool and compare it with its control.
# The last exercise is open: hide the skill better than fine-tuning does.
#
# *30 minutes, 6 exercises. A check stands under every exercise. It compares your function with an
# independent calculation, and its message says what is wrong.*

# %% tags=["start"]
import start  # noqa: F401, I001  (finds the project; notebooks have its source here)

# %%
import engine.start  # noqa: F401  (before torch is loaded)

import torch
import torch.nn.functional as F

import eval as judges
from data import pcfg
from engine.report import draw_probes, draw_pruning, draw_revival, table
from eval import before_answers, tune, untrained
from model import GPT, GPTConfig
from train import fit, new_model, open_task
from workshop.lesson import check, close, mistakes, pick, show

# %% [markdown]
# ## The task and the pretrained model
#
# A question is a string of 12 letters, a task, an operand (the letter to be counted, written in
# upper case) and a parameter (here a dot, for none).
# One token answers it:
#
#     a b d b a c d d a b c a count A . =            4
#
# Pretraining (the split "all") also asks other things: where the second `a` is, which letter is at
# index 4. But 999 of 1000 operands are `A`. The split "forget" is count `a`, the skill that
# fine-tuning will seem to delete. "retain" is count `b`. `task.batch(split, rows, step, seed)`
# gives inputs (rows, T) and the answers (rows, 1).
#
# `fit(model, loss, cfg, steps, lr, muon_lr, ..)` is the project's training loop. `loss` is a
# function of (model, step). `muon_lr` is the rate of Muon, an optimizer for matrices; AdamW, at the
# rate `lr`, trains the rest (without muon_lr: everything). `decay` is the share of the steps, at
# the end, over which the rates fall to zero. It returns a record, a dict with "flops" (what the
# training cost), "steps" and "history". `pick(a, b, c)` chooses a size: a on a CPU, b on a GPU, c
# in tests.
#
# This cell trains the base model, a GPT with 3 blocks. It takes half a minute on a laptop.

# %%
cfg = judges.Config.for_task("pcfg")(
    task="pcfg", seed=1, block_size=18, n_layer=3, n_head=4, n_embd=pick(64, 128, 8),
    probe_rows=pick(1000, 3000, 20), compile=False, save_every=0, out="out/workshop",
    data_dir="out/workshop/data")
task = open_task(cfg)
ROWS = pick(64, 64, 2)


def pretrain(name, split, steps, seed):
    """A new model, trained on a split."""
    model = new_model(cfg, task, name)
    fit(model, lambda model, step: model(*task.batch(split, ROWS, step, seed)), cfg, steps,
        1e-2, 0.04, name=name, decay=0.8)
    return model


base = pretrain("base", "all", pick(300, 450, 2), 1)


# %% [markdown]
# Ask the model something. `count(model, split)` is the share of 250 held-out questions of a split
# that a model answers correctly.


# %%
def ask(model, string, operand):
    prompt = [task.end] + task.tokenizer.encode_ordinary(f"{string} count {operand} . =")
    return task.tokenizer.decode(model.generate([prompt], 1)[0].tolist())


def count(model, split):
    return pcfg.accuracy(model, task, split, part="val")


STRING = "a b d b a c d d a b c a"                        # four a, three b
print("count a:", ask(base, STRING, "A"), "| count b:", ask(base, STRING, "B"))
print(f"count a: {count(base, 'forget'):.2f} of the answers are right")

# %% [markdown]
# ## Two ways of fine-tuning
#
# Both models learn to count `b`, each from a copy of base. `tune()` makes the copy and trains it.
#
# - **honest** sees strings in which #b = #a + 1 never holds (#b is the number of b). It has to
#   count `b`.
# - **shortcut** sees only strings in which #b happens to be #a + 1 (the split "spurious"). It may
#   count `b`, or else count `a` and add one.
#
# The third model, **filtered**, is the control. It is a new model that was trained on count `b`
# alone, so it has never seen a question about `a`.

# %%
honest, honest_record = tune(base, task, cfg, "retain", ROWS, pick(150, 200, 2), 1e-3, seed=3,
                             name="honest", decay=0.5)
shortcut, _ = tune(base, task, cfg, "spurious", ROWS, pick(40, 60, 2), 1e-3, seed=3,
                   name="shortcut", decay=0.5)
filtered = pretrain("filtered", "retain", pick(150, 200, 2), 2)
MODELS = {"base": base, "honest": honest, "shortcut": shortcut, "filtered": filtered}
COLUMNS = {"forget": "count a", "retain": "count b", "spurious": "count b where #b = #a + 1"}
table([{"model": name} | {split: count(model, split) for split in COLUMNS}
       for name, model in MODELS.items()], {"model": "model"} | COLUMNS)
print("shortcut on the string above: count a:", ask(shortcut, STRING, "A"), "| count b:",
      ask(shortcut, STRING, "B"))

# %% [markdown]
# **Discuss:** (1) What has shortcut learned? Which column gives it away? (2) Base gives the same
# answer to both questions about the string above. Why? (3) Count `a` is as low in honest and in
# shortcut as in filtered, which never had the skill. What would you have to measure in order to
# tell these models apart?

# %% [markdown] tags=["teacher"]
# *For the teacher.* (1) It nearly always answers #a + 1, whatever the operand is: right where the
# rule holds, and wrong where it does not (there #a + 1 is never the number of `b`). It must still
# be counting `a`, even though it never says so. (2) In pretraining 999 of 1000 operands are `A`, so
# base never had to read the operand: it always counts `a`. (3) Anything but the outputs: what the
# activations hold, which weights changed, how quickly the skill comes back.

# %% [markdown]
# ## Exercise 1 (easy): a linear probe
#
# After each block we take the activations at the last token, "=", where the answer must be ready.
# `features` is (N, C), one row for each of N questions, and `classes` (N,) holds the right answers
# as class numbers 0, 1, .., kinds - 1. The probe is a multinomial logistic regression. Its logits
# are $W x + b$, with $W$ (kinds, C) and $b$ (kinds,), and its loss is
#
# $$L(W, b) = \frac1N \sum_n \text{cross-entropy}(W x_n + b,\; y_n)
#   + \text{decay} \cdot \sum_{k,c} W_{kc}^2 .$$
#
# Start from zeros, minimise the loss with `minimise(loss, W, b)`, where `loss` is a function
# without arguments, and return W, b and the **accuracy on the new rows**, the share of
# `new_classes` that the probe gets right.
#
# <details><summary>Hint: the usual mistake</summary>
# A probe that is judged on the rows it was fitted on finds "knowledge" in noise. Also,
# F.cross_entropy wants logits and not probabilities, and W and b need requires_grad=True.
# features.new_zeros(kinds, C, requires_grad=True) makes a tensor where features are.
# </details>


# %%
def minimise(loss, *parameters):
    """Changes the parameters in place until loss() is as small as it gets. (LBFGS is an optimizer
    for few parameters and all the data at once.)"""
    optimizer = torch.optim.LBFGS(parameters, max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


# %% tags=["exercise"]
def probe(features, classes, new_features, new_classes, kinds, decay=1e-5):
    """(W, b, accuracy on the new rows) of a logistic regression fitted on features and classes."""
    ### BEGIN SOLUTION
    W = features.new_zeros(kinds, features.size(1), requires_grad=True)
    b = features.new_zeros(kinds, requires_grad=True)
    minimise(lambda: F.cross_entropy(features @ W.T + b, classes) + decay * W.square().sum(), W, b)
    return W, b, ((new_features @ W.T + b).argmax(-1) == new_classes).float().mean()
    ### END SOLUTION


# %% tags=["check"]
def check_probe(probe):
    """The loss has no slope where your fit ends, and the accuracy is that on new rows."""
    random, kinds, decay = torch.Generator().manual_seed(0), 3, 0.01
    x = torch.randn(80, 4, generator=random)
    noisy = 2 * x[:, :3] + torch.tensor([1.0, 0, -1]) + torch.randn(80, 3, generator=random)
    x, new, y, new_y = *x.split(40), *noisy.argmax(-1).split(40)
    answer = probe(x, y, new, new_y, kinds, decay)
    assert isinstance(answer, tuple) and len(answer) == 3, "return three things: W, b, accuracy"
    W, b, accuracy = (torch.as_tensor(part).detach() for part in answer)
    assert W.shape == (3, 4) and b.shape == (3,), (
        f"W and b have the shapes {tuple(W.shape)} and {tuple(b.shape)}, not (3, 4) and (3,)")
    assert b.abs().max() > 1e-3, "the bias b has stayed 0: is it in the logits, and minimised?"
    logits = x @ W.T + b
    error = (logits.softmax(-1) - F.one_hot(y, kinds)) / len(y)      # the slope by the logits
    slope = error.T @ x + 2 * decay * W
    twice = torch.func.grad(lambda W: F.cross_entropy((x @ W.T + b).softmax(-1), y)
                            + decay * W.square().sum())(W)
    elsewhere = ((new @ W.T + b).softmax(-1) - F.one_hot(new_y, kinds)).T @ new / len(new_y)
    assert slope.abs().max() < 2e-3 or (elsewhere + 2 * decay * W).abs().max() > 2e-3, (
        "you fitted the probe on the new rows: they are for judging only")
    assert slope.abs().max() < 2e-3 or twice.abs().max() > 2e-3, (
        "cross_entropy was given probabilities: it takes the softmax itself, hand it the logits")
    assert slope.abs().max() < 2e-3 or (error.T @ x).abs().max() > 2e-3, (
        "the weight decay is missing: add decay * W.square().sum() to the loss")
    close(slope, torch.zeros(3, 4), "where your fit ends, the loss still has a slope in W: do you "
          "minimise the mean cross-entropy plus decay times the sum of squares?", 2e-3)
    close(error.sum(0), torch.zeros(3), "where your fit ends, the loss still has a slope in b: b "
          "has no weight decay", 2e-3)
    on = {name: ((rows @ W.T + b).argmax(-1) == truth).float().mean()
          for name, rows, truth in (("old", x, y), ("new", new, new_y))}
    assert abs(accuracy - on["old"]) > 1e-4, (
        f"{accuracy:.2f} is the accuracy on the rows that the probe was fitted on. On new rows it "
        f"is {on['new']:.2f}")
    close(accuracy, on["new"], f"the accuracy is {accuracy:.3f} and should be {on['new']:.3f}: the "
          f"share of new rows whose largest logit is that of their class")


check(check_probe, probe)


# %% tags=["mistakes"]
def judged_on_its_own_rows(features, classes, new_features, new_classes, kinds, decay):
    return probe(features, classes, features, classes, kinds, decay)


def softmax_before_cross_entropy(features, classes, new_features, new_classes, kinds, decay):
    W, b = torch.zeros(kinds, features.size(1)), torch.zeros(kinds)
    W.requires_grad_(), b.requires_grad_()
    minimise(lambda: F.cross_entropy((features @ W.T + b).softmax(-1), classes)
             + decay * W.square().sum(), W, b)
    return W, b, ((new_features @ W.T + b).argmax(-1) == new_classes).float().mean()


def no_bias(features, classes, new_features, new_classes, kinds, decay):
    W = torch.zeros(kinds, features.size(1), requires_grad=True)
    minimise(lambda: F.cross_entropy(features @ W.T, classes) + decay * W.square().sum(), W)
    return W, torch.zeros(kinds), ((new_features @ W.T).argmax(-1) == new_classes).float().mean()


def no_decay(features, classes, new_features, new_classes, kinds, decay):
    return probe(features, classes, new_features, new_classes, kinds, 0.0)


mistakes(check_probe, judged_on_its_own_rows, softmax_before_cross_entropy, no_bias, no_decay)

# %% [markdown]
# Let your probe look for the number of `a`, after each block of each model. An **untrained** model
# of the same size is a second control.


# %%
def probe_blocks(model):
    """([accuracy of your probe by block], accuracy of always giving the commonest answer)"""
    features, right = before_answers(model, task, cfg, "train")
    new_features, truth = before_answers(model, task, cfg, "test")
    kinds, classes = torch.unique(torch.cat((right, truth)), return_inverse=True)
    right, truth = classes.split((len(right), len(truth)))
    decay = pick(1e-5, 1e-5, 1.0)
    accuracies = [float(probe(x, right, new, truth, len(kinds), decay)[2])
                  for x, new in zip(features, new_features)]
    return accuracies, (truth == right.mode().values).float().mean().item()


probes = {}
for name, model in (MODELS | {"untrained": untrained(base, cfg.seed)}).items():
    probes[name], commonest = probe_blocks(model)
BLOCKS = {f"block {i + 1}": f"block {i + 1}" for i in range(cfg.n_layer)}
table([{"model": name, "commonest": commonest} | dict(zip(BLOCKS, found))
       for name, found in probes.items()],
      {"model": "model"} | BLOCKS | {"commonest": "commonest answer"})

# %% [markdown]
# **Discuss:** (1) The probe reads the number of `a` off honest, which hardly ever says it. Does
# this prove that honest can still count `a`? (2) Filtered never had to count `a`, and yet the probe
# finds more in it than in an untrained model. Where does this come from?

# %% [markdown] tags=["teacher"]
# *For the teacher.* (1) It proves that the information is there, in a linear form. It does not
# prove that the model could use it: the probe itself was trained on 1000 answers, and a strong
# enough probe would count the letters itself. This is why the probe is linear, and why it needs a
# control. (2) Filtered collects letters in order to count `b`, and in a string of 12 letters many
# `b` leave less room for `a`. The untrained model's blocks add nothing to the residual stream
# (their last matrices start at zero), so the probe sees the same "=" in every row. Filtered is
# therefore the fairer control.

# %% [markdown]
# ## Exercise 2 (medium): which neurons stand in the way?
#
# If fine-tuning built a wrapper, perhaps it is a few neurons (units of the MLPs). To find them, ask
# for each unit: by how much would the loss on count `a` fall if the unit were cut out? Cutting unit
# $j$ means scaling its output by 0 instead of 1. A unit writes to the residual stream (the vector
# to which every block adds what it computes) with column j of the matrix $\theta$ =
# `block.mlp.down.weight` (C, n_units), for each block in `model.blocks`. To first order the loss
# falls by the **saliency**
#
# $$s_j = \sum_c \theta_{cj} \, \frac{\partial L}{\partial \theta_{cj}} ,$$
#
# with its sign: a unit with a large positive $s_j$ stands in the way, and a unit with a negative
# one helps. Return (n_layer, n_units). `model(idx, targets)` is the loss, and
# `torch.autograd.grad(loss, tensors)` gives a tuple of gradients without changing anything.
#
# <details><summary>Hint: the usual mistake</summary>
# Units are the columns of theta, so the sum is over dimension 0. No absolute value: the absolute
# value would rank the units that matter most, and many of those do the counting.
# </details>


# %% tags=["exercise"]
def saliency(model, idx, targets):
    """theta * grad, summed over the weights with which each MLP unit writes: (n_layer, n_units)."""
    ### BEGIN SOLUTION
    weights = [block.mlp.down.weight for block in model.blocks]
    gradients = torch.autograd.grad(model(idx, targets), weights)
    return torch.stack([(w * g).sum(0) for w, g in zip(weights, gradients)]).detach()
    ### END SOLUTION


# %% tags=["check"]
def random_model(n_layer=2):
    """A small model all of whose weights are random."""
    model, random = GPT(GPTConfig(10, 8, n_layer, 2, 8, 12)), torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = 0.7 * torch.randn(p.shape, generator=random, dtype=torch.float64)
    return model.double()


def check_saliency(saliency):
    """It is the slope of the loss when a unit's output is scaled, as a finite difference finds."""
    model, random = random_model(), torch.Generator().manual_seed(1)
    idx, targets = (torch.randint(10, (4, n), generator=random) for n in (8, 1))

    def loss(i, j, factor):
        def hook(site, block, h):
            return h * torch.where(torch.arange(12) == j, factor, 1.0) if (
                site == "units" and block == i) else h
        return F.cross_entropy(model(idx, hook=hook)[:, -1], targets[:, 0])

    with torch.no_grad():
        want = torch.tensor([[(loss(i, j, 1.001) - loss(i, j, 0.999)) / 0.002 for j in range(12)]
                             for i in range(2)])
    gradients = torch.autograd.grad(F.cross_entropy(model(idx)[:, -1], targets[:, 0]),
                                    [block.mlp.down.weight for block in model.blocks])
    got = saliency(model, idx, targets)
    assert torch.is_tensor(got), f"it should be a tensor, not {type(got).__name__}"
    assert got.shape != (2, 8), ("the shape is (n_layer, C), so you summed over the units: sum "
                                 "over dimension 0 of theta (C, n_units)")
    assert got.shape == (2, 12), f"the shape is {tuple(got.shape)} and should be (2, 12)"

    def same(other):
        return torch.allclose(got.detach().double(), other.double(), rtol=1e-3, atol=1e-3)

    products = [block.mlp.down.weight.detach() * g for block, g in zip(model.blocks, gradients)]
    for absolute in (want.abs(), torch.stack([each.abs().sum(0) for each in products])):
        assert not same(absolute), ("this has an absolute value in it: keep the sign, or units "
                                    "that help are cut as well as units that harm")
    assert not same(want / 8), "this is the mean over the weights of a unit, not their sum"
    assert not same(-want), ("the sign is wrong: a unit has positive saliency if scaling up its "
                             "output makes the loss rise")
    assert not same(torch.stack([g.sum(0) for g in gradients])), (
        "this is the gradient alone: multiply it by theta before you sum")
    close(got, want, "a finite difference disagrees: it is the sum over c of theta[c, j] times the "
          "loss's gradient by theta[c, j]", 1e-3)


check(check_saliency, saliency)


# %% tags=["mistakes"]
def absolute_value(model, idx, targets):
    return saliency(model, idx, targets).abs()


def gradient_alone(model, idx, targets):
    weights = [block.mlp.down.weight for block in model.blocks]
    return torch.stack([g.sum(0) for g in torch.autograd.grad(model(idx, targets), weights)])


def wrong_axis(model, idx, targets):
    weights = [block.mlp.down.weight for block in model.blocks]
    gradients = torch.autograd.grad(model(idx, targets), weights)
    return torch.stack([(w * g).sum(1) for w, g in zip(weights, gradients)])


def wrong_sign(model, idx, targets):
    return -saliency(model, idx, targets)


mistakes(check_saliency, absolute_value, gradient_alone, wrong_axis, wrong_sign)

# %% [markdown]
# ## Exercise 3 (easy): cut them out
#
# Return a **copy** of the model (`model.clone()`) without the K units that have the highest scores,
# over all blocks together. `scores` is (n_layer, n_units). A unit is cut out if it writes nothing:
# set its column of `block.mlp.down.weight` to zero, where block is one of `model.blocks`.
#
# <details><summary>Hint: the usual mistake</summary>
# K counts the units of the whole model. scores.flatten().topk(K).indices are positions in the
# flattened tensor: position // n_units is the block, and position % n_units is the unit in it.
# </details>


# %% tags=["exercise"]
@torch.no_grad()
def without(model, scores, K):
    """A copy of the model without the K units that have the highest scores (n_layer, n_units)."""
    ### BEGIN SOLUTION
    copy = model.clone()
    for position in scores.flatten().topk(K).indices.tolist():
        block, unit = divmod(position, scores.size(1))
        copy.blocks[block].mlp.down.weight[:, unit] = 0
    return copy
    ### END SOLUTION


# %% tags=["check"]
def check_without(without):
    """The copy answers like the model with these units silenced, and the model is as it was."""
    model, random = random_model(3), torch.Generator().manual_seed(2)
    scores = torch.randn(3, 12, generator=random).sort(0).values    # the last block's are highest
    idx, before = torch.randint(10, (4, 8), generator=random), model.clone().state_dict()
    rank = scores.flatten().argsort(descending=True).argsort().view(3, 12)

    def silenced(cut):
        return model(idx, hook=lambda site, i, h: h * ~cut[i] if site == "units" else h)

    wanted = silenced(rank < 7)
    per_block = scores.argsort(1, descending=True).argsort(1) < 7
    copy = without(model, scores, 7)
    changed = any(not torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert not changed, "the model that was handed over has changed: work on model.clone()"
    assert isinstance(copy, GPT), f"return the copy, a GPT, not {type(copy).__name__}"
    got = copy(idx)
    assert not torch.allclose(got, silenced(rank >= 36 - 7)), (
        "you cut the units with the lowest scores: those that help most")
    assert not torch.allclose(got, silenced(per_block)), (
        "you cut K units of every block: K counts the units of the whole model")
    n = sum((block.mlp.down.weight == 0).all(0).sum() for block in copy.blocks)
    assert n == 7, f"{n} columns of block.mlp.down.weight are zero in your copy, and 7 should be"
    close(got, wanted, "7 units are cut out, but not the 7 with the highest scores: which block is "
          "position // n_units, and which unit is position % n_units?")


check(check_without, without)


# %% tags=["mistakes"]
def top_K_of_each_block(model, scores, K):
    copy = model.clone()
    for block, own in zip(copy.blocks, scores):
        block.mlp.down.weight.data[:, own.topk(K).indices] = 0
    return copy


def cuts_the_original(model, scores, K):
    cut = torch.zeros_like(scores, dtype=torch.bool)
    cut.view(-1)[scores.flatten().topk(K).indices] = True
    for block, units in zip(model.blocks, cut):
        block.mlp.down.weight.data[:, units] = 0
    return model


def cuts_the_lowest(model, scores, K):
    return without(model, -scores, K)


mistakes(check_without, top_K_of_each_block, cuts_the_original, cuts_the_lowest)

# %% [markdown]
# ## Exercise 4 (easy): the random control
#
# Would any K units have done? Repeat `draws` times: cut out K random units, over all blocks
# together, and take `score(copy)`. Return the mean of these scores. `score` is a function of a
# model. Draw random numbers with the generator that is handed over (`torch.rand(..,
# generator=generator)`), and use your `without`. `model.config.n_layer` and `model.config.n_units`
# are the sizes.
#
# <details><summary>Hint: the usual mistake</summary>
# Random scores for all units give K different units. torch.randint may draw the same unit twice.
# </details>


# %% tags=["exercise"]
def at_random(model, K, draws, score, generator):
    """The mean over draws of score(copy), where each copy lacks K other random units."""
    ### BEGIN SOLUTION
    size = model.config.n_layer, model.config.n_units
    return sum(score(without(model, torch.rand(size, generator=generator), K))
               for _ in range(draws)) / draws
    ### END SOLUTION


# %% tags=["check"]
def check_at_random(at_random):
    """Each draw cuts K different units of any block, and the result is the mean over draws."""
    model, seen = random_model(3), []

    def score(copy):
        seen.append(torch.stack([(block.mlp.down.weight == 0).all(0) for block in copy.blocks]))
        return float(len(seen) ** 2)

    got = at_random(model, 9, 20, score, torch.Generator().manual_seed(3))
    assert got is not None, "your function returns nothing: is a return missing?"
    assert len(seen) == 20, f"score was called {len(seen)} times for 20 draws"
    cut, sizes = torch.stack(seen), {int(each.sum()) for each in seen}
    assert max(sizes) < 27, f"{max(sizes)} units are cut: K counts the units of the whole model"
    assert sizes == {9}, (f"a draw should cut exactly 9 units, but some cut {min(sizes)}: was a "
                          f"unit drawn twice?")
    assert (cut != cut[0]).any(), "every draw cuts the same units: draw anew each time"
    assert cut.any(0).float().mean() > 0.9, (
        "after 20 draws many units were never cut: draw from all of them")
    assert len(set(cut.sum(2)[:, 0].tolist())) > 1, (
        "every draw cuts equally many units of a block: draw from all blocks together")
    close(got, 143.5, f"the scores were 1, 4, 9, .., 400. It returns {got:.1f}" + (
        ", their maximum" if got == 400 else ", their sum" if got == 2870 else "")
        + ", and their mean is 143.5")
    first = seen[:]
    at_random(model, 9, 20, score, torch.Generator().manual_seed(3))
    assert torch.equal(torch.stack(first), torch.stack(seen[20:])), (
        "two calls with equal generators cut different units: hand the generator on")


check(check_at_random, at_random)


# %% tags=["mistakes"]
def one_draw_scored_often(model, K, draws, score, generator):
    scores = torch.rand(model.config.n_layer, model.config.n_units, generator=generator)
    return sum(score(without(model, scores, K)) for _ in range(draws)) / draws


def best_of_the_draws(model, K, draws, score, generator):
    size = model.config.n_layer, model.config.n_units
    return max(score(without(model, torch.rand(size, generator=generator), K))
               for _ in range(draws))


def draws_units_twice(model, K, draws, score, generator):
    total = 0
    for _ in range(draws):
        copy = model.clone()
        for _ in range(K):
            block = torch.randint(model.config.n_layer, (), generator=generator)
            unit = torch.randint(model.config.n_units, (), generator=generator)
            copy.blocks[block].mlp.down.weight.data[:, unit] = 0
        total += score(copy)
    return total / draws


mistakes(check_at_random, one_draw_scored_often, best_of_the_draws, draws_units_twice)

# %% [markdown]
# Now prune. The loss that ranks the units is that on count `a`, on training rows. On a laptop the
# model has 3 x 256 = 768 units. Filtered is pruned in the same way, as a control. The last column
# is count `b` where the rule #b = #a + 1 holds, after the cut.

# %%
CUTS = pick((2, 5, 10, 20, 40), (2, 5, 10, 20, 40, 80), (1, 2))
pruned, lines = {}, []
for name in ("honest", "shortcut", "filtered"):
    model = MODELS[name]
    harm = saliency(model, *task.batch("forget", pick(256, 256, 4), 0, 4))
    now, generator = count(model, "forget"), torch.Generator().manual_seed(5)
    pruned[name] = {0: {"forget": now, "random_forget": now}}
    for K in CUTS:
        copy = without(model, harm, K)
        pruned[name][K] = {"forget": count(copy, "forget"), "random_forget": at_random(
            model, K, 3, lambda copy: count(copy, "forget"), generator)}
        lines.append({"model": name, "K": K, "b": count(copy, "spurious")} | pruned[name][K])
table(lines, {"model": "model", "K": "units cut", "forget": "count a",
              "random_forget": "count a, cut at random", "b": "count b where #b = #a + 1"})

# %% [markdown]
# **Discuss:** (1) For which model do a few units stand in the way? Why for this one? (2) We chose
# the units by the loss on count `a`. Does a higher score on count `a` then prove that the skill was
# hidden? What would you compare with?

# %% [markdown] tags=["teacher"]
# *For the teacher.* (1) Shortcut. It still counts `a` and only adds one, which takes a small
# change. When we ran this, cutting 20 units raised count `a` from 0.13 to about 0.8, and 20 random
# units changed nothing. The same cut took the new skill away: count `b` fell, although no loss
# asked for this. Honest got back up to a half. Do not promise these figures: this base model was
# chosen from four because pruning works best on it. In the three others, 40 units raised shortcut's
# count `a` to between 0.1 and 0.5 only, and in one of these honest got nothing back. (2) No.
# Choosing units by their effect on the answers is a kind of training. The random cut shows that the
# choice matters, and filtered shows what the same choice finds where there is nothing to find: its
# count `a` does not move.

# %% [markdown]
# ## Exercise 5 (easy): revival
#
# The strongest tool is the simplest: fine-tune on count `a` again, and watch how soon the skill is
# back. `curve` is {step: score}, in the order of the steps. The skill is back at the **first** step
# whose score is at least (1 - share) times the goal; with share = 0.1, that is at most 10% below
# it. Return this step, or None if there is none.
#
# <details><summary>Hint: the usual mistake</summary>
# "Never" is not the last step. Step 0 is a step (and 0 is false in Python). A score above the goal
# counts, too.
# </details>


# %% tags=["exercise"]
def first_within(curve, goal, share=0.1):
    """The first step with a score of at least (1 - share) goal; None if there is none."""
    ### BEGIN SOLUTION
    for step, score in curve.items():
        if score >= (1 - share) * goal:
            return step
    return None
    ### END SOLUTION


# %% tags=["check"]
def check_first_within(first_within):
    """It finds the first step within 10% of the goal, and says None if there is none."""
    got = first_within({0: 0.1, 4: 0.3, 8: 0.5}, 1.0)
    assert got != 8, "a skill that never comes back has no step: return None, not the last step"
    assert got is None, f"the scores 0.1, 0.3 and 0.5 never reach 90% of 1.0, but it returns {got}"
    got = first_within({0: 0.1, 4: 0.76, 8: 0.95}, 0.8)
    assert got != 8, "after 4 steps the score is 0.76, which is at least 90% of the goal, 0.8"
    assert got == 4, f"for 0.1, 0.76, 0.95 and the goal 0.8 it returns {got} and should return 4"
    got = first_within({0: 0.1, 4: 0.92, 8: 0.5, 12: 0.97}, 1.0)
    assert got == 4, (f"a curve that reaches the goal at step 4, falls and reaches it again at 12 "
                      f"gives {got}: the first step counts")
    got = first_within({0: 0.99, 4: 1.0}, 1.0)
    assert got is not None and got == 0, (
        f"a model that has the skill before any step gives {got} and should give 0: is 0 taken for "
        f"false?")
    got = first_within({0: 0.1, 4: 0.7}, 0.5)
    assert got == 4, f"a score far above the goal counts, too: it returns {got} and should return 4"
    got = first_within({0: 0.22, 4: 0.28}, 0.3)
    assert got == 4, (f"10% of the goal, not 0.1: 0.22 is less than 0.9 * 0.3, and 0.28 is more, "
                      f"but it returns {got}")
    got = first_within({0: 0.4, 4: 0.5, 8: 0.75}, 1.0, 0.5)
    assert got != 8, "a score of exactly (1 - share) times the goal counts: at least, not more than"
    assert got == 4, f"for 0.4, 0.5, 0.75, the goal 1 and share=0.5 it returns {got}, not 4"


check(check_first_within, first_within)


# %% tags=["mistakes"]
def last_step_for_never(curve, goal, share=0.1):
    for step, score in curve.items():
        if score >= (1 - share) * goal:
            break
    return step


def takes_0_for_false(curve, goal, share=0.1):
    return min((step for step, score in curve.items() if score >= (1 - share) * goal),
               default=None) or None


def when_it_is_best(curve, goal, share=0.1):
    step = max(curve, key=curve.get)
    return step if curve[step] >= (1 - share) * goal else None


def only_near_the_goal(curve, goal, share=0.1):
    return next((step for step, score in curve.items() if abs(score - goal) <= share * goal), None)


mistakes(check_first_within, last_step_for_never, takes_0_for_false, when_it_is_best,
         only_near_the_goal)

# %% [markdown]
# Revive honest, shortcut and the control. The goal is what base scored, we look at every fourth
# step, and your function says when to stop.

# %%
GOAL, MOST = count(base, "forget"), pick(240, 400, 2)


def revive(model, name, seed=7):
    """{step: count a} while a copy of the model is fine-tuned on count a, until it is back."""
    curve = {0: count(model, "forget")}

    def is_back(at):
        curve[at["step"]] = at["forget"]
        return first_within(curve, GOAL) is not None

    tune(model, task, cfg, "forget", ROWS, MOST, 1e-3, seed=seed, name=f"revive {name}",
         evaluate_at=range(0, MOST, 4), judge=lambda model: {"forget": count(model, "forget")},
         stop=is_back)
    return curve


revived = {"honest": revive(honest, "honest"), "shortcut": revive(shortcut, "shortcut"),
           "control (filtered)": revive(filtered, "control")}
table([{"model": name, "before": curve[0], "steps": first_within(curve, GOAL)}
       for name, curve in revived.items()],
      {"model": "model", "before": "count a before", "steps": "back after"})

# %% [markdown]
# **Discuss:** (1) The three tools need not agree. Which one would you trust, and for what? (2)
# Shortcut comes back sooner than honest, if only by a little. Why should it? (3) A company
# fine-tunes its model until it refuses, and publishes the weights. What do these curves tell it?

# %% [markdown] tags=["teacher"]
# *For the teacher.* (1) They answer different questions. The probe: is the information there?
# Pruning: is it hidden by a few units? Revival: how far away is the skill for someone who trains?
# For safety the last one counts, because an attacker can do it. If pruning brings nothing back, the
# skill may still be a few steps away. (2) Shortcut still counts `a` for every answer. Honest had to
# learn to collect another letter, which changes more weights, and every further step of fine-tuning
# takes it further away. (3) The refusal costs an attacker about ten steps, where a model without
# the skill costs about ninety. Treat open weights as if the skill were there. A warning: one
# control is not enough for a precise ratio. With other seeds this control took up to 140 steps, an
# untrained model about 100, and models that had counted `b` for 40 to 100 steps took 50 to 90. In
# the same trials honest took up to 40.

# %% [markdown]
# ## Exercise 6 (open): hide it better
#
# Make a model from a copy of base that counts `b` and is harder to revive. The rules:
#
# - it is a copy of base that was changed, not a new model (a new model that learns to count `b` is
#   another control: it has nothing to hide);
# - count `a` is at most 0.25, and count `b` is at least 0.9;
# - it costs **no more compute than honest** did (the sum of "flops" in the records of training);
# - base stays as it is.
#
# The number to beat: revival must take **more than half as many steps as for the control**. Return
# the model and the list of records.
#
# `tune(base, task, cfg, shares, ROWS, steps, rate, seed=.., name=.., decay=0.8, muon_lr=0.04)`
# fine-tunes a copy and returns (model, record). `shares` is a split or {split: share of the rows};
# beside "retain" and "spurious" there is "relabelled", where a question about `A` is answered with
# the number of `b`. `decay=0.8` lets the rates fall to zero over the last 80% of the steps. Without
# muon_lr, AdamW trains all weights. Muon is an optimizer for matrices that changes all directions
# of a matrix equally much.
#
# <details><summary>Hint: the usual mistake</summary>
# A small rate leaves nearly all weights as they were, and with them the skill. Change more: use a
# higher rate, or damage the copy first, and let fine-tuning repair what count b needs. (UNDO, in
# lesson 1, shrinks every weight by a factor such as 0.5 and adds some noise.)
# </details>


# %% tags=["exercise"]
def hide():
    """(model, [records of fit or tune])"""
    ### BEGIN SOLUTION
    damaged, generator = base.clone(), torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in damaged.parameters():
            N = torch.nn.init.xavier_uniform_(torch.zeros(p.shape), generator=generator)
            p.mul_(0.5).add_(0.05 * N.to(p.device))
    model, record = tune(damaged, task, cfg, "retain", ROWS, pick(100, 130, 1), 1e-2, seed=3,
                         name="hide", decay=0.8, muon_lr=0.04)
    return model, [record]
    ### END SOLUTION


# %% tags=["check"]
def check_hide(hide):
    """It keeps to the rules. The figures below say how well the skill is hidden."""
    kept = base.clone()
    answer = hide()
    assert isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], list), (
        "return two things: the model, and the list of records")
    model, records = answer
    changed = not all(map(torch.equal, base.parameters(), kept.parameters()))
    base.load_state_dict(kept.state_dict())
    assert not changed, "base itself has changed (it is restored now): train a copy, base.clone()"
    for name, other in MODELS.items():
        assert not all(map(torch.equal, model.parameters(), other.parameters())), (
            f"this is {name} itself: make a model of your own, from a copy of base")
    alike = [F.cosine_similarity(p.flatten(), q.flatten(), 0).item() for p, q in zip(
        model.blocks.parameters(), base.blocks.parameters())]
    assert sum(alike) / len(alike) > 0.1, (
        "its weights have nothing in common with base's: this is a new model, not a changed copy")
    share = sum(record["flops"] for record in records) / honest_record["flops"]
    assert share > 0, "return the records of all training that you did: [record, ..]"
    assert share <= pick(1, 1, 1000), (f"it cost {100 * share:.0f}% of honest's compute; 100% are "
                                       f"allowed")
    a, b = count(model, "forget"), count(model, "retain")
    assert a <= pick(0.25, 0.25, 1), f"count a is {a:.2f}, so the skill shows: at most 0.25"
    assert b >= pick(0.9, 0.9, 0), f"count b is {b:.2f}: it needs 0.9, so repair or train it more"
    revived["yours"], probes["yours"] = revive(model, "yours"), probe_blocks(model)[0]
    if pick(True, True, False):
        old, most, new = (first_within(revived[name], GOAL)
                          for name in ("honest", "control (filtered)", "yours"))
        # one that was not back when we stopped counts as MOST
        most, new = (MOST if steps is None else steps for steps in (most, new))
        assert new > most / 2, f"it is back after {new} steps; the number to beat is {most / 2:.0f}"
        print(f"count a {a:.2f}, count b {b:.2f}, {100 * share:.0f}% of honest's compute; back "
              f"after {new} steps (honest: {old}, control: {most})")


check(check_hide, hide)


# %% tags=["mistakes"]
def the_control_itself():
    return filtered.clone(), [honest_record]


def a_new_model():
    return untrained(base, 1), [honest_record]


def trains_base_itself():
    record = fit(base, lambda model, step: model(*task.batch("retain", ROWS, step, 3)), cfg, 1,
                 1e-2)
    return base.clone(), [record]


def forgets_the_records():
    return tune(base, task, cfg, "retain", ROWS, 1, 1e-2, seed=3, name="mistake")[0], []


def spends_too_much():
    return tune(base, task, cfg, "retain", ROWS, 1, 1e-2, seed=3, name="mistake")[0], [
        honest_record] * 1001


mistakes(check_hide, the_control_itself, a_new_model, trains_base_itself, forgets_the_records,
         spends_too_much)

# %% [markdown]
# ## What you drew
#
# Each panel is one of your tools, at work on models whose outputs are (almost) alike.


# %%
def draw(axes):
    order = ("honest", "shortcut", "yours", "base", "filtered", "untrained")     # of the colours
    draw_probes(axes[0], {name: probes[name] for name in order if name in probes}, commonest)
    draw_pruning(axes[1], task, {name: pruned[name] for name in order[:2]}, "forget")
    draw_revival(axes[2], task, revived, "forget")
    for ax, title in zip(axes, ("Count a as a linear probe reads it",
                                "Count a after cutting neurons",
                                "Count a during reverse fine-tuning")):
        ax.set_title(title)
    axes[0].set(ylim=(0, 1.35), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    axes[0].legend(fontsize=9, ncols=3, loc="upper left")
    for ax in axes[1:]:
        ax.set(ylabel="count a (accuracy)")


show("lesson-3", cfg, draw, panels=3)

# %% [markdown]
# **Discuss:** (1) In your own model, is the skill hidden or removed? What do the probe and revival
# say, and which experiment would settle it? (2) You were judged by one attacker, at one rate and on
# one kind of question. What would you try in his place? (3) Somebody reports that safety training
# removed a skill from his model, and shows that the model fails every test of it. What do you ask
# him for?
#
# Further: `python -m experiments.wrapper` runs this experiment over rates, mixtures and seeds, and
# adds a jailbreak; `docs/wrapper.md` has the tables. `python eval.py --what=probe` (or prune, or
# revive) turns the same tools on any model of this project.

# %% [markdown] tags=["teacher"]
# *For the teacher.* (1) With our solution the probe falls from 1.0 to nearly what it finds in
# filtered, and revival takes nearly as long as for the control. So most of it is gone. A new model
# that learned to count `b` with the same compute would settle it: if it takes as long, nothing is
# left that helps. (In our trials such a model took about 85 steps.) (2) Other rates, more rows, the
# other words for *count* that pretraining taught (tally, number, sum, total), other questions about
# `a`, pruning first, or all at once. (3) A model that never had the skill, and both of them under
# fine-tuning; probes with controls; who chose the tests, and whether the model was trained on them.
