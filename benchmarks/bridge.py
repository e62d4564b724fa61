"""The map and the bridge, measured: `python benchmarks/bridge.py [--captions FOLDER] [--opt FOLDER] [--images N]`.

* What crosses: shares of captions, on COCO's Karpathy split (learned on val, measured on test) and on the miniature's.
* What it costs: learning the map and carrying captions, against the same by one caption at a time and a dense matrix,
  side by side in one run.
* What arrives: pictures drawn from the captioner's own distributions over each map in each mode, judged by the
  recogniser.

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
from dalleflamingo.bridge import MODES, Bridge, relax
from dalleflamingo.captioner import Captioner
from dalleflamingo.evaluation.vocabulary_report import report
from dalleflamingo.generator import Generator
from dalleflamingo.intervals import derive_seed, paired_bootstrap
from dalleflamingo.miniature.image_score import score_prompt
from dalleflamingo.miniature.recogniser import Recogniser
from dalleflamingo.miniature.scene_graph import Scene
from dalleflamingo.profiles import PROFILES
from dalleflamingo.research.report import current_commit
from dalleflamingo.tokens import clip_tokenizer, wordpiece_tokenizer
from dalleflamingo.vocabulary import KINDS, VocabularyMap

RESULTS = Path("docs/results")
SEED, MINI = 0, PROFILES["mini"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, help="folder of coco_karpathy_{val,test}_gt.json")
    parser.add_argument("--images", type=int, default=100, help="pictures for each map and mode")
    parser.add_argument("--opt", type=Path, help="folder of BLIP-2's tokenizer, OPT's or any of GPT-2's merges")
    arguments = parser.parse_args()
    file = RESULTS / "bridge.json"
    found = {"commits": {}} | (json.loads(file.read_text()) if file.exists() else {})

    commit = current_commit()  # now: the results, once written, differ from it

    def keep(part: str, measured: list[dict] | dict) -> None:
        found[part], found["commits"][part] = measured, commit
        file.write_text(json.dumps(found, indent=1) + "\n")

    if arguments.opt and not arguments.captions:
        parser.error("--opt is measured on COCO: give --captions, too")
    if arguments.captions:
        coco = {part: read_captions(arguments.captions / f"coco_karpathy_{part}_gt.json") for part in ("val", "test")}
        keep("coco", crossings(wordpiece_tokenizer(), clip_tokenizer(), coco["val"], coco["test"]))
        keep("cost", costs(coco["val"]))
        if arguments.opt:
            opt = AutoTokenizer.from_pretrained(arguments.opt)
            keep("opt", crossings(opt, clip_tokenizer(), coco["val"], coco["test"], ("one-to-one", "word-aligned")))
    keep("miniature", miniature_crossings())
    keep("pictures", pictures(arguments.images))
    (RESULTS / "bridge.md").write_text(page(found))
    print(f"{RESULTS}/bridge.md")


def read_captions(file: Path) -> list[str]:
    return [entry["caption"] for entry in json.loads(file.read_text())["annotations"]]


# ── what crosses ─────────────────────────────────────────────────────────────────────────────────────────────────────


def crossings(captioners, generators, learned: list[str], measured: list[str], kinds=KINDS) -> list[dict]:
    """A row a map and direction."""
    rows = []
    for direction, source, target in (("there", captioners, generators), ("back", generators, captioners)):
        for kind in kinds if direction == "there" else ("one-to-one", "word-aligned"):
            told = report(VocabularyMap.learn(source, target, learned, kind), measured)
            rows.append(
                {
                    "direction": direction,
                    "map": kind,
                    "n": told.exact.n,
                    "same": told.same.value,
                    "exact": [told.exact.value, told.exact.low, told.exact.high],
                    "read": told.read.value,
                    "unknown": told.unknown.value,
                    "made": told.made,
                    "lost": told.lost,
                    "words": told.words.word.head(5).tolist(),
                }
            )
    return rows


def miniature_crossings() -> list[dict]:
    texts = {
        part: [text for example in registry.dataset("miniature/coco", part) for text in example.references]
        for part in ("train", "test")
    }
    captioner = Captioner.from_pretrained(registry.locate("miniature/blip"))
    generator = Generator.from_pretrained(registry.locate("miniature/sd"))
    return crossings(captioner.processor.tokenizer, generator.pipeline.tokenizer, texts["train"], texts["test"])


# ── what it costs ────────────────────────────────────────────────────────────────────────────────────────────────────


def costs(captions: list[str]) -> dict:
    """Seconds of ours and of the plain version, each on the same captions, and the ratio."""
    source, target = wordpiece_tokenizer(), clip_tokenizer()
    vocabulary_map = VocabularyMap.learn(source, target, captions)
    special = dict(bos_token_id=49_406, eos_token_id=49_407, pad_token_id=49_407)
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=49_408, hidden_size=768, num_hidden_layers=1, **special))
    bridge = Bridge(vocabulary_map, encoder)
    texts = captions[:4]
    ids = [source(text, add_special_tokens=False).input_ids for text in texts]
    longest = max(map(len, ids))
    said = torch.randn(len(ids), longest, len(source), generator=torch.Generator().manual_seed(SEED)).softmax(-1)
    paths = vocabulary_map.paths(ids, texts)
    dense, table = vocabulary_map.matrix.to_dense(), encoder.get_input_embeddings().weight.detach()

    @torch.no_grad()
    def plain() -> list[torch.Tensor]:
        return [plain_prompt(said[i], path, dense, table) for i, path in enumerate(paths)]

    @torch.no_grad()
    def ours() -> torch.Tensor:
        return bridge.map.carry(said, paths, bridge.readings, table)

    @torch.no_grad()
    def written_down() -> torch.Tensor:
        return bridge.map.rows(said, paths) @ table

    torch.testing.assert_close(ours(), written_down(), atol=1e-4, rtol=1e-3)
    for mine, theirs, path in zip(ours(), plain(), paths, strict=True):
        torch.testing.assert_close(mine[: len(path.target)], theirs, atol=1e-4, rtol=1e-3)
    fast, slow, rows = seconds(ours), seconds(plain, 2), seconds(written_down)
    entries = vocabulary_map.matrix._nnz()
    return {
        "captions": len(captions),
        "learn": seconds(lambda: VocabularyMap.learn(source, target, captions), 2),
        "carry": fast,
        "plain": slow,
        "rows": rows,
        "ratio": slow / fast,
        "batch": len(texts),
        "megabytes": (bridge.readings.numel() * 4 + entries * 20) / 1e6,
        "dense_megabytes": dense.numel() * 4 / 1e6,
    }


def plain_prompt(said: torch.Tensor, path, matrix: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The formula as it stands: a caption and a place at a time, rows over the whole target vocabulary."""
    rows = []
    for j, u in enumerate(path.target):
        row, stayed = torch.zeros(len(table)), 1.0
        for t in (t for t, place in enumerate(path.lands) if place == j):
            departure = said[t].clone()
            departure[path.source[t]] = 0
            row += stayed * (departure @ matrix)
            stayed *= said[t, path.source[t]]
        row[u] += stayed
        rows.append(row @ table)
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


