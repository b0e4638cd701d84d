"""Tiny random models of every family, with logits, losses and gradients of transformers, and adapters of PEFT.

    pip install torch transformers peft safetensors
    python gen_families.py OUT      (OUT: tests/golden/families)

Weights are bf16 values, everything is computed in f32 on the CPU with eager attention. For each model:
config.json, model.safetensors; io.safetensors: for text i of two, `ids.i` and `logits.i`, then `loss` (mean over the labels
of both texts, the first third of each having none) and `grad.<name>` of every parameter.
peft/<name>: an adapter with random B (and magnitudes), its logits and the gradients of its matrices.
"""

import pathlib
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

OUT = pathlib.Path(sys.argv[1])
LENGTHS = [21, 12]
SMALL = dict(vocab_size=48, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)

MODELS = {
    "llama-bias-linear": ("llama", dict(attention_bias=True, mlp_bias=True,
                                        rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4))),
    "llama-dynamic": ("llama", dict(tie_word_embeddings=True,
                                    rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4))),
    "llama-llama3": ("llama", dict(rope_parameters=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=1e3,
        original_max_position_embeddings=32))),
    "mistral-yarn": ("mistral", dict(head_dim=10, sliding_window=None, rope_parameters=dict(
        rope_type="yarn", factor=4.0, rope_theta=1e4, original_max_position_embeddings=16, beta_fast=8.0,
        mscale=1.0, mscale_all_dim=0.5, truncate=False))),
    "qwen2": ("qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    "qwen2-yarn": ("qwen2", dict(tie_word_embeddings=True, rope_parameters=dict(
        rope_type="yarn", factor=4.0, rope_theta=1e4, original_max_position_embeddings=16))),
    "qwen3": ("qwen3", dict(head_dim=16, attention_bias=True)),
    "phi3": ("phi3", dict(sliding_window=7)),
    "phi3-longrope": ("phi3", dict(original_max_position_embeddings=16, rope_parameters=dict(
        rope_type="longrope", rope_theta=1e4, short_factor=[1.0, 1.1, 1.3], long_factor=[1.5, 2.5, 6.0]))),
    "gemma": ("gemma", dict(head_dim=16, num_key_value_heads=1)),
    "gemma2": ("gemma2", dict(head_dim=16, query_pre_attn_scalar=9, sliding_window=5, attn_logit_softcapping=3.0,
                              final_logit_softcapping=2.0, hidden_activation="gelu_pytorch_tanh")),
}

ADAPTERS = {
    "phi3": ("phi3", dict(target_modules="all-linear")),
    "qwen2-dora": ("qwen2", dict(target_modules="all-linear", use_dora=True)),
    "gemma2-dora-rslora": ("gemma2", dict(target_modules=["q_proj", "down_proj", "o_proj"], use_dora=True, use_rslora=True)),
    "qwen2-bias": ("qwen2", dict(target_modules=["q_proj", "v_proj"], bias="all")),
    "phi3-dora": ("phi3", dict(target_modules=["qkv_proj", "down_proj"], use_dora=True)),
}


def draw(model, gemma):
    g = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        x = torch.randn(p.shape, generator=g)
        if name.endswith("bias"):
            x *= 0.3
        elif p.dim() == 1:
            x = 0.2 * x + (0.0 if gemma else 1.0)
        elif "embed_tokens" in name:
            x *= 0.15 if gemma else 0.5
        else:
            x *= 1.2 / p.shape[1] ** 0.5
        p.data.copy_(x.bfloat16().float())


def texts():
    g = torch.Generator().manual_seed(3)
    return [torch.randint(3, SMALL["vocab_size"], (1, n), generator=g) for n in LENGTHS]


def run(model):
    """Logits of both texts, the loss over both; gradients are left in the parameters."""
    out, total, items = {}, 0.0, 0
    for i, ids in enumerate(texts()):
        logits = model(input_ids=ids, use_cache=False).logits
        out[f"ids.{i}"] = ids[0].to(torch.int32)
        out[f"logits.{i}"] = logits[0].detach().clone()
        labels = ids[0, 1:].clone()
        kept = torch.arange(1, ids.shape[1]) >= ids.shape[1] // 3
        total = total + torch.nn.functional.cross_entropy(logits[0, :-1][kept], labels[kept], reduction="sum")
        items += int(kept.sum())
    loss = total / items
    loss.backward()
    out["loss"] = loss.detach().reshape(1)
    return out


def build(name):
    family, changes = MODELS[name]
    config = AutoConfig.for_model(family, **{**SMALL, **changes})
    config.architectures = None
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    draw(model, family.startswith("gemma"))
    return model, config


def small(t):
    return t.detach().to(torch.float32).contiguous()


for name in MODELS:
    model, config = build(name)
    at = OUT / name
    at.mkdir(parents=True, exist_ok=True)
    io = run(model)
    for key, p in model.named_parameters():
        io[f"grad.{key}"] = small(p.grad)
    save_file(io, at / "io.safetensors", {"format": "pt"})
    model.to(torch.bfloat16).save_pretrained(at)
    (at / "generation_config.json").unlink(missing_ok=True)
    print(name, float(io["loss"]), sum(p.numel() for p in model.parameters()))

# PiSSA's start: A and B as PEFT draws them from the weights.
model, _ = build("qwen2")
model = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", init_lora_weights="pissa",
                                         target_modules=["q_proj", "down_proj"]))
# The files say that they need the changed base, which is not what is compared here.
model.peft_config["default"].init_lora_weights = True
model.save_pretrained(OUT / "peft" / "qwen2-pissa")
(OUT / "peft" / "qwen2-pissa" / "README.md").unlink(missing_ok=True)

for name, (base, changes) in ADAPTERS.items():
    torch.manual_seed(5)
    model, _ = build(base)
    config = LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **changes)
    model = get_peft_model(model, config).eval()
    g = torch.Generator().manual_seed(11)
    for key, p in model.named_parameters():
        if "lora_B" in key:
            p.data.copy_(0.3 * torch.randn(p.shape, generator=g))
        if key.endswith("bias") and p.requires_grad:
            p.data.add_(0.2 * torch.randn(p.shape, generator=g))
        if "magnitude" in key:
            p.data.mul_(1 + 0.2 * torch.randn(p.shape, generator=g))
    io = run(model)
    for key, p in model.named_parameters():
        if p.requires_grad:
            io["grad." + key.removeprefix("base_model.model.").replace(".default", "")] = small(p.grad)
    at = OUT / "peft" / name
    model.save_pretrained(at)
    (at / "README.md").unlink(missing_ok=True)
    save_file(io, at / "io.safetensors", {"format": "pt"})
    merged = model.merge_and_unload()
    keep = ("q_proj", "qkv_proj", "o_proj", "down_proj", "bias")
    save_file({k: p.detach().contiguous() for k, p in merged.named_parameters() if ".0." in k and any(m in k for m in keep)},
              at / "merged.safetensors", {"format": "pt"})
    print(name, float(io["loss"]))
