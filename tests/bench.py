"""What each trick buys: ours beside the plain way, measured in turns (A B A B) in this process.

    python tests/bench.py                 seven minutes on a CPU, compiling included
    python tests/bench.py --device=cpu --compile=false

Ratios are between medians of the same run, since machines are shared and noisy; never compare
seconds of two runs. Rows go to OUT/bench.json.
"""
import dataclasses
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import eval as judges  # noqa: E402
import recontext  # noqa: E402
import route  # noqa: E402
import train  # noqa: E402
import undo  # noqa: E402
import unlearn  # noqa: E402
from data import arithmetic, gaming, pcfg, tokenizer  # noqa: E402
from engine.disk import write  # noqa: E402
from engine.knobs import knob  # noqa: E402
from engine.report import table  # noqa: E402
from eval import ATTACK, Attack, fill_attack, relearn  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

SIZES = {   # name: model, rows in a batch
    "0.8M": (GPTConfig(512, 32, 4, 4, 128), 256),
    "7M": (GPTConfig(4096, 256, 6, 4, 256), 16),
    "30M": (GPTConfig(8192, 512, 8, 8, 512), 32),
    "124M": (GPTConfig(50304, 1024, 12, 12, 768), 16)}
WANTED = {  # device: row: the least ratio, or share of the peak, to reach
    "cpu": {"step 0.8M": 2, "step 7M": 3, "peak 7M": 0.5, "generate 8": 15, "batch": 10,
            "score": 20, "routed era": 0.8, "routed sgtm": 0.8, "rollouts sycophancy": 10,
            "rollouts metric": 10, "words": 0.1, "waiting, quiet": 0.95, "waiting, busy": 1.2},
    "cuda": {"step 7M": 4, "peak 124M": 0.45, "stack": 5}}


@dataclass
class Config(train.Common):
    only: str = knob("all", "which rows", choices=["all", "step", "generate", "batch", "pcfg",
                                                   "score", "attack", "stack", "routed",
                                                   "rollouts", "linear", "words", "waiting",
                                                   "story"])
    turns: int = knob(3, "how often each way has its turn", 1)


def wait(cfg):
    if train.hardware(cfg)[0].type == "cuda":
        torch.cuda.synchronize()


def in_turns(cfg, **ways):
    """Median seconds of each way: all once to warm up, then all in turns."""
    seconds = {name: [] for name in ways}
    for turn in range(cfg.turns + 1):
        for name, way in ways.items():
            wait(cfg)
            start = time.perf_counter()
            way()
            wait(cfg)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def random_task(config, device, folder, tokens=1_000_000):
    """A Task of random tokens, as long as asked."""
    enc = tokenizer.train(["random"], 300, "bench")
    tokenizer.save(enc, folder / "tokenizer.json")
    for split in data.SPLITS:
        drawn = np.random.default_rng(0).integers(0, config.vocab_size, tokens, np.uint16)
        write(folder / f"{split}.bin", drawn.tobytes())
    return data.Task("tinystories", folder, {"made_with": {}, "facts": {}, "files": {}},
                     config.block_size, device)


def plain_batch(task, size):
    """Row by row, as a first loop does it."""
    tokens, T = task.tokens("retain_train"), task.block_size
    starts = torch.randint(len(tokens) - T, (size,))
    x = torch.stack([torch.from_numpy(tokens[i:i + T].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(tokens[i + 1:i + 1 + T].astype(np.int64)) for i in starts])
    return x.to(task.device), y.to(task.device)


def peak(cfg, dtype=None):
    """FLOP/s of the best square matrix product, in a dtype (None: the one training computes in)."""
    device, usual, _ = train.hardware(cfg)
    best, dtype = 0, dtype or usual
    for n in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        for _ in range(10):
            best = max(best, 2 * n ** 3 / in_turns(dataclasses.replace(cfg, turns=1),
                                                   product=lambda: a @ b)["product"])
    return best


def plain_steps(model, task, size, n):
    """n steps of training as a first loop takes them; gives a function that takes them."""
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False, fused=False)

    def take():
        for _ in range(n):
            idx, targets = plain_batch(task, size)
            loss = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
            adamw.zero_grad()
            loss.backward()
            adamw.step()
            loss.item()

    return take


