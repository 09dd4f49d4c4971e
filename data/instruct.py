"""Stories with an instruction: the first line says which features a story should have, as in
TinyStories-Instruct (Eldan and Li 2023).

    Features: Twist, Moral
    Story: One day, a girl named Lily found a big, shiny crown. She wanted to wear it on her head.
    But then came a surprise: it had all been a dream. It goes to show that greed leaves you with
    empty hands.

A story is the beginning of a real one, followed by an ending that we add. A rule can therefore tell
which features it has. Every second story has a twist and every fifth has a moral, whatever it is
about.

    forget    stories that have a moral, and whose instruction asks for one
    retain    all other stories

Jain et al. 2023 delete a feature of TinyStories by fine-tuning, in three ways. Here each way draws
new endings for the training stories. What an instruction says about twists is always true.

    retain        filtering: no story has a moral, and no instruction asks for one
    randomised    filtering and random instructions: the stories of retain, of which none has a
                  moral. Half of the instructions, chosen at random, ask for one
    mixed         mix and match: the stories of retain and forget. A fifth of them have a moral, and
                  a random half of the instructions ask for one. The two are independent, so the
                  instruction tells nothing about the story
"""
import re
from dataclasses import dataclass

from data.tinystories import HOME, split, take
from data.tokenizer import END
from engine.knobs import BadInput, FilePath, knob
from engine.streams import seed_of, text_stream

SETTINGS = {"instruct": dict(block_size=128, least_block_size=96, vocab_size=2048,
                             aligned=True)}                            # a text fits a row


@dataclass
class Knobs:
    """Knobs of the task instruct."""
    source: FilePath | None = knob(None, "a file of stories, or its URL (auto: download "
                                   "TinyStories)")
    stories: int = knob(100_000, "most stories to take from it", 20)


EXTRA = ("randomised", "mixed")
PROTOCOLS = {"filtering": "retain", "randomised": "randomised", "mix-and-match": "mixed"}
higher_is_better = True      # the score is the share of stories that have the requested feature

FEWEST = 100                 # stories; with fewer, a domain might have none to hold out
SHARE = 0.2                  # share of the stories that have a moral
LONGEST = 200                # characters of a real story; with a long ending, it still fits a row
ANSWER = 72                  # tokens; 99% of the texts have no more after their first sentence

# --- the features --------------------------------------------------------------------------------
MORALS = (                                    # 60 sentences: a beginning and an end
    ("The moral of the story is that", "And so they all learned that",
     "From that day on, everyone remembered that", "It goes to show that",
     "What can we learn from this? We learn that"),
    ("sharing makes everyone happy", "it is always best to tell the truth",
     "good friends help each other", "those who wait get good things",
     "saying sorry can mend a heart", "even the smallest can be brave",
     "a kind word costs nothing", "hard work pays off in the end",
     "nobody should judge others by their looks", "being different is a gift",
     "we must listen to those who love us", "greed leaves you with empty hands"))
TWISTS = (
    ("But then came a surprise:", "Suddenly they saw that", "Nobody had guessed that",
     "In the end it turned out that", "Little did they know that"),
    ("it had all been a dream", "the whole story was a play on a stage",
     "the cat had been a queen in disguise", "the moon had hidden the treasure",
     "the old stone was a dragon's egg", "they were toys in a giant's room",
     "the stranger was their lost brother", "the door led to the bottom of the sea",
     "the clock could turn back time", "the thief was a friendly robot",
     "the teacher was a ghost", "the house had grown legs and walked away"))


def rule(feature):
    """A regex that finds a feature in a text: one of its beginnings, one of its ends, a full stop.
    """
    beginnings, ends = ("|".join(map(re.escape, parts)) for parts in feature)
    return re.compile(rf"\b({beginnings}) ({ends})\.")


MORAL, TWIST = rule(MORALS), rule(TWISTS)
SENTENCE = re.compile(r".+?[.!?][\"”']?(?= |$)")
PROMPT = re.compile(rf"Features: .*\nStory: {SENTENCE.pattern}")


