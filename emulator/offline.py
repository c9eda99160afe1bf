"""Keeps Hugging Face's libraries off the network, in this process and its children; imported for that effect alone.

They read the setting when they are first imported, so this is imported before them. It covers what no argument of ours
reaches: bitsandbytes, which `peft` imports where it is installed, asks the hub for compiled kernels if it can.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
