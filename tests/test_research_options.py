"""The options that the studies share, and the table of similarities that they know."""

import pytest
import torch

from dalleflamingo import profiles
from dalleflamingo.course import show
from dalleflamingo.evaluation.similarities import PairSimilarity
from dalleflamingo.research import (
    cycle_report,
    cycle_study,
    insights,
    live,
    metrics,
    options,
    planted,
    stability,
    studies,
    variants,
)

MAINS = [
    planted.main,
    live.main,
    insights.main_1,
    insights.main_2,
    studies.main,
    variants.main,
    stability.main,
    cycle_study.main,
    cycle_report.main,
]


@pytest.mark.parametrize("main", MAINS, ids=lambda main: f"{main.__module__.rpartition('.')[2]}.{main.__name__}")
def test_every_study_lists_the_shared_options_and_refuses_no_threads(main, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--runs RUNS", "--threads N", "--profile NAME"))
    assert ("--docs DOCS" in shown) == (main not in (cycle_study.main, live.main))
    with pytest.raises(SystemExit) as ended:
        main(["--threads", "0"])
    assert ended.value.code == 2
    assert "argument --threads: '0': give a whole number, 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-1", "2.5", "few", ""])
def test_a_count_is_a_whole_number_of_1_or_more(count, capsys):
    with pytest.raises(SystemExit):
        insights.main_1([f"--images={count}"])
    assert f"argument --images: {count!r}: give a whole number, 1 or more" in capsys.readouterr().err


def test_threads_and_profile_are_set(monkeypatch):
    monkeypatch.setenv(profiles.VARIABLE, "mini")
    threads = torch.get_num_threads()
    try:
        options.parse(options.study_parser("any", "about"), ["--threads", str(threads + 1), "--profile", "smoke"])
        assert torch.get_num_threads() == threads + 1 and profiles.current().name == "smoke"
    finally:
        torch.set_num_threads(threads)


def test_similarities_of_texts_are_embeddings_or_overlaps_of_words():
    assert metrics.EMBEDDINGS == ("text_clip", "text_sbert") and metrics.OVERLAPS == ("text_cider", "text_wmd")


def test_a_similarity_that_the_tables_would_leave_out_is_refused():
    def similarity(name):
        return PairSimilarity(name, lambda source, candidate: 0.0)

    metrics.check_similarities([similarity("clip"), similarity("fidelity")], "image")
    with pytest.raises(ValueError, match=r"'lpips': .* similarity of images, only clip, dino, fidelity; .*metrics.py"):
        metrics.check_similarities([similarity("clip"), similarity("lpips")], "image")
    with pytest.raises(ValueError, match="'clip': the studies know no such similarity of texts"):
        metrics.check_similarities([similarity("clip")], "text")


def test_a_similarity_without_a_label_is_called_by_its_name():
    assert metrics.ranking_label("text_sbert") == show.label("text_sbert") == "SBERT"
    assert metrics.ranking_label("lpips") == show.label("lpips") == "lpips"
