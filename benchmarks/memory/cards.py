"""Which graphics card holds what was counted: the tensors alive at the peak, and what CUDA itself takes."""

CARDS = (8, 12, 16, 24)
LARGE_CARDS = (32, 48, 80)
# GiB of a card that CUDA's context, workspaces and gaps between tensors take.
CUDA_GIB = 1.5
# What a large card of the consumer kind does in half precision.
TFLOPS = 80


def training_cards(counted):
    """(columns, rows) of {mode: {way: {batch: GiB}}}: GiB at batch 64, and the largest batch that each card holds."""
    rows = []
    for mode, ways in counted.items():
        for way, recomputed in (("ours", ""), ("outer", "outer"), ("all", "all")):
            if way not in ways:
                continue
            gib = {int(batch): value for batch, value in ways[way].items()}
            fits = [max((batch for batch in gib if gib[batch] + CUDA_GIB <= card), default="-") for card in CARDS]
            rows.append([f"`{mode}`", recomputed, f"{gib[64]:.1f}" if 64 in gib else "-", *fits])
    return ["what trains", "recomputed", "GiB at batch 64", *(f"{card} GB card" for card in CARDS)], rows


def identity_cards(counted):
    """(columns, rows) of {way: {pixels: {part: GiB}}}: GiB of both parts, and the smallest card that holds them."""
    rows = []
    for way, pixels in counted.items():
        for size, gib in pixels.items():
            card = min((card for card in CARDS if max(gib.values()) + CUDA_GIB <= card), default=None)
            parts = [f"{gib[part]:.1f}" for part in ("fine_tuning", "drawing")]
            rows.append([way, size, *parts, f"{card} GB" if card else "-"])
    return ["what trains", "pixels", "GiB fine-tuning", "GiB drawing", "smallest card"], rows


def family_cards(counted):
    """(columns, rows) of {model: {part: GiB}}: GiB of each part, and the smallest card that holds all of them."""
    parts, rows = ("network", "text encoders", "encoding", "tuning", "drawing"), []
    for name, gib in counted.items():
        most = max(gib[part] for part in ("encoding", "tuning", "drawing"))
        card = min((card for card in (*CARDS, *LARGE_CARDS) if most + CUDA_GIB <= card), default=None)
        rows.append([name, *(f"{gib[part]:.1f}" for part in parts), f"{card} GB" if card else "-"])
    return ["model", "GiB network", "GiB text encoders", *(f"GiB {part}" for part in parts[2:]), "smallest card"], rows


def identity_costs(identities):
    """(columns, rows) of {way: {part: PFLOP}}: the parts, their sum, its share of `lora` with own sets, seconds."""
    before = sum(identities["lora, a reference set for each identity"].values())
    rows = []
    for way, parts in identities.items():
        total = sum(parts.values())
        numbers = [f"{value:.2f}" for value in (*parts.values(), total)]
        rows.append([way, *numbers, f"{total / before:.2f}", f"{1000 * total / TFLOPS:.0f}"])
    parts = list(next(iter(identities.values())))
    return ["an identity", *parts, "PFLOP", "of lora's own sets", f"s at {TFLOPS} TFLOP/s"], rows
