"""transformers, PEFT and bitsandbytes read what tunebook wrote, compute the same, and write the same for tunebook to read.

    cargo run --example interop write DIR
    python tests/interop/check.py DIR
    cargo run --example interop read DIR

Everything on the CPU in f32, on the small model of the notebooks. `.ci/interop` does all three.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

# Two programs that add in another order.
F32 = 1e-3
# bitsandbytes multiplies in bf16 on a CPU that has it, whatever the compute dtype; of the largest logit.
BF16 = 5e-2


def logits_of(model, prompts):
    """One [N, V] for all prompts, one after the other."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits[0].float() for ids in prompts])


def greedy(model, ids, n):
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=n, pad_token_id=0)
    return out[0, len(ids) :].tolist()


def compare(name, found, expected, tolerance):
    worst = (found - expected).abs().max().item()
    print(f"{name}: logits differ by at most {worst:.1e}")
    assert worst < tolerance, f"{name}: {worst} is not below {tolerance}"


def load(path, **more):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **more).eval()


def dequantized(four, base_dir):
    """The same model with every 4-bit weight as bitsandbytes decodes it, in f32.

    Before a forward of `four`: on the CPU that packs its weights anew.
    """
    plain = load(base_dir)
    linears = dict(plain.named_modules())
    for name, module in four.named_modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            state.dtype = torch.float32
            linears[name].weight.data = dequantize_4bit(module.weight.data, state)
    return plain


def main(root):
    asked = json.loads((root / "asked.json").read_text())
    prompts, base_dir = asked["prompts"], asked["base"]
    expected = load_file(root / "logits.safetensors")

    # What tunebook wrote.
    base = load(base_dir)
    compare("the base", logits_of(base, prompts), expected["base"], F32)
    compare("its adapter in PEFT", logits_of(PeftModel.from_pretrained(base, root / "adapter"), prompts), expected["adapter"], F32)
    four = load(root / "nf4")
    kinds = {type(m) for n, m in four.named_modules() if n.endswith("_proj")}
    assert kinds == {Linear4bit}, kinds
    compare("its 4-bit checkpoint as bitsandbytes decodes it", logits_of(dequantized(four, base_dir), prompts), expected["nf4"], F32)
    largest = expected["nf4"].abs().max().item()
    compare("its 4-bit checkpoint as bitsandbytes multiplies", logits_of(four, prompts), expected["nf4"], BF16 * largest)
    merged = load(root / "merged")
    compare("its merged model in transformers", logits_of(merged, prompts), expected["merged"], F32)
    for ids, text in zip(prompts, asked["greedy"]):
        found = greedy(merged, ids, asked["new_tokens"])
        assert found == text, f"greedy text: {found} is not {text}"
    print(f"its merged model: the same greedy text for {len(prompts)} prompts")
    tokenizer = AutoTokenizer.from_pretrained(root / "merged")
    chat = tokenizer.apply_chat_template(asked["chat"], tokenize=False)
    assert chat == asked["chat_text"], chat
    assert tokenizer(asked["texts"][0]).input_ids == prompts[0]
    print("its tokenizer and chat template: the same text and ids")
    generation = GenerationConfig.from_pretrained(root / "merged")
    assert (generation.eos_token_id, generation.max_new_tokens) == ([2, 0], asked["new_tokens"]), generation

    # What tunebook is to read.
    out, torch_logits = root / "python", {}
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    peft = get_peft_model(load(base_dir), config).eval()
    torch_logits["adapter"] = logits_of(peft, prompts)
    peft.save_pretrained(out / "adapter")
    merged = peft.merge_and_unload()
    torch_logits["merged"] = logits_of(merged, prompts)
    merged.save_pretrained(out / "merged")
    tokenizer.save_pretrained(out / "merged")
    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    four = load(base_dir, quantization_config=bits)
    four.save_pretrained(out / "nf4")
    torch_logits["nf4"] = logits_of(dequantized(four, base_dir), prompts)
    save_file({k: v.contiguous() for k, v in torch_logits.items()}, out / "logits.safetensors")
    texts = [greedy(merged, ids, asked["new_tokens"]) for ids in prompts]
    (out / "greedy.json").write_text(json.dumps(texts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
