"""llama.cpp, compiled for this machine, by its low-level functions in llama-cpp-python."""

import ctypes
import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitwiser.study.peers.engine import STEP_TOKENS, Answer, Asked, cores, describe

ARCHITECTURES = ("LlamaForCausalLM",)  # those that :func:`convert` can write
MOST_SEQUENCES = 256  # LLAMA_MAX_SEQ
FORMATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # GGUF's names of number formats


@dataclass
class _Running:
    """A request whose prompt was read: the sequence of the KV cache that it has, the position of its last token, and how
    many tokens it is to have."""

    sequence: int
    position: int
    new_tokens: int
    answer: Answer


class LlamaCpp:
    """llama.cpp's batched decoding. Each request has a sequence of its own, and prompts are read one after another before
    the next token of all running requests is made: sequences of one length are what llama.cpp computes together. K and V are
    in float16, its own choice, which it computes with faster than with bfloat16.

    ``step_tokens`` is the most tokens of a prompt in a step. ``slots`` is the most requests at a time, by default as many as
    llama.cpp can, and ``shared`` says that their sequences lie in one cache; llama-server's own choice is 512, 4 and True.
    """

    def __init__(
        self, asked: Asked, *, step_tokens: int = STEP_TOKENS, slots: int | None = None, shared: bool = False
    ) -> None:
        file = asked.scratch / f"llama-{asked.dtype}.gguf"
        if not file.exists():
            convert(Path(asked.model), file, FORMATS[asked.dtype])
        import llama_cpp

        self.began_s = time.perf_counter()
        self._lib = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda *_: None)  # kept, since llama.cpp calls it later
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        slots = min(slots or MOST_SEQUENCES, asked.concurrency)
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max, params.kv_unified = slots, shared
        params.n_ctx = slots * -(-asked.longest // 256) * 256  # a sequence's share is a multiple of 256
        params.n_batch = params.n_ubatch = step_tokens
        params.n_threads = params.n_threads_batch = cores()
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp made no context of {params.n_ctx} tokens in {slots} sequences")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(max(step_tokens, slots), 0, 1)
        self._step_tokens = step_tokens
        self.version = describe(
            llama_cpp.__version__, asked.dtype, "float16", f"{step_tokens:,} tokens of a prompt a step", cores(),
            f"{slots} requests at a time", "one cache for all" if shared else "a cache for each",
        )  # fmt: skip
        self._free = deque(range(slots))
        self._waiting: deque[tuple[int, Sequence[int], int]] = deque()
        self._running: list[_Running] = []

    def add(self, number: int, prompt: Sequence[int], new_tokens: int) -> None:
        """Add a request."""
        self._waiting.append((number, prompt, new_tokens))

    def collect(self) -> Iterator[Answer]:
        """Read the next prompt, or make a token for every running request; yields the completed answers."""
        if self._waiting and self._free:
            number, prompt, new_tokens = self._waiting.popleft()
            sequence = self._free.popleft()
            for start in range(0, len(prompt), self._step_tokens):
                chunk = prompt[start : start + self._step_tokens]
                made = self._decode(
                    [
                        (token, position, sequence, position == len(prompt) - 1)
                        for position, token in enumerate(chunk, start)
                    ]
                )
            self._running.append(_Running(sequence, len(prompt) - 1, new_tokens, (number, [], [])))
            stepped = self._running[-1:]
        else:
            made = self._decode([(each.answer[1][-1], each.position, each.sequence, True) for each in self._running])
            stepped = self._running
        now = time.perf_counter_ns()
        for each, token in zip(stepped, made, strict=True):
            each.position += 1
            each.answer[1].append(token)
            each.answer[2].append(now)
        for each in [each for each in stepped if len(each.answer[1]) == each.new_tokens]:
            self._running.remove(each)
            self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), each.sequence, -1, -1)
            self._free.append(each.sequence)
            yield each.answer

    def _decode(self, entries: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Compute a batch of entries: token, position, sequence, and whether the next token is wanted. Returns the likeliest
        next tokens of those."""
        import numpy as np

        batch = self._batch
        for row, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[row], batch.pos[row], batch.logits[row] = token, position, wanted
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        batch.n_tokens = len(entries)
        if code := self._lib.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed with {code}")
        rows = sum(wanted for *_, wanted in entries)
        if not rows:
            return []
        logits = np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (rows, self._vocabulary))
        return [int(token) for token in logits.argmax(-1)]

    def close(self) -> None:
        """Free the context, and with it its threads."""
        self._lib.llama_free(self._context)


def convert(checkpoint: Path, file: Path, kind: str) -> None:
    """Write the checkpoint of a Llama in safetensors as a GGUF file, with weights in the format ``kind`` and without a
    vocabulary, which requests of token ids do not need. Raises ValueError for another architecture, or where positions or
    weights are not those of a plain Llama."""
    import gguf
    import numpy as np

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    (architecture,) = config["architectures"]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{architecture} cannot be converted for llama.cpp here; {', '.join(ARCHITECTURES)} can")
    rotary = config.get("rope_parameters") or config
    if config.get("rope_scaling") or rotary.get("rope_type", "default") != "default":
        raise ValueError(f"{checkpoint.name} scales its rotary embedding, which is not converted for llama.cpp here")
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    kv_heads, size = config["num_key_value_heads"], config["hidden_size"]
    writer = gguf.GGUFWriter(file.with_suffix(".part"), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(size)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.get("head_dim") or size // heads)
    writer.add_rope_freq_base(rotary["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, tensor in _read_tensors(checkpoint):
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # GGUF rotates neighbours, transformers the two halves
            rows = heads if "q_proj" in name else kv_heads
            tensor = tensor.reshape(rows, 2, -1, size).swapaxes(1, 2).reshape(tensor.shape)
        stored = gguf.GGMLQuantizationType.F32 if tensor.ndim == 1 else gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(np.ascontiguousarray(tensor), stored)
        known = names.get_name(name, (".weight",))
        if known is None:
            raise ValueError(f"{checkpoint.name} has a tensor {name}, which is not converted for llama.cpp here")
        writer.add_tensor(known, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.with_suffix(".part").rename(file)


def _read_tensors(checkpoint: Path) -> Iterator[tuple[str, Any]]:
    """Yield the name and the values, in float32, of each tensor of a checkpoint in safetensors: the length of a header of
    JSON (8 bytes, little-endian), the header, then all values. numpy has no bfloat16, which is the first half of float32."""
    import numpy as np

    for path in sorted(checkpoint.glob("*.safetensors")):
        content = np.memmap(path, dtype=np.uint8, mode="r")
        begin = 8 + int.from_bytes(content[:8].tobytes(), "little")
        header: Mapping[str, Any] = json.loads(content[8:begin].tobytes())
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            values = content[begin + first : begin + last].tobytes()
            if entry["dtype"] == "BF16":
                wide = np.frombuffer(values, "<u2").astype("<u4") << 16
                tensor = wide.view("<f4")
            else:
                tensor = np.frombuffer(values, {"F32": "<f4", "F16": "<f2"}[entry["dtype"]]).astype("<f4")
            yield name, tensor.reshape(entry["shape"])
