"""Run what TrainStep.export wrote, in a process where handgrad cannot be imported; a script for the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def run_exported(path: Path, calls: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Call the program with each of the minibatches in turn, on one state; what came of it.

    Under "calls" a dict for each: "losses" and "wrong", or "error"; and "changed", whether any tensor of the state did.
    Under "state" the tensors after the last call.
    """
    torch.save(calls, path.with_suffix(".calls"))
    environment = {**os.environ, "AOTI_RUNTIME_CHECK_INPUTS": "1"}
    command = [sys.executable, __file__, str(path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = torch.load(path.with_suffix(".results"))
    return found


def main(path: Path) -> None:
    """What the process does."""
    import json

    import torch._inductor

    program: Any = torch._inductor.aoti_load_package(str(path))
    metadata = {key: json.loads(value) for key, value in program.get_metadata().items() if not key.startswith("AOTI")}
    state = load_file(path.with_suffix(".safetensors")) | load_file(path.with_suffix(".training.safetensors"))
    results = []
    for minibatches in torch.load(path.with_suffix(".calls")):
        K = len(minibatches["x"])
        tensors = {**state, **minibatches, "first": torch.tensor(0), "last": torch.tensor(K)}
        tensors |= {"seeds": torch.randint(2**31, (K,))}
        before: dict[str, Tensor] = {name: t.clone() for name, t in state.items()}
        try:
            losses, wrong, *_ = program.loader.run([tensors[name] for name in metadata["inputs"]])
            result: dict[str, Any] = {"losses": losses, "wrong": int(wrong)}
        except RuntimeError as error:
            result = {"error": str(error)}
        results.append({**result, "changed": any(not t.equal(before[name]) for name, t in state.items())})
    torch.save({"calls": results, "state": state, "metadata": metadata}, path.with_suffix(".results"))


if __name__ == "__main__":
    sys.modules["handgrad"] = None  # type: ignore[assignment]
    main(Path(sys.argv[1]))
