"""The bridge: parity with the stock encoder and pipeline, gradients against finite differences, what stays frozen."""

from functools import cache

import pytest
import tiny
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from dalleflamingo.bridge import BRIDGE_MODES, Bridge, relax, replaced_token_embeddings
from dalleflamingo.captioner import Captioner
from dalleflamingo.evaluation.vocabulary_report import clip_tokenizer, wordpiece_tokenizer
from dalleflamingo.research.released import ReleasedBridge, released_map
from dalleflamingo.vocabulary import MAP_KINDS, VocabularyMap

WORDPIECE, CLIP, BYTES = wordpiece_tokenizer(), clip_tokenizer(), tiny.byte_level_bpe()
SOURCES = {"WordPiece": WORDPIECE, "bytes": BYTES}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
TEXTS = ["a giraffe's 10 frisbees, isn't it?", "a café by the sea 😀", "", "dog", "giraffe " * 90]


def text_encoder(width: int, layers: int, vocabulary: int = 49_408, **sizes) -> CLIPTextModel:
    torch.manual_seed(0)
    special = dict(bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1)
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64 or 1,
        **(special | sizes),
    )
    return CLIPTextModel(config).eval()


@cache
def learned(kind: str = "word-aligned", source: str = "WordPiece") -> VocabularyMap:
    """A map to CLIP from TEXTS."""
    if kind == "released":
        return released_map(SOURCES[source], CLIP)
    return VocabularyMap.learn(SOURCES[source], CLIP, TEXTS, kind)


@pytest.fixture(scope="module")
def full_size() -> tuple[CLIPTextModel, torch.Tensor]:
    """Stable Diffusion v1-4's text encoder by its published sizes, 123 M random weights, and what it makes of TEXTS."""
    encoder = text_encoder(768, 12)
    assert sum(p.numel() for p in encoder.parameters()) == 123_060_480
    return encoder, hidden_states(encoder, TEXTS)


@pytest.fixture(scope="module")
def small() -> CLIPTextModel:
    return text_encoder(64, 2)


def batch(tokenizer, texts) -> tuple[torch.Tensor, torch.Tensor]:
    """Certain distributions (B, T, V) and ids (B, T), as a captioner gives them: a caption, [SEP], anything behind."""
    end = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
    rows = [[*tokenizer(text, add_special_tokens=False).input_ids, end] for text in texts]
    longest = max(map(len, rows)) + 1
    ids = torch.tensor([row + [5] * (longest - len(row)) for row in rows])
    return torch.nn.functional.one_hot(ids, len(tokenizer)).float(), ids


def hidden_states(encoder: CLIPTextModel, texts) -> torch.Tensor:
    tokens = CLIP(texts, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        return encoder(tokens.input_ids).last_hidden_state


# ── parity ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mode", ["one-hot", "straight-through"])
def test_one_hot_bridge_equals_text_encoder_at_full_size(full_size, source, mode):
    encoder, expected = full_size
    bridge = Bridge(learned(source=source), encoder)
    P, ids = batch(SOURCES[source], TEXTS)
    if mode == "straight-through":
        P = relax(P * 3, mode)
    with torch.no_grad():
        found = bridge(P, ids, TEXTS)
    assert found.shape == (len(TEXTS), 77, 768)
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.float16, 0.1), (torch.bfloat16, 0.1)])
def test_every_precision_keeps_its_dtype_and_device_and_comes_near(dtype, near, device):
    reference, encoder = text_encoder(64, 2), text_encoder(64, 2).to(device, dtype)
    P, ids = batch(WORDPIECE, TEXTS[:2])
    bridge = Bridge(learned(), encoder)
    with torch.no_grad():
        found = bridge(P.to(device, dtype), ids.to(device), TEXTS[:2])
    assert (found.dtype, found.device.type) == (dtype, device)
    assert (found.float().cpu() - hidden_states(reference, TEXTS[:2])).abs().max() < near


def test_released_map_is_what_the_released_code_computes(small):
    """The code gathers the captioner's columns by the pairs and multiplies by E, whatever the rows sum to."""
    rows, columns = learned("released").matrix.indices()
    pairs = torch.empty(len(CLIP), dtype=torch.long)
    pairs[columns] = rows
    ids = torch.tensor([WORDPIECE("a dog surfs", add_special_tokens=False).input_ids])
    P = torch.randn(1, ids.shape[1], len(WORDPIECE), generator=torch.Generator().manual_seed(0)).softmax(-1)
    bridge = Bridge(learned("released"), small)
    E = small.get_input_embeddings().weight
    prompt = bridge.soft_prompt(P, bridge.vocabulary_map.align(ids.tolist()))
    torch.testing.assert_close(prompt[:, 1 : 1 + ids.shape[1]], P[:, :, pairs] @ E, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["one-to-one", "released"])
