"""Makes an ordinary checkpoint of a GGUF file, which loads faster and which other programs read too.

    python scripts/gguf_to_checkpoint.py FILE.gguf FOLDER [--dtype bfloat16]

The checkpoint has what a run of the file itself would serve: the weights converted to --dtype, the configuration with the
tokens that end an answer, and the tokenizer with the chat template.
"""

import argparse
import sys
from pathlib import Path

from transformers import GenerationConfig

from splitwiser.errors import InputError
from splitwiser.model.checkpoints.gguf_file import is_gguf
from splitwiser.model.loading import load_model


def convert(file: Path, folder: Path, dtype: str) -> None:
    """Write the checkpoint of ``file`` into ``folder``. Raises :class:`InputError`."""
    if not is_gguf(file):
        raise InputError(f"{file}: not a GGUF file; its name must end with .gguf")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not an empty folder")
    model = load_model(file, dtype=dtype, device="cpu", load_format="auto")
    if model.tokenizer is None:
        raise InputError(model.no_text)
    # load_model leaves one of its own, for mode generate
    model.module.generation_config = GenerationConfig.from_model_config(model.module.config)
    model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    for note in model.notes:
        print(f"note: {note}")


def main() -> None:
    """Convert; on a mistake of the user's, say it in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32", help="number format of the weights")
    options = parser.parse_args()
    try:
        convert(options.file, options.folder, options.dtype)
    except InputError as error:
        print(f"gguf_to_checkpoint: {error.cli_message}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"{options.folder}: {sum(each.stat().st_size for each in options.folder.iterdir()) / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