# ── what arrives ─────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def pictures(n: int) -> list[dict]:
    """Things of the source picture found again in what is drawn, by map and mode; same caption, same noise."""
    captioner = Captioner.from_pretrained(registry.locate("miniature/blip"))
    generator = Generator.from_pretrained(registry.locate("miniature/sd"))
    recogniser = Recogniser.from_pretrained(registry.locate("miniature/recogniser")).eval()
    source, target = captioner.processor.tokenizer, generator.pipeline.tokenizer
    data = registry.dataset("miniature/coco", "test").subset(n, SEED)
    images = [data.open(example) for example in data]
    scenes = [Scene.from_dict(example.extra["scene"]) for example in data]
    captions = captioner.describe(images)
    logits, ids = captioner.token_logits(images, captions)
    seeds = [derive_seed(SEED, example.image_id) for example in data]
    train = [text for example in registry.dataset("miniature/coco", "train") for text in example.references]

    def judged(states) -> list:
        drawn = generator.render(states, seeds, MINI.steps, MINI.guidance_scale, 25)
        return [score_prompt(*pair) for pair in zip(recogniser.find(drawn), scenes, strict=True)]

    read = target(captions, padding="max_length", return_tensors="pt").input_ids
    scores = {("text", "text"): judged(generator.pipeline.text_encoder(read).last_hidden_state)}
    for kind in tqdm(KINDS, desc="maps"):
        learned = VocabularyMap.learn(source, target, train, kind).widened(logits.shape[-1])
        bridge = Bridge(learned, generator.pipeline.text_encoder)
        for mode in tqdm(MODES, desc=kind):
            said = relax(logits, mode, generator=torch.Generator().manual_seed(SEED))
            scores[kind, mode] = judged(bridge(said, ids))
    return [result_row(kind, mode, mine, scores["text", "text"]) for (kind, mode), mine in scores.items()]


