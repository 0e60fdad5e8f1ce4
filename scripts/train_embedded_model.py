"""Train the small OPT model that the project carries along, and measure it.

Tokenizer and weights start from nothing and see synthetic reports only (see make_reports.py): the training set, and as
many more as asked for from another seed. No report of the validation or test set is trained on. The prompts are those
of ``configs/cases.yaml``; with in-context examples, the model learns from the examples' impressions as well.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from make_reports import DATA, make_reports
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from splitwiser import LLM, SamplingParams
from splitwiser.constants import CASES
from splitwiser.errors import SplitwiserError
from splitwiser.results.rouge import rouge
from splitwiser.workload.cases import Case, load_cases
from splitwiser.workload.reports import Report, load_tok

MODEL = Path("models/radiology-opt")
PAD, BOS_EOS = "<pad>", "</s>"  # OPT's own special tokens, under OPT's own ids
SPECIAL_TOKENS = ["<s>", PAD, BOS_EOS]
POSITIONS = 1280  # the longest prompt with four examples, and 200 new tokens
CASE_SHARES = {0: 0.35, 1: 0.15, 2: 0.2, 4: 0.2, 5: 0.1}  # how often a batch uses each case
CONTEXT_WEIGHT = 0.1  # of a token outside the impressions in the loss; it speeds up the start
IMPRESSION = re.compile(r"### (?:impressions|summary):( [^\n]*)")
ADAPTERS = Path("adapters")  # in the folder of the model: one folder each, with the name that --adapter takes


@dataclass(frozen=True)
class Training:
    """How one adapter is trained: its case of ``configs/cases.yaml``, what peft makes of it, its steps and its highest
    learning rate."""

    case_id: int
    config: PeftConfig
    steps: int
    learning_rate: float


LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
TRAININGS = {
    "lora": Training(200, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=LAYERS), 400, 5e-3),
    "prefix": Training(100, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20), 1200, 3e-2),
}


@dataclass(frozen=True)
class Batch:
    """Token ids, padded on the right, with the weight of each as a target of the loss (0 for padding)."""

    ids: torch.Tensor
    attention: torch.Tensor
    weights: torch.Tensor


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text round-trips, and like OPT's it puts ``</s>`` in front."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bos_id = bpe.token_to_id(BOS_EOS)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS_EOS} $A", pair=f"{BOS_EOS} $A {BOS_EOS} $B", special_tokens=[(BOS_EOS, bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS_EOS,
        eos_token=BOS_EOS,
        unk_token=BOS_EOS,
        pad_token=PAD,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerBase, hidden: int, layers: int) -> OPTForCausalLM:
    """An untrained OPT. Positions start as sinusoids, so that those beyond the training prompts make sense as well."""
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        max_position_embeddings=POSITIONS,
        dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = OPTForCausalLM(config)
    table = model.model.decoder.embed_positions.weight
    steps = torch.arange(len(table)).unsqueeze(1)
    angles = steps * torch.exp(torch.arange(0, hidden, 2) * (-math.log(10_000.0) / hidden))
    with torch.no_grad():
        table[:, 0::2], table[:, 1::2] = config.init_std * angles.sin(), config.init_std * angles.cos()
    return model


def make_batch(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], context_weight: float = CONTEXT_WEIGHT
) -> Batch:
    """Prompts with their answers as a batch; the impressions and the final eos carry the full weight."""
    encoded = tokenizer(list(texts), return_offsets_mapping=True)
    rows, weights = [], []
    for text, ids, offsets in zip(texts, encoded.input_ids, encoded.offset_mapping, strict=True):
        spans = [match.span(1) for match in IMPRESSION.finditer(text)]
        inside = [any(first <= start < end for first, end in spans) for start, _ in offsets]
        rows.append(torch.tensor([*ids, tokenizer.eos_token_id]))
        weights.append(torch.tensor([1.0 if answer else context_weight for answer in inside] + [1.0]))
    return Batch(
        ids=pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        attention=pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        weights=pad_sequence(weights, batch_first=True),
    )


def loss_of(model: OPTForCausalLM | PeftModel, batch: Batch) -> torch.Tensor:
    """The weighted mean cross-entropy of each next token."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False).logits
    weights = batch.weights[:, 1:].flatten()
    targets = batch.ids[:, 1:].flatten()
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


