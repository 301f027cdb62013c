"""What is worth knowing of the machine that measured; no names of machines or users."""

from __future__ import annotations

import os
import platform
from typing import Any


def host() -> dict[str, Any]:
    """Return the CPU's name, the number of its logical cores and the system."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        model = names[0] if names else model
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.system()}
