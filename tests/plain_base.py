"""A pretrained decoder without memory, of no size, shared by the tests of what is done to one."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memlayer.data.text import collate_windows, load_documents, windows
from memlayer.data.tokenizer import save_tokenizer, train_tokenizer

LENGTH, TRAIN, VALIDATION = 48, 64, 10


def text(tokenizer):
    """Windows of the built-in sentences, those that RETROFIT asks for."""
    return windows(tokenizer, load_documents(), LENGTH, TRAIN, VALIDATION)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A plain Llama of three small layers that training has taught which tokens are frequent."""
    folder = tmp_path_factory.getbasetemp() / "base"
    if (folder / "config.json").is_file():
        return folder
    tokenizer = train_tokenizer(load_documents(limit=3000), 400, folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    train_WL, _ = text(tokenizer)
    for step in range(60):
        batch = collate_windows(train_WL[step * 8 % TRAIN :][:8])
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder
