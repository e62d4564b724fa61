"""Captions to words, as the published caption scores have them.

BLEU and CIDEr compare words, so their values depend on the tokenizer. Published tables use Stanford's PTB tokenizer,
which comes with pycocoevalcap and needs Java. Without Java a pure-Python imitation takes its place, with a warning, and
every `Score` names the tokenizer. Both write lower case and drop punctuation.
"""

import functools
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

from pycocoevalcap.tokenizer import ptbtokenizer

PTB = "PTB (Java)"
PYTHON = "PTB-like (pure Python)"
_JAR = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
_DROPPED = frozenset(ptbtokenizer.PUNCTUATIONS)
_END = "end"  # closes the text, as the PTB tokenizer swallows an empty last line


@functools.cache
def default_tokenizer() -> str:
    """`PTB` where Java runs, else `PYTHON` with a warning; decided once per process, so that all numbers agree."""
    java = shutil.which("java")
    # macOS has a `java` that only says where to get Java, hence the trial
    if java and subprocess.run([java, "-version"], capture_output=True).returncode == 0:
        return PTB
    warnings.warn(
        "no Java found: captions are split by a pure-Python imitation of the PTB tokenizer, so BLEU and CIDEr can "
        "differ a little from published ones. For the real one install a Java runtime (apt install "
        "default-jre-headless, or conda install -c conda-forge openjdk) and start Python again.",
        stacklevel=2,
    )
    return PYTHON


def tokenize(captions: Mapping[Hashable, Sequence[str]], tokenizer: str | None = None) -> dict[Hashable, list[str]]:
    """Tokenize every caption: id -> captions becomes id -> the same captions with single spaces between words.

    All captions go through Java in one call. The result for a caption may be empty ("…", ".").

    Args:
        captions: id -> captions.
        tokenizer: `PTB` or `PYTHON`; None: `default_tokenizer()`.
    Raises:
        ValueError: an id without captions. TypeError: a caption that is not a string, or a bare string where a list of
            captions belongs. RuntimeError: Java failed.
    """
    for key, texts in captions.items():
        check_captions(key, texts)
    # a line break of any kind inside a caption would shift all captions after it
    lines = [" ".join(text.split()) for texts in captions.values() for text in texts]
    split = iter((_ptb if (tokenizer or default_tokenizer()) == PTB else _imitation)(lines))
    return {key: [next(split) for _ in texts] for key, texts in captions.items()}


def check_captions(key: Hashable, texts: Sequence[str]) -> None:
    """Refuse what are no captions.

    Args:
        key: whose captions they are, for the message.
        texts: the captions.
    Raises:
        ValueError, TypeError: as `tokenize`.
    """
    if isinstance(texts, str):
        raise TypeError(f"the captions of {key!r} are one string, {texts!r}: give a list of strings, even for one")
    if len(texts) == 0:
        raise ValueError(f"{key!r} has no caption: every image needs at least one; leave out images without captions")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"a caption of {key!r} is {text!r} ({type(text).__name__}), not a string")


def _ptb(lines: list[str]) -> list[str]:
    # pycocoevalcap's own wrapper writes into site-packages, which may be read-only, and overlooks a failing Java
    command = ["java", "-cp", str(_JAR), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "\n".join([*lines, _END]) + "\n"
    done = subprocess.run([*command, "-encoding", "utf-8"], input=text.encode(errors="replace"), capture_output=True)
    split = done.stdout.decode().split("\n")[:-1]
    if len(split) != len(lines) + 1 or split[-1] != _END:
        raise RuntimeError(
            f"the PTB tokenizer gave {len(split)} lines for {len(lines) + 1} (exit status {done.returncode}): "
            f"{done.stderr.decode(errors='replace').strip()[-500:]}{os.linesep}Does `java -version` work, and is there "
            "memory left? Without `java` on PATH a pure-Python tokenizer is used."
        )
    return [" ".join(word for word in line.split(" ") if word not in _DROPPED) for line in split[:-1]]


_WORD = re.compile(
    r"""
    (?:[a-z]\.){2,}                          # u.s., a.m.
  | (?:mr|mrs|ms|dr|jr|sr|st|ave)\.(?=\s\S)      # not where it may end the sentence
  | n't\b | '(?:s|m|d|ll|re|ve)\b            # the second half of a contraction
  | [a-z]+?(?=n't\b)                         # and its first half
  | \d+(?:[.,:/]\d+)+                        # 7:30, 1/2, 1,000
  | \w+(?:[-/&.]\w+|'(?!(?:s|m|d|ll|re|ve|t)\b)\w+)*  # black-and-white, and/or, o'clock
  | \S
    """,
    re.VERBOSE,
)
_JOINED = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me"}
_BRACKETS = dict(zip("()[]{}", ("-lrb-", "-rrb-", "-lsb-", "-rsb-", "-lcb-", "-rcb-"), strict=True))
_STRAIGHT = str.maketrans("\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}", "''", '"“”')


def _imitation(lines: list[str]) -> list[str]:
    split = []
    for line in lines:
        words = _WORD.findall(line.lower().translate(_STRAIGHT))
        words = [_JOINED.get(word, _BRACKETS.get(word, word)) for word in words]
        split.append(" ".join(word for word in words if word not in _DROPPED))
    return split
