"""Memory, parameters and FLOPs, counted on models without weights: no GPU is needed.

`alive` counts the bytes of living tensors; `cards` says which graphics card holds them.
"""
