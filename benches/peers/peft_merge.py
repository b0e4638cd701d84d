"""PEFT's merge on the host, on the shape of Mistral-7B, timed as `tunebook-bench merge` times ours.

    python benches/peers/peft_merge.py --dir /dev/shm/merge --layers 12 --write-only
    python benches/peers/peft_merge.py --dir /dev/shm/merge
    tunebook-bench merge --model /dev/shm/merge/base --adapter /dev/shm/merge/adapter --dir /dev/shm

Both read the same bf16 base and the same adapter from files that are in the page cache, add `B A` to the weights and write a new directory.
PEFT's part as its documentation has it: from_pretrained, PeftModel.from_pretrained, merge_and_unload, save_pretrained. One JSON line for each
run, of all that and of the merge alone, with the largest resident set.
"""

import argparse
import json
import pathlib
import resource
import shutil
import time

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, MistralConfig

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write(path, layers, r):
    """A base of random weights and an adapter with random A and B."""
    torch.manual_seed(0)
    config = MistralConfig(num_hidden_layers=layers, sliding_window=4096, max_position_embeddings=32768)
    torch.set_default_dtype(torch.bfloat16)
    model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(path / "base")
    lora = peft.LoraConfig(r=r, lora_alpha=16, target_modules=MODULES, init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, lora).save_pretrained(path / "adapter")


def merge(path, out):
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path / "base", dtype=torch.bfloat16)
    model = peft.PeftModel.from_pretrained(model, path / "adapter")
    loaded = time.perf_counter()
    model = model.merge_and_unload()
    merged = time.perf_counter()
    model.save_pretrained(out)
    end = time.perf_counter()
    return {"seconds": end - begin, "load": loaded - begin, "merge": merged - loaded, "save": end - merged}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=pathlib.Path, required=True, help="where base and adapter are, or are written")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--write-only", action="store_true", help="write and stop: a process that has written is larger")
    args = parser.parse_args()
    if not (args.dir / "adapter").exists():
        write(args.dir, args.layers, args.r)
    if args.write_only:
        return
    versions = {m.__name__: m.__version__ for m in (transformers, peft, torch)}
    for run in range(args.runs):
        out = args.dir / "merged"
        times = merge(args.dir, out)
        size = sum(f.stat().st_size for f in out.iterdir())
        shutil.rmtree(out)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        line = {"peer": "PEFT", "versions": versions, "threads": torch.get_num_threads(), "run": run, "bytes": size}
        print(json.dumps({**line, **times, "max_rss_bytes": peak}), flush=True)


main()