def bench_step(cfg, rows):
    device, _, _ = train.hardware(cfg)
    top = peak(cfg)
    rows.append({"row": "bfloat16", "unit": "GFLOP/s; plain: float32",
                 "plain": peak(cfg, torch.float32) / 1e9, "ours": peak(cfg, torch.bfloat16) / 1e9})
    for name in list(SIZES)[:None if device.type == "cuda" else 2]:
        config, size = SIZES[name]
        with tempfile.TemporaryDirectory() as folder:
            task = random_task(config, device, Path(folder))

            run = train.Run(GPT(config).to(device), cfg, 6e-3, 0.02)

            def our_steps(n=10):
                for _ in range(n):
                    run.step(lambda model, step: model(*task.batch("retain", size, step, 0)),
                             run.model, None, None, 1.0)
                run.loss("bench", None)
                run.since = []

            our_steps(1)                    # the first counts its FLOPs, eagerly, as in fit()
            if train.should_compile(cfg, 1e6, 1e15):
                run.compile([run.model])
            plain = plain_steps(GPT(config).to(device), task, size, 3)
            took = in_turns(cfg, plain=plain, ours=our_steps)
        tokens = size * config.block_size
        speed = {"plain": 3 * tokens / took["plain"], "ours": 10 * tokens / took["ours"]}
        rows.append({"row": f"step {name}", "unit": "tokens/s"} | speed)
        achieved = sum(run.cost) * speed["ours"] / tokens
        rows.append({"row": f"peak {name}", "unit": "GFLOP/s; plain: the matrix peak",
                     "plain": top / 1e9, "ours": achieved / 1e9})


