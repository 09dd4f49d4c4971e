"""The judges: how a model scores, how fast it relearns, and what its weights still know.

    python eval.py --what=score --model=base
    python eval.py --what=relearn --model=maxent --attack=mixed
    python eval.py --what=sample --model=base --prompt="12 + 5 ="
    python eval.py --what=probe --model=maxent       can a linear layer read the answer from it?
    python eval.py --what=prune --model=maxent       does cutting a few neurons restore the skill?
    python eval.py --what=revive --model=maxent      how few steps of fine-tuning restore it?
    python -m experiments.examine --task=language    the last three, for every model on disk

Forgetting is robust if it survives an attacker who fine-tunes the model (Lee et al. 2025, section
3). If it does not, the method only put a wrapper around the skill (Jain et al. 2023).
"""
import engine.start  # noqa: F401, I001  (before torch is loaded)

import dataclasses
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F

import data
import train
from data.pretrained import is_pretrained
from engine.hardware import autocast
from engine.knobs import BadInput, FilePath, knob
from engine.process import WORLD, run
from engine.report import (
    draw_probes,
    draw_pruning,
    draw_relearning,
    draw_revival,
    picture,
    print_stories,
    say_edges,
    table,
    write_rows,
)
from engine.store import load, models_of, path_of, read
from engine.streams import seed_of, torch_stream
from model import LOGITS, Stack, norm
from train import Common, config_from, evaluated, fill, fit, open_task, pretrain

MOVED = {f"--what={name}": f"python -m experiments.{name}"
         for name in ("wrapper", "compiled", "examine")}


@dataclass
class Rows(Common):
    """Knobs of the attack and of revival."""
    attack_rows: int | None = knob(None, "rows in a batch of the attack and of revival", 1, 2**31)


@dataclass
class Attack(Rows):
    """Knobs of the relearning attack."""
    attack: str | None = knob(None, "what the attacker fine-tunes on: forget data, the pretraining "
                              "mix, retain data alone, or (quiz) forget facts that are not scored",
                              choices=["forget", "mixed", "retain", "shown"])
    lrs: list[float] | None = knob(None, "rates that the attacker tries; the worst counts", 0, 1)
    attack_steps: list[int] | None = knob(None, "steps at which the attacked model is scored", 1)
    attack_seeds: int | None = knob(None, "runs for each rate, on different rows; their mean "
                                    "counts", 1)
    attack_few: int | None = knob(None, "also attack with so many forget texts alone, for 40 steps "
                                  "(published: 64 stories); 0: do not", 0)


@dataclass
class Foundations(Common):
    """Knobs of the two models that pretraining makes if they are missing."""
    base_steps: int | None = knob(None, "pretraining steps, if base has to be made", 1)
    filtered_steps: int | None = knob(None, "the same for the filtered model", 1)


@dataclass
class AfterBase(Attack, Foundations):
    """Knobs of scripts that start from base and compare models with filtered, under attack."""


@dataclass
class Tools(Rows):
    """Knobs of the tools that look for a capability: probe, prune, revive."""
    domain: str = knob("forget", "probe, prune, revive: the domain whose capability is looked for",
                       choices=["forget", "retain"])
    probe_rows: int | None = knob(None, "probe: rows to fit on; as many others are for judging", 2)
    cut: list[int] | None = knob(None, "prune: numbers of MLP neurons to cut, for the curve", 1)
    saliency: str = knob("signed", "prune: rank neurons by theta * grad, or by its absolute value",
                         choices=["signed", "absolute"])
    draws: int = knob(5, "prune: how many random choices of neurons to compare with", 1)
    revive_lr: float | None = knob(None, "revive: AdamW's rate", 0, 1)
    revive_steps: int | None = knob(None, "revive: most steps", 1)
    check_every: int | None = knob(None, "revive: steps between two looks at the score", 1)
    tolerance: float = knob(0.1, "revive: stop when the score is within this share of the "
                            "reference's", 0, 1)


@dataclass
class Config(AfterBase, Tools):
    what: str = knob("score", "which judge", choices=["score", "relearn", "sample", "probe",
                                                      "prune", "revive"])
    model: FilePath = knob("base", "a name in OUT/TASK/seedN/, or a path that ends in .pt")
    reference: FilePath = knob("base", "revive: the model that has the capability")
    control: FilePath = knob("filtered", "revive: the model that never had it")
    prompt: str = knob("", "sample: the text to continue")
    tokens: int = knob(32, "sample: most tokens to add", 1)
    temperature: float = knob(0.0, "sample: 0 is greedy, 1 is the model's distribution", 0, 10)


