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


def same_steps(what, one, two, first=1e-4, rest=1e-3):
    """Assert that the logged numbers of two runs are nearly the same, and print their largest differences."""
    differences = [
        max(abs(left[name] - right[name]) / max(1, abs(left[name])) for name in left)
        for left, right in zip(one, two, strict=True)
    ]
    print(f"\n{what}: first step {differences[0]:.1e}, all steps {max(differences):.1e}", end="")
    assert differences[0] < first and max(differences) < rest


def unit(*shape, seed=0):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows / rows.norm(dim=-1, keepdim=True)