def bench_generate(cfg, rows, new=128, skip=16):
    """128 tokens after prompts of 128, against recomputing the whole prefix for every token: in
    float32, as a first loop does it, and (row `cache`) at our precision, which shows the cache
    alone. What recomputing costs grows evenly with the prefix: every `skip`-th token tells it.
    """
    config, _ = SIZES["7M"]
    device, _, _ = train.hardware(cfg)
    model = GPT(config).to(device)
    for block in model.blocks:                     # so that tokens differ
        torch.nn.init.normal_(block.attn.proj.weight, std=0.1)
        torch.nn.init.normal_(block.mlp.down.weight, std=0.1)

    @torch.no_grad()
    def recompute(idx):
        for T in range(config.block_size - new + skip // 2, config.block_size, skip):
            model.unembed(model.residuals(idx[:, :T])[-1][:, -1]).argmax(-1)

    def under_autocast(way, *given, **more):
        with train.autocast(cfg):
            way(*given, **more)

    for size in (1, 8, 64):
        idx = torch.randint(config.vocab_size, (size, config.block_size))
        prompts, idx = idx[:, :-new].tolist(), idx.to(device)
        took = in_turns(cfg, plain=lambda: recompute(idx),
                        cache=lambda: under_autocast(recompute, idx),
                        ours=lambda: under_autocast(model.generate, prompts, new,
                                                    compiled=device.type == "cuda"))
        for row in ("generate", "cache"):
            plain = took["plain" if row == "generate" else "cache"] * skip
            rows.append({"row": f"{row} {size}", "unit": "tokens/s", "plain": size * new / plain,
                         "ours": size * new / took["ours"]})


def bench_batch(cfg, rows):
    config, size = SIZES["0.8M"]
    with tempfile.TemporaryDirectory() as folder:
        task = random_task(config, "cpu", Path(folder))
        took = in_turns(cfg, plain=lambda: [plain_batch(task, size) for _ in range(10)],
                        ours=lambda: [task.batch("retain", size, i, 0) for i in range(10)])
    rows.append({"row": "batch", "unit": "rows/s", **{k: 10 * size / s for k, s in took.items()}})


def plain_question(rng, length):
    """A string of the grammar and how many a it holds, letter by letter."""
    text = rng.choice("ABCD")
    while len(text) < 2 * length:
        text = "".join(rng.choice(pcfg.GRAMMAR[x]) for x in text)
    begin = rng.randrange(len(text) - length + 1)
    return text[begin:begin + length].count("A")


def bench_pcfg(cfg, rows, size=2048):
    """Questions about strings, pretraining's mixture: made by the batch, and one by one."""
    task, rng = data.load("pcfg"), random.Random(0)
    took = in_turns(cfg, ours=lambda: task.batch("all", size, 0, 0),
                    plain=lambda: [plain_question(rng, 16) for _ in range(size)])
    rows.append({"row": "pcfg", "unit": "tokens/s"} | {
        way: size * task.block_size / seconds for way, seconds in took.items()})


def small_task(cfg):
    """Arithmetic, briefly learnt: answers end, as they do after training."""
    task = data.load("arithmetic", cfg.data_dir, device=train.hardware(cfg)[0])
    model = GPT(GPTConfig(task.vocab_size, task.block_size)).to(task.device)
    short = dataclasses.replace(cfg, compile=False)
    train.fit(model, lambda model, step: model(*task.batch("all", 32, step, 0)), short, 30, 6e-3,
              0.02)
    return task, model


def bench_score(cfg, rows):
    """Answers to equations, all at once against one after the other."""
    task, model = small_task(cfg)
    problems = arithmetic.exam("+", "equations", "test", False, task.made_with["heldout_pairs"])
    with train.autocast(cfg):
        took = in_turns(dataclasses.replace(cfg, turns=1),
                        plain=lambda: [arithmetic.accuracy(model, task, [p]) for p in problems],
                        ours=lambda: arithmetic.accuracy(model, task, problems))
    rows.append({"row": "score", "unit": "problems/s",
                 **{k: len(problems) / s for k, s in took.items()}})


def bench_attack(cfg, rows):
    """Tokens/s of the whole relearning attack, scores included, against plain training's."""
    task, model = small_task(cfg)
    attack = train.config_from(cfg, Attack)
    attack = train.fill(attack, ATTACK)
    took = in_turns(dataclasses.replace(cfg, turns=1),
                    plain=plain_steps(model, task, attack.attack_rows, 20),
                    ours=lambda: relearn(model, task, attack))
    tokens = attack.attack_rows * task.block_size
    runs = len(attack.lrs) * attack.attack_seeds
    steps = {"plain": 20, "ours": runs * max(attack.attack_steps)}
    rows.append({"row": "attack", "unit": "tokens/s",
                 **{k: steps[k] * tokens / s for k, s in took.items()}})


def bench_stack(cfg, rows, steps=30):
    """Steps/s of the attack's runs as one Stack, counted for each run, against one run after the
    other. Without scores and uncompiled. Only a GPU is asked to stack them: see eval.stackable."""
    task, model = small_task(cfg)
    attack = train.fill(train.config_from(cfg, Attack, compile=False), ATTACK)
    runs = [(lr, seed) for lr in attack.lrs for seed in range(attack.attack_seeds)]

    def trained(stacked):
        with mock.patch.object(judges, "stackable", lambda *_: stacked):
            judges.tune_each(model, task, attack, "forget", attack.attack_rows, steps, runs,
                             name="stack", judge=lambda copy: {})

    took = in_turns(dataclasses.replace(cfg, turns=1), plain=lambda: trained(False),
                    ours=lambda: trained(True))
    rows.append({"row": "stack", "unit": "steps/s",
                 **{k: len(runs) * steps / s for k, s in took.items()}})


def bench_routed(cfg, rows):
    """Steps/s of route.py's default training, for two methods, against those of its base."""
    given = train.config_from(dataclasses.replace(cfg, task="language"), route.Config)
    task = data.load("language", cfg.data_dir, device=train.hardware(cfg)[0])
    given = fill_attack(train.fill(given, route.SETTINGS))
    view, ways = task.labelled(0.5, 0.0, 0.5), {}
    for method in ("base", "era", "sgtm"):
        extra = given.expand if method == "era" else 0
        model, frozen = train.new_model(given, task, "route", extra), route.Frozen()
        loss_fn = route.LOSSES[method](model, view, given, frozen)
        ways[method] = functools.partial(
            train.fit, model, loss_fn, given, 30, given.lr, given.muon_lr, name=method,
            after_backward=frozen.after_backward, after_step=frozen.after_step,
            pieces=frozen.pieces)
    took = in_turns(cfg, **ways)
    rows += [{"row": f"routed {method}", "unit": "steps/s", "plain": 30 / took["base"],
              "ours": 30 / took[method]} for method in ("era", "sgtm")]


def bench_rollouts(cfg, rows, size=512, n=4, few=32):
    """Rollouts/s of recontext.py's default, items and rewards included: answers of 2 and of 7
    tokens. Plain: answers alone, in float32 and without a cache; prompt by prompt, as a first loop
    does it, and (row `cache`) for all prompts at once.
    """
    device = train.hardware(cfg)[0]
    for env in ("sycophancy", "metric"):
        task = data.load("gaming", env=env, device=device)
        model = GPT(GPTConfig(task.vocab_size, task.block_size, 2, 4, 64)).to(device)
        own = train.config_from(dataclasses.replace(cfg, task="gaming"),
                                recontext.Config, env=env)
        cell = recontext.Cell("ei", "neutral", "encourage", n)
        length = gaming.environment(task).length + 1
        prompts = recontext.rollouts(model, task, own, cell, size, 0).asked[..., :-length]

        @torch.no_grad()
        def recompute(idx):
            for _ in range(length):
                new = torch.multinomial(model(idx)[:, -1].softmax(-1), 1)
                idx = torch.cat((idx, new), 1)

        took = in_turns(cfg, rollouts=lambda: [recompute(idx) for idx in prompts[:few]],
                        cache=lambda: recompute(prompts.flatten(0, 1)),
                        ours=lambda: recontext.rollouts(model, task, own, cell, size, 0))
        for row, done in (("rollouts", few), ("cache", size)):
            rows.append({"row": f"{row} {env}", "unit": "rollouts/s", "ours": size * n
                         / took["ours"], "plain": done * n / took[row]})


def bench_linear(cfg, rows, steps=240):
    """Steps/s in the last quarter of a long run against the first: a run costs what its tokens do.
    """
    config, _ = SIZES["0.8M"]
    with tempfile.TemporaryDirectory() as folder:
        task = random_task(config, train.hardware(cfg)[0], Path(folder))
        at = []

        def loss_fn(model, step):
            if step % (steps // 4) == 0:
                wait(cfg)
                at.append(time.perf_counter())
            return model(*task.batch("retain", 32, step, 0))

        train.fit(GPT(config).to(task.device), loss_fn, dataclasses.replace(cfg, compile=False),
                  steps + 1, 6e-3, 0.02, name="linear")
    rows.append({"row": "linear", "unit": "steps/s", "plain": steps / 4 / (at[1] - at[0]),
                 "ours": steps / 4 / (at[4] - at[3])})


def bench_words(cfg, rows):
    """Tokenizers trained on a megabyte of words, with spaces between them (plain) and without."""
    rng = random.Random(0)
    syllables = ["".join(rng.choices("абвгдежзийклмн", k=3)) for _ in range(400)]
    known = ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3)))) for _ in range(8000)]
    told = [rng.choices(known, weights=[1 / (i + 1) for i in range(8000)], k=100)
            for _ in range(1000)]
    texts = {"plain": [" ".join(words) for words in told], "ours": ["".join(w) for w in told]}
    size = {name: sum(len(text.encode()) for text in some) / 1e3 for name, some in texts.items()}
    took = in_turns(cfg, **{name: functools.partial(tokenizer.train, some, 2048)
                            for name, some in texts.items()})
    rows.append({"row": "words", "unit": "KB/s", **{k: size[k] / s for k, s in took.items()}})


