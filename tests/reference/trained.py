"""A small model is trained, and runs in the runtime as it does in PyTorch."""

from pathlib import Path

import based
import numpy as np
import torch
from based.torch import BasedForCausalLM


def check_training_and_runtime(config: based.ModelConfig, folder: Path) -> None:
    """20 steps on random tokens, of a vocabulary of 20: the loss falls, and the saved model has the same logits."""
    torch.manual_seed(0)
    model = BasedForCausalLM(config)
    tokens = torch.randint(0, 20, (4, 40))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = model(tokens, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    model.save(folder / "model")
    runtime = based.load(folder / "model", device="cpu")
    with torch.no_grad():
        expected = model(tokens).numpy()
    for row, logits in zip(tokens.numpy(), expected, strict=True):
        found = runtime.forward(row, include_padding=True)
        assert np.linalg.norm(found - logits) <= 2e-5 * np.linalg.norm(logits)
