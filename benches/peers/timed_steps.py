"""What the peers share: one training step without a trainer, and a line of JSON for each run of timed ones."""

import json
import os
import statistics
import subprocess
import time

import torch


def process_mib():
    """This process on the card, as nvidia-smi shows it."""
    try:
        import pynvml

        pynvml.nvmlInit()
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0))
        mine = [p.usedGpuMemory for p in processes if p.pid == os.getpid()]
        return mine[0] >> 20 if mine else None
    except Exception:
        return None


def arguments(parser, warmup):
    """The options that every peer has."""
    defaults = [("batch", 4), ("seq", 512), ("r", 64), ("layers", 32), ("steps", 50), ("runs", 3), ("warmup", warmup)]
    for name, default in defaults:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--between", metavar="COMMAND", help="run after each run: ours, so that the two take turns on one card")


def run(peer, modules, args, model, trained, optimizer, ids, device, **more):
    """Steps of `model` on the tokens `ids` [batch, seq], timed one by one, the card waited for; prints a line for each run. `more` goes
    into it."""
    cuda = device == "cuda"

    def step():
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        return loss.item()

    first = step()
    for _ in range(args.warmup - 1):
        step()
    for number in range(args.runs):
        seconds = []
        for _ in range(args.steps):
            begin = time.perf_counter()
            last = step()
            seconds.append(time.perf_counter() - begin)
        tokens = args.batch * args.seq
        line = {
            "peer": peer,
            "versions": {m.__name__: m.__version__ for m in (*modules, torch)},
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "batch": args.batch,
            "seq": args.seq,
            "r": args.r,
            "dropout": args.dropout,
            **more,
            "run": number,
            "steps": args.steps,
            "tokens_per_s_median": tokens / statistics.median(seconds),
            "tokens_per_s_best": tokens / min(seconds),
            "process_mib": process_mib(),
            "loss_first": first,
            "loss_last": last,
        }
        print(json.dumps(line), flush=True)
        if args.between:
            subprocess.run(args.between, shell=True, check=True)
