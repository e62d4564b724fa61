"""The map and the bridge, measured: `python benchmarks/bridge.py [--captions FOLDER] [--opt FOLDER] [--images N]`.

* Captions: the share that arrives unchanged, on COCO's Karpathy split (learned on val, measured on test) and on the
  miniature's.
* Cost: learning the map and mapping captions, against the same for one caption at a time with a dense matrix, side by
  side in one run.
* Images: generated from the captioner's own distributions with each map in each mode, judged by the recogniser.

Writes docs/results/bridge.json and docs/results/bridge.md. Without FOLDER, COCO's part stays as it was measured last.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from dalleflamingo import registry
from dalleflamingo.bridge import BRIDGE_MODES, Bridge, relax
from dalleflamingo.captioner import Captioner
from dalleflamingo.evaluation.intervals import paired_bootstrap
from dalleflamingo.evaluation.vocabulary_report import clip_tokenizer, report, wordpiece_tokenizer
from dalleflamingo.generator import Generator
from dalleflamingo.miniature.image_score import score_prompt
from dalleflamingo.miniature.recogniser import Recogniser
from dalleflamingo.miniature.scene_graph import Scene
from dalleflamingo.profiles import PROFILES
from dalleflamingo.research.pages import current_commit
from dalleflamingo.research.released import released_map
from dalleflamingo.runs import derive_seed, write_whole
from dalleflamingo.sources import registered
from dalleflamingo.tokens import Alignment
from dalleflamingo.vocabulary import MAP_KINDS, VocabularyMap

RESULTS = Path("docs/results")
KINDS = ("one-to-one", "released", "word-aligned")
SEED, MINI = 0, PROFILES["mini"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, help="folder of coco_karpathy_{val,test}_gt.json")
    parser.add_argument("--images", type=int, default=100, help="images for each map and mode")
    parser.add_argument("--opt", type=Path, help="folder of BLIP-2's tokenizer, OPT's or any of GPT-2's merges")
    arguments = parser.parse_args()
    file = RESULTS / "bridge.json"
    found = {"commits": {}} | (json.loads(file.read_text()) if file.exists() else {})

    commit = current_commit()  # now: the results, once written, differ from it

    def keep(part: str, measured: list[dict] | dict) -> None:
        found[part], found["commits"][part] = measured, commit
        text = json.dumps(found, indent=1) + "\n"
        write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))

    if arguments.opt and not arguments.captions:
        parser.error("--opt is measured on COCO: give --captions, too")
    if arguments.captions:
        coco = {part: read_captions(arguments.captions / f"coco_karpathy_{part}_gt.json") for part in ("val", "test")}
        keep("coco", reports(wordpiece_tokenizer(), clip_tokenizer(), coco["val"], coco["test"]))
        keep("cost", costs(coco["val"]))
        if arguments.opt:
            opt = AutoTokenizer.from_pretrained(arguments.opt)
            keep("opt", reports(opt, clip_tokenizer(), coco["val"], coco["test"], MAP_KINDS))
    keep("miniature", miniature_reports())
    keep("images", images(arguments.images))
    write_whole(RESULTS / "bridge.md", lambda path: path.write_text(page(found), encoding="utf-8"))
    print(f"{RESULTS}/bridge.md")


def read_captions(file: Path) -> list[str]:
    return [entry["caption"] for entry in json.loads(file.read_text())["annotations"]]


def learn(source, target, captions: list[str], kind: str) -> VocabularyMap:
    return released_map(source, target) if kind == "released" else VocabularyMap.learn(source, target, captions, kind)


# ── captions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def reports(captioner, generator, learned: list[str], measured: list[str], kinds=KINDS) -> list[dict]:
    """A row for each direction and map between two tokenizers."""
    rows = []
    directions = (
        ("to the generator", captioner, generator, kinds),
        ("to the captioner", generator, captioner, MAP_KINDS),
    )
    for direction, source, target, possible in directions:
        for kind in possible:
            found = report(learn(source, target, learned, kind), measured)
            rows.append(
                {
                    "direction": direction,
                    "map": kind,
                    "n": found.exact.n,
                    "same_tokens": found.same_tokens.value,
                    "exact": [found.exact.value, found.exact.low, found.exact.high],
                    "token_accuracy": found.token_accuracy.value,
                    "unknown": found.unknown.value,
                    "added_mass": found.added_mass,
                    "lost": found.lost,
                    "lost_words": found.lost_words.word.head(5).tolist(),
                }
            )
    return rows


def miniature_reports() -> list[dict]:
    texts = {
        part: [text for example in registered.load_dataset(MINI.coco, part) for text in example.references]
        for part in ("train", "test")
    }
    captioner = Captioner.from_pretrained(registry.locate(MINI.captioner))
    generator = Generator.from_pretrained(registry.locate(MINI.generator))
    return reports(captioner.processor.tokenizer, generator.pipeline.tokenizer, texts["train"], texts["test"])


# ── cost ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def costs(captions: list[str]) -> dict:
    """Seconds of the package and of the plain version, each on the same captions, and the ratio."""
    source, target = wordpiece_tokenizer(), clip_tokenizer()
    vocabulary_map = VocabularyMap.learn(source, target, captions)
    special = dict(bos_token_id=49_406, eos_token_id=49_407, pad_token_id=49_407)
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=49_408, hidden_size=768, num_hidden_layers=1, **special))
    bridge = Bridge(vocabulary_map, encoder)
    texts = captions[:4]
    ids = [source(text, add_special_tokens=False).input_ids for text in texts]
    longest = max(map(len, ids))
    P = torch.randn(len(ids), longest, len(source), generator=torch.Generator().manual_seed(SEED)).softmax(-1)
    alignments = vocabulary_map.align(ids, texts)
    dense, E = vocabulary_map.matrix.to_dense(), encoder.get_input_embeddings().weight.detach()

    @torch.no_grad()
    def plain() -> list[torch.Tensor]:
        return [plain_prompt(P[i], alignment, dense, E) for i, alignment in enumerate(alignments)]

    @torch.no_grad()
    def embeddings() -> torch.Tensor:
        return bridge.vocabulary_map.expected_embeddings(P, alignments, bridge.mapped_embeddings, E)

    @torch.no_grad()
    def distributions() -> torch.Tensor:
        return bridge.vocabulary_map.target_distributions(P, alignments) @ E

    torch.testing.assert_close(embeddings(), distributions(), atol=1e-4, rtol=1e-3)
    for fast, slow, alignment in zip(embeddings(), plain(), alignments, strict=True):
        torch.testing.assert_close(fast[: len(alignment.target)], slow, atol=1e-4, rtol=1e-3)
    fast, slow = seconds(embeddings), seconds(plain, 2)
    entries = vocabulary_map.matrix._nnz()
    return {
        "captions": len(captions),
        "learn": seconds(lambda: VocabularyMap.learn(source, target, captions), 2),
        "embeddings": fast,
        "plain": slow,
        "distributions": seconds(distributions),
        "ratio": slow / fast,
        "batch": len(texts),
        "megabytes": (bridge.mapped_embeddings.numel() * 4 + entries * 20) / 1e6,
        "dense_megabytes": dense.numel() * 4 / 1e6,
    }


def plain_prompt(P: torch.Tensor, alignment: Alignment, matrix: torch.Tensor, E: torch.Tensor) -> torch.Tensor:
    """The equation as it is written: one caption and one position at a time, over the whole target vocabulary."""
    rows = []
    for j, u in enumerate(alignment.target):
        row, followed = torch.zeros(len(E)), 1.0
        for t in (t for t, position in enumerate(alignment.target_positions) if position == j):
            departure = P[t].clone()
            departure[alignment.source[t]] = 0
            row += followed * (departure @ matrix)
            followed *= P[t, alignment.source[t]]
        row[u] += followed
        rows.append(row @ E)
    return torch.stack(rows)


def seconds(work: Callable[[], object], times: int = 5) -> float:
    """Median of a few runs, after one to warm up."""
    work()
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


# ── images ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def images(n: int) -> list[dict]:
    """Things of the source image found again in the generated image, by map and mode; same caption, same noise."""
    captioner = Captioner.from_pretrained(registry.locate(MINI.captioner))
    generator = Generator.from_pretrained(registry.locate(MINI.generator))
    recogniser = Recogniser.from_pretrained(registry.locate(MINI.judge)).eval()
    source, target = captioner.processor.tokenizer, generator.pipeline.tokenizer
    data = registered.load_dataset(MINI.coco, "test").subset(n, SEED)
    sources = [data.open(example) for example in data]
    scenes = [Scene.from_dict(example.extra["scene"]) for example in data]
    captions = captioner.describe(sources)
    logits, ids = captioner.token_logits(sources, captions)
    seeds = [derive_seed(SEED, example.image_id) for example in data]
    train = [text for example in registered.load_dataset(MINI.coco, "train") for text in example.references]

    def judged(encoder_hidden_states) -> list:
        generated = generator.render(encoder_hidden_states, seeds, MINI.steps, MINI.guidance_scale, 25)
        return [score_prompt(*pair) for pair in zip(recogniser.find(generated), scenes, strict=True)]

    text_ids = target(captions, padding="max_length", return_tensors="pt").input_ids
    scores = {("text", "text"): judged(generator.pipeline.text_encoder(text_ids).last_hidden_state)}
    for kind in tqdm(KINDS, desc="maps"):
        learned = learn(source, target, train, kind).resize(logits.shape[-1])
        bridge = Bridge(learned, generator.pipeline.text_encoder)
        for mode in tqdm(BRIDGE_MODES, desc=kind):
            P = relax(logits, mode, generator=torch.Generator().manual_seed(SEED))
            scores[kind, mode] = judged(bridge(P, ids))
    return [result_row(kind, mode, mine, scores["text", "text"]) for (kind, mode), mine in scores.items()]


def result_row(kind: str, mode: str, mine: list, text: list) -> dict:
    """Share of things found (kind and colour) and its difference from the text's, with intervals over images."""
    right, things = np.array([s.right for s in mine]), np.array([s.things for s in mine])
    baseline = np.array([s.right for s in text])

    def share(counts) -> list[float]:
        found = paired_bootstrap(lambda rows: counts[rows].sum() / things[rows].sum(), len(things), seed=SEED)
        return [found.value, found.low, found.high]

    return {"map": kind, "mode": mode, "n": len(mine), "found": share(right), "against_text": share(right - baseline)}


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def page(found: dict) -> str:
    """The page: the tables of captions, the cost, the images."""
    lines = [
        "# The map and the bridge, measured",
        "",
        "Made by `python benchmarks/bridge.py --captions FOLDER --opt FOLDER --images N`; `--help` says which folders.",
        "",
        "In the tables of captions the captioner is certain, and a caption is known as its tokens only. (If its "
        "text is known, the word-aligned map keeps every caption. It uses M only where the captioner departs from "
        "the caption.) *Unchanged* captions arrive as the generator's own tokens, or in the other direction as the "
        "captioner's, where lower-cased tokens do not tell what was a capital. *Tokens right by M alone* are source "
        "tokens for which M's likeliest target token is the one that holds their first character. *Mass added* is "
        "the mean of the sums of M's rows, minus 1. *released* is our reconstruction of the authors' rule: it pairs "
        "5,064 tokens inside words with a whole word, theirs 829. What mass theirs adds was not measured.",
        "",
        *caption_tables(found),
        *(cost_part(found) if "cost" in found else ()),
        *image_table(found),
    ]
    return "\n".join(lines) + "\n"


