"""Notebooks 02 and 03: from the tokens of one model to those of another.

Each check of a function hands back the one that later cells use: the learner's once it is right, else the course's.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dalleflamingo.course.checks.cases import Case, check

Tokens = list[str]
Pairs = list[tuple[Tokens, Tokens]]

# ── notebook 02 ──────────────────────────────────────────────────────────────────────────────────────────────────────


def with_word_ends(attempt: Callable[[Tokens], Tokens]) -> Callable[[Tokens], Tokens]:
    """Notebook 02, exercise 1: WordPiece's tokens in CLIP's notation.

    Args:
        attempt: tokens with ## -> the same tokens with </w>.
    """

    def ours(wordpieces: Tokens) -> Tokens:
        following = [*wordpieces[1:], ""]
        return [
            token.removeprefix("##") + ("" if after.startswith("##") else "</w>")
            for token, after in zip(wordpieces, following, strict=False)  # no token, nothing follows
        ]

    mistakes = [
        (["gi</w>", "raf</w>", "fe</w>"], "only a token that no ## follows ends a word"),
        (["gi", "##raf", "##fe</w>"], "the ## has to go, CLIP does not write it"),
        (["gi", "raf", "fe"], "nothing follows the last token, so a word ends there too"),
        (["gi</w>", "raf", "fe"], "look at the next token: gi does not end a word, because ##raf continues it"),
    ]
    cases = [
        Case((["gi", "##raf", "##fe"],), ["gi", "raf", "fe</w>"], "one word of three tokens", mistakes),
        Case((["a", "dog"],), ["a</w>", "dog</w>"], "two words of one token each"),
        Case((["a", "fr", "##is", "##bee", "!"],), ["a</w>", "fr", "is", "bee</w>", "!</w>"], "short and long words"),
        Case(([],), [], "a caption without tokens"),
    ]
    shown = "Both notations carry the same information: a word ends where no ## follows."
    return attempt if check(attempt, cases, shown, show_arguments=True) else ours


def learn_map(attempt: Callable[[Pairs], dict[str, str]]) -> Callable[[Pairs], dict[str, str]]:
    """Notebook 02, exercise 2: the paper's map, as a partner for every token of the captioner.

    Args:
        attempt: (source tokens, target tokens) of captions -> partner of each source token.
    """

    def ours(pairs: Pairs) -> dict[str, str]:
        counts = defaultdict(Counter)
        for source, target in pairs:
            if len(source) == len(target):
                for s, u in zip(source, target, strict=True):
                    counts[s][u] += 1
        return {s: partners.most_common(1)[0][0] for s, partners in counts.items()}

    word, part = (["surf"], ["surf</w>"]), (["surf", "##board"], ["surf", "board</w>"])
    unequal = (["fr", "##is", "##bee"], ["frisbee</w>"])
    same_text = (["a", "##a"], ["a</w>", "b</w>"])
    often = [
        ([["##board", "board</w>"], ["surf", "surf"]], "the last pairing wins; count, and take the most frequent"),
        ([["surf", "surf</w>"]], "a caption counts if the numbers of tokens agree; the tokens themselves may differ"),
    ]
    uneven = [
        ([["a", "a</w>"], ["fr", "frisbee</w>"]], "`zip` stops at the shorter side: leave such a caption out"),
        ([["a", "a</w>"], ["fr", "frisbee</w>"], ["##is", None], ["##bee", None]], "no token stands beside ##is"),
    ]
    cases = [
        Case(([(["a"], ["a</w>"])],), [["a", "a</w>"]], "one token on each side"),
        Case(
            ([word, word, part],),
            [["##board", "board</w>"], ["surf", "surf</w>"]],
            "surf is paired with surf</w> twice and with surf once",
            often,
        ),
        Case(
            ([(["a"], ["a</w>"]), unequal],),
            [["a", "a</w>"]],
            "three tokens cannot be paired with one, and this caption is left out",
            uneven,
        ),
        Case(([same_text],), [["##a", "b</w>"], ["a", "a</w>"]], "a and ##a are different tokens"),
    ]

    def as_list(pairs: Pairs) -> object:
        """Partners in the order of their tokens, which a message can show."""
        found = attempt(pairs)
        return sorted(map(list, found.items())) if isinstance(found, Mapping) else found

    shown = "That is M: a row for each of the captioner's tokens, with a single 1 in the column of its partner."
    return attempt if check(as_list, cases, shown) else ours


def predicted_arrivals(prediction: Mapping[str, str]) -> None:
    """Notebook 02, exercise 3: which captions arrive unchanged through the map that was learned from the six?

    Args:
        prediction: caption -> "yes", "no", in any case, or "" where nothing is predicted yet.
    """

    def predicted(caption: str) -> str:
        if prediction[caption] in ("", None):
            raise NotImplementedError
        return str(prediction[caption]).strip().lower()

    cases = [
        Case(("A cat on the sand.",), "yes", "every token has a partner, and it is the right one"),
        Case(("Two boys can surf.",), "yes", "surf is a word here, and its partner is surf</w>"),
        Case(
            ("A woman on a surfboard.",),
            "no",
            "surf is the beginning of a word here, but a token has one partner, and that is surf</w>",
        ),
        Case(("A frisbee in a park.",), "no", "three tokens cannot become one: a matrix maps token by token"),
        Case(
            ("A computer, a skateboard.",),
            "no",
            "7 tokens on both sides, but computer is longer on the right, and skateboard on the left",
        ),
    ]
    shown = "Equal numbers of tokens are needed, and they are not enough: the map sees no neighbours."
    check(predicted, cases, shown, show_arguments=True)


def differing_words(attempt: Callable[[Tokens, Tokens], Pairs]) -> Callable[[Tokens, Tokens], Pairs]:
    """Notebook 02, exercise 4: what lies between two positions where both tokenizers end a word, if it differs.

    Args:
        attempt: (source tokens, target tokens), both in CLIP's notation -> pairs of token lists that differ.
    """

    def letters(tokens: Tokens) -> int:
        return len("".join(tokens).replace("</w>", ""))

    def ours(source: Tokens, target: Tokens) -> Pairs:
        found, one, other = [], [], []
        left, right = list(source), list(target)
        while left or right:
            behind = letters(one) - letters(other)
            if left and (behind <= 0 or not right):
                one.append(left.pop(0))
            if right and (behind >= 0 or not left):
                other.append(right.pop(0))
            both_end = one and other and one[-1][-4:] == other[-1][-4:] == "</w>"
            if letters(one) == letters(other) and both_end or not (left or right):
                found += [(one, other)] if one != other else []
                one, other = [], []
        return found

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
    shown = (
        "Where both sides have spelled the same number of letters and both end a word, a caption can be divided, and "
        "every difference belongs to a word."
    )
    return attempt if check(attempt, cases, shown, show_arguments=True) else ours


# ── notebook 03 ──────────────────────────────────────────────────────────────────────────────────────────────────────


def soft_embedding(attempt: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Notebook 03, exercise 1: expected embeddings.

    Args:
        attempt: ((T, V) distributions, (V, d) embedding table) -> (T, d).
    """

    def ours(distributions: Tensor, table: Tensor) -> Tensor:
        return distributions @ table

    table = torch.tensor([[4.0, 0.0], [0.0, 8.0], [2.0, 2.0]])
    halves = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.5, 0.5]])
    mistakes = [
        (table[[0, 1]], "that is the likeliest token's row: the others count, too, by their probability"),
        (table.mean(0).expand(2, -1), "that is the mean of all rows, whatever their probabilities"),
        (halves.softmax(-1) @ table, "the rows are probabilities already: a second softmax flattens them"),
        ([[2.5, 2.5], [1.0, 5.0]][::-1], "the positions are in the wrong order"),
    ]
    cases = [
        Case((torch.eye(3)[[2, 1]], table), table[[2, 1]], "a one-hot row gives back a row of the table"),
        Case((halves, table), [[2.5, 2.5], [1.0, 5.0]], "½ · (4, 0) + ¼ · (0, 8) + ¼ · (2, 2) = (2.5, 2.5)", mistakes),
    ]
    shown = (
        "A text encoder that looks tokens up can also read averages of tokens; looking up is the special case of "
        "certainty."
    )
    return attempt if check(attempt, cases, shown) else ours