# --- settings: what auto knobs stand for, by task -------------------------------------------------
WORDS = dict(attack="forget", lrs=[3e-4, 1e-3, 3e-3], attack_steps=[10, 20, 40, 60], attack_rows=16,
             attack_seeds=2, attack_few=0)
STORIES = WORDS | dict(attack_steps=[10, 40, 80], attack_rows=8, attack_seeds=1, attack_few=64)
STRINGS = WORDS | dict(lrs=[1e-4, 3e-4, 1e-3], attack_steps=[5, 10, 20, 40])
ATTACK = {"arithmetic": WORDS, "language": WORDS | dict(attack_steps=[10, 20, 40, 60, 80]),
          "tinystories": STORIES, "bilingual": STORIES, "instruct": WORDS,
          "pcfg": STRINGS | dict(attack_rows=64), "gaming": STRINGS | dict(attack_rows=32),
          "quiz": dict(attack="shown", lrs=[3e-6, 1e-5, 3e-5], attack_steps=[5, 10, 20, 40],
                       attack_rows=8, attack_seeds=1, attack_few=0)}
LOOK = dict(cut=[5, 10, 20, 40, 76], check_every=5)
REAL = LOOK | dict(probe_rows=64, revive_lr=1e-3, revive_steps=300)
TOOLS = {"arithmetic": LOOK | dict(probe_rows=256, revive_lr=1e-3, revive_steps=800),
         "language": LOOK | dict(probe_rows=512, revive_lr=1e-3, revive_steps=800),
         "tinystories": REAL, "bilingual": REAL,
         "instruct": LOOK | dict(probe_rows=64, revive_lr=3e-4, revive_steps=400),
         "pcfg": LOOK | dict(probe_rows=3000, revive_lr=3e-4, revive_steps=400,
                             cut=[5, 10, 20, 38]),
         "quiz": LOOK | dict(probe_rows=64, revive_lr=1e-4, revive_steps=40, cut=[20, 100, 500]),
         "gaming": dict(probe_rows=3000, revive_lr=3e-4, revive_steps=800, check_every=1,
                        cut=[5, 10, 20, 40])}


def fill_attack(cfg):
    """cfg, with its auto knobs for the attack, the pretrained models and their size filled."""
    cfg = fill(fill(fill(cfg, ATTACK), train.SETTINGS, "base_"), train.SETTINGS)
    check_attack(cfg)
    return cfg


def check_attack(cfg):
    more = getattr(data.module(cfg.task), "EXTRA", ())
    if getattr(cfg, "attack", None) == "shown" and "shown" not in more:
        raise BadInput(f"--attack=shown means nothing to the task {cfg.task}: quiz has it")


def foundation(name, cfg, task):
    """(model, record) of base or filtered, read from disk or made."""
    return pretrain(name, config_from(cfg, train.Config, steps=cfg.base_steps,
                                      filtered_steps=cfg.filtered_steps), task)


def foundations(cfg, task):
    """(base, filtered), each a (model, record). A pretrained task has base alone."""
    return tuple(foundation(name, cfg, task) for name in ("base", "filtered")
                 if name == "base" or not task.pretrained)


# --- fine-tuning, as an attack and as a test -----------------------------------------------------
def tune(model, task, cfg, shares, rows, steps, lr, *, seed, name, judge=None, change=None, **how):
    """(copy, record): a copy of model, fine-tuned by AdamW, and fit's record. shares is a split or
    {split: share}. change(copy) may change it first. judge(copy) gives figures for the record's
    history; how: fit's other arguments.
    """
    copy = model.clone()
    if change:
        change(copy)

    def loss_fn(model, step):
        return model(*task.batch(shares, rows, step, seed))

    record = fit(copy, loss_fn, cfg, steps, lr, name=name, tokens=rows * task.block_size,
                 evaluate=(lambda: judge(copy)) if judge else None, **how)
    return copy, record


def stackable(model, task, rows, K):
    """Whether K runs are trained as one Stack: on a GPU, where a small step waits for its launches
    and K steps wait no longer. A CPU is busy with products and takes longer (docs/speed.md). vmap
    cannot recompute logits chunk by chunk, so that all of them must fit."""
    return (model.wte.weight.device.type == "cuda" and WORLD == 1
            and K * rows * task.block_size * model.config.vocab_size <= LOGITS)