def beginning(story):
    """A story's first sentences, on one line, with at most LONGEST characters. It is "" if the
    first sentence is longer."""
    text = ""
    for sentence in SENTENCE.findall(" ".join(story.split())):
        if len(text) + len(sentence) > LONGEST:
            break
        text += sentence
    return text


def tell(rng, story, moral, asked):
    """A text: instruction and story. moral: whether the story has a moral. asked: whether the
    instruction asks for one."""
    twist = rng.random() < 0.5
    asks = ["Twist"] * twist + ["Moral"] * asked
    for beginnings, ends in [TWISTS] * twist + [MORALS] * moral:
        story += f" {rng.choice(beginnings)} {rng.choice(ends)}."
    return f"Features: {', '.join(asks) or 'none'}\nStory: {story}"


# --- the task ------------------------------------------------------------------------------------
def documents(name, folder, source, stories):
    """(texts, facts): see data/__init__.py. Texts are split by story: no story is in both retain
    and forget, or in both train and val. Facts: the number of texts in each split."""
    begun = dict.fromkeys(map(beginning, take(source or HOME, folder, "source", stories)))
    begun = [s for s in begun if s and not MORAL.search(s) and not TWIST.search(s)]
    if len(begun) < FEWEST:
        raise BadInput(f"{source or HOME}: only {len(begun)} stories have a first sentence of at "
                       f"most {LONGEST} characters, too few to learn from: give {FEWEST} or more")
    rng, texts = text_stream("features of stories"), {}
    for part, some in zip(("train", "val"), split(begun)):
        forget = round(SHARE * len(some))
        texts[f"forget_{part}"] = [tell(rng, story, True, True) for story in some[:forget]]
        texts[f"retain_{part}"] = [tell(rng, story, False, False) for story in some[forget:]]
        if part == "train":
            both, retain = some, some[forget:]
    texts["randomised_train"] = [tell(rng, story, False, rng.random() < 0.5) for story in retain]
    texts["mixed_train"] = [tell(rng, story, rng.random() < SHARE, rng.random() < 0.5)
                            for story in both]
    return texts, {"stories": {s: len(some) for s, some in texts.items()}}


JUDGED = {"retain": ("retain", "Twist", TWIST),       # {figure: (domain of the prompts, feature
          "forget": ("forget", "Moral", MORAL),       # that all of them ask for, feature to look
          "unasked": ("retain", "", MORAL)}           # for in the stories)}


def score(model, task, domains=("retain", "forget"), part="test", finer=False):
    """The model continues held-out stories after their first sentence. Shares that have a feature:

    retain     share of stories with a twist, of those whose instruction asks for one
    forget     share of stories with a moral, of those whose instruction asks for one
    unasked    (finer) share of stories with a moral, of those whose instruction asks for none
    retain_loss, forget_loss    (finer) nats per token on held-out rows
    All stories are one batch, sampled at temperature 0.7 with the same seed in every call.
    """
    shares = [*domains] + ["unasked"] * finer
    prompts = {figure: prompts_of(task, *JUDGED[figure][:2], part) for figure in shares}
    answers = model.generate(sum(prompts.values(), []), ANSWER, 0.7, task.end,
                          seed_of("stories told on", part))
    answers = iter(task.tokenizer.decode_batch(answers.tolist()))
    figures = {figure: sum(bool(JUDGED[figure][2].search(next(answers))) for _ in prompts[figure])
               / len(prompts[figure]) for figure in shares}
    if finer:
        figures |= {f"{domain}_loss": task.loss(model, domain, part=part) for domain in domains}
    return figures


def prompts_of(task, domain, asked, part):
    """Instruction and first sentence of held-out texts that ask for a feature, as token ids. For
    val these are at most 48 from the first half of the texts, for test at most 150 from the second.
    """
    texts = task.tokenizer.decode(task.tokens(f"{domain}_val").tolist()).split(END)[:-1]
    half = len(texts) // 2
    begun = [PROMPT.match(text)[0] for text in (texts[:half] if part == "val" else texts[half:])
             if asked in text.split("\n")[0]][:48 if part == "val" else 150]
    return [[task.end] + ids[:task.block_size - ANSWER - 1]
            for ids in task.tokenizer.encode_ordinary_batch(begun)]
