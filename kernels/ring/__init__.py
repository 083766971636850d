"""Retrieval over the processes of a `torch.distributed` group, each with rows of its own: `group=`."""
