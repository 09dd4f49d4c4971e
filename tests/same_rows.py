"""Are two versions the same? Every story, at tiny sizes, in two checkouts: rows to the last digit.

    python tests/same_rows.py ../before .              for a change that is to change nothing
    python tests/same_rows.py ../before . --only=undo,digits

Each checkout makes its own data and models in a folder of its own. Exit 1 when a row differs.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

SIZE = "--n_layer=2 --n_embd=32 --n_head=4"
ATTACK = "--lrs=1e-3 --attack_steps=2,4 --attack_rows=4 --attack_seeds=1"
QUICK = "--cut=2,4 --draws=1 --probe_rows=40 --revive_steps=4 --check_every=2 --attack_rows=8"
BASE = "--base_steps=6 --filtered_steps=4"
ROUTE = f"{SIZE} {ATTACK} --steps=4 --batch_size=8 --stories=200"

# name: what a user types after `python`. Where a checkout has experiments/NAME.py, a story of two
# words, "route.py steer", is that file's; before, it was an option of the script named first.
STORIES = {
    "train": f"train.py {SIZE} --steps=6 --filtered_steps=4",
    "unlearn": f"unlearn.py --method=all {SIZE} {BASE} {ATTACK} --steps=3",
    "undo": f"undo.py --seeds=2 {SIZE} {BASE} {ATTACK} --unlearn_steps=3 --steps=4 --alphas=.5,.9 "
            "--check_every=2",
    "undo-tinystories": f"undo.py --task=tinystories --source=SOURCE --block_size=32 {SIZE} {BASE} "
                        f"{ATTACK} --unlearn_steps=3 --steps=4 --alphas=.5 --check_every=2",
    "score": "eval.py --what=score", "relearn": f"eval.py --what=relearn {ATTACK} --attack=mixed",
    "probe": "eval.py --what=probe --probe_rows=40", "prune": f"eval.py --what=prune {QUICK}",
    "revive": f"eval.py --what=revive {QUICK}",
    "examine": f"eval.py examine {QUICK} --models=base",
    "language": f"route.py {ROUTE} --forget_units=16 --expand=16 --coherence_steps=1 --seeds=2 "
                "--label_fractions=1,.5 --with_posthoc=true --alphas=.5",
    "steer": f"route.py steer {SIZE} --n_layer=3 --steps=4 --batch_size=8 --stories=200",
    "digits": "route.py digits --width=16 --steps=4 --batch_size=16 --seeds=2",
    "gridworld": "route.py gridworld --oversight=.1,.5 --width=8 --steps=2 --seeds=2",
    "wrapper": f"eval.py wrapper {SIZE} {QUICK} --base_steps=4 --filtered_steps=3 --tune_steps=2 "
               "--tune_rows=8 --seeds=2",
    "wrapper-instruct": f"eval.py wrapper --task=instruct --source=SOURCE {SIZE} {QUICK} "
                        "--base_steps=4 --filtered_steps=3 --tune_steps=2 --tune_rows=8 --seeds=1",
    "compiled": "eval.py compiled --seeds=1",
    "frontier": f"undo.py frontier {SIZE} {BASE} {ATTACK} --unlearn_steps=3 --steps=4 "
                "--check_every=2 --label_shares=.1 --arms=npo,undo-units,undo-rounds,filter-distil,"
                "ntp-all,undo-labels,classifier-skip,classifier-uniform,ntp,filtered-labels",
    "trial": f"undo.py trial {SIZE} {BASE} {ATTACK} --steps=4 --check_every=2 "
             "--alphas=.5,.9 --teachers=maxent",
    "sweep": f"unlearn.py sweep {SIZE} {BASE} --attempts=2 --steps_range=1,2 --batch_size=8",
    "erosion": f"unlearn.py erosion {SIZE} {BASE} --teach_steps=3 --at=1,2 --inner_steps=2",
    "recontext": f"recontext.py --env=all --seeds=1 {SIZE} --base_steps=20 --steps=2 --rounds=1 "
                 "--exam=64 --prompts=16",
    "recontext-grpo": f"recontext.py --method=grpo --env=lying --seeds=1 {SIZE} --base_steps=20 "
                      "--steps=2 --exam=64 --prompts=16",
    "revive_hack": f"recontext.py revive_hack --seeds=1 {SIZE} --base_steps=20 --rounds=1 "
                   "--prompts=16"}


def command(checkout, story, source):
    script, *rest = STORIES[story].replace("SOURCE", str(source)).split()
    if not rest[0].startswith("--"):
        name = rest.pop(0)
        if (checkout / "experiments" / f"{name}.py").exists():
            return ["-m", f"experiments.{name}", *rest]
        rest.insert(0, {"eval.py": f"--what={name}", "route.py": f"--experiment={name}",
                        "recontext.py": "--revive=true"}[script])
    return [script, *rest]


def rows_of(checkout, story, folder, source):
    """[the rows of each file that a story writes], the story run in a checkout. The judges judge
    what train.py made."""
    judges = STORIES[story].startswith("eval.py --what") or story == "examine"
    out = folder / ("train" if judges else story)
    before = set(folder.rglob("*.json"))
    argv = [sys.executable, *command(checkout, story, source), "--device=cpu", "--compile=false",
            f"--out={out}", *[f"--data_dir={folder}/data"] * (story != "gridworld")]
    done = subprocess.run(argv, cwd=checkout, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{checkout}: {' '.join(argv[1:])}: {done.stderr.strip()[-2000:]}")
    if "picture: none, " in done.stdout.replace("none, pip install", ""):
        tqdm.write(f"{checkout}, {story}: {done.stdout.partition('picture: ')[2]}")
    made = sorted(p for p in set(folder.rglob("*.json")) - before if "data" not in p.parts)
    return [json.loads(p.read_text())["rows"] for p in made]


def differences(a, b, at=""):
    """Paths to what differs in two rows."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in a | b for d in differences(a.get(key), b.get(key), f"{at}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{at}[{i}]")]
    return [] if a == b else [f"{at}: {a!r:.40} is now {b!r:.40}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=
                                     argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs=2, type=lambda path: Path(path).resolve())
    parser.add_argument("--only", help="stories, with commas between them")
    asked = parser.parse_args()
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        source, rng = Path(folder) / "stories.txt", random.Random(0)
        words = "cat dog sun ran sat big red hat the a Tom Lily".split()
        source.write_text("".join(
            f"One day {'. '.join(' '.join(rng.choices(words, k=6)) for _ in range(9))}. "
            f"They saw a {('tree', 'hill')[i % 2]}. The end {i}.\n<|endoftext|>\n"
            for i in range(400)))
        for story in tqdm(asked.only.split(",") if asked.only else STORIES):
            told = []
            for name, checkout in zip(("before", "after"), asked.checkouts):
                (Path(folder) / name).mkdir(exist_ok=True)
                told.append(rows_of(checkout, story, Path(folder) / name, source))
            found = differences(*told)
            different += bool(found) or not told[0]
            tqdm.write(f"{story}: {sum(map(len, told[0]))} rows, "
                       + ("the same" if told[0] and not found else "DIFFERENT: "
                          + "; ".join(found[:5])))
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
