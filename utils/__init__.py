"""What two scripts share."""

import logging

# bitsandbytes asks a package of the name `kernels` for a 4-bit product and finds ours; nothing here uses that product.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()
)
