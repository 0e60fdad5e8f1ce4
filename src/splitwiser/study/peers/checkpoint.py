"""What engines ask of a checkpoint that comes without a tokenizer."""

import json
from pathlib import Path


def with_tokenizer(model: Path, folder: Path) -> None:
    """Make ``folder`` a copy of the checkpoint ``model`` with a tokenizer of one word a token, which some engines ask
    for and requests of token ids do not use."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    for path in model.iterdir():
        if path.suffix in (".safetensors", ".json") and not path.name.startswith(("tokenizer", "special_tokens")):
            (folder / path.name).symlink_to(path.absolute())
    words = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    tokenizer = Tokenizer(models.WordLevel({f"t{word}": word for word in range(words)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", eos_token="t0").save_pretrained(folder)
