# %% [markdown]
# # Lesson 1: Unlearning is shallow. UNDO makes it deep
#
# A model has learned four arithmetic operations: + and -, which it should **retain**, and * and /,
# which it should **forget**. The obvious way is to go on training until it answers * and /
# wrongly. Its outputs are then clean. Are its weights?
#
# An attacker can tell us. He takes the model that has forgotten and fine-tunes it on a few problems
# of the kind that it forgot. If the skill is back after 20 steps, while a model that never saw *
# and / (**filtered**, the gold standard) needs hundreds, then nothing was removed. It was only
# hidden.
#
# **UNDO** (Lee et al. 2025, [arXiv 2506.06278](https://arxiv.org/abs/2506.06278)) goes further, in
# three steps:
#
# 1. **Un**learn: train a copy of the model until it no longer shows the skill. This is the teacher.
# 2. **N**oise: damage the weights of a copy of the teacher, the student. The skill is damaged, too.
# 3. **D**istil **o**utputs: train the student to predict what the teacher predicts. The teacher
#    shows + and -, but never * and /. So only the skill to be retained is repaired.
#
# You will write every idea of this: the unlearning loss, the attack's worst case, the noise, the
# distillation loss, and the score. The last exercise is open: find a better student.
#
# *30 minutes, 6 exercises. A check stands under every exercise. It compares your function with an
# independent calculation, and its message says what is wrong.*

# %% tags=["start"]
import start  # noqa: F401, I001  (finds the project; notebooks have its source here)

# %%
import engine.start  # noqa: F401  (before torch is loaded)

import math

import torch
from torch import nn
from torch.distributions import Categorical, kl_divergence

import train
from engine.report import draw_relearning, table
from eval import tune
from train import fit, new_model, open_task
from workshop.lesson import check, close, mistakes, pick, show

# %% [markdown]
# ## The task and the base model
#
# The texts are equations such as `12 * 5 = 60`. `task.batch(split, rows, step, seed)` gives inputs
# and targets, both of shape (rows, T). The split is "retain", "forget", or "all".
#
# `fit(model, loss, cfg, steps, lr, muon_lr, ..)` is the project's training loop. `loss` is a
# function of (model, step). `muon_lr` is the rate of Muon, an optimizer for the blocks' matrices;
# AdamW, at the rate `lr`, trains the rest (without muon_lr: everything). `decay` is the share of
# the steps, at the end, over which the rates fall to zero. It returns a record, a dict with "flops"
# (what the training cost) and "history". `pick(a, b, c)` chooses a size: a on a CPU, b on a GPU, c
# in tests.
#
# This cell trains the base model, a GPT with 3 blocks. It takes up to a minute on a laptop.

# %%
cfg = train.Config.for_task("arithmetic")(
    task="arithmetic", words=0.0, problems=pick(40_000, 40_000, 300), block_size=48,
    n_layer=3, n_head=4, n_embd=pick(64, 128, 8), compile=False, save_every=0,
    out="out/workshop", data_dir="out/workshop/data")
task = open_task(cfg)
ROWS = pick(64, 64, 2)


def pretrain(name, split, steps, seed):
    """(model, record) of a new model, trained on a split."""
    model = new_model(cfg, task, name)
    record = fit(model, lambda model, step: model(*task.batch(split, ROWS, step, seed)), cfg, steps,
                 2e-2, 0.04, name=name, decay=0.8)
    return model, record


base, _ = pretrain("base", "all", pick(420, 600, 2), 1)
print(task.score(base))

# %% [markdown]
# A score is the share of problems that the model answers exactly. `_heldout_pairs` are operand
# pairs that training never showed. `ask` puts a question to the model:


# %%
@torch.no_grad()
def ask(model, question):
    prompt = [task.end] + task.tokenizer.encode_ordinary(question)
    answer = model.generate([prompt], 5, stop=task.end)[0].tolist()
    return question + task.tokenizer.decode([token for token in answer if token != task.end])


print(ask(base, "12 * 5 ="), "|", ask(base, "12 + 5 ="))