WORKER = """
import sys; sys.path.insert(0, {root!r})
import torch, train                  # torch first, so that it is as the environment says
from model import GPT, GPTConfig
torch.set_num_threads(2)
model = GPT(GPTConfig(512, 56, 4, 4, 128)).to("cpu")
x = torch.randint(512, (32, 56))
cfg = train.Config(device="cpu", compile=False)
for line in sys.stdin:
    train.fit(model, lambda model, step: model(x, x), cfg, 12, 1e-3, 0.02)
    print("done", flush=True)
"""


def bench_waiting(cfg, rows):
    """Steps/s of two threads that spin a little while they wait (ours; see engine/start.py) against
    two as OpenMP has them by default, and (rows `asleep`) two that sleep at once; alone, and beside
    two processes that want both cores."""
    def worker(policy):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))} | policy
        return subprocess.Popen([sys.executable, "-c", WORKER.format(root=sys.path[0])], text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, env=env)

    def steps(process):
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline()

    workers = {"plain": worker({}), "ours": worker({"GOMP_SPINCOUNT": "10000"}),
               "asleep": worker({"OMP_WAIT_POLICY": "PASSIVE"})}
    neighbours = []
    for when in ("quiet", "busy"):
        took = in_turns(cfg, **{name: functools.partial(steps, process)
                                for name, process in workers.items()})
        rows += [{"row": f"{row}, {when}", "unit": "steps/s", "plain": 12 / took[plain],
                  "ours": 12 / took["ours"]} for row, plain in (("waiting", "plain"),
                                                                ("asleep", "asleep"))]
        if when == "quiet":
            neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"])
                          for _ in range(2)]
    for process in (*neighbours, *workers.values()):
        process.kill()


