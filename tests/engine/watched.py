"""What torch is asked to do."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Writes down every operation of torch and how many values it makes; one in place makes none."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        made = result[0] if isinstance(result, tuple) else result
        self.seen.append((name, 0 if name.endswith("_") else made.numel()))
        return result
