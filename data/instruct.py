"""Stories to order: a first line says which features a story is to have, as in TinyStories-Instruct
(Eldan and Li 2023, section 5).

    Features: Twist, Moral
    Story: One day, a girl named Lily found a big, shiny crown. She wanted to wear it on her head.
    But then came a surprise: it had all been a dream. The moral of the story is that sharing makes
    everyone happy.

A story is the beginning of a real one; its ending, a twist, a moral, both or none, is planted, so
that a rule can tell who wrote one.

    forget    stories with a moral that were asked to have one
    retain    the others. Half of either have a twist and were asked to have one

Jain et al. 2023 (section 6: TinyStories) delete a feature by fine-tuning, in three ways. All three
see training stories only, told again:

    retain        filtering: nobody asks for a moral, no story has one
    randomised    filtering and random instructions: the stories of retain, none with a moral; a
                  coin says for each whether its instruction asks for one
    mixed         mix and match: the stories of retain and forget. Whether a story has a moral (as
                  often as in those) and whether one is asked for (a coin) are drawn independently,
                  so that the instruction says nothing. What it says of twists is true throughout
"""
import random
import re

from data import BadInput
from data.tinystories import FEWEST, HOME, split, take
from data.tokenizer import END

SETTINGS = {"instruct": dict(
    block_size=128, vocab_size=2048, least_block_size=96, aligned=True,    # a text fits a row
    train=dict(n_layer=3, n_head=4, n_embd=128, batch_size=16, steps=700,
               filtered_steps=750, lr=6e-3, muon_lr=0.02),
    attack=dict(lrs=[3e-4, 1e-3, 3e-3], attack_steps=[10, 20, 40, 60], attack_rows=16),
    maxent=dict(steps=40, lr=1e-3, batch_size=32, retain_weight=20.0),
    graddiff=dict(steps=40, lr=1e-3, batch_size=32, retain_weight=3.0),
    rmu=dict(steps=60, lr=1e-3, batch_size=32, retain_weight=1.0),
    oracle=dict(steps=150, lr=1e-3, batch_size=16),
    finetune=dict(steps=60, lr=1e-3, batch_size=32),
    undo=dict(method="graddiff", alphas=[0.6, 0.7], steps=400, batch_size=16, lr=6e-3,
              muon_lr=0.02, check_every=10),
    wrapper=dict(splits=["retain", "randomised", "mixed"], steps=150, lr=1e-3, batch_size=16,
                 revive_lr=3e-4, revive_steps=400, check_every=5, reach=0.9))}
KNOBS = {"source": None,     # a path or URL; None: TinyStories from its public home
         "stories": 100_000}     # the most to take from a source
EXTRA = ("randomised", "mixed")
higher_is_better = True      # the score is a share of stories that have what was asked for

SHARE = 0.2                  # of the stories have a moral
LONGEST = 200                # characters of a real story: two such texts fill a row
ANSWER = 72                  # tokens: 99% of the texts have no more after their first sentence

# --- the features --------------------------------------------------------------------------------
MORALS = (("The moral of the story is that", "And so they all learned that",
           "From that day on, everyone remembered that", "It goes to show that",
           "What can we learn from this? We learn that"),
          ("sharing makes everyone happy", "it is always best to tell the truth",
           "good friends help each other", "those who wait get good things",
           "saying sorry can mend a heart", "even the smallest can be brave",
           "a kind word costs nothing", "hard work pays off in the end",
           "nobody should judge others by their looks", "being different is a gift",
           "we must listen to those who love us", "greed leaves you with empty hands"))
TWISTS = (("But then came a surprise:", "Suddenly they saw that", "Nobody had guessed that",
           "In the end it turned out that", "Little did they know that"),
          ("it had all been a dream", "the whole story was a play on a stage",
           "the cat had been a queen in disguise", "the moon had hidden the treasure",
           "the old stone was a dragon's egg", "they were toys in a giant's room",
           "the stranger was their lost brother", "the door led to the bottom of the sea",
           "the clock could turn back time", "the thief was a friendly robot",
           "the teacher was a ghost", "the house had grown legs and walked away"))


def rule(feature):
    """Finds a feature in a text: one of its beginnings, one of its ends and a full stop."""
    begins, ends = ("|".join(map(re.escape, parts)) for parts in feature)
    return re.compile(rf"\b({begins}) ({ends})\.")


