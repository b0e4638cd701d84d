"""Steps of Unsloth on the shape of Mistral-7B, timed as `tunebook-bench train-step` times ours.

    python benches/peers/unsloth_qlora.py --batch 4 --seq 512 --r 64 --steps 50 --runs 3
    tunebook-bench train-step --random-weights --device cuda --batch 4 --seq 512 --r 64 --optimizer adamw_8bit --keep-dequantized --steps 50

(the second as `--between` of the first, so that they take turns).

Both: random weights, NF4 with nested scales, LoRA on the seven projections of each layer, every layer's input the only thing kept (Unsloth's own
gradient checkpointing moves it to the host; `--checkpointing plain` leaves it on the card), 8-bit AdamW, clipping, one step after the other
without a trainer. A checkpoint of random weights is written to `--dir` first (14.5 GB; memory will do: /dev/shm). One JSON line for each run.
"""

import argparse
import os
import pathlib
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
import unsloth  # before transformers, which it patches
import bitsandbytes as bnb
import peft
import timed_steps
import torch
import transformers
from unsloth import FastLanguageModel


def write_checkpoint(path, layers):
    """Mistral-7B's shape with random weights, and a tokenizer that knows no words."""
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast

    config = MistralConfig(num_hidden_layers=layers, sliding_window=4096, use_cache=False, max_position_embeddings=32768)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>"] + [f"t{i}" for i in range(3, config.vocab_size)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(path)
    del model
    torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser()
    timed_steps.arguments(parser, warmup=5)
    parser.add_argument("--checkpointing", choices=["unsloth", "plain", "none"], default="unsloth")
    parser.add_argument("--dir", default="/dev/shm/mistral-7b-random", help="where the checkpoint is, or is written")
    parser.add_argument("--write-only", action="store_true", help="write the checkpoint and stop: its writing takes memory of the card")
    args = parser.parse_args()
    if not (pathlib.Path(args.dir) / "config.json").exists():
        write_checkpoint(args.dir, args.layers)
    if args.write_only:
        return
    begin = time.perf_counter()
    model, _ = FastLanguageModel.from_pretrained(
        model_name=args.dir, max_seq_length=max(args.seq, 2048), dtype=torch.bfloat16, load_in_4bit=True, fix_tokenizer=False
    )
    torch.cuda.synchronize()
    load_seconds = time.perf_counter() - begin
    model = FastLanguageModel.get_peft_model(
        model,
        r=args.r,
        lora_alpha=16,
        lora_dropout=args.dropout,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        bias="none",
        use_gradient_checkpointing={"unsloth": "unsloth", "plain": True, "none": False}[args.checkpointing],
        random_state=0,
    )
    FastLanguageModel.for_training(model, use_gradient_checkpointing=args.checkpointing != "none")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.AdamW8bit(trained, lr=2e-4)
    ids = torch.randint(3, 32000, (args.batch, args.seq), device="cuda")
    modules = (unsloth, transformers, peft, bnb)
    more = {"checkpointing": args.checkpointing, "load_seconds": load_seconds}
    timed_steps.run("Unsloth", modules, args, model, trained, optimizer, ids, "cuda", **more)


main()
