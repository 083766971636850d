"""Values of a method beside the same ones written from its formulas in float64."""

import torch


def close(what, found, wanted, limit=1e-5):
    """Assert that two values agree, and print their largest difference: `pytest -s -k formulas` gives the table."""
    wanted = torch.as_tensor(wanted).detach().double()
    found = torch.as_tensor(found).detach().double()
    assert found.shape == wanted.shape, f"{what}: {tuple(found.shape)} and {tuple(wanted.shape)}"
    difference = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))
    print(f"\n{what}: {difference:.1e}", end="")
    assert difference < limit, f"{what}: {difference:.1e}"


def unit(*shape, seed=0):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows / rows.norm(dim=-1, keepdim=True)