def tune_each(model, task, cfg, split, rows, steps, runs, *, name, judge, alike=1, **how):
    """[history]: of tune() for each (rate, seed) in runs; those of a Stack have scores only."""
    K, top = len(runs), max(lr for lr, _ in runs)
    if not stackable(model, task, rows, K):
        return [tune(model, task, cfg, split, rows, steps, lr, seed=seed, name=f"{name} {lr:g}",
                     judge=judge, alike=alike, **how)[1]["history"] for lr, seed in runs]
    stack = Stack(model, K)
    before = [[p.detach().clone() for p in copy.parameters()] for copy in stack.copies]

    def loss_fn(stack, step):
        drawn = {seed: task.batch(split, rows, step, seed) for _, seed in runs}
        return stack(*map(torch.stack, zip(*(drawn[seed] for _, seed in runs))))

    @torch.no_grad()
    def go_back():
        """AdamW has moved all copies at the highest rate. Its steps are proportional to the rate
        (nothing decays the weights), so that each copy takes back what its own rate is less."""
        for copy, was, (lr, _) in zip(stack.copies, before, runs):
            if lr < top:
                torch._foreach_lerp_(list(copy.parameters()), was, 1 - lr / top)
                torch._foreach_copy_(was, list(copy.parameters()))

    record = fit(stack, loss_fn, cfg, steps, top, name=f"{name}, {K} runs", alike=alike // K or 1,
                 tokens=K * rows * task.block_size, after_step=go_back,
                 evaluate=lambda: {"runs": [*map(judge, stack.copies)]}, **how)
    return [[{"step": at["step"]} | at["runs"][k] for at in record["history"]] for k in range(K)]


def relearn(model, task, cfg, name="model", domains=("forget",)):
    """Attacks copies of a model. Fine-tunes them by AdamW on the split that cfg.attack names, on
    newly drawn training rows, cfg.attack_seeds times for each rate in cfg.lrs. cfg is an Attack
    whose auto knobs are filled.

    returns  {"curves": {lr: {step: scores}}, means over the attack's seeds at cfg.attack_steps;
              "worst": {step: scores and "lr"}, those of the rate that restores most of the forget
              skill *at that step*, of forget words if they are scored: the attacker may
              stop at any step. Scores are Task.score's;
              "few": see relearn_few; None without cfg.attack_few}
    """
    split = "all" if cfg.attack == "mixed" else cfg.attack
    runs = [(lr, seed_of("relearn", cfg.seed, i)) for lr in cfg.lrs
            for i in range(cfg.attack_seeds)]
    histories = iter(tune_each(
        model, task, cfg, split, cfg.attack_rows, max(cfg.attack_steps), runs, alike=4 * len(runs),
        name=f"relearn {name}", evaluate_at=set(cfg.attack_steps),
        judge=lambda model: task.score(model, domains)))
    curves = {lr: {same[0]["step"]: {
        k: sum(h[k] for h in same) / len(same) for k in same[0]
        if k.startswith(("retain", "forget", "mentions"))}
        for same in zip(*islice(histories, cfg.attack_seeds))} for lr in cfg.lrs}
    scores = curves[cfg.lrs[0]][cfg.attack_steps[0]]
    worst, aim = {}, "forget_words" if "forget_words" in scores else "forget"
    for step in cfg.attack_steps:
        lr = cfg.lrs[0]
        for other in cfg.lrs[1:]:
            if task.knows_more(curves[other][step][aim], curves[lr][step][aim]):
                lr = other
        worst[step] = curves[lr][step] | {"lr": lr}
    few = relearn_few(model, task, cfg, name) if cfg.attack_few else None
    return {"curves": curves, "worst": worst, "few": few}


def relearn_few(model, task, cfg, name):
    """The attack that gradient routing was published with (Cloud et al. 2024, section 4.2): 40
    steps on cfg.attack_few forget texts alone. Returns the best forget score that any of cfg.lrs
    reaches on held-out rows (val), which are looked at every fourth step."""
    few, best = task.first_texts(cfg.attack_few), None
    histories = tune_each(model, few, cfg, "forget", cfg.attack_rows, 40,
                          [(lr, seed_of("few", cfg.seed)) for lr in cfg.lrs], name=f"few {name}",
                          judge=lambda model: task.score(model, ("forget",), "val"),
                          evaluate_at=range(0, 40, 4))
    for at in sum(histories, []):
        best = at["forget"] if best is None or task.knows_more(at["forget"], best) else best
    return best