# %% [markdown]
# ## Exercise 1 (easy): a loss that forgets
#
# Maximum entropy unlearning makes the model as unsure as it can be about forget data: it pulls the
# predictions $p$ towards the uniform distribution $u$ over the $V$ tokens,
#
# $$\mathrm{KL}(u \,\|\, p) = \sum_v \tfrac1V \ln \frac{1/V}{p_v}
#   = -\ln V - \tfrac1V \sum_v \ln p_v .$$
#
# `logits` is (N, V), a row for each token of the text. Return the **sum** over the N rows, in nats;
# the model divides it by N later.
#
# <details><summary>Hint: the usual mistake</summary>
# KL is not symmetric. In KL(u || p), the average is over u: the logarithms of p are averaged with
# equal weights, not with weights p. Use logits.log_softmax(-1); the logarithm of a softmax can be
# minus infinity.
# </details>


# %% tags=["exercise"]
def uniform_kl(logits):
    """KL(uniform || softmax(logits)), the sum over rows: logits (N, V) -> scalar."""
    ### BEGIN SOLUTION
    return (-math.log(logits.size(-1)) - logits.log_softmax(-1).mean(-1)).sum()
    ### END SOLUTION


# %% tags=["check"]
def check_uniform_kl(uniform_kl):
    """It is 0 for equal logits, and as torch computes it elsewhere."""
    close(uniform_kl(torch.full((3, 7), 2.0)), 0.0,
          "equal logits are uniform already: the loss should be 0. Is ln V missing, or is it "
          "subtracted once and not for every row? Is the mean over the last dimension?")
    logits = 3 * torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    u, p = Categorical(logits=torch.zeros(5, 7)), Categorical(logits=logits)
    logits.requires_grad_()
    got, want = uniform_kl(logits), kl_divergence(u, p).sum()
    assert torch.is_tensor(got) and got.requires_grad, (
        "no gradient reaches the logits: is there a detach(), or an item()?")
    assert abs(got + want) > 1e-3, "the sign is the other way round"
    assert abs(got - kl_divergence(p, u).sum()) > 1e-3, (
        "this is KL(p || u), the other way round: average the logarithms with equal weights")
    close(got, want, f"for random logits it is {got:.3f} and should be {want:.3f}" + (
        ": you took the mean over rows, not the sum" if abs(got * 5 - want) < 1e-3 else ""))


check(check_uniform_kl, uniform_kl)


# %% tags=["mistakes"]
def without_ln_V(logits):
    return -logits.log_softmax(-1).mean(-1).sum()


def other_direction(logits):
    log_p = logits.log_softmax(-1)
    return (log_p.exp() * (log_p + math.log(logits.size(-1)))).sum()


def has_no_gradient(logits):
    return (-math.log(logits.size(-1)) - logits.detach().log_softmax(-1).mean(-1)).sum()


def mean_over_rows(logits):
    return (-math.log(logits.size(-1)) - logits.log_softmax(-1).mean(-1)).mean()


mistakes(check_uniform_kl, without_ln_V, other_direction, mean_over_rows, has_no_gradient)

# %% [markdown]
# Your loss now makes the teacher. A second term holds on to the retain data. A model computes any
# loss of its logits if you hand it over: `model(idx, targets, criterion)`; without one, it is the
# cross-entropy. A criterion returns a sum over tokens, and the model divides it by their number.
# `model.clone()` is a copy of a model.

# %%
WEIGHT = 20.0                    # of the retain term