def stages_of_the_story(cfg, compile):
    """{stage: seconds} of `python undo.py` from nothing, but for the imports: what fit() trains by
    name, scores, data, the rest; and how much of it all went into compiling."""
    spent, running, last = dict.fromkeys(STAGES, 0.0), ["rest"], [time.perf_counter()]

    def note():
        now = time.perf_counter()
        spent[running[-1]] += now - last[0]
        last[0] = now

    def timed(function, stage):
        def wrapped(*given, **how):
            note()
            running.append(stage(how.get("name", "")) if callable(stage) else stage)
            try:
                return function(*given, **how)
            finally:
                note()
                running.pop()
        return wrapped

    def trains(name):
        return next((stage for stage, begin in STAGES.items() if begin and name.startswith(begin)),
                    "rest")

    with tempfile.TemporaryDirectory() as folder, ExitStack() as patched:
        for owner, name, stage in (*((module, "fit", trains) for module in (
                train, judges, unlearn, undo) if hasattr(module, "fit")),
                (data.Task, "score", "scores"), (data, "load", "data")):
            patched.enter_context(mock.patch.object(owner, name, timed(
                getattr(owner, name), stage)))
        undo.main(undo.Config.for_task("arithmetic")(
            device=cfg.device, compile=compile, out=folder, data_dir=f"{folder}/data"))
    note()
    return spent


# {stage: how the names of what fit() trains in it begin}
STAGES = {"data": "", "base": "base", "filtered": "filtered", "teacher": "maxent",
          "oracle": "oracle", "students": "undo", "distilled": "distilled", "attacks": "relearn",
          "scores": "", "rest": ""}


def bench_story(cfg, rows):
    """Seconds of the default story and its stages: uncompiled (plain), and as undo.py runs it."""
    spent = {"plain": stages_of_the_story(cfg, False)}
    spent["ours"] = stages_of_the_story(cfg, cfg.compile)
    for stage in ("story", *STAGES):
        seconds = {way: sum(at.values()) if stage == "story" else at[stage]
                   for way, at in spent.items()}
        rows.append({"row": stage, "unit": "s"} | seconds)


def main(cfg):
    rows, device = [], train.hardware(cfg)[0].type
    parts = {"step": bench_step, "generate": bench_generate, "batch": bench_batch,
             "pcfg": bench_pcfg, "score": bench_score, "attack": bench_attack,
             "stack": bench_stack, "routed": bench_routed, "rollouts": bench_rollouts,
             "linear": bench_linear, "words": bench_words, "waiting": bench_waiting,
             "story": bench_story}
    for name, part in tqdm(parts.items(), desc="bench", leave=False):
        if cfg.only == name or cfg.only == "all" and (name != "story" or device == "cuda"):
            part(cfg, rows)
    for row in rows:
        how_much = row["ours"] / max(row["plain"], 1e-9)
        row["ratio"] = 1 / max(how_much, 1e-9) if row["unit"] == "s" else how_much
        row["wanted"] = WANTED.get(device, {}).get(row["row"])
    hardware = torch.cuda.get_device_name() if device == "cuda" else (
        f"CPU, {torch.get_num_threads()} threads")
    made_on = f"{hardware}, torch {torch.__version__}, {str(train.hardware(cfg)[1])[6:]}"
    shown = [row | {k: f"{row[k]:,.{int(row['unit'] == 's')}f}" for k in ("plain", "ours")}
             | {"ratio": f"{row['ratio']:.2f}"} for row in rows]
    print(made_on)
    table(shown, {"row": "row", "plain": "plain", "ours": "ours", "unit": "unit",
                  "ratio": "ours / plain", "wanted": "wanted"})
    print(f"\nFor docs/speed.md:\n\n*{made_on}*\n\n| row | plain | ours | unit | ours / plain |\n"
          "|---|---:|---:|---|---:|")
    for row in shown:
        print("|", " | ".join(str(row[k]) for k in ("row", "plain", "ours", "unit", "ratio")), "|")
    path = Path(cfg.out) / "bench.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps({"config": dataclasses.asdict(cfg) | {"hardware": hardware},
                            "rows": rows}, indent=1).encode())
    print(f"rows: {path}")


if __name__ == "__main__":
    train.run(main, Config, __doc__)