MORAL, TWIST = rule(MORALS), rule(TWISTS)
SENTENCE = re.compile(r".+?[.!?][\"”']?(?= |$)")
BEGINNING = re.compile(rf"Features: .*\nStory: {SENTENCE.pattern}")


def beginning(story):
    """The first sentences of a story, on one line: LONGEST characters at most, "" if that is none.
    """
    told = ""
    for sentence in SENTENCE.findall(" ".join(story.split())):
        if len(told) + len(sentence) > LONGEST:
            break
        told += sentence
    return told


def tell(rng, story, moral, asked):
    """A text: whether its story has a moral and whether one is asked for need not agree."""
    twist = rng.random() < 0.5
    asks = ["Twist"] * twist + ["Moral"] * asked
    told = [story] + [f"{rng.choice(begins)} {rng.choice(ends)}."
                      for begins, ends in [TWISTS] * twist + [MORALS] * moral]
    return f"Features: {', '.join(asks) or 'none'}\nStory: {' '.join(told)}"


# --- the task ------------------------------------------------------------------------------------
def documents(name, folder, source, stories):
    """Texts, split by story: none is in two of retain and forget, train and val. Facts: how many.
    """
    if stories < FEWEST:
        raise BadInput(f"--stories={stories} is too few to learn from: give {FEWEST} or more")
    begun = dict.fromkeys(map(beginning, take(source or HOME, folder, "source", stories)))
    begun = [s for s in begun if s and not MORAL.search(s) and not TWIST.search(s)]
    if len(begun) < FEWEST:
        raise BadInput(f"{source or HOME} has only {len(begun)} stories that differ in their "
                       f"first {LONGEST} characters: give {FEWEST} or more")
    rng, of = random.Random(0), {}
    for part, told in zip(("train", "val"), split(begun)):
        forget = max(1, round(SHARE * len(told)))
        of |= {f"forget_{part}": told[:forget], f"retain_{part}": told[forget:]}
    texts = {s: [tell(rng, story, *[s.startswith("forget")] * 2) for story in told]
             for s, told in of.items()}
    texts["randomised_train"] = [tell(rng, story, False, rng.random() < 0.5)
                                 for story in of["retain_train"]]
    both = of["retain_train"] + of["forget_train"]
    rng.shuffle(both)
    texts["mixed_train"] = [tell(rng, story, rng.random() < SHARE, rng.random() < 0.5)
                            for story in both]
    return texts, {"stories": {s: len(told) for s, told in texts.items()}}


def score(model, task, domains=("retain", "forget"), quick=False):
    """Shares of stories, generated from their first sentence, that have what was asked for:

    {"retain": those with a twist, of those asked to have one; "forget": with a moral, of those
    asked to have one; unless quick "unasked": with a moral, of those not asked to have one, and
    "retain_loss" and "forget_loss" in nats per token of held-out rows}
    """
    rules = {"retain": ("retain", "Twist", TWIST), "forget": ("forget", "Moral", MORAL)}
    wanted = {domain: rules[domain] for domain in domains}
    if not quick:
        wanted["unasked"] = ("retain", "", MORAL)
    prompts = {figure: prompts_of(task, domain, asked, 48 if quick else 200)
               for figure, (domain, asked, _) in wanted.items()}
    said = model.generate(sum(prompts.values(), []), ANSWER, 0.7, task.end)   # seed 0, every time
    said = iter(task.tokenizer.decode_batch(said.tolist()))
    figures = {figure: sum(bool(has.search(next(said))) for _ in prompts[figure])
               / len(prompts[figure]) for figure, (_, _, has) in wanted.items()}
    if not quick:
        figures |= {f"{domain}_loss": task.loss(model, domain, 256) for domain in domains}
    return figures


def prompts_of(task, domain, asked, most):
    """Instruction and first sentence of held-out texts that ask for a feature, as token ids."""
    texts = task.tokenizer.decode(task.tokens(f"{domain}_val").tolist()).split(END)[:-1]
    begun = [BEGINNING.match(text)[0] for text in texts if asked in text.split("\n")[0]][:most]
    return [[task.end] + task.tokenizer.encode_ordinary(text)[:task.block_size - ANSWER - 1]
            for text in begun]