def departures(attempt: Callable[[list[float]], tuple[list[float], float]]) -> Callable:
    """Notebook 03, exercise 2: where a path along the caption's tokens is left, for one target token.

    Args:
        attempt: p_t at each source position -> (probability to leave at each, probability to stay to the end).
    """

    def ours(p: list[float]) -> tuple[list[float], float]:
        on_the_path, leaving = 1.0, []
        for stay in p:
            leaving.append(on_the_path * (1 - stay))
            on_the_path *= stay
        return leaving, on_the_path

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
    shown = "What leaves and what stays add up to 1, whatever the probabilities: the map neither loses nor adds mass."
    return attempt if check(attempt, cases, shown, show_arguments=True) else ours


def straight_through(attempt: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Notebook 03, exercise 3: the likeliest token forward, the gradient of the softmax backward.

    Args:
        attempt: (T, V) logits -> (T, V) rows.
    """

    def ours(logits: Tensor) -> Tensor:
        soft = logits.softmax(-1)
        hard = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(soft)
        return hard + soft - soft.detach()

    def forward(logits: Tensor, weights: Tensor) -> Tensor | None:
        return attempt(logits)

    def backward(logits: Tensor, weights: Tensor) -> Tensor | None:
        """The gradient of a weighted sum of the rows; 0 where none passes."""
        rows = attempt(logits.requires_grad_())
        if rows is None or not rows.requires_grad:
            return torch.zeros_like(logits)
        return torch.autograd.grad((rows * weights).sum(), logits)[0]

    logits = torch.tensor([[0.0, 0.6, 0.3], [0.7, 0.2, 0.1]])
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    soft = logits.softmax(-1)
    taken = (soft * weights).sum(-1, keepdim=True)
    slope = soft * (weights - taken)  # of Σ soft · weights, row by row
    values = [
        (soft, "that is soft: forward, the text encoder should read a token"),
        (2 * F.one_hot(logits.argmax(-1), 3) - soft, "take `soft.detach()` off, so that the two cancel"),
        (F.one_hot(logits.argmax(-1), 3) + soft, "take `soft.detach()` off again, so that only the gradient is left"),
    ]
    slopes = [
        (torch.zeros_like(soft), "no gradient passes through argmax: add a term that is 0 and has soft's gradient"),
        (weights, "that is the gradient with respect to the rows: it should go through the softmax"),
        (-slope, "the sign: add soft, and take soft.detach() off"),
        (2 * slope, "the gradient counts twice"),
    ]
    hard = [
        Case((logits, weights), [[0, 1, 0], [1, 0, 0]], "forward, each row has a single 1 (`one_hot`)", values, 1e-6)
    ]
    back = [Case((logits, weights), slope, "backward, the gradient should be that of the softmax", slopes, 1e-6)]
    shown = "Forward the text encoder reads a token. Backward the captioner hears which other token would have helped."
    return attempt if check(forward, hard, "Forward it is hard.") and check(backward, back, shown) else ours


def gumbel_sample(attempt: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Notebook 03, exercise 4: a sample of the softmax, as an argmax.

    Args:
        attempt: ((T, V) logits, (T, V) uniform numbers in (0, 1)) -> (T,) ids.
    """

    def ours(logits: Tensor, uniform: Tensor) -> Tensor:
        return (logits - torch.log(-torch.log(uniform))).argmax(-1)

    def shares(logits: Tensor, uniform: Tensor) -> Tensor | None:
        """How often each id is drawn."""
        ids = attempt(logits, uniform)
        return ids if ids is None else torch.bincount(ids, minlength=logits.shape[-1]) / len(ids)

    probabilities = torch.tensor([0.5, 0.3, 0.2])
    logits = probabilities.log().expand(20_000, -1)
    uniform = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0))
    answers = {
        "there is no noise in it: argmax is always the likeliest token": logits,
        "uniform noise is not Gumbel noise: take −log(−log u)": logits + uniform,
        "the sign: the noise is −log(−log u), large where u is near 1": logits + (-uniform.log()).log(),
        "there is one log too few: the noise is −log(−log u)": logits - uniform.log(),
        "the noise is added to the logits; they are not replaced by it": uniform,
        "the softmax makes probabilities of logits: the noise belongs to the logits": probabilities
        - (-uniform.log()).log(),
    }
    mistakes = [(torch.bincount(scores.argmax(-1), minlength=3) / 20_000, hint) for hint, scores in answers.items()]
    one = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[0.2, 0.9, 0.5]])
    first = [Case(one, [1], "with equal logits, the largest random number decides")]
    many = [Case((logits, uniform), probabilities, "20,000 draws have the shares of the softmax", mistakes, 0.01)]
    shown = "Noise and argmax draw from the softmax exactly, and the noise does not depend on the logits."
    return attempt if check(attempt, first, "The larger number wins.") and check(shares, many, shown) else ours


