"""LoRA by peft on a saved folder: trained, saved, loaded, merged into weights that mhesa itself reads."""

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import mhesa
import mhesa.hf


@torch.no_grad()
def logits(model, ids):
    return model.eval()(ids).logits


def test_lora_is_trained_saved_loaded_and_merged(folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(256, (2, 32))
    before = logits(base, ids)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["to_gate", "to_out"], r=4)
    model = get_peft_model(base.train(), lora)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = logits(model, ids)
    assert not torch.allclose(after, before, atol=1e-2)
    model.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "lora")
    assert torch.equal(logits(again, ids), after)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora"), ids), after)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), after, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    plain, _ = mhesa.load(tmp_path / "merged")
    torch.testing.assert_close(plain(ids), after, atol=1e-4, rtol=1e-4)