def test_released_bridge_keeps_the_ends(small, kind):
    """Everything after the captioner's prompt is mapped, [SEP] and padding too; [EOS] follows, and nothing else."""
    bridge = ReleasedBridge(learned(kind), small)
    texts = ["a dog surfs", "a dog"]
    ids = WORDPIECE(texts, padding=True, return_tensors="pt").input_ids[:, 1:]
    E = small.get_input_embeddings().weight
    mapped = torch.sparse.mm(learned(kind).matrix, E)[ids]  # one-hot rows times M·E
    begin, end = (E[id].expand(2, 1, -1) for id in (CLIP.bos_token_id, CLIP.eos_token_id))
    expected = torch.cat([begin, mapped, end], dim=1)
    P = torch.nn.functional.one_hot(ids, len(WORDPIECE)).float()
    with torch.no_grad(), replaced_token_embeddings(small, expected):
        hidden = small(torch.zeros(expected.shape[:2], dtype=torch.long)).last_hidden_state
        found = bridge(P, ids, texts)
    assert found.shape[1] == ids.shape[1] + 2
    torch.testing.assert_close(found, hidden, atol=1e-5, rtol=1e-5)


def test_released_bridge_stops_where_the_text_encoder_does(small):
    ids = torch.full((1, 90), WORDPIECE.convert_tokens_to_ids("dog"))
    P = torch.nn.functional.one_hot(ids, len(WORDPIECE)).float()
    with torch.no_grad():
        found = ReleasedBridge(learned("one-to-one"), small)(P, ids)
    torch.testing.assert_close(found, hidden_states(small, ["dog " * 90]), atol=1e-5, rtol=0)


def test_ends_are_in_no_word(small):
    with pytest.raises(ValueError, match=r"\[SEP\] is in no word.*take another map"):
        ReleasedBridge(learned(), small)


@pytest.mark.parametrize("kind", [*MAP_KINDS, "released"])
def test_prompt_begins_ends_and_is_padded_as_the_text_encoder_expects(small, kind):
    bridge = Bridge(learned(kind), small)
    P, ids = batch(WORDPIECE, ["a dog", "a red dog sits"])
    prompt = bridge.soft_prompt(P, bridge.vocabulary_map.align(bridge.caption_ids(ids)))
    E = small.get_input_embeddings().weight
    for row, length in zip(prompt, (2, 4), strict=True):
        assert torch.equal(row[0], E[CLIP.bos_token_id])
        assert torch.equal(row[1 + length :], E[CLIP.eos_token_id].expand(76 - length, -1))


# ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [*MAP_KINDS, "released"])
def test_gradient_equals_finite_differences(kind):
    """In float64, through softmax, map and a text encoder of two layers."""
    texts = ["a giraffe", "the dog's ball"]
    blip, clip = tiny.shipped_tokenizers()
    encoder = text_encoder(
        16, 2, len(clip), **{f"{end}_token_id": getattr(clip, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    ).double()
    learned = released_map(blip, clip) if kind == "released" else VocabularyMap.learn(blip, clip, texts, kind)
    bridge = Bridge(learned, encoder)
    _, ids = batch(blip, texts)
    alignments = bridge.vocabulary_map.align(bridge.caption_ids(ids))
    weights = torch.randn(2, 77, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(logits):
        return (bridge.encode(bridge.soft_prompt(relax(logits), alignments)) * weights).sum()

    logits = torch.randn(*ids.shape, len(blip), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(loss, logits.requires_grad_(), eps=1e-6, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize(
    ("kind", "trained"),
    [
        (tiny.blip, "crossattention.self.query"),
        (tiny.blip2, "query_tokens"),
    ],
)
def test_gradient_reaches_what_is_trained_of_the_captioner_and_nothing_frozen(tmp_path, kind, trained):
    """Captioner → bridge → text encoder, trainable what is in the paper's Appendix H."""
    captioner = Captioner.from_pretrained(str(kind(tmp_path)))
    model, source = captioner.model, captioner.processor.tokenizer
    model.requires_grad_(False)
    queries = [p for name, p in model.named_parameters() if trained in name]
    for parameter in queries:
        parameter.requires_grad_()
    encoder = text_encoder(64, 2).requires_grad_(False)
    text = "a red bird in the tree"
    logits, ids = captioner.token_logits(tiny.pictures(1), [text])
    learned = VocabularyMap.learn(source, CLIP, [text]).resize(logits.shape[-1])
    bridge = Bridge(learned, encoder)
    assert source.decode(bridge.caption_ids(ids)[0]) == text
    bridge(relax(logits), ids, [text]).square().sum().backward()
    assert queries and all(p.grad is not None and p.grad.abs().sum() > 0 for p in queries)
    frozen = [p for p in [*model.parameters(), *encoder.parameters()] if not p.requires_grad]
    assert all(p.grad is None for p in frozen)


# ── relaxations ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", BRIDGE_MODES)
def test_relaxed_logits_are_distributions_with_a_gradient(mode):
    logits = torch.randn(2, 3, 7, requires_grad=True)
    P = relax(logits, mode, 0.7, torch.Generator().manual_seed(0))
    torch.testing.assert_close(P.sum(-1), torch.ones(2, 3))
    (P * torch.randn(7)).sum().backward()
    assert logits.grad.abs().sum() > 0


def test_straight_through_is_the_argmax_and_learns_as_soft():
    logits = torch.tensor([[0.1, 2.0, -1.0]], requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 4.0])
    hard = relax(logits, "straight-through", 0.5)
    torch.testing.assert_close(hard, torch.tensor([[0.0, 1.0, 0.0]]))
    [got] = torch.autograd.grad((hard * weights).sum(), logits)
    [expected] = torch.autograd.grad((relax(logits, "soft", 0.5) * weights).sum(), logits)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", ["straight-through", "gumbel"])
def test_rows_of_the_hard_modes_are_one_hot_to_the_bit(mode, dtype):
    """(1 + s) − s is not 1 in every fifth row of float32; 1 + (s − s) is."""
    logits = torch.randn(2000, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    P = relax(logits, mode, 0.7, torch.Generator().manual_seed(0))
    assert torch.equal(P, torch.nn.functional.one_hot(P.argmax(-1), 30).to(dtype))
    if mode == "straight-through":
        assert torch.equal(P.argmax(-1), logits.argmax(-1))


def test_gumbel_samples_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(40_000, 3)
    share = relax(logits, "gumbel", 0.5, torch.Generator().manual_seed(0)).mean(0)
    torch.testing.assert_close(share, logits[0].softmax(-1), atol=0.01, rtol=0)  # 0.01 is four standard errors
    again = relax(logits, "gumbel", 0.5, torch.Generator().manual_seed(0)).mean(0)
    assert torch.equal(share, again)


# ── the hook, bad input ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_text_encoder_is_itself_again_even_after_an_error(small):
    before = hidden_states(small, ["a dog"])
    with pytest.raises(RuntimeError, match="on the way"), replaced_token_embeddings(small, torch.zeros(1, 77, 64)):
        assert not torch.equal(hidden_states(small, ["a dog"]), before)
        raise RuntimeError("on the way")
    assert torch.equal(hidden_states(small, ["a dog"]), before)


def test_captions_too_long_for_the_text_encoder_are_truncated_as_the_pipeline_does(small):
    bridge = Bridge(learned(), small)
    with torch.no_grad():
        found = bridge(*batch(WORDPIECE, TEXTS[4:]), TEXTS[4:])
    torch.testing.assert_close(found, hidden_states(small, TEXTS[4:]), atol=1e-5, rtol=0)


def test_bad_input_says_what_was_expected(small):
    with pytest.raises(ValueError, match="the map leads to 49408 tokens, the text encoder knows 500"):
        Bridge(learned(), text_encoder(64, 1, 500))
    with pytest.raises(ValueError, match="no mode is called 'hard'"):
        relax(torch.zeros(1, 3), "hard")
    with pytest.raises(ValueError, match="temperature 0: it divides the logits"):
        relax(torch.zeros(1, 3), temperature=0)
    with pytest.raises(ValueError, match="no captions to map"):
        Bridge(learned(), small)(torch.zeros(0, 3, len(WORDPIECE)), torch.zeros(0, 3, dtype=torch.long))
