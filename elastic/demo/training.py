"""Trains the demo model: a small Mixtral on the Python documentation that comes with the standard library.

The checkpoint ships with the package, so this runs only for `elastic demo-model DIR --retrain`. One thread and fixed
seeds: the same Python, torch and CPU kind give the same bytes. Takes some minutes on one core.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SEED = 20
STEPS = 700
TOKENS_PER_STEP = 4096
BOS, EOS = "<s>", "</s>"
HEADING = re.compile(r"\n\n(?=[^\n]+\n(?:\*{4,}|={4,}|-{4,}|~{4,})\n)")
# The model completes texts and knows no roles, so the template only joins what was said.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"


def documents() -> list[str]:
    """The corpus: each section of each help topic is one document, so that the model learns where texts end."""
    from pydoc_data.topics import topics

    sections = (part.strip() for name in sorted(topics) for part in HEADING.split(topics[name]))
    return [text for text in sections if len(text) > 40]


def train_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE of 1,024 entries over the corpus, as a transformers fast tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=[BOS, EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=4096)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model() -> Any:
    """An untrained model of 3.6 M parameters, 1 M of them active for a token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        sliding_window=None,
        router_aux_loss_coef=0.02,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=False,
    )
    return MixtralForCausalLM(config)


def _batches(stream: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """Random windows: mostly short; every fourth step long ones, so that far positions are learned too."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    for step in range(steps):
        length = 1024 if step % 4 == 3 else 256
        starts = torch.randint(0, len(stream) - length, (TOKENS_PER_STEP // length,), generator=generator)
        yield torch.stack([stream[s : s + length] for s in starts.tolist()])


def _learning_rate(step: int, steps: int) -> float:
    """Warm-up of 40 steps, then a cosine down to a twentieth."""
    if step < 40:
        return (step + 1) / 40
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - 40) / (steps - 40)))


def fit(model: Any, stream: torch.Tensor, steps: int, report: Callable[[str], None]) -> None:
    """Plain AdamW training with the router's balancing loss."""
    import torch

    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, steps))
    model.train()
    for step, batch in enumerate(_batches(stream, steps)):
        loss = model(input_ids=batch, labels=batch, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            report(f"step {step}/{steps} loss {loss.item():.3f}")


def evaluate(model: Any, stream: torch.Tensor) -> float:
    """Nats per token on held-out documents, in windows of 256 tokens."""
    import torch

    model.eval()
    count = len(stream) // 256
    with torch.no_grad():
        windows = stream[: count * 256].view(count, 256)
        return float(model(input_ids=windows, labels=windows).loss)


def train(directory: Path, report: Callable[[str], None], steps: int = STEPS) -> None:
    """Train and write a complete checkpoint directory."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    try:
        texts = documents()
        tokenizer = train_tokenizer(texts)
        ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
        held_out = torch.tensor([t for doc in ids[::24] for t in doc])
        stream = torch.tensor([t for i, doc in enumerate(ids) if i % 24 for t in doc])
        report(f"{len(texts)} documents, {len(stream)} tokens to train on, {len(held_out)} held out")
        model = build_model()
        fit(model, stream, steps, report)
        model = model.to(torch.bfloat16)
        report(f"held-out loss {evaluate(model, held_out):.3f} nats per token")
        save(model, tokenizer, directory)
    finally:
        torch.set_num_threads(threads)


def save(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write weights, config, tokenizer and generation config; nothing that depends on time or machine."""
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
