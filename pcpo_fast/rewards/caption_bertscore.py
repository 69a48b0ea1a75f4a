"""DDPO's alignment reward: a vision-language model describes the image, and BERTScore compares this with the prompt.

Black et al., arXiv:2305.13301, section 5.3: LLaVA is asked what is going on in the image, the reference is "The image
contains" and the prompt, and the reward is the BERTScore recall at layer 40 of ``microsoft/deberta-xlarge-mnli``: about
0.4 to 0.8, at most 1.
"""

from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from pcpo_fast.errors import UserError
from pcpo_fast.rewards.bertscore import load_encoder, recall
from pcpo_fast.rewards.clip_scoring import check_model_type, load_pretrained, load_tokenizer
from pcpo_fast.rewards.learned import LearnedReward
from pcpo_fast.rewards.model_files import model_folder
from pcpo_fast.rewards.options import checked_option
from pcpo_fast.rewards.preprocessing import read_preprocessing

_IMAGE = "<image>"


class CaptionBertScore(LearnedReward):
    """BERTScore recall of the prompt in a generated description of the image.

    Args:
        model: folder or hub id of a LLaVA model (1.5, or another of transformers' type ``llava``).
        scorer: folder or hub id of BERTScore's encoder.
        layer: the encoder layer whose output is compared.
        instruction: the question, with ``<image>`` in place of the image.
        reference: the text that the description is compared with; must contain ``{prompt}``.
        max_new_tokens: maximum length of the description in tokens.
        device, dtype, batch_size: see :class:`pcpo_fast.rewards.learned.LearnedReward`; ``dtype`` is the LLaVA model's,
            the encoder stays in float32.

    Raises:
        UserError: an option is invalid, or a model is missing or of another kind.
    """

    name: ClassVar[str] = "caption_bertscore"
    size: ClassVar[tuple[int, int]] = (7_063_427_072, 640_257_024)

    def __init__(
        self,
        model: str = "llava-hf/llava-1.5-7b-hf",
        scorer: str = "microsoft/deberta-xlarge-mnli",
        layer: int = 40,
        instruction: str = "USER: <image>\nAnswer concisely: what is going on in this image? ASSISTANT:",
        reference: str = "The image contains {prompt}",
        max_new_tokens: int = 64,
        device: str | None = None,
        dtype: str = "bfloat16",
        batch_size: int = 8,
    ) -> None:
        from transformers import LlavaForConditionalGeneration

        super().__init__(device=device, dtype=dtype, batch_size=batch_size)
        for option, value in (("instruction", instruction), ("reference", reference)):
            checked_option(self.name, option, value, str, "a string")
        checked_option(self.name, "max_new_tokens", max_new_tokens, PositiveInt, "an integer of at least 1")
        if instruction.count(_IMAGE) != 1:
            raise UserError(
                f"reward {self.name}: option instruction must contain {_IMAGE} exactly once, got {instruction!r}"
            )
        if "{prompt}" not in reference:
            raise UserError(f"reward {self.name}: option reference must contain {{prompt}}, got {reference!r}")
        self.reference, self.max_new_tokens = reference, max_new_tokens
        folder = model_folder(self.name, "scorer", scorer)
        self._encoder = self.keep(load_encoder(self.name, folder, layer), torch.float32)
        self._words = load_tokenizer(self.name, None, folder, scorer)
        folder = model_folder(self.name, "model", model)
        where = f"reward {self.name}: {folder}"
        check_model_type(folder, where, "llava")
        self._llava = self.keep(load_pretrained(LlavaForConditionalGeneration, folder, where))
        config = self._llava.config
        self._prepare = read_preprocessing(folder, config.vision_config.image_size, f"reward {self.name}: {model}")
        self._tokenizer = load_tokenizer(self.name, None, folder, model)
        self._asked = _question(self._tokenizer, config, instruction)

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Recalls, float32 [b]."""
        references = [self.reference.replace("{prompt}", prompt) for prompt in prompts]
        return recall(self._encoder, self._words, self.captions(images), references)

    def captions(self, images: Tensor) -> list[str]:
        """Descriptions of images [b, 3, H, W] in 0..1, by greedy decoding."""
        asked = self._asked.to(images.device).expand(
            len(images), -1
        )  # the same question for all images, so no padding is needed
        said = self._llava.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            pixel_values=self._prepare(images).to(self.dtype),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
        )
        texts: list[str] = self._tokenizer.batch_decode(said[:, asked.shape[1] :], skip_special_tokens=True)
        return texts


def _question(tokenizer: Any, config: Any, instruction: str) -> Tensor:
    """Tokens [1, T] of the question, with one image token for each image patch."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    places = side * side + (config.vision_feature_select_strategy == "full")
    mark = tokenizer.convert_ids_to_tokens(config.image_token_id)
    if not isinstance(mark, str):
        raise UserError(
            f"reward caption_bertscore: the model's tokenizer has no token {config.image_token_id} for images"
        )
    tokens: Tensor = tokenizer(instruction.replace(_IMAGE, mark * places), return_tensors="pt").input_ids
    if int((tokens == config.image_token_id).sum()) != places:
        raise UserError(f"reward caption_bertscore: the model's tokenizer does not know {mark} as a token of its own")
    return tokens
