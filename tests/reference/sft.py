"""LoRA or QLoRA with TRL's SFTTrainer and PEFT alone, as one would write it without this project: a yardstick.

It reads rows that are tokenized and masked already, takes them in the order of the file, and pads those of a forward
pass to the longest of them, as SFTTrainer does. It writes the loss and the gradient norm of each step, when each thing
was done, and the most memory that it took:

    python tests/reference/sft.py --model FOLDER --rows rows.jsonl --steps 8 --out losses.json
"""

import time

marks = {"process": time.time()}

import argparse  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

marks["imports"] = time.time()


class Notes(TrainerCallback):
    """The log of each step, when it was over, and the CPU seconds used up to then."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.ends: list[float] = []
        self.cpu: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        marks.setdefault("begin", time.time())

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.time())
        self.cpu.append(time.process_time())

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.steps.append({key: logs[key] for key in ("loss", "grad_norm", "learning_rate")})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of the base model and its tokenizer")
    parser.add_argument("--rows", type=Path, required=True, help="JSONL of input_ids and labels")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--quantize", choices=["none", "nf4"], default="none", help="the base model: nf4 is QLoRA")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--global-batch", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--lr-scheduler", default="cosine")
    parser.add_argument("--warmup-steps", type=int, default=0)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the adapter's start")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def load_model(folder: str, quantize: str) -> Any:
    """The base model: in bf16 on a GPU that has it, or else in fp32; quantized, it is loaded where it trains."""
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu and torch.cuda.is_bf16_supported() else torch.float32
    settings: dict[str, Any] = {}
    if quantize == "nf4":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        if gpu:
            settings["device_map"] = {"": 0}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **settings)


def peak_memory() -> int:
    """Bytes of GPU memory allocated at most; of resident memory where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    gpu = torch.cuda.is_available()
    rows = Dataset.from_list([json.loads(line) for line in args.rows.read_text().splitlines()])
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    marks["load"] = time.time()
    model = load_model(args.model, args.quantize)
    marks["loaded"] = time.time()
    notes = Notes()
    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            output_dir=output,
            seed=args.seed,
            max_steps=args.steps,
            per_device_train_batch_size=args.micro_batch,
            gradient_accumulation_steps=args.global_batch // args.micro_batch,
            train_sampling_strategy="sequential",
            learning_rate=args.learning_rate,
            lr_scheduler_type=args.lr_scheduler,
            warmup_steps=args.warmup_steps,
            weight_decay=args.weight_decay,
            max_grad_norm=args.max_grad_norm,
            max_length=None,
            packing=False,
            activation_checkpointing=args.gradient_checkpointing,
            bf16=model.dtype is torch.bfloat16,
            use_cpu=not gpu,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(
                task_type="CAUSAL_LM",
                r=args.r,
                lora_alpha=args.alpha,
                lora_dropout=args.dropout,
                target_modules="all-linear",
            ),
            callbacks=[notes],
        )
        marks["train"] = time.time()
        trainer.train()
    found = {"steps": notes.steps, "marks": marks, "ends": notes.ends, "cpu": notes.cpu, "peak_memory": peak_memory()}
    args.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
