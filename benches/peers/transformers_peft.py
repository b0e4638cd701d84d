"""Steps of transformers + PEFT + bitsandbytes on the shape of Mistral-7B, timed as `tunebook-bench train-step` times ours.

    python benches/peers/transformers_peft.py --batch 4 --seq 512 --r 64 --steps 50 --runs 3
    tunebook-bench train-step --random-weights --device cuda --batch 4 --seq 512 --r 64 --optimizer adamw_8bit --keep-dequantized --steps 50

(the second as `--between` of the first, so that they take turns).

Both: random weights, NF4 with nested scales, LoRA on the seven projections of each layer, every layer's input the only thing kept (gradient
checkpointing), 8-bit AdamW, clipping, one step after the other without a trainer, its log or its data loader. PEFT's recipe otherwise:
prepare_model_for_kbit_training, bf16 autocast, SDPA. One JSON line for each run: steps timed one by one, the card waited for.
"""

import argparse

import bitsandbytes as bnb
import peft
import timed_steps
import torch
import transformers
from transformers import AutoModelForCausalLM, MistralConfig


def quantize(model, device):
    """Every linear module but lm_head to bitsandbytes' Linear4bit, one at a time."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not torch.nn.Linear or name == "lm_head":
                continue
            new = bnb.nn.Linear4bit(
                child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16,
                compress_statistics=True, quant_type="nf4", device="meta",
            )  # fmt: skip
            new.weight = bnb.nn.Params4bit(
                child.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
            ).to(device)
            setattr(parent, name, new)
    # What prepare_model_for_kbit_training looks for.
    model.is_loaded_in_4bit = True
    model.config.quantization_config = None


def main():
    parser = argparse.ArgumentParser()
    timed_steps.arguments(parser, warmup=3)
    parser.add_argument("--hidden", type=int, default=4096, help="smaller for a check without a GPU")
    parser.add_argument("--no-checkpointing", action="store_true")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 7 // 2,
        num_hidden_layers=args.layers,
        sliding_window=4096,
        use_cache=False,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    quantize(model, device)
    if cuda:
        torch.cuda.empty_cache()
    checkpointing = not args.no_checkpointing
    model = peft.prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = peft.LoraConfig(r=args.r, lora_alpha=16, lora_dropout=args.dropout, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.AdamW8bit(trained, lr=2e-4) if cuda else torch.optim.AdamW(trained, lr=2e-4)
    ids = torch.randint(0, config.vocab_size, (args.batch, args.seq), device=device)
    modules = (transformers, peft, bnb)
    timed_steps.run(
        "transformers + PEFT + bitsandbytes", modules, args, model, trained, optimizer, ids, device, checkpointing=checkpointing
    )


main()