def unlearn(model, step):
    forget, retain = (task.batch(split, ROWS // 2, step, 2) for split in ("forget", "retain"))
    return model(*forget, lambda logits, _: uniform_kl(logits)) + WEIGHT * model(*retain)


teacher = base.clone()
teacher_record = fit(teacher, unlearn, cfg, pick(50, 50, 2), 1e-3, name="teacher", decay=0.5)
print(task.score(teacher))
print(ask(teacher, "12 * 5 ="), "|", ask(teacher, "12 + 5 ="))

# %% [markdown]
# The skill seems to be gone, and + and - are still there. **Discuss:** if you were to release this
# model, what would you want to know before you call the skill removed?

# %% [markdown] tags=["teacher"]
# *For the teacher.* Clean outputs say what the model does, not what it could do. Ask for: an
# attacker who fine-tunes (next exercise), forms of the question that unlearning did not train on,
# what a probe reads from the activations (lesson 3), and how a model scores that never had the
# skill. Without that last comparison no number means anything, because any model can learn.

# %% [markdown]
# ## Exercise 2 (easy): the worst case
#
# The attacker fine-tunes at several learning rates and may stop at any step. The worst case, for
# us, is the highest forget score. It is taken **at every step anew**, over the rates at that step:
# a rate that is best after 5 steps may have broken the model after 40.
#
# `curves` is {rate: {step: forget score}}. Return {step: the highest score of any rate}.
#
# <details><summary>Hint: the usual mistake</summary>
# Do not choose one rate for the whole curve. A dict comprehension over the steps of any one curve
# does it, with max() inside.
# </details>


# %% tags=["exercise"]
def worst_case(curves):
    """{step: highest score over all rates at that step}; curves: {rate: {step: score}}."""
    ### BEGIN SOLUTION
    steps = next(iter(curves.values()))
    return {step: max(curve[step] for curve in curves.values()) for step in steps}
    ### END SOLUTION


# %% tags=["check"]
def check_worst_case(worst_case):
    """At every step, it is the score of the rate that is worst at that step."""
    curves = {1e-3: {5: 0.1, 10: 0.3, 40: 0.9}, 1e-2: {5: 0.4, 10: 0.2, 40: 0.0}}
    got = worst_case(curves)
    assert isinstance(got, dict), f"it should be a dict {{step: score}}, not {type(got).__name__}"
    assert set(got) == {5, 10, 40}, f"its keys are {list(got)} and should be the steps, 5, 10, 40"
    assert got != curves[1e-3], ("you chose the rate that is best in the end, and took its whole "
                                 "curve. After 5 steps the other rate was worse (0.4)")
    got = [float(got[step]) for step in (5, 10, 40)]
    assert got != [0.4, 0.4, 0.9], (
        "this is the highest score so far. The attacker who stops after 10 steps has the model of "
        "step 10, not an earlier one")
    close(got, [0.4, 0.3, 0.9], f"after 5, 10 and 40 steps it is {got} and should be "
          f"[0.4, 0.3, 0.9]: the highest score, because the attacker wants the skill back")


check(check_worst_case, worst_case)


# %% tags=["mistakes"]
def one_rate_for_all_steps(curves):
    return max(curves.values(), key=lambda curve: curve[max(curve)])


def mean_over_rates(curves):
    steps = next(iter(curves.values()))
    return {step: sum(curve[step] for curve in curves.values()) / len(curves) for step in steps}


mistakes(check_worst_case, one_rate_for_all_steps, mean_over_rates)

# %% [markdown]
# Attack the teacher, and the gold standard: a model that was trained on + and - alone. (This trains
# `filtered`, half a minute, and then attacks both models at two rates. `tune()` is fit() on a copy:
# it returns the copy and a record, whose history has the scores at the steps in evaluate_at.)

# %%
STEPS = pick((5, 10, 20, 40), (5, 10, 20, 40), (1, 2))


def attack(model, name):
    """{step: forget score}, the worst case over two rates. Step 0 is before the attack."""
    curves = {lr: {at["step"]: at["forget"] for at in tune(
        model, task, cfg, "forget", pick(16, 16, 2), STEPS[-1], lr, seed=3,
        name=f"attack on {name}, rate {lr:g}", evaluate_at=STEPS,
        judge=lambda model: task.score(model, ("forget",)))[1]["history"]} for lr in (1e-3, 3e-3)}
    return {0: task.score(model, ("forget",))["forget"]} | worst_case(curves)


filtered, filtered_record = pretrain("filtered", "retain", pick(350, 400, 2), 4)
attacked = {name: attack(model, name) for name, model in (("teacher", teacher),
                                                          ("filtered", filtered))}
table([{"model": name} | curve for name, curve in attacked.items()],
      {"model": "model"} | {step: f"after {step}" for step in attacked["teacher"]})

# %% [markdown]
# ## Exercise 3 (medium): noise
#
# The student starts as a copy of the teacher. Every parameter $\theta$ is shrunk and mixed with
# noise, in place:
#
# $$\theta \leftarrow (1-\alpha)\,\theta + \alpha\,\beta\,N,$$
#
# where $N$ is Xavier-uniform for a matrix, that is $N \sim U(-a, a)$ with
# $a = \sqrt{6 / (\text{fan in} + \text{fan out})}$, and 0 for a vector, which is only shrunk.
# `torch.nn.init.xavier_uniform_(tensor, generator=generator)` fills a tensor on the CPU with such
# numbers; `N.to(p.device)` moves them to where p is.
#
# <details><summary>Hint: the usual mistake</summary>
# Three things go wrong: forgetting to shrink the old weight, drawing without the generator (then
# nobody can repeat your run), and drawing noise for vectors, for which Xavier is not defined.
# </details>


# %% tags=["exercise"]
@torch.no_grad()
def noise(model, alpha, beta, generator):
    """theta <- (1 - alpha) theta + alpha beta N for every parameter of the model, in place."""
    ### BEGIN SOLUTION
    for p in model.parameters():
        N = torch.zeros(p.shape)
        if p.ndim == 2:
            torch.nn.init.xavier_uniform_(N, generator=generator)
        p.mul_(1 - alpha).add_(alpha * beta * N.to(p.device))
    ### END SOLUTION


# %% tags=["check"]
def check_noise(noise):
    """Nothing changes at alpha 0, weights shrink, and the noise has Xavier's size."""
    def noised(alpha, beta, seed=0):
        net = nn.Sequential(nn.Linear(300, 100), nn.LayerNorm(100))
        for p in net.parameters():
            nn.init.ones_(p)
        assert noise(net, alpha, beta, torch.Generator().manual_seed(seed)) is None, (
            "noise changes the model in place and returns nothing")
        return [p.detach() for p in net.parameters()]

    matrix, bias, gain, _ = noised(0, 1)
    close(matrix, torch.ones(100, 300), "alpha 0 must leave the weights as they are")
    matrix, bias, gain, _ = noised(0.25, 0)
    close(matrix, 0.75 * torch.ones(100, 300), "at alpha 0.25 and beta 0 a weight of 1 should "
          "become 0.75. Is the factor (1 - alpha) missing, or beta? Did you change p in place?")
    matrix, bias, gain, _ = noised(1, 0.5)
    bound = 0.5 * math.sqrt(6 / 400)
    assert matrix.std() > 0, "at alpha 1 there is no noise in the matrix"
    assert abs(matrix.std() / (bound / math.sqrt(3)) - 1) < 0.02, (
        f"at alpha 1 and beta 0.5 the noise in a (100, 300) matrix has a standard deviation of "
        f"{matrix.std():.4f} and should have {bound / math.sqrt(3):.4f}, that of U(-a, a) times "
        f"beta")
    assert matrix.abs().max() <= bound, (
        f"the largest noise is {matrix.abs().max():.4f}, beyond beta a = {bound:.4f}: is it "
        f"uniform?")
    close(torch.cat((bias, gain)), torch.zeros(200), "vectors get no noise: at alpha 1 they are 0")
    close(noised(1, 0.5)[0], matrix, "two calls with equal generators give different noise: hand "
          "the generator on")
    assert not torch.equal(noised(1, 0.5, seed=1)[0], matrix), (
        "two different generators give the same noise: hand the generator on")


check(check_noise, noise)


# %% tags=["mistakes"]
@torch.no_grad()
def does_not_shrink(model, alpha, beta, generator):
    for p in model.parameters():
        if p.ndim == 2:
            p.add_(alpha * beta * torch.nn.init.xavier_uniform_(torch.zeros(p.shape),
                                                                generator=generator))


@torch.no_grad()
def standard_normal(model, alpha, beta, generator):
    for p in model.parameters():
        N = torch.randn(p.shape, generator=generator) * (p.ndim == 2)
        p.mul_(1 - alpha).add_(alpha * beta * N)


@torch.no_grad()
def ignores_the_generator(model, alpha, beta, generator):
    for p in model.parameters():
        N = torch.zeros(p.shape)
        if p.ndim == 2:
            torch.nn.init.xavier_uniform_(N)
        p.mul_(1 - alpha).add_(alpha * beta * N)


mistakes(check_noise, does_not_shrink, standard_normal, ignores_the_generator)

# %% [markdown]
# ## Exercise 4 (medium): distil
#
# The student learns the teacher's whole distribution at every token, by the forward KL,
#
# $$\mathrm{KL}(t \,\|\, s) = \sum_v t_v \,(\ln t_v - \ln s_v),$$
#
# with $t$ the teacher's and $s$ the student's probabilities. Both arguments are logits (N, V).
# Return the sum over rows.
#
# <details><summary>Hint: the usual mistake</summary>
# The average is over the teacher's probabilities. torch.nn.functional.kl_div takes the student's
# log-probabilities first and the teacher's probabilities second: writing the formula down is safer.
# </details>


# %% tags=["exercise"]
def kl(teacher_logits, logits):
    """KL(teacher || student), the sum over rows: (N, V), (N, V) -> scalar."""
    ### BEGIN SOLUTION
    t, s = teacher_logits.log_softmax(-1), logits.log_softmax(-1)
    return (t.exp() * (t - s)).sum()
    ### END SOLUTION


# %% tags=["check"]
def check_kl(kl):
    """It is right, and its gradient is softmax(student) - softmax(teacher)."""
    random = torch.Generator().manual_seed(1)
    t, s = (2 * torch.randn(4, 6, generator=random) for _ in range(2))
    s.requires_grad_()
    got = kl(t, s)
    assert torch.is_tensor(got) and got.ndim == 0, (
        "it should be a scalar tensor: is a return missing?")
    assert got.requires_grad, "no gradient reaches the student: did you detach it?"
    want, reverse = (kl_divergence(Categorical(logits=a), Categorical(logits=b)).sum()
                     for a, b in ((t, s), (s, t)))
    entropy = Categorical(logits=t).entropy().sum()
    for wrong, why in (
            (reverse, "this is KL(student || teacher): the average is over the teacher's "
                      "probabilities"),
            (want + entropy, "this is the cross-entropy: ln t is missing. (Its gradient would be "
                             "right, but it is not 0 where the two agree)"),
            (-want, "the sign is the other way round"),
            (want / 4, "you took the mean over rows, not the sum"),
            (want / 24, "you took the mean over rows and tokens, not the sum")):
        assert abs(got - wrong) > 1e-3, why
    close(got, want, f"it is {got:.3f} and should be {want:.3f}: are both arguments made "
          f"log-probabilities over the vocabulary, the last dimension?")
    got.backward()
    close(s.grad, s.softmax(-1) - t.softmax(-1), "its value is right, but its gradient is not "
          "softmax(student) - softmax(teacher): did you detach the student?")


check(check_kl, kl)


# %% tags=["mistakes"]
def the_other_way_round(teacher_logits, logits):
    t, s = teacher_logits.log_softmax(-1), logits.log_softmax(-1)
    return (s.exp() * (s - t)).sum()


def softmax_over_rows(teacher_logits, logits):
    t, s = teacher_logits.log_softmax(0), logits.log_softmax(0)
    return (t.exp() * (t - s)).sum()


def cross_entropy(teacher_logits, logits):
    return -(teacher_logits.softmax(-1) * logits.log_softmax(-1)).sum()


mistakes(check_kl, the_other_way_round, softmax_over_rows, cross_entropy)

# %% [markdown]
# Now the whole of UNDO, with your functions. The student is distilled on the *unlabelled* mix: it
# sees * and /, but learns of them only what the teacher says, which is nothing.


# %%
def imitate(student, step):
    idx, _ = task.batch("all", ROWS, step, 5)
    with torch.no_grad():
        target = teacher(idx)
    return student(idx, target, lambda logits, target: kl(target, logits))


def undo(alpha, beta=0.1, steps=pick(75, 100, 2), name="student"):
    """(student, record): the teacher, noised and then distilled."""
    student = teacher.clone()
    noise(student, alpha, beta, torch.Generator().manual_seed(6))
    return student, fit(student, imitate, cfg, steps, 1e-2, 0.04, name=name, decay=0.8,
                        frozen=(teacher,))


student, student_record = undo(0.3)
attacked["UNDO, alpha 0.3"] = attack(student, "student")
print(task.score(student), attacked["UNDO, alpha 0.3"])

# %% [markdown]
# **Discuss:** both the teacher and the student were trained on outputs only. Why does it make a
# difference that the student's weights were damaged first?

# %% [markdown] tags=["teacher"]
# *For the teacher.* Training on outputs needs only the smallest change of the weights that makes
# the outputs right. In the teacher the circuits of * and / are still there, and a small change
# silences them; a small change by the attacker undoes it. Noise destroys these circuits together
# with those of + and -. Distillation then rebuilds only what it is shown. With alpha 0 the student
# is the teacher, and with alpha 1 it is a new model. Let somebody set beta to 0: shrinking alone
# does much of the work here.

# %% [markdown]
# ## Exercise 5 (easy): one number
#
# A student's **robustness** says where its forget score P under attack lies between the teacher's
# (robustness 0) and that of filtered, which never had the skill (robustness 1):
#
# $$\frac{P_\text{student} - P_\text{teacher}}{P_\text{filtered} - P_\text{teacher}} .$$
#
# Each argument is a curve, {step: score}. Compute the quotient at every step of the attack, and
# return the mean of the quotients. Step 0 is before the attack and does not count.
#
# <details><summary>Hint: the usual mistake</summary>
# Both differences are negative as a rule. Their quotient is not. Leave step 0 out: there the
# teacher may be below filtered, and the quotient means nothing.
# </details>


# %% tags=["exercise"]
def robustness(student, teacher, filtered):
    """The mean over all steps but 0; arguments are curves {step: forget score}."""
    ### BEGIN SOLUTION
    values = [(student[step] - teacher[step]) / (filtered[step] - teacher[step])
              for step in student if step]
    return sum(values) / len(values)
    ### END SOLUTION


# %% tags=["check"]
def check_robustness(robustness):
    """The teacher has 0, filtered has 1, and what lies between them is in proportion."""
    low, high = {0: 0.0, 10: 0.8, 40: 1.0}, {0: 0.1, 10: 0.2, 40: 0.8}
    close(robustness(low, low, high), 0.0, "the teacher itself should have robustness 0")
    close(robustness(high, low, high), 1.0, "filtered itself should have robustness 1")
    got = robustness({0: 0.7, 10: 0.5, 40: 0.8}, low, high)
    assert abs(got - 0.625) > 1e-3, "this is the quotient of the means, not the mean of quotients"
    close(got, 0.75, f"a student that is half way after 10 steps, and all the way after 40, has "
          f"{got:.2f} and should have 0.75: the mean over the steps 10 and 40, without step 0")
    got = robustness({0: 0.0, 10: 0.8, 40: 1.2}, low, high)
    close(got, -0.5, "a student that is worse than the teacher has a negative robustness")


check(check_robustness, robustness)


# %% tags=["mistakes"]
def relative_to_the_teacher(student, teacher, filtered):
    values = [1 - student[step] / teacher[step] for step in student if step]
    return sum(values) / len(values)


def counts_step_0(student, teacher, filtered):
    values = [(student[step] - teacher[step]) / (filtered[step] - teacher[step])
              for step in student]
    return sum(values) / len(values)


def quotient_of_the_means(student, teacher, filtered):
    s, t, f = (sum(curve[step] for step in student if step)
               for curve in (student, teacher, filtered))
    return (s - t) / (f - t)


mistakes(check_robustness, relative_to_the_teacher, counts_step_0, quotient_of_the_means)


# %%
def figures(name, flops):
    """(robustness, compute in % of training filtered) of an attacked model."""
    try:
        robust = robustness(attacked[name], attacked["teacher"], attacked["filtered"])
    except ZeroDivisionError:                     # in a run that is too short to learn anything
        robust = 0.0
    return robust, 100 * flops / filtered_record["flops"]


print("robustness {:.2f} for {:.0f}% of the compute of training without * and /".format(
    *figures("UNDO, alpha 0.3", teacher_record["flops"] + student_record["flops"])))

# %% [markdown]
# ## Exercise 6 (open): a better student
#
# Find a student that is more robust than `student` (alpha 0.3), **for at most 55% of the compute**
# of training `filtered`, the teacher included, and that keeps at least 90% of the teacher's retain
# score. Return the student and the list of the records that fit() gave you on the way. You may call
# `undo()` with another alpha, beta or number of steps (100 steps cost about 37% of training
# `filtered`, and the teacher cost 13%); damage some weights more than others; do two small rounds;
# or write something that nobody has tried.
#
# <details><summary>Hint: the usual mistake</summary>
# More noise needs more distillation. If the retain score is what is missing, give it steps before
# you give it more noise.
# </details>


# %% tags=["exercise"]
def better():
    """(student, [records of fit])"""
    ### BEGIN SOLUTION
    student, record = undo(0.45, beta=0.5, steps=pick(100, 140, 2), name="better")
    return student, [record]
    ### END SOLUTION


# %% tags=["check"]
def check_better(better):
    """It keeps to the budget. The table below says how robust it is."""
    answer = better()
    assert isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], list), (
        "return two things, the student and the list of records: return student, [record]")
    student, records = answer
    assert records, "the list of records is empty: it needs those of all training that you did"
    flops = teacher_record["flops"] + sum(record["flops"] for record in records)
    share = 100 * flops / filtered_record["flops"]
    for name, other in (("teacher", teacher), ("filtered", filtered), ("base", base)):
        assert not torch.equal(student.wte.weight, other.wte.weight), (
            f"this is {name} itself: damage a copy of the teacher, and repair it")
    assert share <= pick(55, 55, 1000), f"it cost {share:.0f}% of the compute; 55% are allowed"
    kept, had = (task.score(model, ("retain",))["retain"] for model in (student, teacher))
    assert kept >= 0.9 * had, (f"its retain score is {kept:.2f}, the teacher's is {had:.2f}: it "
                               f"needs more distillation, or less noise")
    attacked["yours"] = attack(student, "yours")
    if pick(True, True, False):
        old, new = figures("UNDO, alpha 0.3", 0)[0], figures("yours", flops)[0]
        assert new > old, f"its robustness is {new:.2f}; the number to beat is {old:.2f}"
        print(f"robustness {new:.2f} at {share:.0f}% of the compute (alpha 0.3: {old:.2f})")