def caption_tables(found: dict) -> list[str]:
    """Lines of a table for each pair of tokenizers that was measured."""
    titles = {
        "coco": "COCO, BLIP to CLIP: learned on Karpathy val, measured on Karpathy test",
        "opt": "COCO, byte-level BPE (BLIP-2's OPT has GPT-2's merges) to CLIP",
        "miniature": "The miniature",
    }
    lines = []
    for name, title in titles.items():
        if name not in found:
            continue
        lines += [
            f"## {title}",
            "",
            measured_at(found, name),
            "",
            "| direction | map | captions | same tokens | unchanged (95 %) | tokens right by M alone | tokens to [UNK] "
            "| mass added | words lost |",
            "| --- " * 9 + "|",
        ]
        for entry in found[name]:
            exact, low, high = entry["exact"]
            words = ", ".join(word or "(a space)" for word in entry["lost_words"])
            lost = f"{entry['lost']:,}: {words}" if words else "0"
            added = round(entry["added_mass"], 3) + 0  # no −0.000
            lines += [
                f"| {entry['direction']} | {entry['map']} | {entry['n']:,} | {entry['same_tokens']:.2%} | {exact:.2%} "
                f"({low:.2%} … {high:.2%}) | {entry['token_accuracy']:.2%} | {entry['unknown']:.3%} | {added:+.3f} "
                f"| {lost} |"
            ]
        lines += [""]
    return lines


