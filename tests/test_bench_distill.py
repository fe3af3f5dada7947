"""The trainer's benchmark: its contenders see the same batch, and print their rows."""

import torch
from click.testing import CliRunner

from bench import distill

TINY = distill.SMALL | {"d_model": 16, "n_heads": 2, "n_kv_heads": 2, "n_layers": 1}
TINY |= {"mlp_hidden_size": 24, "vocab_size": 40, "embedding_size": 40}
TINY |= {"mask_token_id": 39, "eos_token_id": 38}


def test_smoke(monkeypatch):
    monkeypatch.setitem(distill.SHAPES, "small", TINY)
    options = "--device cpu --prompt 5 --answer 12 --window 4 --repeat 2"
    result = CliRunner().invoke(distill.main, options.split())
    assert result.exit_code == 0, result.output
    assert result.output.count(" %") == 2 and "bare, rows that count" in result.output


def test_the_bare_model_has_the_trainer_s_rows(monkeypatch):
    model = distill.random_transformer(TINY, "cpu", torch.float32)
    contenders = distill.Contenders(model, distill.random_trajectories(40, 8, 5, 12), 2, 4)
    contenders.trainer(0)
    seen = []
    linear = torch.nn.functional.linear

    def look(x, weight, bias=None):
        if weight.shape[0] == 40:
            seen.append(x.shape[:-1].numel())
        return linear(x, weight, bias)

    monkeypatch.setattr(distill.F, "linear", look)
    contenders.bare(False)
    contenders.bare(True)
    assert seen[0] + seen[1] == 2 * 4  # two windows of 4, each position in one of two
    assert seen[2] == seen[3] == 2 * 17
    assert all(p.grad is not None for p in model.parameters())