def attacked(result):
    """Figures for a row, from what relearn() returns: {"relearned": {step: forget score}, "rates":
    {step: worst rate}}, a relearned_.. for each further figure but retain's, at that rate, and
    "relearned_few" where there was such an attack."""
    worst, few = result["worst"], result["few"]
    names = {"relearned": "forget", "rates": "lr"} | {
        f"relearned_{k.removeprefix('forget_')}": k for k in next(iter(worst.values()))
        if k not in ("forget", "lr") and not k.startswith("retain")}
    return {name: {str(step): at[k] for step, at in worst.items()} for name, k in names.items()} | (
        {} if few is None else {"relearned_few": few})


def robustness(method, unlearned, filtered):
    """(P_method - P_unlearned) / (P_filtered - P_unlearned), where P is the worst forget score at a
    step (Lee et al. 2025, section 3). 0: the model relearns like the unlearned one; 1: like one
    that never saw the data. None if the two references do not differ.
    """
    return None if filtered == unlearned else (method - unlearned) / (filtered - unlearned)


def scored(model, task, cfg):
    """{"retain", "forget", ..}: the reported scores of a model, without finer figures."""
    return evaluated(cfg, lambda: task.score(model))


def revive(model, task, cfg, goal, name="model"):
    """Reverse fine-tuning (Jain et al. 2023, section 5): AdamW on cfg.domain's data until its score
    is within cfg.tolerance of `goal`.

    returns  (steps, {step: score}); steps is None if cfg.revive_steps are not enough
    """
    def revived(at):
        return task.within(at[cfg.domain], goal, cfg.tolerance)

    curve = {0: scored(model, task, cfg)}
    if revived(curve[0]):
        return 0, {0: curve[0][cfg.domain]}
    _, record = tune(model, task, cfg, cfg.domain, cfg.attack_rows, cfg.revive_steps,
                     cfg.revive_lr, seed=seed_of("revive", cfg.seed), name=f"revive {name}",
                     stop=revived, evaluate_at=range(0, cfg.revive_steps, cfg.check_every),
                     judge=lambda model: task.score(model, (cfg.domain,)))
    curve |= {h["step"]: h for h in record["history"]}
    return (record["steps"] if revived(record["history"][-1]) else None,
            {step: h[cfg.domain] for step, h in curve.items()})


# --- looking inside ------------------------------------------------------------------------------
@torch.no_grad()
def before_answers(model, task, cfg, part):
    """([(N, C)], (N,)): the residuals of each block just before an answer, normalised as for the
    unembedding, and the answers. They are from cfg.probe_rows rows of a part of cfg.domain's data.
    If the task has no answer_mask, every target counts as an answer."""
    idx, targets = task.undivided(cfg.domain, cfg.probe_rows, 0, seed_of("probe", cfg.seed), part)
    every = torch.ones_like(targets, dtype=torch.bool)
    mask = (task.module.answer_mask(task, idx, targets) if hasattr(task.module, "answer_mask")
            else every)
    chunks = []                                              # [[(n, C) for each block]]
    for rows, where in zip(idx.split(250), mask.split(250)):
        with autocast(cfg):
            stream = model.residuals(rows)[1:]
        chunks.append([norm(x[:, -targets.size(1):].float())[where] for x in stream])
    return [torch.cat(block) for block in zip(*chunks)], targets[mask]