def cost_part(found: dict) -> list[str]:
    """Lines on time and memory."""
    cost = found["cost"]
    return [
        "## Cost",
        "",
        f"Learned from {cost['captions']:,} captions in {cost['learn']:.1f} s. {cost['batch']} captions over the "
        f"real vocabularies, as expected embeddings of 768 numbers: {cost['embeddings'] * 1e3:.0f} ms. In the same "
        "run: batched, but with the distributions over the target vocabulary formed first, "
        f"{cost['distributions'] / cost['embeddings']:.1f} times as "
        f"long; one caption and one position at a time with a dense matrix, {cost['plain']:.1f} s, "
        f"**{cost['ratio']:.0f} times** as long. Memory: {cost['megabytes']:.0f} MB (M·E and M) instead of "
        f"{cost['dense_megabytes']:,.0f} MB. {measured_at(found, 'cost')}",
        "",
    ]


def image_table(found: dict) -> list[str]:
    """Lines of the table of generated images."""
    lines = [
        "## Images from the captioner's own distributions",
        "",
        "Miniature, coco test, captions by beam search: things of the source image that the recogniser finds again, "
        f"kind and colour, in the generated image ({MINI.steps} steps, guidance {MINI.guidance_scale}; same caption "
        f"and noise; seed {SEED}). {measured_at(found, 'images')}",
        "",
        "| map | mode | images | things found (95 %) | against text (95 %) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for entry in found["images"]:
        share, apart = (
            f"{value:.3f} ({low:.3f} … {high:.3f})" for value, low, high in (entry["found"], entry["against_text"])
        )
        apart = "" if entry["map"] == "text" else apart
        lines += [f"| {entry['map']} | {entry['mode']} | {entry['n']} | {share} | {apart} |"]
    return lines


def measured_at(found: dict, part: str) -> str:
    return f"Measured at commit `{found['commits'].get(part, 'unknown')}`."


if __name__ == "__main__":
    main()
