"""Notebooks 02 and 03: from the tokens of one model to those of another."""

from collections.abc import Callable

import torch

from dalleflamingo.course.checks.cases import Case, check


def with_word_ends(attempt: Callable[[list[str]], list[str]]) -> None:
    """Notebook 02, exercise 1: WordPiece's tokens in CLIP's notation.

    Args:
        attempt: tokens with ## -> the same tokens with </w>.
    """
    mistakes = [
        (["gi</w>", "raf</w>", "fe</w>"], "only a token that no ## follows ends a word"),
        (["gi", "##raf", "##fe</w>"], "the ## has to go, CLIP does not write it"),
        (["gi", "raf", "fe"], "nothing follows the last token, so a word ends there too"),
    ]
    cases = [
        Case((["gi", "##raf", "##fe"],), ["gi", "raf", "fe</w>"], "one word of three tokens", mistakes),
        Case((["a", "dog"],), ["a</w>", "dog</w>"], "two words of one token each"),
        Case((["a", "fr", "##is", "##bee", "!"],), ["a</w>", "fr", "is", "bee</w>", "!</w>"], "short and long words"),
        Case(([],), [], "a caption without tokens"),
    ]
    check(
        attempt,
        cases,
        "Both notations carry the same information: a word ends where no ## follows.",
        show_arguments=True,
    )


def differing_words(attempt: Callable[[list[str], list[str]], list[tuple[list[str], list[str]]]]) -> None:
    """Notebook 02, exercise 2: what lies between two positions where both tokenizers end a word, if it differs.

    Args:
        attempt: (source tokens, target tokens), both in CLIP's notation -> pairs of token lists that differ.
    """
    by_position = [(["gi"], ["giraffe</w>"]), (["raf"], ["eats</w>"])]
    cases = [
        Case((["a</w>", "dog</w>"], ["a</w>", "dog</w>"]), [], "nothing differs"),
        Case(
            (["a</w>", "gi", "raf", "fe</w>", "eats</w>"], ["a</w>", "giraffe</w>", "eats</w>"]),
            [(["gi", "raf", "fe</w>"], ["giraffe</w>"])],
            "only the giraffe differs",
            [
                (
                    by_position,
                    "compared by position, tokens lose their partners after a difference; count letters instead",
                )
            ],
        ),
        Case(
            (["dog</w>", "'</w>", "s</w>", "toy</w>"], ["dog</w>", "'s</w>", "toy</w>"]),
            [(["'</w>", "s</w>"], ["'s</w>"])],
            "'s is two words on the left and one on the right",
            [([], "have both sides spelled the same number of letters where you stop?")],
        ),
        Case(
            (["computer</w>", "skate", "board</w>"], ["compu", "ter</w>", "skateboard</w>"]),
            [(["computer</w>"], ["compu", "ter</w>"]), (["skate", "board</w>"], ["skateboard</w>"])],
            "two words in a row differ, in opposite directions, and the second ends the caption",
        ),
    ]
    check(
        attempt,
        cases,
        "Where both sides have spelled the same number of letters and both end a word, a caption can be divided, and "
        "every difference belongs to a word.",
        show_arguments=True,
    )


def soft_embedding(attempt: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Notebook 03, exercise 1: expected embeddings.

    Args:
        attempt: ((T, V) distributions, (V, D) embedding table) -> (T, D).
    """
    table = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    uniform = torch.full((2, 5), 0.2)
    cases = [
        Case((torch.eye(5)[[4, 1]], table), table[[4, 1]], "one-hot rows give back rows of the table", tolerance=1e-5),
        Case((uniform, table), table.mean(0).expand(2, -1), "equal shares give the mean of all rows", tolerance=1e-5),
    ]
    check(
        attempt,
        cases,
        "A text encoder that looks tokens up can also read averages of tokens; looking up is the special case of "
        "certainty.",
    )


def departures(attempt: Callable[[list[float]], tuple[list[float], float]]) -> None:
    """Notebook 03, exercise 2: where a path along the caption's tokens is left, for one target token.

    Args:
        attempt: p_t at each source position -> (probability to leave at each, probability to stay to the end).
    """
    cases = [
        Case(([0.75, 1.0, 1.0],), ([0.25, 0.0, 0.0], 0.75), "only the first position is uncertain"),
        Case(
            ([0.5, 0.5],),
            ([0.5, 0.25], 0.25),
            "to leave at the second position, one must have stayed at the first",
            [
                (([0.5, 0.5], 0.25), "together 1.25: the second position counts what had left before"),
                (([0.5, 0.5], 0.5), "together 1.5: each position counts as if it were the only one"),
                (([0.5, 0.25], 0.5), "together 1.25: to stay to the end is to stay at both positions"),
            ],
        ),
        Case(
            ([0.75, 0.5, 0.75],),
            ([0.25, 0.375, 0.09375], 0.28125),
            "to leave at the third position, one must have stayed at both before it",
            [(([0.25, 0.375, 0.125], 0.28125), "0.125 forgets what had left at the first position")],
        ),
        Case(([],), ([], 1.0), "there is no position to leave at, so all of it stays"),
    ]
    check(
        attempt,
        cases,
        "What leaves and what stays add up to 1, whatever the probabilities: the map neither loses nor adds mass.",
        show_arguments=True,
    )
