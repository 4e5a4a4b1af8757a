"""`vit2dpe text sample`: what a trained language model writes, or a translator translates."""

from __future__ import annotations

import torch

from ..data.pairs import load_pair_tokenizer
from ..data.tokenizers import from_json
from ..errors import CheckpointError, ConfigError
from ..models.text.generate import generate
from ..models.text.heads import TextDecoder
from ..models.text.seq2seq import Seq2Seq
from ..models.text.translate import translate
from .checkpoint import load_run
from .devices import pick_device
from .text_settings import SampleConfig


def sample(config: SampleConfig, command: str = "vit2dpe text sample") -> list[str]:
    """Sample from the model of a run; each text is printed behind its prompt, and returned. A translator gives the
    translation.

    Raises:
        CheckpointError: if the run is not one of a language model that writes.
        DataError: if the prompt has a character that the model does not know.
        ConfigError: for an empty prompt, or numbers that cannot work.
    """
    model = load_run(config.run, pick_device(config.device), which=config.which)
    about = vars(model)["about"]  # the JSON of its checkpoint
    if isinstance(model, Seq2Seq) and about.get("task") == "translation":
        if not config.prompt.strip():
            raise ConfigError("a sentence to translate is needed: --prompt")
        texts = translate(model, load_pair_tokenizer(about), [config.prompt], beams=config.beams)
        print(texts[0])
        return texts
    if not isinstance(model, TextDecoder) or "tokenizer" not in about:
        raise CheckpointError(
            f"{config.run} holds a {about['model']}; what writes is trained by `vit2dpe text train --objective causal` "
            "or translate"
        )
    tokenizer = from_json(about["tokenizer"])
    prompt = tokenizer.encode(config.prompt)
    if not prompt:
        raise ConfigError("a text to go on from is needed: --prompt")
    device = next(model.parameters()).device
    tokens = generate(
        model,
        torch.tensor([prompt] * config.count, device=device),
        config.length,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
    )
    texts = [tokenizer.decode(row) for row in tokens.tolist()]
    print("\n---------------\n".join(texts))
    return texts