def probe(model, task, cfg, decay=1e-5):
    """A linear probe predicts the answers in cfg.domain's rows (see before_answers) from each
    block's residual. It is a multinomial logistic regression with weight decay, fitted on training
    rows (Jain et al. 2023, section 5).

    returns  ([accuracy by block], accuracy of always giving the commonest answer), held-out rows
    """
    features, right = before_answers(model, task, cfg, "train")
    new_features, truth = before_answers(model, task, cfg, "test")
    if not len(right) or not len(truth):
        raise BadInput(f"--probe_rows={cfg.probe_rows}: these rows of {task.name} contain no "
                       f"answer: give more")
    kinds, classes = torch.unique(torch.cat((right, truth)), return_inverse=True)
    right, truth = classes.split((len(right), len(truth)))
    accuracies = []
    for x, new in zip(features, new_features):
        W = torch.zeros(len(kinds), x.size(1), device=x.device, requires_grad=True)
        b = torch.zeros(len(kinds), device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([W, b], max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(x, W, b), right) + decay * W.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        accuracies.append((F.linear(new, W, b).argmax(-1) == truth).float().mean().item())
    return accuracies, (truth == right.mode().values).float().mean().item()


def saliency(model, task, cfg, rows=256):
    """(n_layer, n_units): theta * grad of cfg.domain's loss, summed over the weights that each MLP
    neuron writes with. To first order, the loss falls by this much when the neuron is cut out. It
    equals the gradient by a factor on the neuron's output, which is how it is computed here (Jain
    et al. 2023, section 5; Molchanov et al. 2016).
    """
    config = model.config
    batch = task.undivided(cfg.domain, rows, 0, seed_of("saliency", cfg.seed), "train")
    factor = torch.ones(config.n_layer, config.n_units, device=task.device, requires_grad=True)

    def hook(site, i, h):
        return h * factor[i] if site == "units" else h

    gradient, = torch.autograd.grad(model(*batch, hook=hook), factor)
    return gradient.abs() if cfg.saliency == "absolute" else gradient


@torch.no_grad()
def without(model, scores, K):
    """A copy without the K neurons that have the highest scores (n_layer, n_units)."""
    copy, cut = model.clone(), torch.zeros_like(scores, dtype=torch.bool)
    cut.view(-1)[scores.flatten().topk(K).indices] = True
    for block, units in zip(copy.blocks, cut):
        block.mlp.down.weight[:, units] = 0
    return copy


def check_cut(cfg, neurons):
    if max(cfg.cut) > neurons:
        raise BadInput(f"--cut={max(cfg.cut)}: the model has {neurons} MLP neurons")


def prune(model, task, cfg):
    """For each K in cfg.cut, cuts together the K neurons that raise cfg.domain's loss most.

    returns  {K: {"retain", "forget", "random_retain", "random_forget"}}: the scores, and their
             means over cfg.draws choices of K random neurons
    """
    harm, scores = saliency(model, task, cfg), {}
    generator = torch_stream("random neurons", cfg.seed)
    for K in cfg.cut:
        chance = [scored(without(model, torch.rand(harm.shape, generator=generator).to(harm), K),
                         task, cfg) for _ in range(cfg.draws)]
        scores[K] = scored(without(model, harm, K), task, cfg) | {
            f"random_{domain}": sum(at[domain] for at in chance) / cfg.draws
            for domain in ("retain", "forget")}
    return scores


# --- the judges ----------------------------------------------------------------------------------
def judge_score(cfg, task, model):
    with autocast(cfg):
        scores = task.score(model, finer=True)
    write_rows("score", cfg, task, rows := [{"model": cfg.model} | scores])
    table([{"figure": k, "value": v} for k, v in scores.items() if k != "stories"],
          {"figure": cfg.model, "value": ""})
    print_stories(rows)


def judge_relearn(cfg, task, model):
    before = scored(model, task, cfg)
    result = relearn(model, task, cfg, cfg.model, ("retain", "forget"))
    curve = {0: before | {"lr": None}} | result["worst"]
    rows = [{"model": cfg.model, "attack": cfg.attack, "step": step} | at
            for step, at in curve.items()]
    unseen = {"forget_heldout_pairs": "unseen pairs"} if "forget_heldout_pairs" in before else {}
    write_rows("relearn", cfg, task, rows)
    picture("relearn", cfg, draw_relearning, task, {
        f"{cfg.model}, rate {lr:g}": {0: before["forget"]} | {
            step: at["forget"] for step, at in points.items()}
        for lr, points in result["curves"].items()})
    table([row | {"rate": f"{row['lr']:g}" if row["lr"] else None} for row in rows],
          {"step": "step", "forget": "forget", "retain": "retain"} | unseen
          | {"rate": "worst rate"})
    say_edges([{"model": cfg.model} | attacked(result)], cfg)


def judge_sample(cfg, task, model):
    prompt = [task.end] + task.tokenizer.encode_ordinary(cfg.prompt)
    room = model.config.block_size - len(prompt)
    if room < 1:
        raise BadInput(f"--prompt has {len(prompt) - 1} tokens; this model reads at most "
                       f"{model.config.block_size - 2}")
    with autocast(cfg):
        new = model.generate([prompt], min(cfg.tokens, room), cfg.temperature, task.end, cfg.seed,
                             compiled=bool(cfg.compile))
    text = task.tokenizer.decode([i for i in new[0].tolist() if i != task.end])
    print(cfg.prompt + text)


def untrained(model, seed):
    """An untrained model of the same size, whose initial weights no other model shares."""
    copy = model.clone()
    copy.init_weights(torch_stream("weights", "untrained", seed))
    return copy


def judge_probe(cfg, task, model):
    """Also probes an untrained model of the same size: what the architecture alone gives."""
    rows = []
    for name, each in ((cfg.model, model), ("untrained", untrained(model, cfg.seed))):
        probed, chance = probe(each, task, cfg)
        rows.append({"model": name, "probe": probed, "chance": chance})
    columns = {f"block {i + 1}": f"block {i + 1}" for i in range(model.config.n_layer)}
    write_rows("probe", cfg, task, rows)
    picture("probe", cfg, draw_probes, {row["model"]: row["probe"] for row in rows}, chance)
    table([row | dict(zip(columns, row["probe"])) for row in rows],
          {"model": "model", "chance": "commonest"} | columns)


def judge_prune(cfg, task, model):
    check_cut(cfg, model.config.n_layer * model.config.n_units)
    pruned = prune(model, task, cfg)
    rows = [{"model": cfg.model, "neurons": 0} | scored(model, task, cfg)]
    rows += [{"model": cfg.model, "neurons": K} | at for K, at in pruned.items()]
    write_rows("prune", cfg, task, rows)
    picture("prune", cfg, draw_pruning, task, {cfg.model: pruned}, cfg.domain)
    table(rows, {k: k.replace("_", " ") for k in ("neurons", "forget", "random_forget", "retain",
                                                  "random_retain")})


def judge_revive(cfg, task, model):
    """Also revives the control, if there can be one, and an untrained model, to compare with."""
    goal = scored(known(cfg.reference, cfg, task), task, cfg)[cfg.domain]
    models = {cfg.model: model}
    if not task.pretrained:
        models[f"control ({cfg.control})"] = known(cfg.control, cfg, task)
    models["control (untrained)"] = untrained(model, cfg.seed)
    rows = []
    for name, each in models.items():
        steps, curve = revive(each, task, cfg, goal, name)
        rows.append({"model": name, "before": curve[0], "after": [*curve.values()][-1],
                     "revive_steps": steps, "curve": curve})
    write_rows("revive", cfg, task, rows)
    picture("revive", cfg, draw_revival, task, {row["model"]: row["curve"] for row in rows},
            cfg.domain)
    table(rows, {"model": "model", "before": "before", "after": "after",
                 "revive_steps": f"steps to {goal:.3f} ±{cfg.tolerance:.0%}"})


def known(name, cfg, task):
    if task.pretrained and name == "base":
        return task.module.base(task)[0]
    model = load(path_of(name, cfg), task)[0]
    if model.config.block_size < task.block_size:
        raise BadInput(f"{path_of(name, cfg)} reads rows of at most {model.config.block_size} "
                       f"tokens, not of {task.block_size}: give --block_size="
                       f"{model.config.block_size}")
    return model


def known_ones(first, cfg, task):
    """{name: model}: those called `first`, and then cfg.models, or all models of this seed. A file
    that cannot be used is left out with a note, unless it was named."""
    files = sorted(path.stem for path in models_of(cfg).glob("*.pt")
                   if not path.stem.endswith(".resume"))
    named, models = [*first, *(cfg.models or ())], {}
    for name in dict.fromkeys(named + ([] if cfg.models else files)):
        try:
            models[name] = known(name, cfg, task)
        except BadInput as error:
            if name in named:
                raise
            print(f"note: {name} is left out: {error}")
    return models


JUDGES = {"score": judge_score, "relearn": judge_relearn, "sample": judge_sample,
          "probe": judge_probe, "prune": judge_prune, "revive": judge_revive}


def as_long_as(name, cfg):
    """cfg with block_size set to that of the named model, unless the user gave one. A pretrained
    model reads far more than a row."""
    path = path_of(name, cfg)
    if cfg.block_size or not path.exists() or data.starts_pretrained(cfg.task):
        return cfg
    return dataclasses.replace(cfg, block_size=read(path)[0].config.block_size)


def main(cfg):
    own = data.starts_pretrained(cfg.task) and is_pretrained(cfg.model)
    file = cfg.model if own else None                               # quiz: base's own file
    task = open_task(dataclasses.replace(as_long_as(cfg.model, cfg), model=file), writes=False)
    cfg = fill(fill(dataclasses.replace(cfg, model="base" if file else cfg.model), ATTACK), TOOLS)
    check_attack(cfg)
    JUDGES[cfg.what](cfg, task, known(cfg.model, cfg, task))


if __name__ == "__main__":
    run(main, Config, __doc__, MOVED)