def gathered(attempt: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Notebook 03, exercise 5: the released code's gather, without copies of probability.

    Args:
        attempt: ((T, V) distributions, (W,) the source token that each target token reads) -> (T, W).
    """

    def ours(distributions: Tensor, pairs: Tensor) -> Tensor:
        readers = torch.bincount(pairs, minlength=distributions.shape[-1])
        return distributions[:, pairs] / readers[pairs]

    P, pairs = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([0, 1, 2, 2, 2, 2])
    copied = P[:, pairs]
    mistakes = [
        (copied, "the four tokens that read off [UNK] have 0.2 each, 0.8 in all"),
        (copied / copied.sum(), "it sums to 1 now, but [UNK] still counts four times: share each token's own mass"),
        (copied.softmax(-1), "a softmax of probabilities flattens them, and [UNK] still counts four times"),
        ([[0.5, 0.3, 0, 0, 0, 0]], "without [UNK] its probability is lost"),
        ([[0.5, 0.3, 0.2, 0, 0, 0]], "whoever reads first gets all: share equally"),
        (copied / 6, "divide by the number of tokens that read off the same one, not by all"),
    ]
    cases = [
        Case((torch.tensor([[0.6, 0.4]]), torch.tensor([1, 0])), [[0.4, 0.6]], "each token is read once"),
        Case((P, pairs), [[0.5, 0.3, 0.05, 0.05, 0.05, 0.05]], "four target tokens share 0.2", mistakes, 1e-6),
    ]
    shown = "Every source token that is read passes its probability on once, however many tokens read it."
    return attempt if check(attempt, cases, shown) else ours