def training_texts(
    reports: Sequence[Report], cases: dict[int, Case], per_batch: int, rng: random.Random
) -> Iterator[list[str]]:
    """Batches of about ``per_batch`` reports, for ever: each uses one case, so that its rows are of similar length."""
    order: list[Report] = []
    while True:
        case = cases[rng.choices(list(CASE_SHARES), weights=list(CASE_SHARES.values()))[0]]
        texts = []
        for _ in range(max(1, per_batch // (case.examples + 1))):
            if len(order) <= case.examples:
                order = rng.sample(reports, len(reports))
            report, *examples = (order.pop() for _ in range(case.examples + 1))
            texts.append(f"{case.prompt_text(report.finding, examples)} {report.impression}")
        yield texts


def train(args: argparse.Namespace, cases: dict[int, Case]) -> None:
    """Train tokenizer and model, and save the weights with the lowest validation loss."""
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    training, held_out = load_tok(args.data, "train"), load_tok(args.data, "validate")
    kept_out = {report.finding for report in [*held_out, *load_tok(args.data, "test")]}
    extra = (Report(*pair) for pair in make_reports(args.reports, args.seed))
    reports = [report for report in [*training, *extra] if report.finding not in kept_out]

    sample = [f"{case.prompt_text(r.finding, [r])} {r.impression}" for r in training for case in (cases[1], cases[5])]
    tokenizer = train_tokenizer(sample, args.vocabulary)
    model = build_model(tokenizer, args.hidden, args.layers)
    print(f"{len(reports)} reports, {len(tokenizer)} tokens in the vocabulary, {model.num_parameters()} parameters")

    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98))

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / args.warmup)
        return float(warm * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, step / args.steps))) / 2))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    checks = []
    for case, chunk in ((cases[0], held_out), (cases[4], held_out[:40])):
        asked = zip(case.prompts(chunk, training, args.seed), chunk, strict=True)
        checks.append(make_batch(tokenizer, [f"{prompt} {report.impression}" for prompt, report in asked]))
    best, started = math.inf, time.monotonic()
    batches = training_texts(reports, cases, args.per_batch, rng)
    last = min(args.last_step, args.steps)
    bar = tqdm(range(1, last + 1), desc="training", unit="step", mininterval=5)
    for step in bar:
        model.train()
        loss = loss_of(model, make_batch(tokenizer, next(batches)))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if step % args.check_every and step != last:
            continue
        model.eval()
        with torch.no_grad():
            losses = [loss_of(model, batch).item() for batch in checks]
        some = held_out[:50]
        written = generate(model, tokenizer, cases[0], cases[0].prompts(some, training, args.seed))
        bar.write(
            f"step {step}: validation loss {losses[0]:.4f} (case 0), {losses[1]:.4f} (case 4); "
            f"ROUGE-L {rouge_l(written, some):.3f} (case 0, 50 reports); {time.monotonic() - started:.0f} s"
        )
        if sum(losses) < best:
            best = sum(losses)
            save(model, tokenizer, args.out)


