"""A model's own tokenizer: whether its files are on this machine, and whether it can be loaded."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from splitwiser.errors import first_line
from splitwiser.model.checkpoints.catalog import CatalogEntry
from splitwiser.model.checkpoints.checkpoint import find_pointer
from splitwiser.model.checkpoints.gguf_file import complete_tokenizer, read_header
from splitwiser.model.checkpoints.hub import check_hub, find_file, only_files_of

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def has_tokenizer_files(entry: CatalogEntry) -> bool:
    """Return whether the model's own tokenizer, or a file of it, is on this machine."""
    if entry.gguf:
        return read_header(entry.gguf).has_tokenizer
    return any(find_file(entry, name) for name in TOKENIZER_FILES)


def load_tokenizer(entry: CatalogEntry, *, local_only: bool) -> tuple[PreTrainedTokenizerBase | None, str]:
    """Return the tokenizer and an empty string, or None and a line that says why there is none that can be loaded: prompts
    must then be token ids. If ``local_only``, nothing is downloaded."""
    problem = find_pointer(entry, TOKENIZER_FILES) or ""
    for local in (True,) if local_only or entry.path or problem else (True, False):
        try:
            if not local:
                check_hub(entry)
            with only_files_of(entry) as place:
                tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**place, local_files_only=local)
            if entry.gguf:
                complete_tokenizer(tokenizer, read_header(entry.gguf))
        except Exception as error:  # no file, a broken file, a missing library
            problem = problem or first_line(error)
            continue
        # without any tokenizer file, transformers makes one of special tokens only, which drops all text
        if len(tokenizer) > len(set(tokenizer.all_special_tokens)):
            return tokenizer, ""
        problem = problem or "its files contain no vocabulary"
    found = f"'s tokenizer cannot be loaded: {problem}" if has_tokenizer_files(entry) else " has no tokenizer"
    return None, f"{entry.name}{found}; give its prompt as token ids"
