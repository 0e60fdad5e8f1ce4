"""The one file a user edits: every default of the command line and of the Python API. A flag overrides it for one run."""

from pathlib import Path

_SHIPPED = Path(__file__).resolve().with_name("shipped")  # only a wheel has it; see pyproject.toml
_IN_CHECKOUT = not _SHIPPED.is_dir()
DIR_PROJECT = Path(__file__).resolve().parents[2] if _IN_CHECKOUT else _SHIPPED  # where configs/ and models/ lie
DIR_CONFIGS = DIR_PROJECT / "configs"  # folders of workloads, sweeps and worker layouts by name
CASES = DIR_CONFIGS / "cases.yaml"
MODELS = DIR_CONFIGS / "models.yaml"
DIR_DATA = DIR_PROJECT / "models" / "data"  # {train,validate,test}.{findings,impression}.tok
DIR_RESULTS = DIR_PROJECT / "results" if _IN_CHECKOUT else Path("results")  # one folder a run

VLLM_ENVIRONMENT = (DIR_PROJECT if _IN_CHECKOUT else Path()) / ".venv-vllm"  # scripts/install_backend.sh vllm makes it

MODEL = "radiology-opt"  # a name of MODELS, a checkpoint directory, a GGUF file or a hub id
CASE_ID = 0  # a prompting recipe of CASES: 0 null prompt, 1, 2, 4 in-context examples, 5 start prefix
MODE = "sequential"  # how the phases are placed: generate, sequential, mp, mps or green
BACKEND = "hf"  # what computes: hf, this project's own engine over transformers' models, or vllm
KV_TRANSFER = "shared"  # from prefill to decode engines of vLLM's: one KV pool (shared), or copies (copy)
WORKERS = ""  # worker layout of modes mp, mps and green: a YAML file or text; empty: one prefill and one decode worker
SHARE = "fixed"  # how workers divide the device: fixed (their shares), auto (decode keeps ITL_TARGET_MS) or none
ITL_TARGET_MS = 50.0  # the time between two tokens that SHARE = "auto" keeps decode under while prompts are prefilled
BACKLOG_ITL_MS = 85.0  # mode mp on a CPU: the time between two tokens while more prompts wait than a prefill step takes
LEND = True  # a worker without work lends its part of the device to the others, step by step
SECOND_LANE = True  # mode mp on a CPU: a backlog of prompts is prefilled in a second lane too
DECODE_PRIORITY = True  # on a GPU, decode's kernels go before prefill's where both wait (modes mps and green)
MPS = "private"  # mode mps: private starts an MPS daemon for each run; existing uses the one that is there
EXCLUSIVE = False  # mode mps: put the GPU into compute mode EXCLUSIVE_PROCESS for the run; needs root
SPLIT = "test"  # which set of DIR_DATA is summarised: train, validate or test

REQUESTS = 100  # how many synthetic requests, where --requests does not say
OUTPUT_TOKENS = 128  # new tokens of each, where --output_tokens does not say

DTYPE = "float32"  # float32 (exact), bfloat16 or float16 (faster, half the memory); auto takes the checkpoint's own
DEVICE = "auto"  # auto (the first GPU if there is one), cpu, cuda or cuda:N
LOAD_FORMAT = "auto"  # auto reads a checkpoint; dummy builds the architecture with random weights, for timing

MAX_BATCH = 64  # most requests in one decode step
BATCH_SIZE = 20  # mode generate: rows of a padded batch, as in the original
POLICY = "first_come"  # the order in which requests are admitted and prefilled
SCHEDULE = "alternate"  # what a mixed worker runs next: alternate, prefill_first, decode_first or hybrid
AGEING_S = 10.0  # other policies: seconds of waiting after which a request goes before all that have waited less
TTFT_TARGET_MS = 1000.0  # policy deadline: the TTFT that requests without a target of their own are to have
PREFILL_TOKENS = 2048  # most prompt tokens in one prefill step, longer prompts are split; and a bound of hybrid steps
BLOCK_TOKENS = 16  # tokens in one block of the KV pool
RESERVE = False  # reserve KV blocks for the longest answer at admission, instead of preempting where none is free
PREFIX_CACHING = None  # True: requests that begin alike share KV blocks; None: only for cases with in-context examples
KV_DTYPE = "auto"  # what K and V are stored as: the model's dtype (auto), bfloat16 or int8
KV_MEMORY = (
    "auto"  # the KV pool's size, such as 512MiB or 4GiB; auto takes what MAX_BATCH longest requests need, if it fits
)

ADAPTERS = (
    ""  # adapters as peft saves them: NAME=DIRECTORY, or the NAME of one that comes with the model, with commas between
)
MERGE_ADAPTER = False  # merge the one LoRA adapter into the weights, for all requests

QUANTIZATION = "none"  # int8 computes linear layers in whole numbers, on a CPU; none in DTYPE
KERNELS = "auto"  # auto compiles what is faster so, where there is a compiler; plain uses PyTorch alone

TEMPERATURE = 0.0  # 0 is greedy; above, tokens are drawn at random
TOP_K = 0  # keep only the K likeliest tokens when drawing; 0 keeps all
TOP_P = 1.0  # keep the likeliest tokens that make up this probability when drawing; 1 keeps all
SEED = 0  # draws of in-context examples, dummy weights and tokens
