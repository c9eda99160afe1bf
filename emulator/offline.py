"""Keeps Hugging Face's libraries off the network, in this process and its children; imported for that effect alone.

They read the setting when they are first imported, so this is imported before them. It covers what no argument of ours
reaches: bitsandbytes, which `peft` imports where it is installed, asks the hub for compiled kernels if it can.
"""

import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

# On processors with AVX512-BF16 bitsandbytes regrets on stderr that it found no kernel on the hub. There is nothing to
# be done about it, and it looks like a fault.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in str(record.msg))
