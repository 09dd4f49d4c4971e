"""README and docs/: every command parses, every link and file is there, every recipe works."""
import importlib
import importlib.util
import re
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from test_wiring import ATTACK, STRINGS, lively

import data
import eval as judges
import route
import train
import unlearn
from data import gaming
from engine.knobs import BadInput, command_line

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def commands(text):
    """What follows `python` in code, up to a comment or the next command."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    lines += [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", text)]
    for line in lines:
        for part in re.split(r"&&|\|", line.partition(" #")[0]):
            words = shlex.split(part)
            if words and words[0] in ("python", "torchrun"):
                yield [word for word in words[1:] if not word.startswith("--nproc")]


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page):
    for script, *argv in commands(PAGES[page]):
        if script == "-m":
            script = argv.pop(0)
            if script in ("pytest", "experiments.NAME"):
                continue
        of_a_package = re.match(r"(experiments|workshop)\.", script)
        there = script.replace(".", "/") + ".py" if of_a_package else script
        assert (ROOT / there).exists(), script
        if script.endswith("same_rows.py") or script.startswith("workshop"):   # these have no knobs
            continue
        sys.path.insert(0, str(ROOT / "tests"))
        module = importlib.import_module(Path(script).stem if script.endswith(".py") else script)
        sys.path.pop(0)
        known = {"--method=shuffled": "--method=maxent", "--task=colours": "--task=language",
                 "--env=copy": "--env=lying"}                      # of the recipes in extend.md
        command_line(module.Config, "", [known.get(word, word) for word in argv],
                     getattr(module, "MOVED", {}))


def test_there_are_commands():
    found = [command for text in PAGES.values() for command in commands(text)]
    assert len(found) > 40 and ["undo.py"] in found and ["-m", "experiments.digits"] in found


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_are_there(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        assert link.startswith("https://") or (folder / link.partition("#")[0]).exists(), link
    rooms = "data|engine|experiments|workshop|tests|docs|assets"
    for name in re.findall(rf"`((?:{rooms})/[\w./-]+)`", PAGES[page]):
        assert (ROOT / name).exists() or name == "data/colours.py", name


def test_pictures_are_shown():
    shown = {Path(link).name for text in PAGES.values()
             for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)}
    assert shown == {path.name for path in (ROOT / "assets").glob("*.png")}


def test_readme_is_finished_in_five_minutes():
    text = PAGES["README.md"]
    assert text.count("\n") <= 250 and len(text.encode()) <= 16 << 10


# --- extend.md -----------------------------------------------------------------------------------
def recipe(title, block=0):
    section = re.search(rf"## {title}\n(.*?)(?=\n## |\Z)", PAGES["extend.md"], re.S)[1]
    return re.findall(r"```python\n(.*?)```", section, re.S)[block]


def test_a_new_unlearning_loss(monkeypatch, tmp_path):
    names = dict(vars(unlearn))
    monkeypatch.setitem(unlearn.METHODS, "shuffled", None)          # taken out again at the end
    exec(recipe("An unlearning loss"), names)
    model, cfg = lively(STRINGS), unlearn.Config(retain_weight=0.5, method="shuffled")
    forget, retain = (STRINGS.batch(split, 4, 0, 0) for split in ("forget", "retain"))
    wrong = torch.cat([forget[1][-1:], forget[1][:-1]])
    loss = unlearn.objective(model, forget, retain, model, cfg)
    assert loss.item() == pytest.approx((model(forget[0], wrong) + 0.5 * model(*retain)).item())

    said = dict(re.findall(r"--(\w+)=([\w.-]+)", PAGES["extend.md"].split("Put the function")[1]))
    knobs = {k: float(said[k]) for k in ("lr", "retain_weight")} | {
        k: int(said[k]) for k in ("steps", "batch_size")}
    for wanted, given in ((None, knobs | {"steps": 1}), ("--retain_weight", knobs | {
            "retain_weight": None})):
        cfg = unlearn.Config(task="pcfg", method="shuffled", device="cpu", compile=False,
                             out=str(tmp_path / str(wanted)), **given)
        with pytest.raises(BadInput, match=wanted) if wanted else nullcontext():
            unlearn.unlearn(cfg, STRINGS, model, {"made_with": {}, "flops": 0})


def test_a_new_routing_mask(tmp_path):
    names = dict(vars(route)) | {"LOSSES": {}}
    exec(recipe("A routing mask"), names)
    task = data.load("language", folder=tmp_path, stories=200, block_size=32)
    cfg = route.Config(**ATTACK, steps=1, batch_size=16, lr=1e-3, muon_lr=0.0)
    model, size = lively(task), 4                                          # of a head
    idx, targets, forget = route.mixed_batch(task, cfg, 0)
    assert 0 < forget.sum() < 16
    for rows, others in ((forget, False), (~forget, True)):                # of one kind at a time
        names["mixed_batch"] = lambda *_: (idx[rows[:, 0]], targets[rows[:, 0]], forget[rows[:, 0]])
        model.zero_grad()
        names["LOSSES"]["one_head"](model, task, cfg, route.Frozen())(model, 0).backward()
        values = model.blocks[0].attn.qkv.weight.grad[-model.config.n_embd:]
        assert values[-size:].any() and values[:-size].any() == others


def test_a_new_task(tmp_path, monkeypatch):
    path = tmp_path / "colours.py"
    path.write_text(recipe("A task"))
    found = importlib.util.spec_from_file_location("data.colours", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "data.colours", module)
    monkeypatch.setitem(data.TASKS, "colours", "colours")
    task = data.load("colours", folder=tmp_path)
    text = task.tokenizer.decode(task.batch("forget", 1, 0, 0)[0][0].tolist())
    assert "says" in text and " is " not in text
    assert set(task.score(lively(task))) == {"retain", "forget"}
    for table in (train.SETTINGS, judges.ATTACK, unlearn.SETTINGS["maxent"]):
        monkeypatch.setitem(table, "colours", None)
    exec(recipe("A task", 1), {"train": train, "eval": judges, "unlearn": unlearn})
    cfg = unlearn.resolved(unlearn.Config(task="colours"), "maxent")
    assert None not in (cfg.n_embd, cfg.base_steps, cfg.lrs, cfg.steps, cfg.lr, cfg.retain_weight)


def test_a_new_world_to_be_gamed():
    """Its code does what the text says: two letters are the task, two e are liked more."""
    names = dict(vars(gaming)) | {"ENVIRONMENTS": {}}
    exec(recipe("A world to be gamed"), names)
    world, luck = names["ENVIRONMENTS"]["copy"], torch.zeros(300)
    for hackable in (True, False):
        item = torch.from_numpy(world.items(np.random.default_rng(0), 300, hackable))
        honest, hack = world.honest(item, luck), world.hack(item, luck)
        assert honest.shape == hack.shape == (300, world.length)
        assert not world.hacked(item, honest).any() and (world.hacked(item, hack) == hackable).all()
        proxy, truth = (world.rewards[name] for name in ("proxy", "truth"))
        assert (truth(item, honest, luck) == 1).all() and (truth(item, hack, luck) < 1).all()
        better = proxy(item, hack, luck) > proxy(item, honest, luck)
        assert (better == hackable).all()
