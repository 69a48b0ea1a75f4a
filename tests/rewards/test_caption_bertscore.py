"""DDPO's reward of captions: LLaVA's description against its processor, BERTScore against its definition."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_judges import SIZE, bert_words, scatter
from torch import Tensor

from pcpo_fast.errors import UserError
from pcpo_fast.rewards import load_reward
from pcpo_fast.rewards.bertscore import load_encoder, recall

WORDS = [*"abcdefghijklmnop", "cat", "dog", "red", "on", "what"]
QUESTION = "a <image> what"


def build_llava(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        GenerationConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=SIZE, patch_size=14, **layers),
            text_config=LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **layers),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )
    scatter(model, 5)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(
        folder
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertForMaskedLM

    path = tmp_path_factory.mktemp("captions")
    words = bert_words(path / "bert")
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    encoder = BertForMaskedLM(BertConfig(vocab_size=len(words), max_position_embeddings=64, **layers))
    scatter(encoder, 4, 1.0)  # with less, all words look alike
    encoder.save_pretrained(path / "bert")
    build_llava(path / "llava")
    return path


def reward(folder: Path, **options: Any) -> Any:
    common = {"model": str(folder / "llava"), "scorer": str(folder / "bert"), "layer": 2, "instruction": QUESTION}
    return load_reward("caption_bertscore", common | {"dtype": "float32", "max_new_tokens": 5} | options)


def by_definition(folder: Path, candidates: list[str], references: list[str], layer: int) -> list[float]:
    """Recall of equation (1) in the paper, one text at a time; [CLS] and [SEP] can be matched but do not count."""
    from transformers import BertModel

    model, words = BertModel.from_pretrained(folder, add_pooling_layer=False), bert_words(folder)

    def embed(text: str) -> Tensor:
        with torch.no_grad():
            tokens = words(text, return_tensors="pt")
            return model(**tokens, output_hidden_states=True).hidden_states[layer][0]  # type: ignore[no-any-return]

    found = []
    for candidate, reference in zip(candidates, references, strict=True):
        have, want = embed(candidate), embed(reference)
        best = [max(float(torch.cosine_similarity(w, h, dim=0)) for h in have) for w in want[1:-1]]
        found.append(sum(best) / len(best))
    return found


@pytest.mark.parametrize("layer", [1, 3])
def test_recall_by_definition(folder: Path, layer: int) -> None:
    candidates = ["a red cat", "the dog sleeps on a mat", "b"]
    references = ["a cat", "a dog", "something longer than all the others"]
    encoder = load_encoder("x", folder / "bert", layer)
    with torch.no_grad():
        scores = recall(encoder, bert_words(folder / "bert"), candidates, references)
        same = recall(encoder, bert_words(folder / "bert"), candidates, candidates)
        empty = recall(encoder, bert_words(folder / "bert"), ["", "a", ""], ["a", "", ""])
    expected = torch.tensor(by_definition(folder / "bert", candidates, references, layer))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(same, torch.ones(3), rtol=1e-5, atol=1e-5)
    assert empty.tolist() == [0.0, 0.0, 0.0]
    assert scores.min() < 0.999, "the texts do not differ enough to tell"


def test_captions_and_scores_are_those_of_the_published_processor(folder: Path) -> None:
    from transformers import AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    batch = torch.rand(5, 3, SIZE, SIZE).round(decimals=1)
    files = [
        Image.fromarray(np.ascontiguousarray(row)) for row in (batch * 255).round().byte().permute(0, 2, 3, 1).numpy()
    ]
    processor = LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(folder / "llava"),
        AutoTokenizer.from_pretrained(folder / "llava"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    inputs = processor(images=files, text=[QUESTION] * 5, return_tensors="pt")
    model = LlavaForConditionalGeneration.from_pretrained(folder / "llava").eval()
    said = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs.input_ids.shape[1] :]
    expected = processor.tokenizer.batch_decode(said, skip_special_tokens=True)
    judge = reward(folder, batch_size=2)
    assert [text for start in (0, 2, 4) for text in judge.captions(batch[start : start + 2])] == expected
    assert len(set(expected)) > 1, "the images do not differ enough to tell"
    prompts = ["a cat", "red", "dog on a mat", "b", "c d"]
    references = [f"The image contains {prompt}" for prompt in prompts]
    scores = judge(batch, prompts, [{}] * 5)
    torch.testing.assert_close(
        scores, torch.tensor(by_definition(folder / "bert", expected, references, 2)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 4}, "^reward caption_bertscore: option layer must be an integer of 1 to 3, got 4$"),
        ({"instruction": "what is this?"}, "option instruction must contain <image> exactly once, got 'what is this"),
        ({"reference": "an image"}, "option reference must contain {prompt}, got 'an image'$"),
        ({"max_new_tokens": 0}, "option max_new_tokens must be an integer of at least 1, got 0$"),
        ({"model": "bert"}, "is a model of type bert; allowed: llava$"),
        ({"scorer": "llava"}, "is not an encoder like BERT, RoBERTa or DeBERTa, but of type llava$"),
    ],
)
def test_wrong_options(folder: Path, options: dict[str, Any], message: str) -> None:
    paths = {key: str(folder / value) for key, value in options.items() if key in ("model", "scorer")}
    with pytest.raises(UserError, match=message):
        reward(folder, **(options | paths))
