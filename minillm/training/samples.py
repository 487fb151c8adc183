"""What the model writes while it is trained: greedy continuations, or answers after fine-tuning."""

from __future__ import annotations

import torch

from minillm.models.chat import encode_chat, end_of_turn_ids
from minillm.settings.run import SamplesSection
from minillm.utils import distributed
from minillm.utils.logging import say
from minillm.utils.seeding import rng_untouched


@torch.no_grad()
def sample(engine, tokenizer, section: SamplesSection, chat: bool) -> list[dict[str, str]]:
    """Greedy continuations (answers, with `chat`) of the prompts, each said as it is made.

    Every rank generates the same text, since at ZeRO-3 each forward pass gathers the weights from all of them.
    """
    engine.eval()
    texts = []
    # Every new length would be compiled anew.
    with rng_untouched(), torch.compiler.set_stance("force_eager"):
        for prompt in section.prompts:
            ids = (
                encode_chat(tokenizer, [{"role": "user", "content": prompt}])
                if chat
                else tokenizer(prompt)["input_ids"]
            )
            inputs = torch.tensor([ids], device=engine.device)
            output = engine.module.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=section.max_new_tokens,
                do_sample=False,
                synced_gpus=distributed.world_size() > 1,
                eos_token_id=end_of_turn_ids(tokenizer),
                pad_token_id=tokenizer.pad_token_id,
            )
            text = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
            say(f"sample: {prompt!r} -> {text!r}")
            texts.append({"prompt": prompt, "text": text})
    engine.train()
    return texts