def result_row(kind: str, mode: str, mine: list, text: list) -> dict:
    """Share of things found (kind and colour) and its difference from the text's, with intervals over pictures."""
    right, things = np.array([s.right for s in mine]), np.array([s.things for s in mine])
    baseline = np.array([s.right for s in text])

    def share(counts) -> list[float]:
        found = paired_bootstrap(lambda rows: counts[rows].sum() / things[rows].sum(), len(things), seed=SEED)
        return [found.value, found.low, found.high]

    return {"map": kind, "mode": mode, "n": len(mine), "found": share(right), "against_text": share(right - baseline)}


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def page(found: dict) -> str:
    lines = [
        "# The map and the bridge, measured",
        "",
        "Made by `python benchmarks/bridge.py --captions FOLDER --opt FOLDER --images N`; `--help` says which folders.",
        "",
        "The tables of what crosses: captions are known as the captioner's pieces only, said with certainty. (From "
        "its text every caption crosses the word-aligned map. M has no part in that: it serves departures.) *There* is "
        "from the captioner to the generator, *back* the other way, where lower-cased pieces do not tell what was a "
        "capital. *Read*: pieces that M by itself reads as what they begin in. *released* is our reconstruction of the "
        "authors' rule: it pairs 5,064 pieces inside words with a whole word, theirs 829; what mass theirs makes was "
        "not measured.",
        "",
    ]
    titles = {
        "coco": "COCO, BLIP to CLIP: learned on Karpathy val, measured on Karpathy test",
        "opt": "COCO, byte-level BPE (BLIP-2's OPT has GPT-2's merges) to CLIP",
        "miniature": "The miniature",
    }
    for name, title in titles.items():
        if name not in found:
            continue
        lines += [
            f"## {title}",
            "",
            measured_at(found, name),
            "",
            "| direction | map | captions | same pieces | carried exactly (95 %) | read | to [UNK] | mass made "
            "| words lost |",
            "| --- " * 9 + "|",
        ]
        for entry in found[name]:
            exact, low, high = entry["exact"]
            words = ", ".join(word or "(a space)" for word in entry["words"])
            lost = f"{entry['lost']:,}: {words}" if words else "0"
            made = round(entry["made"], 3) + 0  # no −0.000
            lines += [
                f"| {entry['direction']} | {entry['map']} | {entry['n']:,} | {entry['same']:.2%} | {exact:.2%} "
                f"({low:.2%} … {high:.2%}) | {entry['read']:.2%} | {entry['unknown']:.3%} | {made:+.3f} | {lost} |"
            ]
        lines += [""]
    if cost := found.get("cost"):
        lines += [
            "## Cost",
            "",
            f"Learned from {cost['captions']:,} captions in {cost['learn']:.1f} s. {cost['batch']} captions over the "
            f"real vocabularies, to embeddings of 768 numbers: {cost['carry'] * 1e3:.0f} ms. In the same run: batched, "
            f"but with M's rows written down before they meet the table, {cost['rows'] / cost['carry']:.1f} times as "
            f"long; one caption and one place at a time with a dense matrix, {cost['plain']:.1f} s, "
            f"**{cost['ratio']:.0f} times** as long. Memory: {cost['megabytes']:.0f} MB (M·E and M) instead of "
            f"{cost['dense_megabytes']:,.0f} MB. {measured_at(found, 'cost')}",
            "",
        ]
    lines += [
        "## Pictures from the captioner's own distributions",
        "",
        "Miniature, coco test, captions by beam search: things of the source picture that the recogniser finds again, "
        f"kind and colour, in what is drawn ({MINI.steps} steps, guidance {MINI.guidance_scale}; same caption and "
        f"noise; seed {SEED}). {measured_at(found, 'pictures')}",
        "",
        "| map | mode | pictures | things found (95 %) | against text (95 %) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for entry in found["pictures"]:
        share, apart = (
            f"{value:.3f} ({low:.3f} … {high:.3f})" for value, low, high in (entry["found"], entry["against_text"])
        )
        apart = "" if entry["map"] == "text" else apart
        lines += [f"| {entry['map']} | {entry['mode']} | {entry['n']} | {share} | {apart} |"]
    return "\n".join(lines) + "\n"


def measured_at(found: dict, part: str) -> str:
    return f"Measured at commit `{found['commits'].get(part, 'unknown')}`."


if __name__ == "__main__":
    main()