def save(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a checkpoint that ``from_pretrained`` reads; it generates greedily by default."""
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    tokenizer.backend_tokenizer.no_padding()  # else the file keeps the padding of the latest call
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def numbered(impression: str) -> str:
    """The style of the adapters: ``impression`` with a number before each of its statements."""
    return " ".join(f"{number}. {each}" for number, each in enumerate(statements(impression), 1))


def statements(impression: str) -> list[str]:
    """The statements of an impression, numbered or not."""
    return [each.strip() for each in re.findall(r"[^.]+\.", re.sub(r"\b\d+\. ", "", impression))]


def train_adapter(args: argparse.Namespace, name: str, training: Training, case: Case) -> None:
    """Train the adapter ``name`` of the saved model on impressions in its style, and save it beside the model."""
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    reports = load_tok(args.data, "train")
    # long impressions are rare, and the later numbers are learnt from them alone
    weights = [len(statements(report.impression)) ** 2 for report in reports]
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32), training.config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.learning_rate, training.steps)
    bar = tqdm(range(training.steps), desc=f"training {name}", unit="step", mininterval=5)
    for _ in bar:
        chosen = rng.choices(reports, weights, k=args.adapter_batch)
        texts = [f"{case.prompt_text(report.finding)} {numbered(report.impression)}" for report in chosen]
        loss = loss_of(model, make_batch(tokenizer, texts, context_weight=0.0))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    folder = args.out / ADAPTERS / name
    config = model.peft_config["default"]
    config.base_model_name_or_path = args.out.name  # not the path on this machine
    if isinstance(config, LoraConfig):
        config.target_modules = LAYERS  # peft makes a set of it, whose order differs from run to run
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # a form to fill in, for the hub
    (folder / "adapter_model.safetensors").chmod(0o644)


def generate(
    model: OPTForCausalLM | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    case: Case,
    prompts: Sequence[str],
    rows: int = 50,
) -> list[str]:
    """What the model writes after each prompt, greedily."""
    texts: list[str] = []
    for first in range(0, len(prompts), rows):
        inputs = tokenizer(list(prompts[first : first + rows]), return_tensors="pt", padding=True, padding_side="left")
        with torch.no_grad():
            ids = model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=case.max_new_tokens,
                do_sample=False,
            )
        texts += tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def evaluate_adapter(args: argparse.Namespace, name: str, case: Case) -> None:
    """Score the model with the adapter ``name`` on the test set, as :func:`evaluate` does: against the references in the
    adapter's style, and how many answers are in that style, right or wrong."""
    test = load_tok(args.data, "test")
    with LLM(args.out, adapters={name: args.out / ADAPTERS / name}) as llm:
        outputs = llm.generate(case.prompts(test, [], args.seed), SamplingParams(max_tokens=case.max_new_tokens))
    written = [output.text.strip() for output in outputs]
    references = [numbered(report.impression) for report in test]
    score = rouge(references, written)["rougeL"] or 0.0
    exact = sum(text == reference for text, reference in zip(written, references, strict=True)) / len(test)
    in_style = sum(text == numbered(text) for text in written) / len(test)
    title = f"case {case.case_id}: {case.description}"
    print(f"{title:<36}{score:>8.3f}{exact:>8.1%}{in_style:>10.1%} in style", flush=True)
    for text in written[: args.show]:
        print(f"generated:  {text}")


def rouge_l(texts: Sequence[str], reports: Sequence[Report]) -> float:
    """Mean ROUGE-L f-measure of ``texts`` against the reports' impressions."""
    return rouge([report.impression for report in reports], texts)["rougeL"] or 0.0


def evaluate(args: argparse.Namespace, cases: dict[int, Case]) -> None:
    """Score the saved model on the test set in every case it was trained on, beside a baseline that only copies."""
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    training, test = load_tok(args.data, "train"), load_tok(args.data, "test")
    first_sentences = [report.finding.split(". ")[0] for report in test]
    shown: list[str] = []
    print(f"{'':<36}{'ROUGE-L':>8}{'exact':>8}{'prompt tokens (longest)':>25}")
    print(f"{'copy of the first sentence':<36}{rouge_l(first_sentences, test):>8.3f}")
    for case_id in sorted(CASE_SHARES):
        case = cases[case_id]
        prompts = case.prompts(test, training, args.seed)
        written = generate(model, tokenizer, case, prompts)
        shown = shown or written[: args.show]
        exact = sum(text == report.impression for text, report in zip(written, test, strict=True)) / len(test)
        longest = max(map(len, tokenizer(prompts).input_ids))
        name = f"case {case_id}: {case.description}"
        print(f"{name:<36}{rouge_l(written, test):>8.3f}{exact:>8.1%}{longest:>25}", flush=True)
    for report, text in zip(test, shown, strict=False):
        print(f"\nfindings:   {report.finding}\nreference:  {report.impression}\ngenerated:  {text}")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Train the embedded radiology model from scratch, then evaluate it on the test set.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--evaluate", action="store_true", help="only evaluate what is saved")
    parser.add_argument("--only", choices=["model", "adapters"], help="only this part; default: both")
    parser.add_argument("--adapter_batch", type=int, default=16, help="reports in one step of training an adapter")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the .tok reports")
    parser.add_argument("--out", type=Path, default=MODEL, help="folder of the model")
    parser.add_argument("--show", type=int, default=3, help="test reports to print with their impressions")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights, extra reports and in-context examples")
    parser.add_argument("--reports", type=int, default=150_000, help="reports to generate besides the training set")
    parser.add_argument("--steps", type=int, default=3600, help="steps in which the learning rate falls to nothing")
    parser.add_argument("--last_step", type=int, default=2800, help="step to stop after, if that is sooner")
    parser.add_argument("--per_batch", type=int, default=36, help="reports in one step")
    parser.add_argument("--hidden", type=int, default=192, help="width of the model, a multiple of 32")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model")
    parser.add_argument("--vocabulary", type=int, default=1024, help="most tokens in the vocabulary")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--warmup", type=int, default=300, help="steps until the highest learning rate")
    parser.add_argument("--check_every", type=int, default=400, help="steps between two looks at the validation set")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    try:
        cases = load_cases(CASES)
        if args.only != "adapters":
            if not args.evaluate:
                train(args, cases)
            evaluate(args, cases)
        for name, training in TRAININGS.items() if args.only != "model" else ():
            case = cases[training.case_id]
            if not args.evaluate:
                train_adapter(args, name, training, case)
            evaluate_adapter(args, name, case)
    except (SplitwiserError, OSError, ValueError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
