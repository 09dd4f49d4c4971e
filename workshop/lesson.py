"""What all lessons use: checks of exercises, sizes that suit the machine, pictures.

A master is a script in jupytext's percent format. Tags of its cells say what build.py does with
them:

    start       the cell that runs workshop/start.py: notebooks get its source
    exercise    a participant writes what stands between BEGIN SOLUTION and END SOLUTION
    check       judges the exercise before it, by something that does not use the solution
    mistakes    wrong answers that people give, which the check must refuse; solutions only
    teacher     answers to the questions that are to be discussed; solutions only
"""
import os
import sys

import torch

from engine.report import picture

SIZES = ("test", "cpu", "gpu")
SIZE = os.environ.get("WORKSHOP_SIZE") or ("gpu" if torch.cuda.is_available() else "cpu")
if SIZE not in SIZES:
    raise ValueError(f"WORKSHOP_SIZE={SIZE} must be one of {', '.join(SIZES)}")


def pick(cpu, gpu, test):
    """The value that suits the machine. The suite's own, test, only shows that the code runs."""
    return {"cpu": cpu, "gpu": gpu, "test": test}[SIZE]


class Wrong(AssertionError):
    """An answer to an exercise is not right yet; the message says what is wrong with it."""


def check(judge, *answers):
    """Judges a participant's answers. judge(*answers) is a function full of assertions. Prints its
    docstring, which says what holds now, or raises Wrong in one line."""
    try:
        judge(*answers)
    except NotImplementedError:
        raise Wrong("not written yet: put your code in the place of the line that raises "
                    "NotImplementedError, and run the cell again") from None
    except AssertionError as error:
        raise Wrong(str(error)) from None
    except Exception as error:
        raise Wrong(f"your code failed with {type(error).__name__}: {error}") from error
    if SIZE != "test":
        print("Right.", " ".join(judge.__doc__.split()))


def mistakes(judge, *wrong):
    """Shows what a check says of wrong answers. Raises RuntimeError if it takes one for right."""
    for answer in wrong:
        try:
            check(judge, answer)
        except Wrong as error:
            print(f"{answer.__name__}: {error}")
        else:
            raise RuntimeError(f"{judge.__name__} takes {answer.__name__} for right")


def close(got, want, message, within=1e-4):
    """Asserts that got (a tensor or a number) is want, with a message that says what is wrong."""
    assert got is not None, "your function returns nothing: is a return missing?"
    got, want = torch.as_tensor(got).detach().float().cpu(), torch.as_tensor(want).float().cpu()
    assert got.shape == want.shape, (f"the shape is {tuple(got.shape)} and should be "
                                     f"{tuple(want.shape)}")
    assert got.isfinite().all(), "there are numbers that are not finite"
    assert torch.allclose(got, want, rtol=within, atol=within), message


def show(name, cfg, draw, *given, **how):
    """Draws a picture (see engine.report.picture), saves it and, in a notebook, shows it."""
    path = picture(name, cfg, draw, *given, **how)
    if path and "ipykernel" in sys.modules:
        from IPython.display import Image, display
        display(Image(str(path), width=900))
