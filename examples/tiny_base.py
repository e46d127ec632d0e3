"""python examples/tiny_base.py runs/base

Trains a small plain Llama, without memory, on the built-in known facts for about a minute, and saves it with its
tokenizer as an ordinary Hugging Face folder: a base model to try a retrofit on where there is no network.
"""

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from memlayer.data.text import collate_windows, load_documents, windows
from memlayer.data.tokenizer import save_tokenizer, train_tokenizer

LENGTH, BATCH = 64, 32

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("output", type=Path, help="folder to write")
parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default: %(default)s)")
options = parser.parse_args()

set_seed(0)
tokenizer = train_tokenizer(load_documents(), 1024, options.output)
config = LlamaConfig(
    vocab_size=len(tokenizer),
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=256,
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
    tie_word_embeddings=True,
)
model = LlamaForCausalLM(config)
train_WL, validation_WL = windows(tokenizer, load_documents(), LENGTH, num_train=4000, num_validation=50)
arguments = TrainingArguments(
    output_dir=str(options.output),
    max_steps=options.steps,
    per_device_train_batch_size=BATCH,
    learning_rate=3e-3,
    lr_scheduler_type="cosine",
    warmup_steps=options.steps // 10,
    logging_steps=max(1, options.steps // 5),
    save_strategy="no",
    report_to="none",
    use_cpu=not torch.accelerator.is_available(),
    dataloader_pin_memory=torch.accelerator.is_available(),
    remove_unused_columns=False,
)
trainer = Trainer(model, arguments, train_dataset=train_WL, eval_dataset=validation_WL, data_collator=collate_windows)
trainer.train()
loss = trainer.evaluate()["eval_loss"]
model.save_pretrained(options.output)
save_tokenizer(tokenizer, options.output)
print(f"wrote {options.output}: validation loss {loss:.3f} nats per token")
