"""The judges: what a model scores, how fast it relearns, what it says.

    python eval.py --what=score --model=base
    python eval.py --what=relearn --model=maxent --attack=mixed
    python eval.py --what=sample --model=base --prompt="12 + 5 ="

Robustness is what survives an attacker who fine-tunes the model (Lee et al. 2025, section 3).
"""
from dataclasses import dataclass

from data.knobs import BadInput, knob
from data.report import figure, table, write_rows
from model import GPT
from train import Common, autocast, fill, fit, load, open_task, path_of, run


@dataclass
class Attack(Common):
    """Knobs of the relearning attack."""
    attack: str = knob("forget", "fine-tune on forget data, on the pretraining mix, or on retain "
                       "data alone", choices=["forget", "mixed", "retain"])
    lrs: list[float] | None = knob(None, "rates the attacker tries; the worst counts", 0, 1)
    attack_steps: list[int] | None = knob(None, "steps at which the attacked model is scored", 1)
    attack_rows: int | None = knob(None, "rows in a batch of the attack", 1, 2**31)


@dataclass
class Config(Attack):
    what: str = knob("score", "which judge", choices=["score", "relearn", "sample"])
    model: str = knob("base", "a name in OUT/TASK/, or a path that ends in .pt")
    prompt: str = knob("", "sample: the text to continue")
    tokens: int = knob(32, "sample: most tokens to add", 1)
    temperature: float = knob(0.0, "sample: 0 is greedy, 1 the model's own distribution", 0, 10)


def worse(a, b, task):
    """Whether forget score a shows more of the forgotten skill than b."""
    return a > b if task.higher_is_better else a < b


def within(score, reference, share, task):
    """Whether a retain score is at most `share` worse than a reference score."""
    if task.higher_is_better:
        return score >= (1 - share) * reference
    return score <= (1 + share) * reference


def relearn(model, task, cfg, name="model"):
    """Attacks copies of a model: AdamW on forget data, once for each rate in cfg.lrs.

    returns  {"curves": {lr: {step: {"retain", "forget"}}},
              "worst": {step: {"retain", "forget", "lr"}}}: the rate with the most forgotten skill
              *at each step*, as an attacker who may stop when it suits him. cfg is an Attack whose
              auto knobs are filled; steps are those of cfg.attack_steps.
    """
    split = {"forget": "forget", "mixed": "all", "retain": "retain"}[cfg.attack]
    seed = cfg.seed + 10_000                        # rows that the model has not been trained on
    curves = {}
    for lr in cfg.lrs:
        copy = GPT(model.config).to(task.device)
        copy.load_state_dict(model.state_dict())

        def loss_fn(model, step):
            return model(*task.batch(split, cfg.attack_rows, step, seed))

        record = fit(copy, loss_fn, cfg, max(cfg.attack_steps), lr, name=f"relearn {name} {lr:g}",
                     tokens=cfg.attack_rows * task.block_size, evaluate_at=set(cfg.attack_steps),
                     evaluate=lambda: task.score(copy, quick=True))
        curves[lr] = {h["step"]: {k: h[k] for k in ("retain", "forget")}
                      for h in record["history"]}
    worst = {}
    for step in cfg.attack_steps:
        lr = cfg.lrs[0]
        for other in cfg.lrs[1:]:
            if worse(curves[other][step]["forget"], curves[lr][step]["forget"], task):
                lr = other
        worst[step] = curves[lr][step] | {"lr": lr}
    return {"curves": curves, "worst": worst}


def robustness(method, unlearned, filtered):
    """(P_method - P_unlearned) / (P_filtered - P_unlearned): 0 relearns like the unlearned model,
    1 like one that never saw the data. P is the worst forget score at a step (Lee et al. 2025,
    section 3). None where the two references do not differ.
    """
    return None if filtered == unlearned else (method - unlearned) / (filtered - unlearned)


def draw_relearning(ax, task, curves):
    """Worst-case forget score against attack steps; curves: {name: {step: score}}."""
    styles = {"filtered": dict(color="black", linestyle="--", linewidth=2.5)}
    for name, points in curves.items():
        ax.plot(list(points), list(points.values()), marker="o", markersize=4,
                label=name + " (gold standard)" * (name == "filtered"), **styles.get(name, {}))
    what = "accuracy" if task.higher_is_better else "loss (nats per token)"
    ax.set(xlabel="fine-tuning steps of the attacker", ylabel=f"forget {what}, worst rate")
    ax.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))        # beside the curves


def judge_score(cfg, task, model):
    with autocast(cfg):
        figures = task.score(model)
    table([{"figure": k, "value": v} for k, v in figures.items()],
          {"figure": cfg.model, "value": ""})
    write_rows("score", cfg, task, [{"model": cfg.model} | figures])


def judge_relearn(cfg, task, model):
    with autocast(cfg):
        before = task.score(model, quick=True)
    result = relearn(model, task, cfg, cfg.model)
    curve = {0: before | {"lr": None}} | result["worst"]
    rows = [{"model": cfg.model, "attack": cfg.attack, "step": step} | at
            for step, at in curve.items()]
    table(rows, {"step": "step", "forget": "forget", "retain": "retain", "lr": "worst rate"})
    write_rows("relearn", cfg, task, rows)
    with figure("relearn", cfg, 1) as axes:
        if axes is not None:
            lines = {f"{cfg.model}, rate {lr:g}":
                     {0: before["forget"]} | {step: at["forget"] for step, at in points.items()}
                     for lr, points in result["curves"].items()}
            draw_relearning(axes[0], task, lines)


def judge_sample(cfg, task, model):
    prompt = [task.end] + task.tokenizer.encode_ordinary(cfg.prompt)
    room = model.config.block_size - len(prompt)
    if room < 1:
        raise BadInput(f"--prompt has {len(prompt) - 1} tokens; this model reads "
                       f"{model.config.block_size - 2} at most")
    with autocast(cfg):
        new = model.generate([prompt], min(cfg.tokens, room), cfg.temperature, task.end, cfg.seed)
    text = task.tokenizer.decode([i for i in new[0].tolist() if i != task.end])
    print(cfg.prompt + text)


def main(cfg):
    task = open_task(cfg, writes=False)
    cfg = fill(cfg, task, "attack")
    model, _ = load(path_of(cfg.model, cfg), task)
    task.block_size = model.config.block_size         # judged on rows as long as it reads
    {"score": judge_score, "relearn": judge_relearn, "sample": judge_sample}[cfg.what](
        cfg, task, model)


if __name__ == "__main__":
    run(main, Config, __doc__)