check(check_better, better)


# %% tags=["mistakes"]
def the_teacher_again():
    return teacher.clone(), [student_record]


def forgets_the_records():
    return undo(0.4, steps=2)[0], []


def spends_too_much():
    return undo(0.9, steps=2)[0], [filtered_record] * 10


mistakes(check_better, the_teacher_again, forgets_the_records, spends_too_much)


# %% [markdown]
# ## What you drew
#
# The curves are those of your attack, on your teacher and your students.


# %%
def draw(ax):
    draw_relearning(ax, task, attacked)
    ax.set_title("Relearning curves under attack")


show("lesson-1", cfg, draw)

# %% [markdown]
# **Discuss:** (1) Given 500 steps, every model here relearns * and /. What, then, has been gained?
# (2) Who could use UNDO, and what would it cost him, if retraining costs ten million? (3) What
# would an attacker do who knows how you made your student?
#
# Further: `python undo.py` tells the same story at full size, with word problems, several seeds and
# spread; `docs/undo.md` has the tables.

# %% [markdown] tags=["teacher"]
# *For the teacher.* (1) Cost. Security is a matter of what an attack costs against what training
# the skill anew costs; `filtered` is that limit. Nothing that leaves the weights open can do
# better. (2) Someone who finds out after training what the model should not know. The price is the
# compute in the table: here about a half of retraining, and retain skill. (3) He would use other
# data, more of it, other rates, LoRA; he would attack parts that were damaged less. A number from
# one attack is a bound on robustness from above, never a proof of it.
