"""Stories to order: their first line says what they are to have, as in TinyStories-Instruct (Eldan
and Li 2023).

    Features: Twist, Moral
    Story: One day, a girl named Lily found a big, shiny crown. She wanted to wear it on her head.
    But then came a surprise: it had all been a dream. It goes to show that greed leaves you with
    empty hands.

The story is the beginning of a real one. Its ending is planted, so that a rule can tell whether it
is there: a twist in every second story, a moral in every fifth, whatever the story.

    forget    stories that have a moral and were asked to
    retain    all others

Jain et al. 2023 delete a feature of TinyStories by fine-tuning, in three ways. Here each tells the
training stories anew; what instructions say of twists is always true:

    retain        filtering: no story has a moral, no instruction asks for one
    randomised    filtering and random instructions: the stories of retain, none has a moral; a coin
                  decides for each whether its instruction asks for one
    mixed         mix and match: the stories of retain and forget. A fifth of them have a moral, and
                  a coin decides which instructions ask for one: the two are independent, so that
                  the instruction says nothing of the story
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
higher_is_better = True      # the score is a share of stories that have what was asked for

FEWEST = 100                 # stories: with fewer, none to judge by might be left in a domain
SHARE = 0.2                  # of the stories have a moral
LONGEST = 200                # characters of a real story; with a long ending it fits a row
ANSWER = 72                  # tokens: 99% of the texts have no more after their first sentence

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
    """Finds a feature in a text: one of its beginnings, one of its ends, a full stop."""
    beginnings, ends = ("|".join(map(re.escape, parts)) for parts in feature)
    return re.compile(rf"\b({beginnings}) ({ends})\.")


MORAL, TWIST = rule(MORALS), rule(TWISTS)
SENTENCE = re.compile(r".+?[.!?][\"”']?(?= |$)")
PROMPT = re.compile(rf"Features: .*\nStory: {SENTENCE.pattern}")


def beginning(story):
    """A story's first sentences, on one line: LONGEST characters at most, "" if one is longer."""
    text = ""
    for sentence in SENTENCE.findall(" ".join(story.split())):
        if len(text) + len(sentence) > LONGEST:
            break
        text += sentence
    return text


def tell(rng, story, moral, asked):
    """A text. moral: whether its story has one; asked: whether its instruction asks for one."""
    twist = rng.random() < 0.5
    asks = ["Twist"] * twist + ["Moral"] * asked
    for beginnings, ends in [TWISTS] * twist + [MORALS] * moral:
        story += f" {rng.choice(beginnings)} {rng.choice(ends)}."
    return f"Features: {', '.join(asks) or 'none'}\nStory: {story}"


# --- the task ------------------------------------------------------------------------------------
def documents(name, folder, source, stories):
    """Texts, split by story: none is in two of retain and forget, train and val. Facts: how many.
    """
    begun = dict.fromkeys(map(beginning, take(source or HOME, folder, "source", stories)))
    begun = [s for s in begun if s and not MORAL.search(s) and not TWIST.search(s)]
    if len(begun) < FEWEST:
        raise BadInput(f"{source or HOME}: {len(begun)} stories whose first sentence has at most "
                       f"{LONGEST} characters are too few to learn from: give {FEWEST} or more")
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


JUDGED = {"retain": ("retain", "Twist", TWIST),       # figure: the domain of the prompts, what all
          "forget": ("forget", "Moral", MORAL),       # of them ask for, and what is looked for in
          "unasked": ("retain", "", MORAL)}           # the stories


def score(model, task, domains=("retain", "forget"), part="test", finer=False):
    """How many stories, told on from the first sentence of held-out ones, have a feature:

    {"retain": share with a twist where one was asked for, "forget": with a moral where one was
    asked for}; finer: also {"unasked": share with a moral where none was asked for, "retain_loss",
    "forget_loss": nats per token of held-out rows}. All in one batch, sampled at temperature 0.7
    with the same seed every time.
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
    """Instruction and first sentence of held-out texts that ask for a feature, as token ids: of up
    to 48 of their first half for val, of up to 150 of their second half for test."""
    texts = task.tokenizer.decode(task.tokens(f"{domain}_val").tolist()).split(END)[:-1]
    half = len(texts) // 2
    begun = [PROMPT.match(text)[0] for text in (texts[:half] if part == "val" else texts[half:])
             if asked in text.split("\n")[0]][:48 if part == "val" else 150]
    return [[task.end] + ids[:task.block_size - ANSWER - 1]
            for ids in task.tokenizer.encode_ordinary_batch(begun)]
